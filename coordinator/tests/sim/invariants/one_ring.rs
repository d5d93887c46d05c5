//! One generation, one ring: no two workers see different rings under one generation, and nobody trains in a ring
//! before all its links are up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Instruction};
use mattock_coordinator::protocol::Formation;

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct OneRing {
    rings: BTreeMap<u64, Formation>,
    linked: BTreeSet<(u64, WorkerId)>,
}

impl OneRing {
    /// The ring of this generation is this one, from here on.
    fn is_the_ring(&mut self, formation: &Formation) -> Result<(), String> {
        let known = self.rings.entry(formation.generation).or_insert_with(|| formation.clone());
        demand!(known == formation, "two rings in one generation: {known:?} and {formation:?}");
        let members: BTreeSet<WorkerId> = formation.places.iter().map(|place| place.worker).collect();
        demand!(members.len() == formation.places.len(), "a worker has two ranks: {formation:?}");
        demand!(!members.is_empty(), "a ring of nobody: {formation:?}");
        Ok(())
    }

    fn may_train(&self, formation: &Formation) -> Result<(), String> {
        let generation = formation.generation;
        let missing =
            formation.places.iter().find(|place| !self.linked.contains(&(generation, place.worker)));
        demand!(missing.is_none(), "generation {generation} trains before {missing:?} is linked");
        Ok(())
    }
}

impl Invariant for OneRing {
    fn name(&self) -> &'static str {
        "one ring"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { actions, .. } => actions.iter().try_for_each(|action| match action {
                Action::Form(formation) => self.is_the_ring(formation),
                Action::Start(formation) => {
                    self.is_the_ring(formation)?;
                    self.may_train(formation)
                }
                _ => Ok(()),
            }),
            Fact::Instructed(worker, Instruction::Link { rank, formation }) => {
                self.is_the_ring(formation)?;
                let place = formation.places.get(*rank as usize).map(|place| place.worker);
                demand!(place == Some(*worker), "{worker} is told rank {rank} of {formation:?}");
                Ok(())
            }
            Fact::Instructed(worker, Instruction::Train(formation)) => {
                self.is_the_ring(formation)?;
                let linked = self.linked.contains(&(formation.generation, *worker));
                demand!(linked, "{worker} trains in a ring that it has not linked");
                self.may_train(formation)
            }
            Fact::Linked(worker, generation) => {
                self.linked.insert((*generation, *worker));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
