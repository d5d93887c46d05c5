//! Who was sent away is out for good: no ring has it, nothing that it reports counts, and nobody lets it in again.

use std::collections::BTreeSet;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::Action;

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct Fence {
    out: BTreeSet<WorkerId>,
}

impl Invariant for Fence {
    fn name(&self) -> &'static str {
        "fence"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { actions, .. } => {
                for action in *actions {
                    match action {
                        Action::Lose(worker, _) | Action::Release(worker, _) => {
                            self.out.insert(*worker);
                        }
                        Action::Form(formation) => {
                            let out = formation.places.iter().find(|place| self.out.contains(&place.worker));
                            demand!(out.is_none(), "{out:?} was sent away, and is in {formation:?}");
                        }
                        Action::Recall { members, .. } | Action::Restore(members) => {
                            let out = members.iter().find(|worker| self.out.contains(worker));
                            demand!(out.is_none(), "{out:?} was sent away, and is asked for something");
                        }
                        _ => {}
                    }
                }
            }
            // Whoever knew it is gone; what it says is heard, and does no harm.
            Fact::TookOver => self.out.clear(),
            Fact::Counted(worker, report) => {
                demand!(!self.out.contains(worker), "{worker} was sent away, and is heard: {report:?}");
            }
            _ => {}
        }
        Ok(())
    }
}
