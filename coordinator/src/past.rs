//! What workers tell a coordinator that has taken over of the rings before: put together, it is the ledger that the dead one
//! had.
//!
//! # Invariants
//! 1. One generation, one ring: who tells of another is not believed.
//! 2. A step that is on record already is not recorded again.
//! 3. Steps come out in order, each once, as the dead coordinator would have recorded them; none that the next ring does again.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::StepRecord;
use crate::ids::WorkerId;
use crate::ledger::{Disagreement, Ledger};
use crate::protocol::{Formation, StepReport};

/// Rings of which one worker may tell: as many as it keeps.
pub const RINGS_MAX: usize = 64;
/// Reports that one worker may send: as many as it keeps.
pub const REPORTS_MAX: usize = 4096;

/// The rings before, with what their ranks report of them.
#[derive(Debug, Clone, Default)]
pub struct Past {
    rings: BTreeMap<u64, Told>,
    /// How many rings each worker told of, and reports.
    told: BTreeMap<WorkerId, (usize, usize)>,
    /// The newest step that is on record.
    recorded: Option<u64>,
}

#[derive(Debug, Clone)]
struct Told {
    ring: Formation,
    reports: Vec<(WorkerId, StepReport)>,
    /// Who told of it.
    by: BTreeSet<WorkerId>,
}

impl Past {
    /// Nothing was told yet; `recorded` is the newest step that is on record, where that is known.
    pub fn new(recorded: Option<u64>) -> Self {
        Self { recorded, ..Self::default() }
    }

    /// A worker tells of a ring.
    ///
    /// # Errors
    /// Why it is not believed.
    pub fn ring(&mut self, worker: WorkerId, ring: &Formation, micro_batches: u32) -> Result<(), String> {
        let generation = ring.generation;
        if let Some(flaw) = flaw(ring, worker, micro_batches) {
            return Err(format!("it tells of a ring {generation} that cannot have been: {flaw}"));
        }
        let (rings, _) = self.told.entry(worker).or_default();
        *rings += 1;
        if *rings > RINGS_MAX {
            return Err(format!("it tells of more than {RINGS_MAX} rings"));
        }
        let new = || Told { ring: ring.clone(), reports: Vec::new(), by: BTreeSet::new() };
        let told = self.rings.entry(generation).or_insert_with(new);
        if told.ring != *ring {
            return Err(format!("it tells of another ring {generation} than the others"));
        }
        told.by.insert(worker);
        Ok(())
    }

    /// A ring of which somebody has told.
    pub fn known(&self, generation: u64) -> Option<&Formation> {
        self.rings.get(&generation).map(|told| &told.ring)
    }

    /// A worker's report of a step in a ring that it has told of; others are ignored.
    pub fn report(&mut self, worker: WorkerId, report: StepReport) {
        let told = self.rings.get_mut(&report.generation).filter(|told| told.by.contains(&worker));
        let (_, reports) = self.told.entry(worker).or_default();
        let Some(told) = told.filter(|_| *reports < REPORTS_MAX) else { return };
        *reports += 1;
        told.reports.push((worker, report));
    }

    /// Forgets what a worker has reported: its state is wrong.
    pub fn disown(&mut self, worker: WorkerId) {
        self.rings.values_mut().for_each(|told| told.reports.retain(|(by, _)| *by != worker));
    }

    /// Whether a worker may hold the state after `step`: it has reported that, or a ring of its own started from it, or
    /// later; or it is on record.
    pub fn may_hold(&self, worker: WorkerId, step: u64) -> bool {
        let reported =
            |told: &Told| told.reports.iter().any(|(by, report)| *by == worker && report.step == step);
        let known = |told: &Told| told.ring.step >= step || reported(told);
        let own = self.rings.values().filter(|told| told.by.contains(&worker));
        self.recorded.is_some_and(|recorded| step <= recorded) || own.into_iter().any(known)
    }

    /// The ledger as the dead coordinator had it, and the steps up to `start`, from which the next ring starts, that were
    /// complete and are not on record yet. Those after it will be done again: everybody who had them is gone.
    ///
    /// # Errors
    /// Where the reports do not fit together.
    pub fn replay(
        self,
        micro_batches: u32,
        start: u64,
    ) -> Result<(Option<Ledger>, Vec<StepRecord>), Disagreement> {
        let (mut ledger, mut records) = (None::<Ledger>, Vec::new());
        for Told { ring, mut reports, .. } in self.rings.into_values() {
            let mut next = match ledger.take() {
                Some(ledger) => ledger.reformed(ring)?,
                None => Ledger::new(micro_batches, ring),
            };
            // Those of one step together: who was cut off earlier must not seem too far behind.
            reports.sort_by_key(|(_, report)| report.step);
            for (worker, report) in reports {
                records.extend(next.report(worker, report)?);
            }
            ledger = Some(next);
        }
        records.retain(|record| record.step <= start);
        if let Some(recorded) = self.recorded {
            records.retain(|record| record.step > recorded);
            ledger = ledger.map(|ledger| ledger.recorded(recorded));
        }
        Ok((ledger, records))
    }
}

/// Why there cannot have been such a ring with this worker, if so.
fn flaw(ring: &Formation, worker: WorkerId, micro_batches: u32) -> Option<&'static str> {
    if !ring.places.iter().any(|place| place.worker == worker) {
        return Some("it is not in it");
    }
    let all = |mut shares: Vec<u32>| {
        shares.sort_unstable();
        shares.iter().copied().eq(0..micro_batches)
    };
    let steady = ring.places.iter().flat_map(|place| place.micro_batches.clone()).collect();
    let first = ring.places.iter().flat_map(|place| place.first.clone()).collect();
    (!all(steady) || !all(first)).then_some("its shares are not a step's micro-batches")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Place;

    const M: u32 = 2;

    /// Workers 5 and 8 with a micro-batch each.
    fn ring(generation: u64, step: u64) -> Formation {
        let place = |worker, index| Place {
            worker: WorkerId(worker),
            address: String::new(),
            micro_batches: vec![index],
            first: vec![index],
        };
        Formation { generation, step, source: None, places: vec![place(5, 0), place(8, 1)] }
    }

    fn report(generation: u64, step: u64, rank: u32) -> StepReport {
        StepReport {
            generation,
            step,
            rank,
            loss: step as f64,
            grad_norm: 1.0,
            lr: 0.1,
            hash_before: 0,
            state_hash: Some(step),
            tokens: 10,
            wide_blocks: 0,
            micro_batches: vec![rank],
            counts: Vec::new(),
            tx_bytes: 1,
            rx_bytes: 1,
            held: Vec::new(),
            sent: Vec::new(),
            seconds: Vec::new(),
        }
    }

    fn tell(past: &mut Past, worker: u64, ring: &Formation, steps: std::ops::RangeInclusive<u64>) {
        past.ring(WorkerId(worker), ring, M).unwrap();
        let rank = u32::from(worker == 8);
        steps.for_each(|step| past.report(WorkerId(worker), report(ring.generation, step, rank)));
    }

    fn steps(records: &[StepRecord]) -> Vec<(u64, u64)> {
        records.iter().map(|record| (record.step, record.generation)).collect()
    }

    #[test]
    fn what_all_ranks_tell_is_recorded_but_for_what_is_on_record() {
        for (recorded, expected) in [(None, vec![1, 2, 3, 4]), (Some(2), vec![3, 4]), (Some(4), vec![])] {
            let mut past = Past::new(recorded);
            tell(&mut past, 5, &ring(3, 0), 1..=5);
            tell(&mut past, 8, &ring(3, 0), 1..=4);
            let (ledger, records) = past.replay(M, 5).unwrap();
            assert_eq!(steps(&records), expected.into_iter().map(|step| (step, 3)).collect::<Vec<_>>());
            // Step 5 is known of one rank; the next ring, which starts from it, shows that all have it.
            let mut next = ledger.unwrap().reformed(ring(9, 5)).unwrap();
            let records = next.report(WorkerId(8), report(9, 6, 1)).unwrap();
            assert_eq!(steps(&records), [(5, 3)]);
        }
    }

    #[test]
    fn steps_of_a_ring_whose_other_rank_is_gone_come_with_the_next_ring() {
        let mut past = Past::new(Some(1));
        tell(&mut past, 5, &ring(3, 0), 1..=3);
        let (ledger, records) = past.replay(M, 5).unwrap();
        assert!(records.is_empty());
        let mut next = ledger.unwrap().reformed(ring(9, 3)).unwrap();
        let records = next.report(WorkerId(5), report(9, 4, 0)).unwrap();
        assert_eq!(steps(&records), [(2, 3), (3, 3)], "step 1 is on record");
    }

    #[test]
    fn steps_that_the_next_ring_does_again_are_not_recorded() {
        for (start, expected) in [(1, vec![]), (2, vec![2]), (3, vec![2, 3]), (9, vec![2, 3])] {
            let mut past = Past::new(Some(1));
            tell(&mut past, 5, &ring(3, 0), 1..=3);
            tell(&mut past, 8, &ring(3, 0), 1..=3);
            let (ledger, records) = past.replay(M, start).unwrap();
            assert_eq!(steps(&records), expected.into_iter().map(|step| (step, 3)).collect::<Vec<_>>());
            let mut next = ledger.unwrap().reformed(ring(9, start)).unwrap();
            let records = next.report(WorkerId(8), report(9, start + 1, 1)).unwrap();
            assert!(records.is_empty(), "{start}: {records:?}");
        }
    }

    #[test]
    fn rings_follow_each_other_as_they_did() {
        let mut past = Past::new(Some(2));
        for worker in [8, 5] {
            tell(&mut past, worker, &ring(3, 0), 1..=if worker == 5 { 3 } else { 2 });
            tell(&mut past, worker, &ring(4, 3), 4..=5);
        }
        let (ledger, records) = past.replay(M, 5).unwrap();
        assert_eq!(steps(&records), [(3, 3), (4, 4), (5, 4)]);
        assert!(ledger.unwrap().may_hold(WorkerId(5), 5));
    }

    #[test]
    fn who_tells_of_a_ring_that_was_not_is_not_believed() {
        let mut past = Past::new(None);
        past.ring(WorkerId(5), &ring(3, 0), M).unwrap();
        assert!(past.ring(WorkerId(8), &ring(3, 1), M).unwrap_err().contains("another ring 3"));
        assert!(past.ring(WorkerId(7), &ring(3, 0), M).unwrap_err().contains("not in it"));
        assert!(past.ring(WorkerId(5), &ring(4, 0), 3).unwrap_err().contains("shares"));
        past.report(WorkerId(8), report(3, 1, 1));
        past.report(WorkerId(5), report(7, 1, 0));
        assert!(past.rings[&3].reports.is_empty(), "nobody reports of what it has not told of");
    }

    #[test]
    fn nobody_tells_of_more_than_it_may() {
        let mut past = Past::new(None);
        for generation in 1..=RINGS_MAX as u64 {
            past.ring(WorkerId(5), &ring(generation, 0), M).unwrap();
        }
        assert!(past.ring(WorkerId(5), &ring(999, 0), M).unwrap_err().contains("more than"));
        past.ring(WorkerId(8), &ring(999, 0), M).unwrap();
        for step in 0..2 * REPORTS_MAX as u64 {
            past.report(WorkerId(5), report(1 + step % 2, step, 0));
        }
        let kept: usize = past.rings.values().map(|told| told.reports.len()).sum();
        assert_eq!(kept, REPORTS_MAX);
    }

    #[test]
    fn a_state_that_a_worker_may_hold_is_one_of_which_it_tells() {
        let mut past = Past::new(Some(2));
        tell(&mut past, 5, &ring(3, 4), 5..=5);
        for (worker, step, may) in [(5, 5, true), (5, 4, true), (5, 6, false), (8, 5, false), (8, 2, true)] {
            assert_eq!(past.may_hold(WorkerId(worker), step), may, "worker {worker}, step {step}");
        }
    }
}
