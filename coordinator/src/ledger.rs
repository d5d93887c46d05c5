//! Who did what in which step: the ranks' reports put together, and held against each other.
//!
//! # Invariants
//! 1. A step is recorded once: when all ranks of its ring have reported it, or, where the ring broke meanwhile, when all
//!    ranks of a later ring are known to have it. Ranks that could not report it did what they were assigned, by the ring or by
//!    the counts that the others tell: no rank commits a step unless every micro-batch was counted once.
//! 2. All ranks report the same loss and state hash, or the ledger names one that differs; it records no step more until that
//!    one's reports are [disowned](Ledger::disown), and the next ring is formed.
//! 3. In a recorded step every micro-batch was computed by exactly one rank.
//! 4. A recorded step has its state's hash. Where state is divided among workers, no rank knows that when it reports: such a
//!    step is recorded with the first report of the next one, which tells it, or at the end.
//!
//! Why "are known to have it": the next ring may start from a step that one rank alone has committed. Should that one die
//! before the others have got its state, they do the step again.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::event::{RankRecord, StepRecord};
use crate::ids::WorkerId;
use crate::protocol::{Formation, Place, StepReport};

/// Steps that may be half reported at once. Ranks cannot run further apart than a step or two, but their reports can: one
/// worker's line may stall, and until its silence counts, the ring goes on.
const OPEN_STEPS_MAX: usize = 4096;

/// The ranks' reports do not fit together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Disagreement {
    /// Two ranks hold different states.
    #[error("rank {rank} has state {got:016x} after step {step}, rank {other} has {want:016x}")]
    Hash {
        /// The step.
        step: u64,
        /// Who differs.
        rank: u32,
        /// Its hash.
        got: u64,
        /// From whom.
        other: u32,
        /// Whose hash.
        want: u64,
    },
    /// A micro-batch was computed by nobody, or by two.
    #[error("micro-batch {index} of step {step} was computed {times} times")]
    Coverage {
        /// The step.
        step: u64,
        /// The micro-batch.
        index: u32,
        /// How often.
        times: usize,
    },
    /// Ranks are too far apart.
    #[error("step {0} is reported while {OPEN_STEPS_MAX} others are not complete")]
    TooFarApart(u64),
}

/// Open reports of one ring.
#[derive(Debug, Clone)]
pub struct Ledger {
    micro_batches: u32,
    formation: Formation,
    /// Of the ring's workers.
    ranks: BTreeMap<WorkerId, u32>,
    /// The newest step that is settled, or was before this ring.
    settled: u64,
    open: BTreeMap<u64, BTreeMap<u32, StepReport>>,
    /// Ranks do not agree on an open step: until the next ring says who is right, no step is settled.
    disputed: bool,
    /// Steps from which this ring starts, done in those before: recorded when one more shows that all its ranks have them.
    waiting: Vec<StepRecord>,
}

impl Ledger {
    /// The ledger of one ring.
    pub fn new(micro_batches: u32, formation: Formation) -> Self {
        let (open, waiting) = (BTreeMap::new(), Vec::new());
        let ranks = formation.places.iter().map(|place| place.worker).zip(0..).collect();
        Self { micro_batches, settled: formation.step, formation, ranks, open, disputed: false, waiting }
    }

    /// The ledger of the next ring. Steps that rings before have committed, but not all of their ranks reported, wait for
    /// this one to show that it has them; those that it will do again are forgotten.
    ///
    /// # Errors
    /// Where the ranks' reports do not fit together.
    pub fn reformed(mut self, formation: Formation) -> Result<Self, Disagreement> {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|record| record.step <= formation.step);
        for (&step, reports) in self.open.range(..=formation.step) {
            waiting.extend(self.settle(step, reports)?);
        }
        Ok(Self { waiting, ..Self::new(self.micro_batches, formation) })
    }

    /// Forgets of steps up to this one, which is on record, what is not settled yet.
    pub(crate) fn recorded(mut self, step: u64) -> Self {
        self.settled = self.settled.max(step);
        self.waiting.retain(|record| record.step > step);
        self.open.retain(|&open, _| open > step);
        self
    }

    /// The steps that still wait, where all ranks have said that they are done, with this state.
    pub fn finish(&mut self, state_hash: u64) -> Vec<StepRecord> {
        let mut records = std::mem::take(&mut self.waiting);
        if let Some(last) = records.last_mut().filter(|last| last.state_hash.is_empty()) {
            last.state_hash = hex(state_hash);
        }
        records
    }

    /// The steps that wait for nothing but to be shown, which a report of this step does.
    fn release(&mut self, step: u64) -> Vec<StepRecord> {
        for index in 0..self.waiting.len() {
            if self.waiting[index].state_hash.is_empty() {
                self.waiting[index].state_hash = self.hash_after(self.waiting[index].step);
            }
        }
        let is_shown = |record: &StepRecord| record.step < step && !record.state_hash.is_empty();
        let (shown, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(is_shown);
        self.waiting = waiting;
        shown
    }

    /// The hash of the state after a step, if a report of the next one tells it; empty if none does.
    fn hash_after(&self, step: u64) -> String {
        let next = self.open.get(&(step + 1)).and_then(|reports| reports.values().next());
        next.map(|report| hex(report.hash_before)).unwrap_or_default()
    }

    /// Forgets what a worker has reported of open steps: its state is wrong.
    pub fn disown(&mut self, worker: WorkerId) {
        let places = &self.formation.places;
        let own = |rank: &u32| places.get(*rank as usize).is_some_and(|place| place.worker == worker);
        self.open.values_mut().for_each(|reports| reports.retain(|rank, _| !own(rank)));
    }

    /// Whether all ranks of the ring have reported a step that they did together.
    pub(crate) fn has_settled(&self) -> bool {
        self.settled > self.formation.step
    }

    /// Whether a worker may hold the state after `step`: it has reported that, or its ring started from it, or later.
    pub fn may_hold(&self, worker: WorkerId, step: u64) -> bool {
        let rank = self.ranks.get(&worker);
        let reported =
            |reports: &BTreeMap<u32, StepReport>| rank.is_some_and(|rank| reports.contains_key(rank));
        step <= self.settled || self.open.get(&step).is_some_and(reported)
    }

    /// Takes in a worker's report of its rank; returns the records of steps that are complete with it. Reports of other
    /// rings, of ranks that are not the worker's, and of settled steps are ignored.
    ///
    /// # Errors
    /// Where the ranks' reports do not fit together.
    pub fn report(&mut self, worker: WorkerId, report: StepReport) -> Result<Vec<StepRecord>, Disagreement> {
        let places = &self.formation.places;
        let own = places.get(report.rank as usize).is_some_and(|place| place.worker == worker);
        if report.generation != self.formation.generation || !own {
            return Ok(Vec::new());
        }
        let ranks = places.len();
        let step = report.step;
        if step <= self.settled {
            return Ok(Vec::new());
        }
        if !self.open.contains_key(&step) && self.open.len() >= OPEN_STEPS_MAX {
            return Err(Disagreement::TooFarApart(step));
        }
        let reports = self.open.entry(step).or_default();
        reports.insert(report.rank, report);
        let is_complete = reports.len() == ranks;
        if self.disputed {
            return Ok(Vec::new());
        }
        let record = match is_complete {
            true => self.settle(step, &self.open[&step]),
            false => Ok(None),
        };
        self.disputed = record.is_err();
        let record = record?;
        // All ranks took part in this step, so all have the ones before.
        let mut records = self.release(step);
        if is_complete {
            self.open.remove(&step);
            self.settled = step;
            let is_known = record.as_ref().is_some_and(|record| !record.state_hash.is_empty());
            if is_known { records.extend(record) } else { self.waiting.extend(record) }
        }
        Ok(records)
    }

    fn settle(
        &self,
        step: u64,
        reports: &BTreeMap<u32, StepReport>,
    ) -> Result<Option<StepRecord>, Disagreement> {
        let Some(first) = reports.values().next() else { return Ok(None) };
        let same = |report: &&StepReport| {
            (report.hash_before, report.state_hash) == (first.hash_before, first.state_hash)
                && report.loss.to_bits() == first.loss.to_bits()
        };
        if let Some(odd) = reports.values().find(|report| !same(report)) {
            let hash = |report: &StepReport| report.state_hash.unwrap_or(report.hash_before);
            let (rank, got, want) = (odd.rank, hash(odd), hash(first));
            return Err(Disagreement::Hash { step, rank, got, other: first.rank, want });
        }
        let ranks = self.ranks(step, reports);
        let mut times = vec![0; self.micro_batches as usize];
        for index in ranks.iter().flat_map(|rank| &rank.micro_batches) {
            if let Some(times) = times.get_mut(*index as usize) {
                *times += 1;
            }
        }
        if let Some((index, &times)) = (0..).zip(&times).find(|(_, times)| **times != 1) {
            return Err(Disagreement::Coverage { step, index, times });
        }
        Ok(Some(StepRecord {
            step,
            loss: first.loss,
            grad_norm: first.grad_norm,
            lr: first.lr,
            state_hash: first.state_hash.map_or_else(|| self.hash_after(step), hex),
            tokens: first.tokens,
            wide_blocks: first.wide_blocks,
            world_size: ranks.len() as u32,
            generation: self.formation.generation,
            ranks,
        }))
    }

    /// All ranks' parts: as reported, or as assigned where there is no report.
    fn ranks(&self, step: u64, reports: &BTreeMap<u32, StepReport>) -> Vec<RankRecord> {
        let counts = reports.values().map(|report| &report.counts).find(|counts| !counts.is_empty());
        let had = |rank: u32, place: &Place| match counts {
            Some(counts) => stretch(counts, rank).collect(),
            None => place.share(self.formation.step, step.saturating_sub(1)).to_vec(),
        };
        let part = |(rank, place): (u32, &Place)| match reports.get(&rank) {
            Some(report) => RankRecord {
                rank,
                worker: place.worker.0,
                micro_batches: report.micro_batches.clone(),
                tx_bytes: report.tx_bytes,
                rx_bytes: report.rx_bytes,
                held: report.held.iter().cloned().collect(),
                sent: report.sent.iter().cloned().collect(),
                seconds: report.seconds.iter().cloned().collect(),
            },
            None => RankRecord {
                rank,
                worker: place.worker.0,
                micro_batches: had(rank, place),
                tx_bytes: 0,
                rx_bytes: 0,
                held: BTreeMap::new(),
                sent: BTreeMap::new(),
                seconds: BTreeMap::new(),
            },
        };
        (0..).zip(&self.formation.places).map(part).collect()
    }
}

/// A rank's micro-batches, where ranks have so many each, in order.
fn stretch(counts: &[u32], rank: u32) -> Range<u32> {
    let rank = rank as usize;
    let start = counts.iter().take(rank).sum();
    start..start + counts.get(rank).copied().unwrap_or_default()
}

fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Place;

    fn ledger() -> Ledger {
        Ledger::new(3, formation(2, 0))
    }

    /// A ring of workers 5 and 8, that are to compute 0 and 1, and 2; in the first step 1, and 0 and 2.
    fn formation(generation: u64, step: u64) -> Formation {
        let place = |worker, micro_batches, first| Place {
            worker: WorkerId(worker),
            address: String::new(),
            micro_batches,
            first,
        };
        let places = vec![place(5, vec![0, 1], vec![1]), place(8, vec![2], vec![0, 2])];
        Formation { generation, step, source: None, places }
    }

    #[test]
    fn a_ring_has_settled_once_all_have_done_a_step_together() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 10, &[1])).unwrap();
        assert!(!ledger.has_settled(), "one of two has told");
        tell(&mut ledger, report(1, 10, &[0, 2])).unwrap();
        assert!(ledger.has_settled());
        assert!(!ledger.reformed(formation(3, 1)).unwrap().has_settled(), "the next ring has done none");
    }

    /// From the worker that has the rank.
    fn tell(ledger: &mut Ledger, report: StepReport) -> Result<Vec<StepRecord>, Disagreement> {
        let worker =
            ledger.formation.places.get(report.rank as usize).map_or(WorkerId(5), |place| place.worker);
        ledger.report(worker, report)
    }

    fn report(rank: u32, state_hash: u64, micro_batches: &[u32]) -> StepReport {
        StepReport {
            generation: 2,
            step: 1,
            rank,
            loss: 1.0,
            grad_norm: 1.0,
            lr: 0.1,
            hash_before: 0,
            state_hash: Some(state_hash),
            tokens: 10,
            wide_blocks: 0,
            micro_batches: micro_batches.to_vec(),
            counts: Vec::new(),
            tx_bytes: 1,
            rx_bytes: 2,
            held: Vec::new(),
            sent: Vec::new(),
            seconds: vec![("compute".into(), 1.0)],
        }
    }

    #[test]
    fn a_step_is_recorded_when_all_ranks_have_reported() {
        let mut ledger = ledger();
        assert_eq!(tell(&mut ledger, report(1, 9, &[2])), Ok(vec![]));
        let record = tell(&mut ledger, report(0, 9, &[0, 1])).unwrap().remove(0);
        assert_eq!(record.ranks.iter().map(|rank| rank.worker).collect::<Vec<_>>(), [5, 8]);
        assert_eq!(record.state_hash, "0000000000000009");
    }

    #[test]
    fn a_rank_with_another_state_is_named() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[0, 1])).unwrap();
        let error = tell(&mut ledger, report(1, 8, &[2])).unwrap_err();
        assert_eq!(error, Disagreement::Hash { step: 1, rank: 1, got: 8, other: 0, want: 9 });
    }

    /// What one of them says is forgotten; until then no later step is settled.
    #[test]
    fn a_step_that_ranks_disagree_on_is_recorded_as_the_others_have_it() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        tell(&mut ledger, report(1, 8, &[0, 2])).unwrap_err();
        for rank in 0..2 {
            let share: &[u32] = if rank == 0 { &[0, 1] } else { &[2] };
            let next = StepReport { step: 2, ..report(rank, 10, share) };
            assert_eq!(tell(&mut ledger, next), Ok(vec![]), "step 1 is not settled");
        }
        ledger.disown(WorkerId(8));
        let mut next = ledger.reformed(formation(3, 2)).unwrap();
        let records = next.finish(0);
        let hashes: Vec<&str> = records.iter().map(|record| record.state_hash.as_str()).collect();
        assert_eq!(hashes, ["0000000000000009", "000000000000000a"]);
        assert_eq!(records[0].ranks[1].micro_batches, [0, 2], "as assigned");
    }

    #[test]
    fn a_micro_batch_of_two_ranks_or_none_is_named() {
        for (shares, times) in [([[0, 1], [1, 2]], 2), ([[0, 0], [2, 2]], 0)] {
            let mut ledger = ledger();
            let reported = |mut shares: Vec<u32>| {
                shares.dedup();
                shares
            };
            tell(&mut ledger, report(0, 9, &reported(shares[0].to_vec()))).unwrap();
            let error = tell(&mut ledger, report(1, 9, &reported(shares[1].to_vec()))).unwrap_err();
            assert_eq!(error, Disagreement::Coverage { step: 1, index: 1, times });
        }
    }

    #[test]
    fn reports_of_another_ring_are_ignored() {
        let mut ledger = ledger();
        assert_eq!(tell(&mut ledger, StepReport { generation: 1, ..report(0, 9, &[0]) }), Ok(vec![]));
        assert_eq!(tell(&mut ledger, report(7, 9, &[0])), Ok(vec![]));
        assert!(ledger.open.is_empty());
    }

    #[test]
    fn a_settled_step_is_not_recorded_again() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[0, 1])).unwrap();
        assert!(tell(&mut ledger, report(1, 9, &[2])).unwrap().len() == 1);
        for _ in 0..2 {
            assert_eq!(tell(&mut ledger, report(0, 9, &[0, 1])), Ok(vec![]));
            assert_eq!(tell(&mut ledger, report(1, 8, &[2])), Ok(vec![]));
        }
        assert_eq!(tell(&mut ledger, StepReport { step: 0, ..report(0, 9, &[0, 1]) }), Ok(vec![]));
        assert!(ledger.open.is_empty(), "nothing is kept of them");
    }

    #[test]
    fn nobody_reports_for_another() {
        let mut ledger = ledger();
        for worker in [8, 7] {
            assert_eq!(ledger.report(WorkerId(worker), report(0, 1, &[0, 1])), Ok(vec![]));
        }
        assert!(ledger.open.is_empty());
        tell(&mut ledger, report(0, 9, &[0, 1])).unwrap();
        assert_eq!(tell(&mut ledger, report(1, 9, &[2])).unwrap().len(), 1, "it would have disagreed");
    }

    /// What rank 0 reports of steps 1 and 2, before the ring breaks.
    fn half_reported() -> Ledger {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        tell(&mut ledger, StepReport { step: 2, ..report(0, 10, &[0, 1]) }).unwrap();
        ledger
    }

    fn later(generation: u64, step: u64, rank: u32) -> StepReport {
        let share: &[u32] = if rank == 0 { &[1] } else { &[0, 2] };
        StepReport { generation, step, ..report(rank, 11, share) }
    }

    #[test]
    fn what_only_some_could_report_is_recorded_when_all_of_the_next_ring_have_it() {
        let mut next = half_reported().reformed(formation(3, 2)).unwrap();
        assert_eq!(tell(&mut next, StepReport { generation: 2, ..later(3, 3, 0) }), Ok(vec![]), "it is late");
        let records = tell(&mut next, later(3, 3, 1)).unwrap();
        let done: Vec<(u64, u64, Vec<Vec<u32>>)> = records
            .iter()
            .map(|record| {
                let shares = record.ranks.iter().map(|rank| rank.micro_batches.clone()).collect();
                (record.step, record.generation, shares)
            })
            .collect();
        assert_eq!(done, [(1, 2, vec![vec![1], vec![0, 2]]), (2, 2, vec![vec![0, 1], vec![2]])]);
        assert_eq!(records[1].state_hash, "000000000000000a");
        let steps: Vec<u64> = tell(&mut next, later(3, 3, 0)).unwrap().iter().map(|r| r.step).collect();
        assert_eq!(steps, [3], "each once");
    }

    #[test]
    fn what_will_be_done_again_is_forgotten() {
        let mut next = half_reported().reformed(formation(3, 1)).unwrap();
        let records = tell(&mut next, later(3, 2, 0)).unwrap();
        assert_eq!(records.iter().map(|record| record.step).collect::<Vec<_>>(), [1]);
        let record = tell(&mut next, later(3, 2, 1)).unwrap().remove(0);
        assert_eq!((record.step, record.generation), (2, 3), "the old report is none of its own");
    }

    /// One rank has committed step 2, and dies while it gives its state to the other.
    #[test]
    fn what_only_one_had_and_took_with_it_is_recorded_when_it_is_done_again() {
        let again = half_reported().reformed(formation(3, 2)).unwrap().reformed(formation(4, 1)).unwrap();
        let (mut first, mut second) = (again.clone(), again);
        assert_eq!(first.finish(0).iter().map(|record| record.step).collect::<Vec<_>>(), [1]);
        assert_eq!(first.finish(0), [], "once");
        tell(&mut second, later(4, 2, 0)).unwrap();
        let record = tell(&mut second, later(4, 2, 1)).unwrap().remove(0);
        assert_eq!((record.step, record.generation), (2, 4));
    }

    #[test]
    fn shares_that_had_changed_are_those_that_were_told() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        let after = StepReport { step: 2, counts: vec![1, 2], ..report(0, 10, &[0]) };
        tell(&mut ledger, after).unwrap();
        let records = ledger.reformed(formation(3, 2)).unwrap().finish(0);
        assert_eq!(records[1].ranks[1].micro_batches, [1, 2]);
    }

    #[test]
    fn what_was_recorded_is_not_settled_again() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        assert_eq!(tell(&mut ledger, report(1, 9, &[0, 2])).unwrap().len(), 1);
        assert_eq!(ledger.reformed(formation(3, 1)).unwrap().finish(0), []);
    }

    /// Another coordinator has recorded it.
    #[test]
    fn what_is_on_record_is_told_no_more() {
        let steps = |records: Vec<StepRecord>| records.iter().map(|record| record.step).collect::<Vec<_>>();
        for (recorded, left) in [(0, vec![1, 2]), (1, vec![2]), (2, vec![])] {
            let waiting = half_reported().reformed(formation(3, 2)).unwrap();
            assert_eq!(steps(waiting.recorded(recorded).finish(0)), left);
            let open = half_reported().recorded(recorded);
            assert_eq!(steps(open.reformed(formation(3, 2)).unwrap().finish(0)), left);
            let mut late = half_reported().recorded(recorded);
            let settled = steps(tell(&mut late, report(1, 9, &[0, 2])).unwrap());
            assert_eq!(settled, if recorded == 0 { vec![1] } else { vec![] });
        }
    }

    #[test]
    fn what_some_reported_must_fit_what_the_others_were_assigned() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[0, 1])).unwrap();
        let error = ledger.reformed(formation(3, 1)).unwrap_err();
        assert_eq!(error, Disagreement::Coverage { step: 1, index: 0, times: 2 });
    }

    #[test]
    fn a_state_that_a_worker_may_hold_is_its_rings_or_one_that_it_reported() {
        let mut ledger = ledger();
        let may = |ledger: &Ledger, worker, step| ledger.may_hold(WorkerId(worker), step);
        assert!(may(&ledger, 5, 0) && !may(&ledger, 5, 1));
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        assert!(may(&ledger, 5, 1) && !may(&ledger, 8, 1) && !may(&ledger, 5, 2));
        tell(&mut ledger, report(1, 9, &[0, 2])).unwrap();
        assert!(may(&ledger, 8, 1) && may(&ledger, 8, 0));
    }

    /// Of a ring whose ranks have a part of the state each.
    fn divided(step: u64, rank: u32, hash_before: u64) -> StepReport {
        let share: &[u32] = match (step, rank) {
            (1, 0) => &[1],
            (1, _) => &[0, 2],
            (_, 0) => &[0, 1],
            _ => &[2],
        };
        StepReport { step, hash_before, state_hash: None, ..report(rank, 0, share) }
    }

    #[test]
    fn a_hash_that_no_rank_knows_comes_with_the_next_step() {
        let mut ledger = ledger();
        assert_eq!(tell(&mut ledger, divided(1, 0, 5)), Ok(vec![]));
        assert_eq!(tell(&mut ledger, divided(1, 1, 5)), Ok(vec![]), "nobody has told it yet");
        let told = |records: Vec<StepRecord>| -> Vec<(u64, String)> {
            records.into_iter().map(|record| (record.step, record.state_hash)).collect()
        };
        let records = tell(&mut ledger, divided(2, 1, 0x6a)).unwrap();
        assert_eq!(told(records), [(1, "000000000000006a".to_owned())]);
        assert_eq!(tell(&mut ledger, divided(2, 0, 0x6a)), Ok(vec![]));
        let mut broken = ledger.clone().reformed(formation(3, 2)).unwrap();
        let after = StepReport { generation: 3, step: 3, ..divided(1, 0, 7) };
        assert_eq!(told(tell(&mut broken, after).unwrap()), [(2, "0000000000000007".to_owned())]);
        assert_eq!(told(ledger.finish(8)), [(2, "0000000000000008".to_owned())]);
        assert_eq!(ledger.finish(8), [], "once");
    }

    #[test]
    fn ranks_that_tell_different_hashes_of_the_step_before_are_named() {
        let mut ledger = ledger();
        tell(&mut ledger, divided(1, 0, 5)).unwrap();
        let error = tell(&mut ledger, divided(1, 1, 6)).unwrap_err();
        assert_eq!(error, Disagreement::Hash { step: 1, rank: 1, got: 6, other: 0, want: 5 });
    }

    #[test]
    fn half_reported_steps_are_bounded() {
        let mut ledger = ledger();
        for step in 1..=OPEN_STEPS_MAX as u64 {
            tell(&mut ledger, StepReport { step, ..report(0, 9, &[]) }).unwrap();
        }
        assert_eq!(
            tell(&mut ledger, StepReport { step: 99_999, ..report(0, 9, &[]) }),
            Err(Disagreement::TooFarApart(99_999))
        );
    }

    #[test]
    fn a_step_whose_hash_nobody_has_told_is_not_shown() {
        let mut ledger = ledger();
        assert_eq!(tell(&mut ledger, divided(1, 0, 5)), Ok(vec![]));
        assert_eq!(tell(&mut ledger, divided(1, 1, 5)), Ok(vec![]));
        // The one after the next says nothing of it.
        assert_eq!(tell(&mut ledger, divided(3, 0, 7)), Ok(vec![]));
        let shown = tell(&mut ledger, divided(2, 0, 6)).unwrap();
        assert_eq!(
            shown.iter().map(|record| (record.step, &record.state_hash[..])).collect::<Vec<_>>(),
            [(1, "0000000000000006")]
        );
    }
}
