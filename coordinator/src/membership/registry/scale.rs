//! Fewer workers on request: the newest leave, as if each had been told to by its host.
//!
//! What was asked for waits until a ring is formed: only then it is known who is there, also after another coordinator has
//! taken over. It is done once. Whoever joins later is welcome: a request is no bound, `max_workers` is.

use super::{Registry, Worker};
use crate::ids::WorkerId;
use crate::membership::vocabulary::{Action, Phase};

impl Registry {
    /// How many workers there are that stay, if the run may be asked to have so many.
    ///
    /// # Errors
    /// Why it may not.
    pub fn may_scale(&self, wanted: u32) -> Result<u32, String> {
        let (least, most) = (self.config.min_workers.max(1), self.config.max_workers);
        if self.phase == Phase::Ended || self.stop {
            return Err("the run is ending".to_owned());
        }
        if !self.has_begun() || self.returning.is_some() {
            return Err("not all of its workers are there yet: wait until it trains".to_owned());
        }
        if !(least..=most).contains(&wanted) {
            return Err(format!(
                "{wanted} workers are outside of what the recipe allows: {least} to {most} (`elastic.min_workers`, \
                 `elastic.max_workers`)"
            ));
        }
        Ok(self.staying().count() as u32)
    }

    fn staying(&self) -> impl DoubleEndedIterator<Item = (WorkerId, &Worker)> {
        self.workers.iter().filter(|(_, worker)| worker.leaving.is_none()).map(|(id, worker)| (*id, worker))
    }

    /// Lets the newest go that are too many.
    pub(super) fn shrink(&mut self, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Forming | Phase::Running) {
            return;
        }
        let Some(wanted) = self.shrink_to.take() else { return };
        let reason = || format!("the run was scaled to {wanted} workers");
        let too_many = self.staying().count().saturating_sub(wanted as usize);
        let newest: Vec<(WorkerId, bool)> =
            self.staying().rev().take(too_many).map(|(id, worker)| (id, worker.has_state())).collect();
        for (id, has_state) in newest {
            match has_state {
                true => drop(self.workers.entry(id).and_modify(|worker| worker.leaving = Some(reason()))),
                false => self.release(id, reason(), actions),
            }
        }
    }
}
