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
    /// A coordinator has taken over from another.
    successor: bool,
}

impl Admission {
    pub(crate) fn new(setup: &Setup) -> Self {
        let setup = setup.clone();
        let (admitted, ever) = (BTreeMap::new(), BTreeSet::new());
        Self { setup, admitted, ever, fingerprint: None, formed: false, successor: false }
    }

    fn admit(&mut self, event: &Event, worker: WorkerId) -> Result<(), String> {
        let (joined, candidate, came_back) = match event {
            Event::Joined(joined, candidate) => (joined, candidate, false),
            // The coordinator that let it in has died.
            Event::CameBack(joined, candidate) => (joined, candidate, self.successor),
            _ => return Err(format!("{worker} is let in upon {event:?}")),
        };
        demand!(*joined == worker, "{worker} is let in when {joined} joins");
        let first = self.fingerprint.get_or_insert_with(|| candidate.fingerprint.clone());
        let fits = self.setup.mixed || self.successor || *first == candidate.fingerprint;
        demand!(fits, "{worker} is let in as {candidate:?}, the first was {first:?}");
        demand!(self.ever.insert(worker) || came_back, "{worker} is let in twice");
        self.admitted.insert(worker, candidate.clone());
        let (count, limit) = (self.admitted.len(), self.setup.max_workers as usize);
        demand!(count <= limit || self.successor, "{count} workers are in, of {limit}");
        Ok(())
    }

    fn kind_of(&self, worker: WorkerId) -> Option<&str> {
        self.admitted.get(&worker).map(|candidate| candidate.fingerprint.as_str())
    }

    fn form(&mut self, formation: &Formation) -> Result<(), String> {
        let (ranks, quorum) = (formation.places.len(), self.setup.quorum());
        // One that has taken over does not know how many there have been.
        let least = if self.successor { self.setup.min_workers as usize } else { quorum };
        demand!(self.formed || ranks >= least, "the first ring has {ranks} ranks, not {least}");
        self.formed = true;
        let kinds: BTreeSet<&str> =
            formation.places.iter().filter_map(|place| self.kind_of(place.worker)).collect();
        demand!(
            self.setup.mixed || kinds.len() <= 1,
            "workers of different kinds are in {formation:?}: {kinds:?}"
        );
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
        if let Fact::TookOver = fact {
            self.admitted.clear();
            (self.fingerprint, self.successor) = (None, true);
        }
        let Fact::Decided { event, actions, .. } = fact else { return Ok(()) };
        for action in *actions {
            match action {
                Action::Admit(worker) => self.admit(event, *worker)?,
                Action::Refuse(worker, reason) => {
                    demand!(!reason.is_empty(), "{worker} is refused without a reason");
                    // One that took over learns late of what kind the run is.
                    let was_in = self.admitted.remove(worker).is_some();
                    demand!(!was_in || self.successor, "{worker} is refused, having been let in");
                }
                Action::Lose(worker, reason) | Action::Release(worker, reason) => {
                    demand!(!reason.is_empty(), "{worker} is sent away without a reason");
                    let was_in = self.admitted.remove(worker).is_some();
                    // It may not have come back.
                    let was_in = was_in || self.successor && self.ever.contains(worker);
                    demand!(was_in, "{worker} is sent away, and was not there");
                }
                Action::Form(formation) => self.form(formation)?,
                _ => {}
            }
        }
        Ok(())
    }
}
