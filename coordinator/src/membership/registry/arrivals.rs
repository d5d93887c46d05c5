//! Workers that come: their places among those who are there, and who of them is worth waiting for.
//!
//! Where each worker holds a part of the state, parts move whenever the number of workers changes. So a ring is not formed without
//! somebody who takes the place of one who was lost, if it comes soon: parts then move to nobody but the newcomer. And where all read
//! the state from storage again, the first that is done does not begin alone: it might not even have room for all of it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Registry, Standing};
use crate::ids::WorkerId;

/// For so long a ring of divided state is not formed without somebody who is known to come. A process starts within a fraction
/// of it; one that takes longer, as a device's driver may, finds that the others went on.
const ARRIVAL: Duration = Duration::from_secs(2);

impl Registry {
    /// A process was started in the place of one that ended.
    pub(super) fn expect_replacement(&mut self) {
        if self.config.divided && self.has_begun() {
            self.replacement = Some(self.now + ARRIVAL);
        }
    }

    /// Whoever has not come by now is not waited for.
    pub(super) fn expire_replacement(&mut self) {
        self.replacement = self.replacement.filter(|until| self.now < *until);
    }

    /// Whether a ring of so many would move parts twice.
    pub(super) fn is_waiting_for_arrivals(&self, free: usize) -> bool {
        let before = self.formation.as_ref().map_or(0, |ring| ring.places.len());
        let comes = self.replacement.is_some() && (self.needed()..before).contains(&free);
        let loads = |id| self.workers.get(id).is_some_and(|worker| worker.standing == Standing::Loading);
        !self.stop && (comes || self.restoring.iter().any(loads))
    }

    /// Who may be put into a ring, in the order of ranks: those who were in the last one keep theirs, as far as may be. Others
    /// take the places of those who are gone, so that nobody else's part of a divided state moves; the rest follow.
    pub(super) fn free(&self) -> Vec<WorkerId> {
        let before = self.formation.iter().flat_map(|ring| &ring.places).map(|place| place.worker);
        let is_free = |id: &WorkerId| self.workers.get(id).is_some_and(|worker| worker.held().is_some());
        let before: BTreeMap<WorkerId, usize> = before.zip(0..).collect();
        let mut newcomers = self.workers.keys().filter(|id| is_free(id) && !before.contains_key(*id));
        let mut by_rank: Vec<WorkerId> = Vec::new();
        let mut places: Vec<WorkerId> = before.keys().copied().collect();
        places.sort_by_key(|id| before[id]);
        for id in places {
            by_rank.extend(if is_free(&id) { Some(id) } else { newcomers.next().copied() });
        }
        by_rank.extend(newcomers);
        by_rank
    }
}
