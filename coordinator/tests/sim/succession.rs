//! Coordinators that die, and others that take over: what src/launch/successor.rs, coordinator/src/server/tenure.rs and
//! worker/src/succession.rs do.
//!
//! The lease is a number that only grows. A coordinator below it is stale: it may still listen and tell its workers what
//! needs no look at the lease, until it looks.

use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Action, Event, Instruction, Phase};
use mattock_coordinator::protocol::{About, Formation, FromWorker, Return, StepReport};

use crate::coordinator::Coordinator;
use crate::facts::Fact;
use crate::network::Parcel;
use crate::sabotage::Sabotage;
use crate::seeds::trace;
use crate::sim::{Happening, Sim};
use crate::swarm::TIMEOUT;
use crate::worker::{Stage, ms};

/// How long a launcher takes to start another coordinator.
const RESTART: std::ops::RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_secs(3);
/// Timeouts that a worker holds what it has.
const HOLD: u32 = 10;

/// What a worker has told, for the next coordinator.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    rings: Vec<(Formation, Vec<StepReport>)>,
    ready: Option<Option<u64>>,
}

impl Journal {
    pub(crate) fn enter(&mut self, ring: &Formation) {
        self.ready = None;
        if self.rings.last().is_some_and(|(_, reports)| reports.is_empty()) {
            self.rings.pop();
        }
        self.rings.push((ring.clone(), Vec::new()));
    }

    pub(crate) fn keep(&mut self, message: &FromWorker) {
        match message {
            FromWorker::Ready { step } => self.ready = Some(*step),
            FromWorker::Step(report) => {
                let newest = self.rings.last_mut();
                let newest = newest.filter(|(ring, _)| ring.generation == report.generation);
                newest.into_iter().for_each(|(_, reports)| reports.push(report.clone()));
            }
            _ => {}
        }
    }

    fn retell(&self) -> Vec<FromWorker> {
        let mut told = Vec::new();
        for (ring, reports) in &self.rings {
            told.push(FromWorker::Past(ring.clone()));
            told.extend(reports.iter().cloned().map(FromWorker::Step));
        }
        told
    }
}

/// The coordinators.
impl Sim {
    /// The coordinator's process dies; another is started before long.
    pub(crate) fn coordinator_dies(&mut self) {
        if self.coordinator.dead || self.phase() == Phase::Ended {
            return;
        }
        self.coordinator_leaves();
        let takes = self.rng.duration(&RESTART);
        self.schedule_in(takes, Happening::Succeed);
    }

    /// Its process has ended: nobody receives what is under way to it, and its workers will notice.
    fn coordinator_leaves(&mut self) {
        self.coordinator.dead = true;
        let all: Vec<WorkerId> = self.workers.keys().copied().collect();
        for id in all.into_iter().filter(|id| self.is_connected(*id)).collect::<Vec<WorkerId>>() {
            self.lose_coordinator(id);
        }
    }

    /// Another is started where one has died.
    pub(crate) fn succeed(&mut self) {
        if self.coordinator.dead {
            self.take_over();
        }
    }

    /// Another takes over while one lives, which looks at the lease before long.
    pub(crate) fn usurp(&mut self) {
        if self.coordinator.dead || self.stale.is_some() || self.phase() == Phase::Ended {
            return;
        }
        let looks = self.rng.duration(&(Duration::ZERO..=TIMEOUT / 4));
        self.schedule_in(looks, Happening::Watch(self.coordinator.incarnation));
        self.take_over();
    }

    fn take_over(&mut self) {
        self.lease += 1;
        let now = self.origin + self.now;
        let next = Coordinator::successor(&self.setup, now, self.lease, self.on_record);
        let before = std::mem::replace(&mut self.coordinator, next);
        trace(|| {
            format!("{:?} coordinator {} takes over, on record is {:?}", self.now, self.lease, self.on_record)
        });
        self.stale = Some(before).filter(|before| !before.dead).or(self.stale.take());
        // What kind it is, those say who come back.
        self.fingerprint = None;
        self.observe(&Fact::TookOver);
        if self.stop_asked {
            self.decide(Event::StopRequested);
        }
        self.set_timer();
    }

    /// A coordinator looks at the lease, and ends if it is not its own any more.
    pub(crate) fn watch_lease(&mut self, incarnation: u64) {
        if self.sabotage != Some(Sabotage::NeverLooks) {
            self.as_stale(incarnation, Self::coordinator_leaves);
        }
    }

    /// Lets something happen to the coordinator that is stale, if it is still there.
    pub(crate) fn as_stale(&mut self, incarnation: u64, act: impl FnOnce(&mut Self)) {
        let Some(stale) = self.stale.take_if(|stale| stale.incarnation == incarnation) else { return };
        let current = std::mem::replace(&mut self.coordinator, stale);
        act(self);
        let stale = std::mem::replace(&mut self.coordinator, current);
        self.stale = Some(stale).filter(|stale| !stale.dead);
    }

    /// What a stale coordinator does of what it decided: before it forms a ring, or ends the run, it looks at the lease.
    pub(crate) fn decide_as_stale(&mut self, actions: Vec<Action>) {
        let weighty =
            |action: &Action| matches!(action, Action::Form(_) | Action::End(..) | Action::Restore(_));
        if self.sabotage != Some(Sabotage::NeverLooks) && actions.iter().any(weighty) {
            return self.coordinator_leaves();
        }
        trace(|| format!("{:?} the stale coordinator does {actions:?}", self.now));
        for action in actions {
            if let Action::Form(_) = &action {
                let (event, phase) = (Event::Tick, self.phase());
                let actions = std::slice::from_ref(&action);
                self.observe(&Fact::Decided { event: &event, actions, phase, deadline: None });
            }
            self.execute(action);
        }
    }
}

/// The workers.
impl Sim {
    /// A worker's connection is gone: it finishes its step, and looks for the next coordinator.
    pub(crate) fn lose_line(&mut self, id: WorkerId, cause: &str) {
        trace(|| format!("{:?} {id} has no coordinator: {cause}", self.now));
        let worker = self.worker(id);
        worker.line = false;
        if worker.over || worker.stage == Stage::Leaving {
            return;
        }
        let generation = worker.member.as_ref().and_then(|member| member.generation());
        let Some(generation) = generation else { return self.look_from_now(id) };
        worker.drains = Some(generation);
        match worker.gate.drain(generation) {
            true => self.hold_now(id),
            false => self.schedule_in(TIMEOUT / 2, Happening::HoldNow(id)),
        }
    }

    /// The step is finished, or not waited for any more: what is held stays as it is.
    pub(crate) fn hold_now(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let Some(generation) = worker.drains else { return };
        // It is being written; when it is, this is called again.
        let Some(holding) = worker.freeze(generation) else { return };
        worker.drains = None;
        trace(|| format!("{:?} {id} holds {holding:?} without a coordinator", self.now));
        self.observe(&Fact::Told { worker: id, generation, holding: &holding });
        self.cancel(id);
        let reason = "the coordinator is gone".to_owned();
        self.instruct(id, Instruction::Recall { generation, reason });
        self.look_from_now(id);
    }

    fn look_from_now(&mut self, id: WorkerId) {
        let until = self.now + HOLD * TIMEOUT;
        self.worker(id).looks_until = Some(until);
        self.look_soon(id);
    }

    fn look_soon(&mut self, id: WorkerId) {
        let takes = self.rng.duration(&ms(50..=500));
        self.schedule_in(takes, Happening::Look(id));
    }

    /// Comes back to the coordinator that has the lease, if it is there.
    pub(crate) fn look_for_coordinator(&mut self, id: WorkerId) {
        let now = self.now;
        let Some(until) = self.worker(id).looks_until else { return };
        if now >= until {
            self.worker(id).looks_until = None;
            let end = Instruction::End { reason: "no coordinator came".to_owned() };
            self.observe(&Fact::Instructed(id, &end));
            self.cancel(id);
            return self.instruct(id, end);
        }
        // Where it has not heard that the last connection is gone, it lets nobody in twice.
        if self.coordinator.dead || self.coordinator.links.contains(&id) {
            return self.look_soon(id);
        }
        self.come_back(id);
    }

    fn come_back(&mut self, id: WorkerId) {
        trace(|| format!("{:?} {id} comes back", self.now));
        self.network.renew(id);
        let incarnation = self.coordinator.incarnation;
        let worker = self.worker(id);
        (worker.to, worker.line, worker.looks_until) = (incarnation, true, None);
        let (pid, host, fingerprint) = (id.0 as u32, String::new(), worker.fingerprint.to_owned());
        let about = About { pid, host, address: format!("worker-{}", id.0), fingerprint };
        let mut told = vec![FromWorker::Return(Return { about, incarnation })];
        told.extend(worker.journal.retell());
        let generation = worker.member.as_ref().and_then(|member| member.generation());
        match (worker.journal.ready, generation) {
            (Some(step), _) => told.push(FromWorker::Ready { step }),
            (None, Some(generation)) => {
                let Some(holding) = worker.freeze(generation) else { return };
                self.observe(&Fact::Told { worker: id, generation, holding: &holding });
                told.push(FromWorker::Returned(holding));
            }
            (None, None) => {}
        }
        told.into_iter().for_each(|message| self.send_up(id, Parcel::Message(message)));
    }
}
