//! What coordinator/src/server.rs does, without sockets: messages become events of the real registry, reports go to
//! the real ledger, decisions become messages.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mattock_coordinator::membership::{Action, Candidate, Config, Event, Outcome, Phase, Registry};
use mattock_coordinator::protocol::{Failure, Formation, FromCoordinator, FromWorker, StepReport};
use mattock_coordinator::{Ledger, WorkerId};

use crate::facts::{Fact, Setup};
use crate::network::Parcel;
use crate::sabotage::Sabotage;
use crate::seeds::trace;
use crate::sim::{Happening, Sim};
use crate::swarm::TIMEOUT;

/// How long the coordinator waits for workers to leave, after the end.
const FAREWELL: Duration = Duration::from_secs(2);

/// The coordinator's process.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) registry: Registry,
    pub(crate) end: Option<(Outcome, String)>,
    ledger: Option<Ledger>,
    /// Who is connected.
    links: BTreeMap<WorkerId, ()>,
    /// When the timer fires.
    timer: Option<Duration>,
}

impl Coordinator {
    pub(crate) fn new(setup: &Setup, origin: Instant) -> Self {
        let config = Config {
            micro_batches: setup.micro_batches,
            expected: setup.expected,
            max_workers: setup.max_workers,
            timeout: TIMEOUT,
            mixed: setup.mixed,
        };
        let registry = Registry::new(config, origin);
        Self { registry, end: None, ledger: None, links: BTreeMap::new(), timer: None }
    }
}

impl Sim {
    /// A parcel of a worker arrives.
    pub(crate) fn coordinator_receives(&mut self, worker: WorkerId) {
        let Some(parcel) = self.network.next_up(worker) else { return };
        let event = match parcel {
            Parcel::Gone(cause) => {
                self.coordinator.links.remove(&worker);
                Some(Event::Lost(worker, cause.to_owned()))
            }
            Parcel::Message(message) => self.absorb(worker, message),
        };
        if let Some(event) = event {
            self.decide(event);
        }
    }

    /// From a message to what it means for membership.
    pub(crate) fn absorb(&mut self, worker: WorkerId, message: FromWorker) -> Option<Event> {
        Some(match message {
            FromWorker::Hello(about) if !self.coordinator.links.contains_key(&worker) => {
                self.coordinator.links.insert(worker, ());
                let (address, fingerprint) = (about.address, about.fingerprint);
                Event::Joined(worker, Candidate { address, fingerprint })
            }
            FromWorker::Ready { step } => Event::Ready(worker, step),
            FromWorker::Linked { generation } => Event::Linked(worker, generation),
            FromWorker::Finished(finish) => Event::Finished(worker, finish),
            FromWorker::Failed(failure) => Event::Failed(worker, failure),
            FromWorker::Step(report) => self.record(worker, report),
            FromWorker::Hello(_)
            | FromWorker::Checkpoint { .. }
            | FromWorker::Notice { .. }
            | FromWorker::Heartbeat => Event::Heard(worker),
        })
    }

    fn record(&mut self, worker: WorkerId, report: StepReport) -> Event {
        let recorded =
            self.coordinator.ledger.as_mut().map_or(Ok(None), |ledger| ledger.report(worker, report));
        match recorded {
            Ok(Some(mut record)) => {
                trace(|| format!("{:?} step {} is recorded", self.now, record.step));
                if self.sabotage == Some(Sabotage::WrongRecord) {
                    record.state_hash = "0000000000000000".to_owned();
                }
                self.observe(&Fact::Recorded(&record));
                if self.sabotage == Some(Sabotage::DoubleRecord) {
                    self.observe(&Fact::Recorded(&record));
                }
                Event::Heard(worker)
            }
            Ok(None) => Event::Heard(worker),
            Err(disagreement) => {
                let failure = Failure { text: disagreement.to_string(), bad_input: false, lost_rank: None };
                Event::Failed(worker, failure)
            }
        }
    }

    /// The launcher tells of a process that has ended.
    pub(crate) fn launcher_notices(&mut self, worker: WorkerId) {
        let cause = format!("its process {} ended", worker.0);
        let bad_input = self.worker(worker).bad_input();
        self.decide(match self.coordinator.links.contains_key(&worker) {
            true => Event::Lost(worker, cause),
            false => Event::Abandoned { cause, bad_input },
        });
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

    fn execute(&mut self, action: Action) {
        match action {
            Action::Admit(worker) => {
                let (run, recipe, settings) = (String::new(), String::new(), String::new());
                let welcome = FromCoordinator::Welcome { run, recipe, settings };
                self.send_down(worker, Parcel::Message(welcome));
            }
            Action::Refuse(worker, reason) => {
                self.send_down(worker, Parcel::Message(FromCoordinator::Refused { reason }));
                self.send_down(worker, Parcel::Gone("dismissed"));
                self.coordinator.links.remove(&worker);
            }
            Action::Form(formation) => self.form(formation),
            Action::Start(formation) => {
                self.tell_all(&FromCoordinator::Start { generation: formation.generation });
            }
            Action::Stop => self.tell_all(&FromCoordinator::Stop),
            Action::End(outcome, reason) => {
                self.tell_all(&FromCoordinator::End { reason: reason.clone() });
                self.coordinator.end.get_or_insert((outcome, reason));
                self.schedule_in(FAREWELL, Happening::Dismiss);
            }
        }
    }

    fn form(&mut self, formation: Formation) {
        self.coordinator.ledger = Some(Ledger::new(self.setup.micro_batches, formation.clone()));
        let Some(sabotage) = self.sabotage else {
            return self.tell_all(&FromCoordinator::Form(formation));
        };
        let members: Vec<WorkerId> = self.coordinator.links.keys().copied().collect();
        for (index, worker) in members.into_iter().enumerate() {
            let told = sabotage.told(index, formation.clone());
            self.send_down(worker, Parcel::Message(FromCoordinator::Form(told)));
        }
    }

    fn tell_all(&mut self, message: &FromCoordinator) {
        let linked: Vec<WorkerId> = self.coordinator.links.keys().copied().collect();
        linked.into_iter().for_each(|worker| self.send_down(worker, Parcel::Message(message.clone())));
    }

    /// Who has not left by now is left behind.
    pub(crate) fn coordinator_dismisses(&mut self) {
        debug_assert_eq!(self.phase(), Phase::Ended, "workers are dismissed at the end only");
        let linked: Vec<WorkerId> = self.coordinator.links.keys().copied().collect();
        linked
            .into_iter()
            .for_each(|worker| self.send_down(worker, Parcel::Gone("the coordinator has left")));
    }
}
