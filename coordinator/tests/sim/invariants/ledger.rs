//! The ledger records every step once, in order, up to the last, and what it records is what the ranks reported; where not
//! all could, the rest is what they were assigned. Only where everybody who had the state is gone, and a worker that loaded
//! an older one leads the next ring, are steps recorded again, and then identically.

use std::collections::BTreeMap;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::event::{RankRecord, StepRecord};
use mattock_coordinator::membership::{Action, Event, Outcome};
use mattock_coordinator::protocol::{Formation, Place, StepReport};

use super::{Invariant, demand};
use crate::facts::{Cause, Fact};
use crate::session::share;

#[derive(Default)]
pub(crate) struct Ledger {
    rings: BTreeMap<u64, Formation>,
    newest: u64,
    recorded: u64,
    hashes: BTreeMap<u64, String>,
    /// Workers that loaded a state, and that of which step.
    loaded: BTreeMap<WorkerId, u64>,
    /// By generation, step and rank.
    reported: BTreeMap<(u64, u64, u32), StepReport>,
    corrupt: bool,
    /// Whose reports do not count.
    flipped: Option<WorkerId>,
    /// The step that the run ended with.
    ended: Option<u64>,
}

impl Ledger {
    fn form(&mut self, formation: &Formation) -> Result<(), String> {
        let (step, recorded) = (formation.step, self.recorded);
        if self.rings.is_empty() {
            self.recorded = step;
        } else if step < recorded {
            let loaded = formation.places.iter().any(|place| self.loaded.get(&place.worker) == Some(&step));
            demand!(loaded, "a ring starts from step {step}, and {recorded} are recorded");
            self.recorded = step;
        }
        self.newest = formation.generation;
        self.rings.insert(formation.generation, formation.clone());
        Ok(())
    }

    fn record(&mut self, record: &StepRecord) -> Result<(), String> {
        let (step, generation, before) = (record.step, record.generation, self.recorded);
        let Some(ring) = self.rings.get(&generation) else {
            return Err(format!(
                "step {step} is recorded for generation {generation}, of which there is no ring"
            ));
        };
        demand!(step == before + 1, "step {step} is recorded after {before}");
        self.recorded = step;
        let known = self.hashes.entry(step).or_insert_with(|| record.state_hash.clone());
        let same = *known == record.state_hash || self.corrupt;
        demand!(same, "step {step} is recorded again with {}, it was {known}", record.state_hash);
        demand!(
            record.ranks.len() == ring.places.len() && record.world_size as usize == ring.places.len(),
            "step {step} is recorded for other ranks: {record:?}"
        );
        let mut reports = 0;
        for (rank, (recorded, place)) in (0..).zip(record.ranks.iter().zip(&ring.places)) {
            reports += u32::from(self.recorded_as_reported(record, rank, recorded, place)?);
            let share = share(ring, rank, step - 1);
            demand!(recorded.micro_batches == share, "rank {rank} had {share:?}, recorded is {recorded:?}");
        }
        let complete = generation == self.newest && self.rings[&generation].step < step;
        demand!(reports > 0, "step {step} is recorded, and nobody has reported it");
        demand!(complete || generation < self.newest, "step {step} was done before generation {generation}");
        Ok(())
    }

    /// Whether there is a report; then the record says what it said.
    fn recorded_as_reported(
        &self,
        record: &StepRecord,
        rank: u32,
        recorded: &RankRecord,
        place: &Place,
    ) -> Result<bool, String> {
        let (step, generation) = (record.step, record.generation);
        demand!(
            recorded.worker == place.worker.0 && recorded.rank == rank,
            "rank {rank} of step {step} is {}, recorded as {recorded:?}",
            place.worker
        );
        let report = self.reported.get(&(generation, step, rank));
        if report.is_some() && self.flipped == Some(place.worker) && generation < self.newest {
            return Ok(false);
        }
        let Some(report) = report else {
            demand!(generation < self.newest, "step {step} is recorded before rank {rank} has reported it");
            return Ok(false);
        };
        demand!(
            record.state_hash == format!("{:016x}", report.state_hash.unwrap_or_default())
                && record.loss.to_bits() == report.loss.to_bits()
                || self.corrupt,
            "step {step} is recorded as {record:?}, rank {rank} reported {report:?}"
        );
        Ok(true)
    }
}

impl Invariant for Ledger {
    fn name(&self) -> &'static str {
        "ledger"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Caused(Cause::Corruption) => self.corrupt = true,
            Fact::Caused(Cause::Flipped(worker)) => self.flipped = Some(*worker),
            Fact::Decided { event, actions, .. } => {
                if let Event::Ready(worker, Some(step)) = event {
                    self.loaded.insert(*worker, *step);
                }
                for action in *actions {
                    match action {
                        Action::Form(formation) => self.form(formation)?,
                        Action::End(Outcome::Completed(finish) | Outcome::Stopped(finish), _) => {
                            self.ended = Some(finish.step);
                        }
                        _ => {}
                    }
                }
            }
            Fact::Counted(worker, report) => {
                let key = (report.generation, report.step, report.rank);
                let places = self.rings.get(&report.generation).map(|ring| &ring.places);
                let own = places.and_then(|places| places.get(report.rank as usize));
                // Who reports for another is not listened to.
                if own.is_none_or(|place| place.worker != *worker) {
                    return Ok(());
                }
                self.reported.insert(key, (*report).clone());
            }
            Fact::Recorded(record) => self.record(record)?,
            Fact::TimeIsUp => {
                let (ended, recorded) = (self.ended, self.recorded);
                let all = ended.is_none_or(|step| step == recorded);
                demand!(all, "the run ended after step {ended:?}, and {recorded} are recorded");
            }
            _ => {}
        }
        Ok(())
    }
}
