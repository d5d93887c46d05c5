//! Generations only grow, for the coordinator and in each worker's eyes.

use std::collections::BTreeMap;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Instruction};

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct Generations {
    newest: u64,
    seen: BTreeMap<WorkerId, u64>,
}

impl Invariant for Generations {
    fn name(&self) -> &'static str {
        "generations"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { actions, .. } => {
                for action in *actions {
                    match action {
                        Action::Form(formation) => {
                            let (newest, next) = (self.newest, formation.generation);
                            demand!(next > newest, "generation {next} is formed after {newest}");
                            self.newest = next;
                        }
                        Action::Start(formation) => {
                            let (newest, started) = (self.newest, formation.generation);
                            demand!(started == newest, "generation {started} starts, the newest is {newest}");
                        }
                        _ => {}
                    }
                }
            }
            Fact::Instructed(worker, Instruction::Link { formation, .. }) => {
                let (next, seen) = (formation.generation, self.seen.entry(*worker).or_default());
                demand!(next > *seen, "{worker} links generation {next} after {seen}");
                *seen = next;
            }
            Fact::Instructed(worker, Instruction::Train(formation)) => {
                let (started, seen) = (formation.generation, self.seen.get(worker));
                demand!(seen == Some(&started), "{worker} trains in {started}, having linked {seen:?}");
            }
            _ => {}
        }
        Ok(())
    }
}
