//! Fewer workers on request: the newest leave, as if each had been told to by its host.
//!
//! Who was to stay may be lost before they are gone. They are not let go then who have the state: they leave later, or not at all.
//!
//! What was asked for waits until a ring is formed: only then it is known who is there, also after another coordinator has
//! taken over. It is done once. Whoever joins later is welcome: a request is no bound, `max_workers` is.

use super::{Registry, Worker};
use crate::ids::WorkerId;
use crate::membership::vocabulary::{Action, Phase};

/// Who is sent away finishes the step that is under way, if that takes no longer than this part of a timeout.
const STEP: u32 = 4;

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

    /// Before leavers are let go: where nobody else has the run's state any more, who was sent away stays, until it is known again
    /// who is there.
    pub(super) fn keep_who_is_needed(&mut self) {
        let Some((wanted, sent_away)) = self.sent_away.take() else { return };
        let has_state = |worker: &Worker| worker.held().is_some_and(|holding| holding.step.is_some());
        if self.staying().any(|(_, worker)| has_state(worker)) {
            return;
        }
        for id in sent_away {
            self.workers.entry(id).and_modify(|worker| worker.leaving = None);
        }
        self.shrink_to = self.shrink_to.or(Some(wanted));
    }

    /// Who was told to leave by its host does, whatever becomes of the others.
    pub(super) fn leaves_anyway(&mut self, id: WorkerId) {
        if let Some((_, sent_away)) = &mut self.sent_away {
            sent_away.remove(&id);
        }
    }

    /// All ranks have done a step.
    pub(super) fn end_step(&mut self) {
        self.breaks = 0;
        self.let_them_go();
    }

    /// Who was sent away has had its step, or the time for it.
    pub(super) fn let_them_go(&mut self) {
        self.unsettled |= self.goes_at.take().is_some();
    }

    /// Whether a ring is ended for this worker, which leaves, now: who was sent away finishes the step first, lest what it has
    /// added up of it is lost.
    pub(super) fn may_go(&self, id: &WorkerId) -> bool {
        let is_sent = || self.sent_away.as_ref().is_some_and(|(_, sent)| sent.contains(id));
        self.goes_at.is_none() || !is_sent()
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
        let ids = newest.iter().map(|(id, _)| *id);
        self.sent_away = Some((wanted, ids.collect()));
        let goes_at = self.now + self.config.timeout / STEP;
        self.goes_at = Some(goes_at);
        self.look_at = self.look_at.map(|at| at.min(goes_at));
        for (id, has_state) in newest {
            match has_state {
                true => drop(self.workers.entry(id).and_modify(|worker| worker.leaving = Some(reason()))),
                false => self.release(id, reason(), actions),
            }
        }
    }
}
