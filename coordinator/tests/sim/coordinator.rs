//! What coordinator/src/server/core.rs does, without sockets: messages become events of the real registry, reports go to
//! the real ledger, decisions become messages.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mattock_coordinator::event::StepRecord;
use mattock_coordinator::membership::{Action, Candidate, Config, Event, Outcome, Phase, Registry};
use mattock_coordinator::protocol::{
    Blame, Failure, Formation, FromCoordinator, FromWorker, Holding, StepReport,
};
use mattock_coordinator::{Ledger, WorkerId};

use crate::facts::{Cause, Fact, Setup};
use crate::network::Parcel;
use crate::sabotage::Sabotage;
use crate::seeds::trace;
use crate::sim::{Happening, Sim};
use crate::swarm::TIMEOUT;
use crate::worker::Status;

/// How long the coordinator waits for workers to leave, after the end.
const FAREWELL: Duration = Duration::from_secs(2);
/// Processes in a row that one place may lose without a step.
const FRUITLESS_MAX: u32 = 3;

/// The coordinator's process.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) registry: Registry,
    pub(crate) end: Option<(Outcome, String)>,
    ledger: Option<Ledger>,
    /// Who is connected.
    pub(crate) links: BTreeSet<WorkerId>,
    /// The newest step that is recorded.
    step: u64,
    /// When the timer fires.
    timer: Option<Duration>,
}

impl Coordinator {
    pub(crate) fn new(setup: &Setup, origin: Instant) -> Self {
        let config = Config {
            micro_batches: setup.micro_batches,
            expected: setup.expected,
            min_workers: setup.min_workers,
            max_workers: setup.max_workers,
            timeout: TIMEOUT,
            mixed: setup.mixed,
        };
        let registry = Registry::new(config, origin);
        Self { registry, end: None, ledger: None, links: BTreeSet::new(), step: 0, timer: None }
    }
}

impl Sim {
    /// A parcel of a worker arrives.
    pub(crate) fn coordinator_receives(&mut self, worker: WorkerId) {
        let Some(parcel) = self.network.next_up(worker) else { return };
        match parcel {
            Parcel::Gone(cause) => {
                self.coordinator.links.remove(&worker);
                self.decide(Event::Lost(worker, cause.to_owned()));
            }
            Parcel::Message(message) => self.absorb(worker, message),
        }
    }

    /// From a message to what it means for membership.
    fn absorb(&mut self, worker: WorkerId, message: FromWorker) {
        let linked = self.coordinator.links.contains(&worker);
        if let FromWorker::Hello(about) = message {
            if self.coordinator.links.insert(worker) {
                let (address, fingerprint) = (about.address, about.fingerprint);
                self.decide(Event::Joined(worker, Candidate { address, fingerprint }));
            }
            return;
        }
        // What is left in the queue of a worker that was sent away.
        if !linked && self.sabotage != Some(Sabotage::NoFence) {
            return;
        }
        let event = match message {
            FromWorker::Step(report) => return self.record(worker, report),
            FromWorker::Ready { step } => Event::Ready(worker, step),
            FromWorker::Linked { generation } => Event::Linked(worker, generation),
            FromWorker::Held { generation, holding } => self.hold(worker, generation, holding),
            FromWorker::Broken(broken) => Event::Broken(worker, broken),
            FromWorker::Leaving { reason } => Event::Leaving(worker, reason),
            FromWorker::Finished(finish) => Event::Finished(worker, finish),
            FromWorker::Failed(failure) => Event::Failed(worker, failure),
            FromWorker::Pulse(pulse) => Event::Pulse(worker, pulse),
            FromWorker::Hello(_)
            | FromWorker::Return(_)
            | FromWorker::Past(_)
            | FromWorker::Returned(_)
            | FromWorker::Checkpoint { .. }
            | FromWorker::Notice { .. }
            | FromWorker::Heartbeat => Event::Heard(worker),
        };
        self.decide(event);
    }

    fn hold(&self, worker: WorkerId, generation: u64, holding: Holding) -> Event {
        let may_hold = |ledger: &Ledger| holding.step.is_none_or(|step| ledger.may_hold(worker, step));
        let current = self.coordinator.registry.formation().is_some_and(|ring| ring.generation == generation);
        match current && !self.coordinator.ledger.as_ref().is_none_or(may_hold) {
            true => {
                let text =
                    format!("it holds the state of step {:?}, which it has not reported", holding.step);
                Event::Failed(worker, Failure { text, blame: Blame::Worker })
            }
            false => Event::Held(worker, generation, holding),
        }
    }

    fn record(&mut self, worker: WorkerId, report: StepReport) {
        self.decide(Event::Heard(worker));
        let ring = self.coordinator.registry.formation();
        if ring.is_none_or(|ring| ring.generation != report.generation) {
            return;
        }
        self.observe(&Fact::Counted(worker, &report));
        let recorded =
            self.coordinator.ledger.as_mut().map_or(Ok(Vec::new()), |ledger| ledger.report(worker, report));
        match recorded {
            Ok(records) => {
                let stepped = !records.is_empty();
                records.into_iter().for_each(|record| self.commit(record));
                if stepped {
                    self.decide(Event::Stepped);
                }
            }
            Err(disagreement) => {
                let (text, blame) = (disagreement.to_string(), Blame::Run);
                self.decide(Event::Failed(worker, Failure { text, blame }));
            }
        }
    }

    fn commit(&mut self, mut record: StepRecord) {
        let newest = self.coordinator.registry.formation().map(|ring| ring.generation);
        if self.sabotage == Some(Sabotage::ForgetsSteps) && newest != Some(record.generation) {
            return;
        }
        trace(|| format!("{:?} step {} is recorded", self.now, record.step));
        self.coordinator.step = record.step;
        if self.sabotage == Some(Sabotage::WrongRecord) {
            record.state_hash = "0000000000000000".to_owned();
        }
        self.observe(&Fact::Recorded(&record));
        if self.sabotage == Some(Sabotage::DoubleRecord) {
            self.observe(&Fact::Recorded(&record));
        }
    }

    /// The launcher tells of a process that has ended, and starts another in its place, as src/launch/slots.rs says.
    pub(crate) fn launcher_notices(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let (fingerprint, fruitless) = (worker.fingerprint, worker.fruitless + 1);
        let (success, bad_input) =
            (worker.status == Some(Status::Success), worker.status == Some(Status::BadInput));
        let over = self.phase() == Phase::Ended;
        let replaced = self.respawn && !over && !success && !bad_input && fruitless <= FRUITLESS_MAX;
        let cause = format!("its process {} ended", id.0);
        let linked = self.coordinator.links.contains(&id);
        if linked {
            self.decide(Event::Lost(id, cause.clone()));
        }
        if replaced {
            let next = self.boot(fingerprint, true);
            self.worker(next).fruitless = fruitless;
        } else if !over {
            self.cause(Cause::Abandoned);
            let left = self.workers.values().filter(|worker| worker.local && !worker.is_gone()).count();
            self.decide(Event::Abandoned { cause, bad_input: bad_input && !linked, left });
        }
    }

    pub(crate) fn coordinator_ticks(&mut self) {
        self.coordinator.timer = None;
        let deaf = self.sabotage == Some(Sabotage::DeafTimer);
        match self.deadline() {
            Some(deadline) if deadline <= self.now && !deaf => self.decide(Event::Tick),
            _ => self.set_timer(),
        }
    }

    fn deadline(&self) -> Option<Duration> {
        self.coordinator.registry.deadline().map(|deadline| deadline - self.origin)
    }

    /// One timer at a time: if it fires early, it is set again.
    fn set_timer(&mut self) {
        let Some(deadline) = self.deadline() else { return };
        if self.sabotage != Some(Sabotage::DeafTimer)
            && self.coordinator.timer.is_none_or(|timer| deadline < timer)
        {
            self.coordinator.timer = Some(deadline);
            self.schedule(deadline, Happening::Tick);
        }
    }

    /// Decides, and does what was decided.
    pub(crate) fn decide(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.coordinator.registry.step(self.origin + self.now, event.clone(), &mut actions);
        if self.sabotage == Some(Sabotage::EarlyRing) {
            self.answer_for_others(&event, &mut actions);
        }
        if let Some(sabotage) = self.sabotage {
            sabotage.tamper(&event, &mut actions, self.coordinator.end.is_some());
        }
        if !actions.is_empty() || !matches!(event, Event::Heard(_)) {
            trace(|| format!("{:?} the registry hears {event:?} and does {actions:?}", self.now));
        }
        let mut deadline = self.deadline();
        if self.sabotage == Some(Sabotage::StuckTimer) {
            deadline = deadline.map(|deadline| deadline.min(self.now));
        }
        let phase = self.phase();
        self.observe(&Fact::Decided { event: &event, actions: &actions, phase, deadline });
        actions.into_iter().for_each(|action| self.execute(action));
        self.set_timer();
    }

    /// As if all had answered a recall when one has.
    fn answer_for_others(&mut self, event: &Event, actions: &mut Vec<Action>) {
        let Event::Held(_, generation, Holding { step, .. }) = event else { return };
        let others: Vec<WorkerId> = self.coordinator.registry.workers().map(|(id, _)| id).collect();
        for other in others {
            let holding = Holding { step: *step, ..Holding::default() };
            let held = Event::Held(other, *generation, holding);
            self.coordinator.registry.step(self.origin + self.now, held, actions);
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Admit(worker) => {
                let fingerprint = self.workers.get(&worker).map(|worker| worker.fingerprint);
                self.fingerprint = self.fingerprint.or(fingerprint);
                let (run, recipe, settings) = (String::new(), String::new(), String::new());
                let under_way = self.coordinator.ledger.is_some();
                let welcome = FromCoordinator::Welcome { run, recipe, settings, under_way, incarnation: 0 };
                self.send_down(worker, Parcel::Message(welcome));
            }
            Action::Refuse(worker, reason) => self.dismiss(worker, FromCoordinator::Refused { reason }),
            Action::Lose(worker, reason) => self.dismiss(worker, FromCoordinator::End { reason }),
            Action::Release(worker, reason) => self.dismiss(worker, FromCoordinator::Released { reason }),
            Action::Recall { generation, members, reason } => {
                let message = FromCoordinator::Recall { generation, reason };
                members.into_iter().for_each(|worker| self.tell(worker, &message));
            }
            Action::Restore(workers) => {
                let message = FromCoordinator::Restore { up_to: self.coordinator.step };
                workers.into_iter().for_each(|worker| self.tell(worker, &message));
            }
            Action::Wait { .. } => {}
            Action::Form(formation) => self.form(formation),
            Action::Start(formation) => {
                self.tell_all(&FromCoordinator::Start { generation: formation.generation });
            }
            Action::Stop => self.tell_all(&FromCoordinator::Stop),
            Action::End(outcome, reason) => {
                if let Outcome::Completed(finish) | Outcome::Stopped(finish) = &outcome {
                    let hash = finish.state_hash;
                    let ledger = self.coordinator.ledger.as_mut();
                    let waiting = ledger.map(|ledger| ledger.finish(hash)).unwrap_or_default();
                    waiting.into_iter().for_each(|record| self.commit(record));
                }
                self.tell_all(&FromCoordinator::End { reason: reason.clone() });
                self.coordinator.end.get_or_insert((outcome, reason));
                self.schedule_in(FAREWELL, Happening::Dismiss);
            }
        }
    }

    /// Nothing that it says counts from here on.
    fn dismiss(&mut self, worker: WorkerId, message: FromCoordinator) {
        self.tell(worker, &message);
        if self.coordinator.links.remove(&worker) {
            self.send_down(worker, Parcel::Gone("dismissed"));
        }
    }

    fn form(&mut self, formation: Formation) {
        let members: Vec<WorkerId> = self.coordinator.links.iter().copied().collect();
        for (index, worker) in members.into_iter().enumerate() {
            let told = match self.sabotage {
                Some(sabotage) => sabotage.told(index, formation.clone()),
                None => formation.clone(),
            };
            self.tell(worker, &FromCoordinator::Form(told));
        }
        let start = formation.step;
        let next = match self.coordinator.ledger.take() {
            Some(ledger) => ledger.reformed(formation),
            None => Ok(Ledger::new(self.setup.micro_batches, formation)),
        };
        match next {
            Ok(ledger) => {
                if self.coordinator.ledger.is_none() || start < self.coordinator.step {
                    self.coordinator.step = start;
                }
                self.coordinator.ledger = Some(ledger);
            }
            Err(disagreement) => {
                let (text, blame) = (disagreement.to_string(), Blame::Run);
                let any = self.coordinator.registry.workers().next().map(|(id, _)| id);
                any.into_iter()
                    .for_each(|id| self.decide(Event::Failed(id, Failure { text: text.clone(), blame })));
            }
        }
    }

    fn tell(&mut self, worker: WorkerId, message: &FromCoordinator) {
        if self.coordinator.links.contains(&worker) {
            self.send_down(worker, Parcel::Message(message.clone()));
        }
    }

    fn tell_all(&mut self, message: &FromCoordinator) {
        let linked: Vec<WorkerId> = self.coordinator.links.iter().copied().collect();
        linked.into_iter().for_each(|worker| self.tell(worker, message));
    }

    /// Who has not left by now is left behind.
    pub(crate) fn coordinator_dismisses(&mut self) {
        debug_assert_eq!(self.phase(), Phase::Ended, "workers are dismissed at the end only");
        let linked: Vec<WorkerId> = self.coordinator.links.iter().copied().collect();
        linked
            .into_iter()
            .for_each(|worker| self.send_down(worker, Parcel::Gone("the coordinator has left")));
    }
}
