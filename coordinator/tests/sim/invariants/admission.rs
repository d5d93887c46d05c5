//! Who takes part: each worker is let in once, no more than the run has room for, only before the first ring, and of
//! one kind unless the run is mixed; and only who was let in is in a ring, where it said that it can be reached.

use std::collections::BTreeMap;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Candidate, Event};
use mattock_coordinator::protocol::Formation;

use super::{Invariant, demand};
use crate::facts::{Fact, Setup};

pub(crate) struct Admission {
    setup: Setup,
    admitted: BTreeMap<WorkerId, Candidate>,
    formed: bool,
}

impl Admission {
    pub(crate) fn new(setup: &Setup) -> Self {
        Self { setup: setup.clone(), admitted: BTreeMap::new(), formed: false }
    }

    fn admit(&mut self, event: &Event, worker: WorkerId) -> Result<(), String> {
        let Event::Joined(joined, candidate) = event else {
            return Err(format!("{worker} is let in upon {event:?}"));
        };
        demand!(*joined == worker, "{worker} is let in when {joined} joins");
        demand!(!self.formed, "{worker} is let in after the first ring was formed");
        let others = self.admitted.values().next().map(|first| &first.fingerprint);
        let fits = self.setup.mixed || others.is_none_or(|first| *first == candidate.fingerprint);
        demand!(fits, "{worker} is let in as {candidate:?} beside {others:?}");
        let before = self.admitted.insert(worker, candidate.clone());
        demand!(before.is_none(), "{worker} is let in twice");
        let (count, quorum) = (self.admitted.len(), self.setup.quorum());
        demand!(count <= quorum, "{count} workers are let in, of {quorum}");
        Ok(())
    }

    fn form(&mut self, formation: &Formation) -> Result<(), String> {
        self.formed = true;
        let quorum = self.setup.quorum();
        demand!(formation.places.len() == quorum, "a ring of {formation:?}, not of {quorum}");
        for place in &formation.places {
            let known = self.admitted.get(&place.worker).map(|candidate| &candidate.address);
            demand!(known == Some(&place.address), "{place:?} is in the ring, {known:?} was let in");
        }
        Ok(())
    }
}

impl Invariant for Admission {
    fn name(&self) -> &'static str {
        "admission"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        let Fact::Decided { event, actions, .. } = fact else { return Ok(()) };
        for action in *actions {
            match action {
                Action::Admit(worker) => self.admit(event, *worker)?,
                Action::Refuse(worker, reason) => {
                    demand!(!reason.is_empty(), "{worker} is refused without a reason");
                    demand!(!self.admitted.contains_key(worker), "{worker} is refused, having been let in");
                }
                Action::Form(formation) => self.form(formation)?,
                _ => {}
            }
        }
        Ok(())
    }
}
