//! A coordinator that has taken over: it knows nobody, and those who were in the last ring come back to it.
//!
//! They hold, as after a recall, and say in which ring they were. Once all of the newest ring that anybody tells of are
//! back, or have had their time, the next ring is formed as after a recall. Whoever comes later is one more who joins.
//! Where nobody tells of a ring, as many as training takes begin it after that time: some who were waited for may be gone for good.

use std::time::Instant;

use super::{Registry, Standing, another_kind};
use crate::ids::WorkerId;
use crate::membership::vocabulary::{Action, Config};
use crate::protocol::{Formation, Holding};

/// Timeouts that workers have to come back: one until the last of them has noticed that the old coordinator is silent, one
/// to find the new one.
const RETURN: u32 = 2;

impl Registry {
    /// A run whose coordinator has died. Rings of this one have numbers above `generation`, which is higher than any that
    /// another has given.
    pub fn taking_over(config: Config, now: Instant, generation: u64) -> Self {
        let until = now + RETURN * config.timeout;
        let (returning, look_at) = (Some(until), Some(until));
        Self { generation, successor: true, returning, look_at, ..Self::new(config, now) }
    }

    /// Whether those who were in the last ring are waited for.
    pub fn awaits_returns(&self) -> bool {
        self.returning.is_some()
    }

    /// A worker tells of a ring that it was in.
    pub(super) fn hear_of_ring(&mut self, id: WorkerId, ring: Formation) {
        self.hear(id);
        let newer = self.formation.as_ref().is_none_or(|known| ring.generation > known.generation);
        if self.returning.is_some() && newer {
            self.generation = self.generation.max(ring.generation);
            self.formation = Some(ring);
        }
    }

    /// The run is of this kind from here on; who was let in before that was known, and is of another, is sent away.
    pub(super) fn settle_kind(&mut self, fingerprint: &str, actions: &mut Vec<Action>) {
        if self.fingerprint.is_some() {
            return;
        }
        self.fingerprint = Some(fingerprint.to_owned());
        let differs =
            |worker: &super::Worker| worker.candidate.fingerprint != fingerprint && !self.config.mixed;
        let strangers = self.workers.iter().filter(|(_, worker)| differs(worker)).map(|(id, _)| *id);
        for id in strangers.collect::<Vec<WorkerId>>() {
            if let Some(worker) = self.workers.remove(&id) {
                actions.push(Action::Refuse(id, another_kind(&worker.candidate, fingerprint)));
            }
        }
    }

    /// A worker that is back says what it holds.
    pub(super) fn take_back(&mut self, id: WorkerId, holding: Holding) {
        self.hear(id);
        let is_back = |worker: &&mut super::Worker| worker.standing == Standing::Loading;
        if let Some(worker) = self.workers.get_mut(&id).filter(is_back) {
            worker.standing = Standing::Free(holding);
        }
    }

    /// Whether somebody may still come back for whom it is worth waiting; who has not come in time is lost.
    pub(super) fn is_waiting_for_returns(&mut self, actions: &mut Vec<Action>) -> bool {
        let Some(until) = self.returning else { return false };
        let places = self.formation.iter().flat_map(|ring| &ring.places);
        let members: Vec<WorkerId> = places.map(|place| place.worker).collect();
        let is_back = |id: &WorkerId| self.workers.get(id).is_some_and(|worker| worker.held().is_some());
        let all_back = !members.is_empty() && members.iter().all(|id| is_back(id) || self.out.contains(id));
        if !all_back && self.now < until {
            return true;
        }
        self.returning = None;
        if let Some(first) = self.workers.values().next().map(|worker| worker.candidate.fingerprint.clone()) {
            self.settle_kind(&first, actions);
        }
        let gone = |id: &WorkerId| !self.workers.contains_key(id) && !self.out.contains(id);
        for id in members.into_iter().filter(gone).collect::<Vec<WorkerId>>() {
            let cause = "it did not come back after the coordinator had died".to_owned();
            self.out.insert(id);
            self.last_lost = Some((id, cause.clone()));
            actions.push(Action::Lose(id, cause));
        }
        self.let_go(actions);
        false
    }

    /// Who wanted to leave meanwhile leaves now, if enough are left.
    fn let_go(&mut self, actions: &mut Vec<Action>) {
        let leaves = |(id, worker): (&WorkerId, &mut super::Worker)| Some((*id, worker.leaving.take()?));
        for (id, reason) in self.workers.iter_mut().filter_map(leaves).collect::<Vec<_>>() {
            self.leave(id, reason, actions);
        }
    }
}
