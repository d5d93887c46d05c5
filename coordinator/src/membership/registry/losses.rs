//! Who is lost: by its own word, by others', by silence, or because its training stands still.

use super::{HEARING, HEARING_MIN, Registry, Stale, Standing, Worker};
use crate::ids::WorkerId;
use crate::membership::vocabulary::{Action, Outcome, Phase};
use crate::protocol::{Blame, Break, Failure};

impl Registry {
    pub(super) fn break_ring(&mut self, id: WorkerId, broken: Break) {
        self.hear(id);
        let Some(ring) = self.formation.as_ref().filter(|_| broken.generation == self.generation) else {
            return;
        };
        let takes_part = matches!(
            self.workers.get(&id).map(|worker| &worker.standing),
            Some(Standing::Member | Standing::Recalled { .. })
        );
        if !takes_part && !ring.places.iter().any(|place| place.worker == id)
            || !self.workers.contains_key(&id)
        {
            return;
        }
        let lost = broken.lost_rank.and_then(|rank| ring.places.get(rank as usize)).map(|place| place.worker);
        let accused = lost.filter(|&lost| lost != id);
        if self.is_member(id) {
            let reason = format!("{id}: {}", broken.text);
            self.stale.get_or_insert(Stale { reason, broken_by: Some(id), accused });
        } else if self.phase == Phase::Recalling {
            // Another was quicker to call the ring broken, but may have called somebody lost who only gave it up too.
            accused.into_iter().for_each(|accused| self.hear_out(accused));
        }
    }

    /// Who was called lost, and has yet to answer, must do so soon.
    pub(super) fn hear_out(&mut self, accused: WorkerId) {
        let hearing = self.now + (self.config.timeout / HEARING).max(HEARING_MIN);
        if let Some(Standing::Recalled { until }) =
            self.workers.get_mut(&accused).map(|worker| &mut worker.standing)
        {
            *until = hearing.min(*until);
            let hearing = *until;
            self.look_at = self.look_at.map(|at| at.min(hearing));
        }
    }

    /// A worker says that it cannot go on.
    pub(super) fn fail(&mut self, id: WorkerId, failure: &Failure, actions: &mut Vec<Action>) {
        if !self.workers.contains_key(&id) {
            return;
        }
        // Where others have a state, and train, it is not the run's input that is at fault.
        let joins = self.workers.get(&id).is_some_and(|worker| !worker.has_state()) && self.is_under_way();
        let outcome = match failure.blame {
            Blame::Input if !joins => Outcome::BadInput,
            Blame::Run => Outcome::Failed,
            Blame::Input | Blame::Worker => {
                self.lose(id, &failure.text, actions);
                return;
            }
        };
        self.end(outcome, &format!("{id}: {}", failure.text), actions);
    }

    pub(super) fn notice_silence(&mut self, actions: &mut Vec<Action>) {
        let timeout = self.config.timeout;
        // Who is done may be silent.
        let silent = |worker: &Worker| worker.finish.is_none() && self.now >= worker.heard + timeout;
        let gone: Vec<WorkerId> =
            self.workers.iter().filter(|(_, worker)| silent(worker)).map(|(id, _)| *id).collect();
        for id in gone {
            self.lose(id, &format!("nothing was heard of it for {timeout:?}"), actions);
        }
        let is_late = |worker: &Worker| match worker.standing {
            Standing::Recalled { until } => self.now >= until,
            _ => false,
        };
        let late: Vec<WorkerId> =
            self.workers.iter().filter(|(_, worker)| is_late(worker)).map(|(id, _)| *id).collect();
        for id in late {
            self.lose(id, "it did not say in time what it holds of the ring that was recalled", actions);
        }
    }

    /// A worker has said how far it is: it is given up if it stands still.
    pub(super) fn notice_standstill(&mut self, id: WorkerId, actions: &mut Vec<Action>) {
        if let Some(cause) = self.workers.get(&id).and_then(|worker| self.verdict(worker)) {
            self.lose(id, &cause, actions);
        }
    }

    /// Why a worker is given up whose training stands still, if it does; who is done is not at work.
    fn verdict(&self, worker: &Worker) -> Option<String> {
        let trains = worker.finish.is_none() && worker.standing != Standing::Loading;
        worker.progress.filter(|_| trains).and_then(|progress| self.detector.verdict(progress))
    }

    /// A worker is gone; unless it was done, the ring goes on without it.
    pub(super) fn lose(&mut self, id: WorkerId, cause: &str, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.finish.is_some() {
            worker.gone.get_or_insert_with(|| cause.to_owned());
            return;
        }
        // Who has hung up before it said what it holds may still come back with it, as one who has not come yet.
        let comes_again =
            self.returning.is_some() && worker.came_back && worker.standing == Standing::Loading;
        let member = self.is_member(id);
        self.workers.remove(&id);
        if comes_again {
            return;
        }
        self.out.insert(id);
        if member {
            self.stale = Some(Stale { reason: format!("{id} was lost: {cause}"), ..Stale::default() });
        }
        // That explains why rings broke.
        self.breaks = 0;
        self.last_lost = Some((id, cause.to_owned()));
        actions.push(Action::Lose(id, cause.to_owned()));
    }
}
