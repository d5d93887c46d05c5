//! A rank is at s or at s + 1: no rank commits a step while another has yet to commit the one before.

use std::collections::BTreeMap;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::Action;

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct Lockstep {
    generation: u64,
    steps: BTreeMap<WorkerId, u64>,
}

impl Invariant for Lockstep {
    fn name(&self) -> &'static str {
        "lockstep"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { actions, .. } => {
                for action in *actions {
                    let Action::Form(formation) = action else { continue };
                    self.generation = formation.generation;
                    let places = formation.places.iter();
                    self.steps = places.map(|place| (place.worker, formation.step)).collect();
                }
            }
            Fact::Committed { worker, generation, state, .. } if *generation == self.generation => {
                let step = &state.step;
                let Some(before) = self.steps.insert(*worker, *step) else {
                    return Err(format!("{worker} commits step {step} of a ring it is not in"));
                };
                demand!(*step == before + 1, "{worker} commits step {step} after {before}");
                let least = self.steps.values().min().copied().unwrap_or(*step);
                demand!(*step <= least + 1, "{worker} commits step {step} while another is at {least}");
            }
            _ => {}
        }
        Ok(())
    }
}
