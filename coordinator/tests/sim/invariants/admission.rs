//! Who takes part: each worker is let in once, no more at a time than the run has room for, and of one kind unless the
//! run is mixed; and only who was let in, and has not left, is in a ring, where it said that it can be reached.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Candidate, Event};
use mattock_coordinator::protocol::Formation;

use super::{Invariant, demand};
use crate::facts::{Fact, Setup};

pub(crate) struct Admission {
    setup: Setup,
    /// Who is in.
    admitted: BTreeMap<WorkerId, Candidate>,
    /// Who was ever let in.
    ever: BTreeSet<WorkerId>,
    fingerprint: Option<String>,
    formed: bool,
}

impl Admission {
    pub(crate) fn new(setup: &Setup) -> Self {
        let setup = setup.clone();
        Self { setup, admitted: BTreeMap::new(), ever: BTreeSet::new(), fingerprint: None, formed: false }
    }

    fn admit(&mut self, event: &Event, worker: WorkerId) -> Result<(), String> {
        let Event::Joined(joined, candidate) = event else {
            return Err(format!("{worker} is let in upon {event:?}"));
        };
        demand!(*joined == worker, "{worker} is let in when {joined} joins");
        let first = self.fingerprint.get_or_insert_with(|| candidate.fingerprint.clone());
        let fits = self.setup.mixed || *first == candidate.fingerprint;
        demand!(fits, "{worker} is let in as {candidate:?}, the first was {first:?}");
        demand!(self.ever.insert(worker), "{worker} is let in twice");
        self.admitted.insert(worker, candidate.clone());
        let (count, limit) = (self.admitted.len(), self.setup.max_workers as usize);
        demand!(count <= limit, "{count} workers are in, of {limit}");
        Ok(())
    }

    fn form(&mut self, formation: &Formation) -> Result<(), String> {
        let (ranks, quorum) = (formation.places.len(), self.setup.quorum());
        demand!(self.formed || ranks >= quorum, "the first ring has {ranks} ranks, not {quorum}");
        self.formed = true;
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
                Action::Lose(worker, reason) | Action::Release(worker, reason) => {
                    demand!(!reason.is_empty(), "{worker} is sent away without a reason");
                    let was_in = self.admitted.remove(worker).is_some();
                    demand!(was_in, "{worker} is sent away, and was not there");
                }
                Action::Form(formation) => self.form(formation)?,
                _ => {}
            }
        }
        Ok(())
    }
}
