//! Each micro-batch exactly once: in every ring's shares, and, as workers have really counted them, in every step that is
//! committed.

use std::time::Duration;

use mattock_coordinator::membership::Action;
use mattock_coordinator::protocol::Place;

use super::{Invariant, demand};
use crate::facts::{Fact, Setup};

pub(crate) struct Coverage {
    micro_batches: u32,
}

impl Coverage {
    pub(crate) fn new(setup: &Setup) -> Self {
        Self { micro_batches: setup.micro_batches }
    }
}

impl Invariant for Coverage {
    fn name(&self) -> &'static str {
        "coverage"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { actions, .. } => {
                for action in *actions {
                    let Action::Form(formation) = action else { continue };
                    let all: Vec<u32> = (0..self.micro_batches).collect();
                    let steady: fn(&Place) -> Vec<u32> = |place| place.micro_batches.clone();
                    let first: fn(&Place) -> Vec<u32> = |place| place.first.clone();
                    for share in [steady, first] {
                        let mut shared: Vec<u32> = formation.places.iter().flat_map(share).collect();
                        shared.sort_unstable();
                        demand!(shared == all, "the ranks' micro-batches are {shared:?}, of {all:?}");
                    }
                }
            }
            Fact::Committed { worker, state, counts, .. } => {
                let step = state.step;
                let once =
                    counts.len() == self.micro_batches as usize && counts.iter().all(|&count| count == 1);
                demand!(once, "{worker} commits step {step} with counts {counts:?}");
            }
            _ => {}
        }
        Ok(())
    }
}
