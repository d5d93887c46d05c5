//! What coordinator/src/server/core.rs does, without sockets: messages become events of the real registry, reports go to
//! the real ledger, decisions become messages.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mattock_coordinator::event::StepRecord;
use mattock_coordinator::membership::{Action, Candidate, Config, Event, Outcome, Phase, Registry};
use mattock_coordinator::protocol::{
    Blame, Failure, Formation, FromCoordinator, FromWorker, Holding, Return, StepReport,
};
use mattock_coordinator::{Disagreement, Ledger, Past, WorkerId};

use crate::facts::{Cause, Fact, Setup};
use crate::network::Parcel;
use crate::sabotage::Sabotage;
use crate::seeds::trace;
use crate::sim::{Happening, Sim};
use crate::swarm::TIMEOUT;
use crate::worker::Status;

/// Of rings, for each coordinator.
const NUMBERS: u64 = 1_000_000;
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
    /// Workers were told to read the state from storage, and no ring has been formed since.
    restoring: bool,
    /// When the timer fires.
    timer: Option<Duration>,
    /// Its lease's number.
    pub(crate) incarnation: u64,
    /// What workers tell of the rings before, until the first of its own.
    pub(crate) past: Option<Past>,
    /// Whether the launcher told it which step is on record.
    knows_record: bool,
    /// Its process has ended.
    pub(crate) dead: bool,
}

impl Coordinator {
    /// The first one.
    pub(crate) fn new(setup: &Setup, origin: Instant) -> Self {
        Self::with(Registry::new(config(setup), origin), 1, None, 0)
    }

    /// One that takes over; `on_record` is the newest step of which the launcher knows.
    pub(crate) fn successor(setup: &Setup, now: Instant, incarnation: u64, on_record: Option<u64>) -> Self {
        let registry = Registry::taking_over(config(setup), now, (incarnation - 1) * NUMBERS);
        let knows_record = on_record.is_some();
        let past = Some(Past::new(on_record));
        Self { knows_record, ..Self::with(registry, incarnation, past, on_record.unwrap_or(0)) }
    }

    fn with(registry: Registry, incarnation: u64, past: Option<Past>, step: u64) -> Self {
        let (end, ledger, links, timer, dead) = (None, None, BTreeSet::new(), None, false);
        let (knows_record, restoring) = (false, false);
        Self { knows_record, registry, end, ledger, links, step, restoring, timer, incarnation, past, dead }
    }

    /// The newest step that a state from storage may be of.
    fn restore_up_to(&self) -> u64 {
        let knows = self.ledger.is_some() || self.knows_record || self.past.is_none();
        if knows { self.step } else { u64::MAX }
    }
}

fn config(setup: &Setup) -> Config {
    Config {
        micro_batches: setup.micro_batches,
        expected: setup.expected,
        min_workers: setup.min_workers,
        max_workers: setup.max_workers,
        timeout: TIMEOUT,
        mixed: setup.mixed,
        divided: setup.divided,
    }
}

impl Sim {
    /// A parcel of a worker arrives at the coordinator that it is connected to.
    pub(crate) fn coordinator_receives(&mut self, worker: WorkerId, number: u64) {
        let Some(parcel) = self.network.next_up(worker, number) else { return };
        let current = self.coordinator.incarnation;
        match self.workers.get(&worker).map_or(current, |worker| worker.to) {
            to if to == current && !self.coordinator.dead => self.take_in(worker, parcel),
            to if to < current => self.as_stale(to, |sim| sim.take_in(worker, parcel)),
            _ => {}
        }
    }

    fn take_in(&mut self, worker: WorkerId, parcel: Parcel<FromWorker>) {
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
        if let FromWorker::Return(Return { about, .. }) = message {
            if self.coordinator.links.insert(worker) {
                let (address, fingerprint) = (about.address, about.fingerprint);
                self.decide(Event::CameBack(worker, Candidate { address, fingerprint }));
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
            FromWorker::Past(ring) => self.hear_of_ring(worker, ring),
            FromWorker::Returned(holding) => self.take_back(worker, holding),
            FromWorker::Hello(_)
            | FromWorker::Return(_)
            | FromWorker::Scale { .. }
            | FromWorker::Checkpoint { .. }
            | FromWorker::Rebalanced(_)
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
        // What arrives while workers are told of the end is not looked at.
        if self.coordinator.end.is_some() {
            return;
        }
        if let Some(past) = &mut self.coordinator.past {
            if self.sabotage != Some(Sabotage::ForgetsPast) {
                past.report(worker, report.clone());
            }
            return self.observe(&Fact::Counted(worker, &report));
        }
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
            Err(disagreement @ Disagreement::Hash { .. }) => {
                self.decide(Event::Disagreed(disagreement.to_string()));
            }
            Err(disagreement) => {
                let (text, blame) = (disagreement.to_string(), Blame::Run);
                self.decide(Event::Failed(worker, Failure { text, blame }));
            }
        }
    }

    pub(crate) fn commit(&mut self, mut record: StepRecord) {
        let newest = self.coordinator.registry.formation().map(|ring| ring.generation);
        if self.sabotage == Some(Sabotage::ForgetsSteps) && newest != Some(record.generation) {
            return;
        }
        trace(|| format!("{:?} step {} is recorded", self.now, record.step));
        self.coordinator.step = record.step;
        // One that took over may tell again what the one before it had told: whoever keeps the records knows them.
        if self.on_record >= Some(record.step) {
            return;
        }
        self.on_record = Some(record.step);
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
        if self.coordinator.dead {
            // The next coordinator is told.
            return self.schedule_in(Duration::from_millis(100), Happening::Exited(id));
        }
        let worker = self.worker(id);
        let (fingerprint, fruitless) = (worker.fingerprint, worker.fruitless + 1);
        let (success, bad_input) =
            (worker.status == Some(Status::Success), worker.status == Some(Status::BadInput));
        let over = self.phase() == Phase::Ended;
        let replaced = self.respawn && !over && !success && !bad_input && fruitless <= FRUITLESS_MAX;
        let cause = format!("its process {} ended", id.0);
        let linked = self.coordinator.links.contains(&id);
        if replaced {
            self.decide(Event::Replaced);
        }
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
    pub(crate) fn set_timer(&mut self) {
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
        if self.coordinator.dead {
            return;
        }
        let mut actions = Vec::new();
        self.coordinator.registry.step(self.origin + self.now, event.clone(), &mut actions);
        if self.coordinator.incarnation < self.lease {
            return self.decide_as_stale(actions);
        }
        self.learn_kind(&event);
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

    /// What kind the run is: that of the first who was let in, but for those who come while others may come back.
    fn learn_kind(&mut self, event: &Event) {
        let registry = &self.coordinator.registry;
        let mut there = registry.workers().map(|(id, _)| id);
        let says = match event {
            Event::CameBack(id, _) => there.find(|other| other == id),
            _ if registry.awaits_returns() => None,
            _ => there.next(),
        };
        let kind = says.and_then(|id| self.workers.get(&id)).map(|worker| worker.fingerprint);
        self.fingerprint = self.fingerprint.or(kind);
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

    pub(crate) fn execute(&mut self, action: Action) {
        match action {
            Action::Admit(worker) => {
                let (run, recipe, settings) = (String::new(), String::new(), String::new());
                let incarnation = self.coordinator.incarnation;
                let under_way = self.coordinator.ledger.is_some() || incarnation > 1;
                let welcome = FromCoordinator::Welcome { run, recipe, settings, under_way, incarnation };
                self.tell(worker, &welcome);
            }
            Action::Refuse(worker, reason) => self.dismiss(worker, FromCoordinator::Refused { reason }),
            Action::Lose(worker, reason) => self.dismiss(worker, FromCoordinator::End { reason }),
            Action::Quarantine(worker, _) => {
                self.coordinator.ledger.iter_mut().for_each(|ledger| ledger.disown(worker));
                self.coordinator.past.iter_mut().for_each(|past| past.disown(worker));
            }
            Action::Release(worker, reason) => self.dismiss(worker, FromCoordinator::Released { reason }),
            Action::Recall { generation, members, reason } => {
                let message = FromCoordinator::Recall { generation, reason };
                members.into_iter().for_each(|worker| self.tell(worker, &message));
            }
            Action::Restore(workers) => {
                self.coordinator.restoring = true;
                let message = FromCoordinator::Restore { up_to: self.coordinator.restore_up_to() };
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
        let connected = self.is_connected(worker);
        if self.coordinator.links.remove(&worker) && connected {
            self.send_down(worker, Parcel::Gone("dismissed"));
        }
    }

    fn form(&mut self, formation: Formation) {
        if let Err(disagreement) = self.settle_past(formation.step) {
            return self.disagree(&disagreement);
        }
        let members: Vec<WorkerId> = self.coordinator.links.iter().copied().collect();
        for (index, worker) in members.into_iter().enumerate() {
            let told = match self.sabotage {
                Some(sabotage) => sabotage.told(index, formation.clone()),
                None => formation.clone(),
            };
            self.tell(worker, &FromCoordinator::Form(told));
        }
        let (start, first) = (formation.step, self.coordinator.ledger.is_none());
        self.fingerprint = self.workers.get(&formation.places[0].worker).map(|worker| worker.fingerprint);
        let next = match self.coordinator.ledger.take() {
            Some(ledger) => ledger.reformed(formation),
            None => Ok(Ledger::new(self.setup.micro_batches, formation)),
        };
        let restored = std::mem::take(&mut self.coordinator.restoring);
        match next {
            Ok(ledger) => {
                if first || restored || start < self.coordinator.step {
                    self.coordinator.step = start;
                    self.on_record = Some(start);
                }
                self.coordinator.ledger = Some(ledger);
            }
            Err(disagreement) => self.disagree(&disagreement),
        }
    }

    fn settle_past(&mut self, start: u64) -> Result<(), Disagreement> {
        let Some(past) = self.coordinator.past.take() else { return Ok(()) };
        let (ledger, records) = past.replay(self.setup.micro_batches, start)?;
        self.coordinator.ledger = ledger;
        records.into_iter().for_each(|record| self.commit(record));
        Ok(())
    }

    fn disagree(&mut self, disagreement: &Disagreement) {
        let (text, blame) = (disagreement.to_string(), Blame::Run);
        let any = self.coordinator.registry.workers().next().map(|(id, _)| id);
        any.into_iter().for_each(|id| self.decide(Event::Failed(id, Failure { text: text.clone(), blame })));
    }

    fn hear_of_ring(&mut self, worker: WorkerId, ring: Formation) -> Event {
        let micro_batches = self.setup.micro_batches;
        match self.coordinator.past.as_mut().map(|past| past.ring(worker, &ring, micro_batches)) {
            Some(Ok(())) => Event::Past(worker, ring),
            Some(Err(text)) => Event::Failed(worker, Failure { text, blame: Blame::Worker }),
            None => Event::Heard(worker),
        }
    }

    fn take_back(&self, worker: WorkerId, holding: Holding) -> Event {
        let may_hold = |step| match &self.coordinator.past {
            Some(past) => past.may_hold(worker, step),
            None => step <= self.coordinator.step,
        };
        match holding.step.is_none_or(may_hold) {
            true => Event::Returned(worker, holding),
            false => {
                let text = format!("it came back with a state of step {:?}", holding.step);
                Event::Failed(worker, Failure { text, blame: Blame::Worker })
            }
        }
    }

    /// Whether a worker's connection is to this coordinator.
    pub(crate) fn is_connected(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|worker| worker.to == self.coordinator.incarnation)
    }

    fn tell(&mut self, worker: WorkerId, message: &FromCoordinator) {
        if self.coordinator.links.contains(&worker) && self.is_connected(worker) {
            self.send_down(worker, Parcel::Message(message.clone()));
        }
    }

    fn tell_all(&mut self, message: &FromCoordinator) {
        let linked: Vec<WorkerId> = self.coordinator.links.iter().copied().collect();
        linked.into_iter().for_each(|worker| self.tell(worker, message));
    }

    /// Who has not left by now is left behind.
    pub(crate) fn coordinator_dismisses(&mut self) {
        // One that was stale may have ended a run that is not its own, where it is sabotaged.
        let stale = self.sabotage == Some(Sabotage::NeverLooks);
        debug_assert!(stale || self.phase() == Phase::Ended, "workers are dismissed at the end only");
        let linked = self.coordinator.links.iter().copied().filter(|worker| self.is_connected(*worker));
        let linked: Vec<WorkerId> = linked.collect();
        linked
            .into_iter()
            .for_each(|worker| self.send_down(worker, Parcel::Gone("the coordinator has left")));
    }
}
