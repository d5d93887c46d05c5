//! A run's outcome is the truth: complete only where every rank has done every step, with the state of one process alone,
//! and otherwise for a cause that there was. What happens to workers is none: the run goes on without them, unless the last
//! is gone and nobody starts another. No worker is called lost to which nothing happened.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Event, Outcome};
use mattock_coordinator::protocol::{Finish, Formation};

use super::{Invariant, demand};
use crate::facts::{Cause, Fact, Setup};
use crate::state::State;

pub(crate) struct Truth {
    steps: u64,
    /// The hash that the run must end with.
    hash: u64,
    ring: Option<Formation>,
    finishes: BTreeMap<WorkerId, Finish>,
    causes: BTreeSet<Cause>,
    /// A coordinator has taken over from another.
    successor: bool,
}

impl Truth {
    pub(crate) fn new(setup: &Setup) -> Self {
        let hash = State::serial(setup.micro_batches, setup.steps).hash;
        let (finishes, causes) = (BTreeMap::new(), BTreeSet::new());
        Self { steps: setup.steps, hash, ring: None, finishes, causes, successor: false }
    }

    /// All ranks have ended alike, and the outcome says what they said.
    fn all_finished(&self, finish: &Finish) -> Result<(), String> {
        let Some(ring) = &self.ring else { return Err("a run without a ring is called complete".to_owned()) };
        for place in &ring.places {
            let Some(own) = self.finishes.get(&place.worker) else {
                return Err(format!("the run is over before {} has finished", place.worker));
            };
            demand!(
                own.step == finish.step && own.state_hash == finish.state_hash,
                "{} ended with {own:?}, the run with {finish:?}",
                place.worker
            );
        }
        // Rank 0 measures it, whoever that is.
        demand!(finish.held_out_loss.is_some(), "the held-out loss is lost: {finish:?}");
        Ok(())
    }

    /// Whether somebody was told to leave: where too few would be left, that stops the run.
    fn leaves(&self) -> bool {
        self.causes.iter().any(|cause| matches!(cause, Cause::Leave(_)))
    }

    /// Whether this worker was told to leave, or may have been sent away.
    fn was_told(&self, worker: WorkerId) -> bool {
        self.causes.contains(&Cause::Leave(worker)) || self.causes.contains(&Cause::Scale)
    }

    fn may_be_lost(&self, worker: WorkerId, reason: &str) -> Result<(), String> {
        // Who has got a state that is wrong differs, too.
        let trouble = [Cause::Trouble(worker), Cause::Flipped(worker), Cause::Corruption];
        let trouble = trouble.into_iter().any(|cause| self.causes.contains(&cause));
        // Who was let go, and whose coordinator has died since, is missed by the next.
        let trouble = trouble || self.successor && self.was_told(worker);
        demand!(trouble, "{worker} is called lost, and nothing happened to it: {reason}");
        Ok(())
    }

    fn judge(&self, outcome: &Outcome, reason: &str) -> Result<(), String> {
        let has = |cause| self.causes.contains(&cause);
        match outcome {
            Outcome::Completed(finish) => {
                self.all_finished(finish)?;
                demand!(
                    finish.completed && finish.step >= self.steps,
                    "complete at step {} of {}",
                    finish.step,
                    self.steps
                );
                let right = finish.state_hash == self.hash || finish.step > self.steps;
                demand!(right || has(Cause::Corruption), "the run ends with other bits: {finish:?}");
            }
            Outcome::Stopped(finish) => {
                self.all_finished(finish)?;
                demand!(has(Cause::Stop) || self.leaves(), "stopped, and nobody asked for it");
                demand!(!finish.completed, "called stopped with all steps done");
            }
            Outcome::WorkerLost(worker) => {
                self.may_be_lost(*worker, reason)?;
                demand!(
                    has(Cause::Abandoned),
                    "given up for {worker}, and another could have come: {reason}"
                );
            }
            Outcome::BadInput => demand!(has(Cause::BadInput), "bad input, and there was none: {reason}"),
            Outcome::Failed => {
                let causes = [Cause::Abandoned, Cause::Stop, Cause::Corruption, Cause::Failure];
                demand!(causes.into_iter().any(has) || self.leaves(), "failed for no cause: {reason}");
            }
        }
        Ok(())
    }
}

impl Invariant for Truth {
    fn name(&self) -> &'static str {
        "outcome"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Caused(cause) => drop(self.causes.insert(*cause)),
            Fact::TookOver => self.successor = true,
            Fact::Decided { event, actions, .. } => {
                if let Event::Finished(worker, finish) = event {
                    self.finishes.insert(*worker, finish.clone());
                }
                for action in *actions {
                    match action {
                        Action::Form(formation) => self.ring = Some(formation.clone()),
                        Action::Lose(worker, reason) => self.may_be_lost(*worker, reason)?,
                        Action::Release(worker, _) => {
                            let told = self.was_told(*worker);
                            demand!(told, "{worker} is released, and nobody told it to leave");
                        }
                        Action::End(outcome, reason) => self.judge(outcome, reason)?,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
