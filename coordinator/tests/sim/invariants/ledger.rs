//! The ledger records a step once, in order, when all ranks have reported it and agree; and what it records is what
//! they reported.

use std::collections::BTreeMap;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::event::StepRecord;
use mattock_coordinator::membership::Action;
use mattock_coordinator::protocol::{Formation, StepReport};

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct Ledger {
    ring: Option<Formation>,
    recorded: u64,
    /// By generation, step and rank.
    reported: BTreeMap<(u64, u64, u32), (WorkerId, StepReport)>,
}

impl Ledger {
    fn record(&mut self, record: &StepRecord) -> Result<(), String> {
        let (step, generation) = (record.step, record.generation);
        let Some(ring) = self.ring.as_ref().filter(|ring| ring.generation == generation) else {
            return Err(format!(
                "step {step} is recorded for generation {generation}, which is not the ring's"
            ));
        };
        let before = self.recorded;
        demand!(step == before + 1, "step {step} is recorded after {before}");
        self.recorded = step;
        demand!(
            record.ranks.len() == ring.places.len() && record.world_size as usize == ring.places.len(),
            "step {step} is recorded for other ranks: {record:?}"
        );
        for (rank, (recorded, place)) in (0..).zip(record.ranks.iter().zip(&ring.places)) {
            let Some((worker, report)) = self.reported.get(&(generation, step, rank)) else {
                return Err(format!("step {step} is recorded before rank {rank} has reported it"));
            };
            demand!(
                *worker == place.worker && recorded.worker == worker.0 && recorded.rank == rank,
                "rank {rank} of step {step} is {worker}, recorded as {recorded:?}"
            );
            demand!(
                record.state_hash == format!("{:016x}", report.state_hash)
                    && record.loss.to_bits() == report.loss.to_bits(),
                "step {step} is recorded as {record:?}, rank {rank} reported {report:?}"
            );
            demand!(
                recorded.micro_batches == place.micro_batches,
                "rank {rank} had {:?}, recorded {:?}",
                place.micro_batches,
                recorded.micro_batches
            );
        }
        Ok(())
    }
}

impl Invariant for Ledger {
    fn name(&self) -> &'static str {
        "ledger"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { actions, .. } => {
                for action in *actions {
                    if let Action::Form(formation) = action {
                        self.recorded = formation.step;
                        self.ring = Some(formation.clone());
                    }
                }
            }
            Fact::Reported(worker, report) => {
                let key = (report.generation, report.step, report.rank);
                self.reported.insert(key, (*worker, (*report).clone()));
            }
            Fact::Recorded(record) => self.record(record)?,
            _ => {}
        }
        Ok(())
    }
}
