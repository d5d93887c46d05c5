//! Workers that are about to come, and are worth waiting for.
//!
//! Where each worker holds a part of the state, parts move whenever the number of workers changes. So a ring is not formed without
//! somebody who takes the place of one who was lost, if it comes soon: parts then move to nobody but the newcomer. And where all read
//! the state from storage again, the first that is done does not begin alone: it might not even have room for all of it.

use std::time::Duration;

use super::{Registry, Standing};

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
}
