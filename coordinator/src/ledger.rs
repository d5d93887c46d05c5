//! Who did what in which step: the ranks' reports put together, and held against each other.
//!
//! # Invariants
//! 1. A step is recorded once: when all ranks of its ring have reported it, or, where the ring broke meanwhile, when the
//!    next ring starts from it. Ranks that could not report it did what they were assigned: no rank commits a step
//!    unless every micro-batch was counted once.
//! 2. All ranks report the same loss and state hash, or the ledger names one that differs.
//! 3. In a recorded step every micro-batch was computed by exactly one rank.

use std::collections::BTreeMap;

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
    /// The newest step that is settled, or was before this ring.
    settled: u64,
    open: BTreeMap<u64, BTreeMap<u32, StepReport>>,
}

impl Ledger {
    /// The ledger of one ring.
    pub fn new(micro_batches: u32, formation: Formation) -> Self {
        Self { micro_batches, settled: formation.step, formation, open: BTreeMap::new() }
    }

    /// The ledger of the next ring. Steps that the old ring committed, but not all of its ranks reported, are settled;
    /// those that the new ring will do again are forgotten.
    ///
    /// # Errors
    /// Where the ranks' reports do not fit together.
    pub fn reformed(self, formation: Formation) -> Result<(Self, Vec<StepRecord>), Disagreement> {
        let mut records = Vec::new();
        for (&step, reports) in self.open.range(..=formation.step) {
            records.extend(self.settle(step, reports.values().cloned().collect())?);
        }
        Ok((Self::new(self.micro_batches, formation), records))
    }

    /// Takes in a worker's report of its rank; returns the step's record when it is complete. Reports of other rings, of
    /// ranks that are not the worker's, and of settled steps are ignored.
    ///
    /// # Errors
    /// Where the ranks' reports do not fit together.
    pub fn report(
        &mut self,
        worker: WorkerId,
        report: StepReport,
    ) -> Result<Option<StepRecord>, Disagreement> {
        let places = &self.formation.places;
        let own = places.get(report.rank as usize).is_some_and(|place| place.worker == worker);
        if report.generation != self.formation.generation || !own {
            return Ok(None);
        }
        let ranks = places.len();
        let step = report.step;
        if step <= self.settled {
            return Ok(None);
        }
        if !self.open.contains_key(&step) && self.open.len() >= OPEN_STEPS_MAX {
            return Err(Disagreement::TooFarApart(step));
        }
        let reports = self.open.entry(step).or_default();
        reports.insert(report.rank, report);
        if reports.len() < ranks {
            return Ok(None);
        }
        let reports = self.open.remove(&step).unwrap_or_default();
        self.settled = step;
        self.settle(step, reports.into_values().collect())
    }

    fn settle(&self, step: u64, reports: Vec<StepReport>) -> Result<Option<StepRecord>, Disagreement> {
        let Some(first) = reports.first().cloned() else { return Ok(None) };
        let same = |report: &&StepReport| {
            report.state_hash == first.state_hash && report.loss.to_bits() == first.loss.to_bits()
        };
        if let Some(odd) = reports.iter().find(|report| !same(report)) {
            let (rank, got) = (odd.rank, odd.state_hash);
            return Err(Disagreement::Hash { step, rank, got, other: first.rank, want: first.state_hash });
        }
        let ranks = self.ranks(step, reports);
        for index in 0..self.micro_batches {
            let times = ranks.iter().flat_map(|rank| &rank.micro_batches).filter(|&&m| m == index).count();
            if times != 1 {
                return Err(Disagreement::Coverage { step, index, times });
            }
        }
        Ok(Some(StepRecord {
            step,
            loss: first.loss,
            grad_norm: first.grad_norm,
            lr: first.lr,
            state_hash: format!("{:016x}", first.state_hash),
            tokens: first.tokens,
            wide_blocks: first.wide_blocks,
            world_size: ranks.len() as u32,
            generation: self.formation.generation,
            ranks,
        }))
    }

    /// All ranks' parts: as reported, or as assigned where there is no report.
    fn ranks(&self, step: u64, reports: Vec<StepReport>) -> Vec<RankRecord> {
        let mut reports: BTreeMap<u32, StepReport> =
            reports.into_iter().map(|report| (report.rank, report)).collect();
        let part = |(rank, place): (u32, &Place)| match reports.remove(&rank) {
            Some(report) => RankRecord {
                rank,
                worker: place.worker.0,
                micro_batches: report.micro_batches,
                tx_bytes: report.tx_bytes,
                rx_bytes: report.rx_bytes,
                seconds: report.seconds.into_iter().collect(),
            },
            None => RankRecord {
                rank,
                worker: place.worker.0,
                micro_batches: place.share(self.formation.step, step.saturating_sub(1)).to_vec(),
                tx_bytes: 0,
                rx_bytes: 0,
                seconds: BTreeMap::new(),
            },
        };
        (0..).zip(&self.formation.places).map(part).collect()
    }
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

    /// From the worker that has the rank.
    fn tell(ledger: &mut Ledger, report: StepReport) -> Result<Option<StepRecord>, Disagreement> {
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
            state_hash,
            tokens: 10,
            wide_blocks: 0,
            micro_batches: micro_batches.to_vec(),
            tx_bytes: 1,
            rx_bytes: 2,
            seconds: vec![("compute".into(), 1.0)],
        }
    }

    #[test]
    fn a_step_is_recorded_when_all_ranks_have_reported() {
        let mut ledger = ledger();
        assert_eq!(tell(&mut ledger, report(1, 9, &[2])), Ok(None));
        let record = tell(&mut ledger, report(0, 9, &[0, 1])).unwrap().unwrap();
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
        assert_eq!(tell(&mut ledger, StepReport { generation: 1, ..report(0, 9, &[0]) }), Ok(None));
        assert_eq!(tell(&mut ledger, report(7, 9, &[0])), Ok(None));
        assert!(ledger.open.is_empty());
    }

    #[test]
    fn a_settled_step_is_not_recorded_again() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[0, 1])).unwrap();
        assert!(tell(&mut ledger, report(1, 9, &[2])).unwrap().is_some());
        for _ in 0..2 {
            assert_eq!(tell(&mut ledger, report(0, 9, &[0, 1])), Ok(None));
            assert_eq!(tell(&mut ledger, report(1, 8, &[2])), Ok(None));
        }
        assert_eq!(tell(&mut ledger, StepReport { step: 0, ..report(0, 9, &[0, 1]) }), Ok(None));
        assert!(ledger.open.is_empty(), "nothing is kept of them");
    }

    #[test]
    fn nobody_reports_for_another() {
        let mut ledger = ledger();
        for worker in [8, 7] {
            assert_eq!(ledger.report(WorkerId(worker), report(0, 1, &[0, 1])), Ok(None));
        }
        assert!(ledger.open.is_empty());
        tell(&mut ledger, report(0, 9, &[0, 1])).unwrap();
        assert!(tell(&mut ledger, report(1, 9, &[2])).unwrap().is_some(), "it would have disagreed");
    }

    #[test]
    fn what_only_some_could_report_is_settled_when_the_next_ring_starts_from_it() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        tell(&mut ledger, StepReport { step: 2, ..report(0, 10, &[0, 1]) }).unwrap();
        let (next, records) = ledger.reformed(formation(3, 2)).unwrap();
        let done: Vec<(u64, u64, Vec<Vec<u32>>)> = records
            .iter()
            .map(|record| {
                let shares = record.ranks.iter().map(|rank| rank.micro_batches.clone()).collect();
                (record.step, record.generation, shares)
            })
            .collect();
        assert_eq!(done, [(1, 2, vec![vec![1], vec![0, 2]]), (2, 2, vec![vec![0, 1], vec![2]])]);
        assert_eq!(records[1].state_hash, "000000000000000a");
        assert!(next.open.is_empty() && next.settled == 2);
    }

    #[test]
    fn what_will_be_done_again_is_forgotten() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        tell(&mut ledger, StepReport { step: 2, ..report(0, 10, &[0, 1]) }).unwrap();
        let (mut next, records) = ledger.reformed(formation(3, 1)).unwrap();
        assert_eq!(records.iter().map(|record| record.step).collect::<Vec<_>>(), [1]);
        assert!(next.open.is_empty());
        let again = |rank, share: &[u32]| StepReport { generation: 3, step: 2, ..report(rank, 10, share) };
        assert_eq!(tell(&mut next, again(0, &[1])), Ok(None));
        let record = tell(&mut next, again(1, &[0, 2])).unwrap().unwrap();
        assert_eq!((record.step, record.generation), (2, 3), "the old report is none of its own");
    }

    #[test]
    fn what_was_recorded_is_not_settled_again() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[1])).unwrap();
        assert!(tell(&mut ledger, report(1, 9, &[0, 2])).unwrap().is_some());
        assert_eq!(ledger.reformed(formation(3, 1)).unwrap().1, []);
    }

    #[test]
    fn what_some_reported_must_fit_what_the_others_were_assigned() {
        let mut ledger = ledger();
        tell(&mut ledger, report(0, 9, &[0, 1])).unwrap();
        let error = ledger.reformed(formation(3, 1)).unwrap_err();
        assert_eq!(error, Disagreement::Coverage { step: 1, index: 0, times: 2 });
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
}
