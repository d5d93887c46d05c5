//! A recall ends a ring for all its members: the next is formed only when all who are still there have said what they
//! hold, and what they said stays true. Who has said it begins nothing and commits nothing in that ring, and has in the next
//! ring's first step what it said that it would have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Event};
use mattock_coordinator::protocol::Holding;

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct Recalled {
    /// The newest answer of each worker, with the ring's number.
    told: BTreeMap<WorkerId, (u64, Holding)>,
    /// Members of the ring that is recalled that have not answered yet.
    owing: BTreeSet<WorkerId>,
}

impl Recalled {
    fn is_over(&self, worker: WorkerId, generation: u64, what: &str) -> Result<(), String> {
        let told = self.told.get(&worker).filter(|(told, _)| *told >= generation);
        demand!(told.is_none(), "{worker} {what} in generation {generation}, having said {told:?}");
        Ok(())
    }

    fn decide(&mut self, event: &Event, actions: &[Action]) -> Result<(), String> {
        if let Event::Held(worker, ..) = event {
            self.owing.remove(worker);
        }
        for action in actions {
            match action {
                Action::Recall { members, .. } => self.owing = members.iter().copied().collect(),
                Action::Lose(worker, _) => drop(self.owing.remove(worker)),
                Action::Form(formation) => {
                    let owing = &self.owing;
                    demand!(owing.is_empty(), "{formation:?} is formed before {owing:?} have answered");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Invariant for Recalled {
    fn name(&self) -> &'static str {
        "recalled"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { event, actions, .. } => self.decide(event, actions)?,
            Fact::TookOver => self.owing.clear(),
            Fact::Told { worker, generation, holding } => {
                self.told.insert(*worker, (*generation, (*holding).clone()));
            }
            Fact::Began { worker, generation, index } => {
                self.is_over(*worker, *generation, &format!("begins micro-batch {index}"))?;
            }
            Fact::Committed { worker, generation, state, .. } => {
                self.is_over(*worker, *generation, &format!("commits step {}", state.step))?;
            }
            Fact::Entered { worker, generation, step, kept } => {
                self.is_over(*worker, *generation, "begins")?;
                let nothing = Holding::default();
                let told = self.told.get(worker).map_or(&nothing, |(_, told)| told);
                let counts = told.step == Some(*step);
                let claimed: BTreeSet<u32> =
                    told.done.iter().chain(&told.running).copied().filter(|_| counts).collect();
                demand!(**kept == claimed, "{worker} has {kept:?} of the next step, it said {told:?}");
            }
            _ => {}
        }
        Ok(())
    }
}
