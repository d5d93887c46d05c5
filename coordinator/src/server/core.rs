//! The one task that decides: messages in, the registry's actions out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::door::Inbound;
use super::past::TakeOver;
use super::scale::Asked;
use super::tenure::Tenure;
use super::{Command, Ending, RunEnd, ServerConfig};
use crate::event::{Event, ShareRecord, StepRecord};
use crate::ids::WorkerId;
use crate::ledger::{Disagreement, Ledger};
use crate::membership::{self, Action, Candidate, Dissent, Outcome, Phase, Registry};
use crate::protocol::{
    About, Blame, Failure, Formation, FromCoordinator, FromWorker, Holding, Rebalance, Return, Shift,
    StepReport,
};
use crate::recovery::Recovery;
use crate::status::Status;
use crate::wire::{self, WireError};

/// Phases of a step, and kinds of bytes, that a worker may report.
const PHASES_MAX: usize = 64;
/// Of the name of one.
const PHASE_BYTES_MAX: usize = 64;

/// The status is brought up to date so often where nothing but time has changed it: it names all workers.
const SHOW_EVERY: Duration = Duration::from_millis(250);

/// A connected worker.
#[derive(Debug)]
pub(super) struct Link {
    outbox: mpsc::Sender<Bytes>,
    about: About,
    /// A coordinator before this one has let it in.
    pub(super) came_back: bool,
}

/// The one task that decides.
pub(super) struct Core {
    pub(super) config: ServerConfig,
    pub(super) registry: Registry,
    pub(super) ledger: Option<Ledger>,
    /// Nothing where the run ends with its coordinator.
    pub(super) tenure: Option<Tenure>,
    /// Until the first ring of a coordinator that has taken over.
    pub(super) take_over: Option<TakeOver>,
    /// Somebody has told of a higher incarnation.
    pub(super) outranked: bool,
    pub(super) links: BTreeMap<WorkerId, Link>,
    events: mpsc::Sender<Event>,
    status: watch::Sender<Status>,
    shown: Instant,
    /// The newest step that is recorded.
    pub(super) step: u64,
    /// Workers were told to read the state from storage, and no ring has been formed since.
    restoring: bool,
    /// The change of rings that is under way.
    recovery: Option<Recovery>,
    /// Who wants to know that the launcher has heard of another number of workers.
    pub(super) asked: Vec<Asked>,
    /// How long it has waited for those who read events, or did not run, all in all.
    stalled: Duration,
}

impl Core {
    pub(super) fn new(
        config: ServerConfig,
        tenure: Option<Tenure>,
        events: mpsc::Sender<Event>,
        status: watch::Sender<Status>,
    ) -> Self {
        let (now, membership) = (Instant::now(), config.membership.clone());
        let recorded = config.failover.as_ref().and_then(|failover| failover.recorded);
        let (ledger, links, recovery, stalled) = (None, BTreeMap::new(), None, Duration::ZERO);
        let (registry, take_over) = match tenure.as_ref().filter(|tenure| tenure.lease.is_successor()) {
            Some(tenure) => {
                let registry = Registry::taking_over(membership, now, tenure.lease.first_number());
                (registry, Some(TakeOver::begin(recorded)))
            }
            None => (Registry::new(membership, now), None),
        };
        let step = recorded.filter(|_| take_over.is_some()).unwrap_or(0);
        let (outranked, restoring) = (false, false);
        Self {
            config,
            registry,
            ledger,
            tenure,
            take_over,
            outranked,
            links,
            events,
            status,
            shown: now,
            step,
            restoring,
            recovery,
            asked: Vec::new(),
            stalled,
        }
    }

    /// The registry's time: it stands still while nobody reads the events, or this process does not run, for then nobody listens to
    /// workers either, and what was not heard is no silence.
    pub(super) fn now(&self) -> Instant {
        Instant::now() - self.stalled
    }

    /// How far the registry's time is behind.
    pub(super) fn stalled(&self) -> Duration {
        self.stalled
    }

    /// Hears how long after its time a turn came. Where that is more than this process is ever due, it was stopped or starved, and
    /// what workers sent meanwhile is still to be read.
    pub(super) fn came_late(&mut self, late: Duration, usual: Duration) {
        if late > usual {
            tracing::warn!(
                ?late,
                "this coordinator did not run: what it did not hear meanwhile is no silence"
            );
            self.stalled += late;
        }
    }

    pub(super) async fn emit(&mut self, event: Event) {
        let asked = Instant::now();
        // Who does not read events does not want them.
        let _ = self.events.send(event).await;
        self.stalled += asked.elapsed();
    }

    /// From a message to what it means for membership.
    pub(super) async fn absorb(&mut self, worker: WorkerId, message: Inbound) -> Vec<membership::Event> {
        use membership::Event as Meaning;
        let message = match message {
            Inbound::Hello(about, outbox) => {
                let candidate =
                    Candidate { address: about.address.clone(), fingerprint: about.fingerprint.clone() };
                self.links.insert(worker, Link { outbox, about, came_back: false });
                return vec![Meaning::Joined(worker, candidate)];
            }
            Inbound::Return(Return { about, incarnation }, outbox) => {
                self.outranked |= incarnation > self.incarnation();
                let candidate =
                    Candidate { address: about.address.clone(), fingerprint: about.fingerprint.clone() };
                self.links.insert(worker, Link { outbox, about, came_back: true });
                return vec![Meaning::CameBack(worker, candidate)];
            }
            Inbound::Gone(cause) => {
                self.links.remove(&worker);
                return vec![Meaning::Lost(worker, cause)];
            }
            Inbound::Scale(workers, answer) => {
                return self.scale(workers, answer).await;
            }
            // What is left in the queue of a worker that was sent away.
            Inbound::Message(_) if !self.links.contains_key(&worker) => return Vec::new(),
            Inbound::Message(message) => message,
        };
        vec![match message {
            FromWorker::Ready { step } => Meaning::Ready(worker, step),
            FromWorker::Linked { generation } => Meaning::Linked(worker, generation),
            FromWorker::Held { generation, holding } => self.hold(worker, generation, holding),
            FromWorker::Broken(broken) => Meaning::Broken(worker, broken),
            FromWorker::Leaving { reason } => Meaning::Leaving(worker, reason),
            FromWorker::Finished(finish) => Meaning::Finished(worker, finish),
            FromWorker::Failed(failure) => Meaning::Failed(worker, failure),
            FromWorker::Step(report) => return self.record(worker, report).await,
            FromWorker::Checkpoint { step, url, bytes, seconds } => {
                self.emit(Event::Checkpoint { step, url, bytes, seconds }).await;
                Meaning::Heard(worker)
            }
            FromWorker::Rebalanced(rebalance) => {
                self.tell_of_shares(worker, &rebalance).await;
                Meaning::Heard(worker)
            }
            FromWorker::Notice { text } => {
                self.emit(Event::Notice { message: text }).await;
                Meaning::Heard(worker)
            }
            FromWorker::Pulse(pulse) => Meaning::Pulse(worker, pulse),
            FromWorker::Past(ring) => self.hear_of_ring(worker, ring),
            FromWorker::Returned(holding) => self.take_back(worker, holding),
            FromWorker::Hello(_)
            | FromWorker::Return(_)
            | FromWorker::Scale { .. }
            | FromWorker::Heartbeat => Meaning::Heard(worker),
        }]
    }

    fn hold(&self, worker: WorkerId, generation: u64, holding: Holding) -> membership::Event {
        let (held, micro_batches) = (holding.done.len(), self.config.membership.micro_batches);
        if held > micro_batches as usize {
            let text = format!("it holds {held} micro-batches of a step of {micro_batches}");
            return membership::Event::Failed(worker, Failure { text, blame: Blame::Worker });
        }
        let may_hold = |ledger: &Ledger| holding.step.is_none_or(|step| ledger.may_hold(worker, step));
        let current = self.registry.formation().is_some_and(|ring| ring.generation == generation);
        if current && !self.ledger.as_ref().is_none_or(may_hold) {
            let text = format!("it holds the state of step {:?}, which it has not reported", holding.step);
            return membership::Event::Failed(worker, Failure { text, blame: Blame::Worker });
        }
        membership::Event::Held(worker, generation, holding)
    }

    async fn record(&mut self, worker: WorkerId, report: StepReport) -> Vec<membership::Event> {
        let heard = membership::Event::Heard(worker);
        if self.take_over.is_some() {
            return vec![self.hear_of_step(worker, report)];
        }
        let ring = self.registry.formation().filter(|ring| ring.generation == report.generation);
        let Some(ring) = ring else { return vec![heard] };
        if let Some(text) = misreport(ring, worker, &report, self.config.membership.micro_batches) {
            return vec![membership::Event::Failed(worker, Failure { text, blame: Blame::Worker })];
        }
        let reported = self.ledger.as_mut().map_or(Ok(Vec::new()), |ledger| ledger.report(worker, report));
        let settled = self.ledger.as_ref().is_some_and(Ledger::has_settled);
        if let Some(recovery) = self.recovery.as_mut().filter(|recovery| settled && recovery.has_started()) {
            recovery.commit(Instant::now());
        }
        match reported {
            Ok(records) => {
                let stepped = (!records.is_empty()).then_some(membership::Event::Stepped);
                for record in records {
                    self.commit(record).await;
                }
                std::iter::once(heard).chain(stepped).collect()
            }
            // Who of them is wrong is known when all have said what they hold.
            Err(disagreement @ Disagreement::Hash { .. }) => {
                vec![heard, membership::Event::Disagreed(disagreement.to_string())]
            }
            Err(disagreement) => vec![disagree(worker, &disagreement)],
        }
    }

    /// A ring's first rank says whose shares change.
    async fn tell_of_shares(&mut self, worker: WorkerId, rebalance: &Rebalance) {
        let Rebalance { generation, step, median_micros, ref shifts } = *rebalance;
        let ring = self.registry.formation().filter(|ring| ring.generation == generation);
        let Some(places) = ring.map(|ring| &ring.places) else { return };
        if places.first().is_none_or(|place| place.worker != worker) {
            return;
        }
        let ms = |micros: u32| f64::from(micros) / 1e3;
        let share = |shift: &Shift| {
            let Shift { rank, before, after, micros } = *shift;
            let worker = places.get(rank as usize)?.worker.0;
            Some(ShareRecord { worker, before, after, ms: ms(micros) })
        };
        let shares = shifts.iter().take(places.len()).filter_map(share).collect();
        self.emit(Event::Rebalanced { generation, step, median_ms: ms(median_micros), shares }).await;
    }

    async fn commit(&mut self, record: StepRecord) {
        self.step = record.step;
        let newest = self.registry.formation().is_some_and(|ring| ring.generation == record.generation);
        let recovery = self.recovery.take_if(|recovery| newest && recovery.has_started());
        let recovered = recovery.map(|recovery| recovery.end(Instant::now(), &record));
        self.emit(Event::Step(record)).await;
        if let Some(recovered) = recovered {
            self.emit(recovered).await;
        }
    }

    /// All ranks are done: they have every step.
    async fn close_ledger(&mut self, state_hash: u64) {
        for record in self.ledger.as_mut().map(|ledger| ledger.finish(state_hash)).unwrap_or_default() {
            self.commit(record).await;
        }
    }

    pub(super) async fn command(&mut self, command: Command) -> Vec<membership::Event> {
        match command {
            Command::Ping => {
                self.emit(Event::Alive).await;
                Vec::new()
            }
            Command::Stop => vec![membership::Event::StopRequested],
            Command::Shrink(workers) => self.shrink(workers),
            Command::ProcessExited { host, pid, status, bad_input, replaced, left } => {
                let is_it = |about: &About| about.pid == pid && about.host == host;
                let link = self.links.iter().find(|(_, link)| is_it(&link.about));
                let lost = link.map(|(worker, _)| {
                    membership::Event::Lost(*worker, format!("its process {pid} ended: {status}"))
                });
                let bad_input = bad_input && lost.is_none();
                let cause = format!("process {pid}: {status}");
                let abandoned = || membership::Event::Abandoned { cause, bad_input, left };
                // Who comes is known before it is decided what follows from the loss.
                let expected = replaced.then_some(membership::Event::Replaced);
                expected.into_iter().chain(lost).chain((!replaced).then(abandoned)).collect()
            }
        }
    }

    /// Decides, and does what was decided; returns the run's end if this was it.
    pub(super) async fn decide(&mut self, events: Vec<membership::Event>) -> Option<Ending> {
        let mut actions = Vec::new();
        for event in events {
            self.registry.step(self.now(), event, &mut actions);
        }
        if self.must_look(&actions)
            && let Some(successor) = self.successor().await
        {
            return Some(Ending::Superseded(successor));
        }
        let mut end = None;
        for action in actions {
            match action {
                Action::Admit(worker) => self.admit(worker).await,
                Action::Refuse(worker, reason) => self.refuse(worker, reason).await,
                Action::Lose(worker, reason) => self.lose(worker, reason).await,
                Action::Quarantine(worker, dissent) => self.quarantine(worker, dissent).await,
                Action::Release(worker, reason) => self.release(worker, reason).await,
                Action::Recall { generation, members, reason } => {
                    self.recall(generation, &members, reason).await;
                }
                Action::Restore(workers) => {
                    self.restoring = true;
                    let message = FromCoordinator::Restore { up_to: self.restore_up_to() };
                    workers.iter().for_each(|worker| self.tell(*worker, &message));
                }
                Action::Wait { ready, needed } => self.emit(Event::Waiting { ready, needed }).await,
                Action::Form(formation) => end = self.form(formation).await.err().or(end),
                Action::Start(formation) => self.start(formation.generation),
                Action::Stop => self.ask_all(&FromCoordinator::Stop),
                Action::End(outcome, reason) => {
                    if let Outcome::Completed(finish) | Outcome::Stopped(finish) = &outcome {
                        self.close_ledger(finish.state_hash).await;
                    }
                    end = Some(Ending::Over(RunEnd { outcome, reason }));
                }
            }
        }
        self.show();
        end
    }

    async fn admit(&mut self, worker: WorkerId) {
        // Where another had the run before, it is under way, or may be.
        let successor = self.tenure.as_ref().is_some_and(|tenure| tenure.lease.is_successor());
        let under_way = self.ledger.is_some() || successor;
        self.tell(worker, &self.config.welcome(under_way, self.incarnation()));
        if let Some(link) = self.links.get(&worker) {
            let (host, pid, worker) = (link.about.host.clone(), link.about.pid, worker.0);
            let event = match link.came_back {
                true => Event::WorkerReturned { worker, host, pid },
                false => Event::WorkerJoined { worker, host, pid },
            };
            self.emit(event).await;
        }
    }

    async fn refuse(&mut self, worker: WorkerId, reason: String) {
        self.tell(worker, &FromCoordinator::Refused { reason: reason.clone() });
        self.links.remove(&worker);
        self.emit(Event::WorkerRefused { reason }).await;
    }

    /// Should it still be there, it hears that it is not needed any more; nothing that it says is heard.
    async fn lose(&mut self, worker: WorkerId, reason: String) {
        let end = FromCoordinator::End { reason: format!("it goes on without this worker: {reason}") };
        self.tell(worker, &end);
        self.links.remove(&worker);
        self.emit(Event::WorkerLost { worker: worker.0, reason }).await;
    }

    /// Nothing that it has said of its state and sums counts.
    async fn quarantine(&mut self, worker: WorkerId, dissent: Dissent) {
        if let Some(ledger) = &mut self.ledger {
            ledger.disown(worker);
        }
        if let Some(take_over) = &mut self.take_over {
            take_over.disown(worker);
        }
        let Dissent { step, what, got, want, agreed, ranks } = dissent;
        let (worker, hash, majority) = (worker.0, format!("{got:016x}"), format!("{want:016x}"));
        self.emit(Event::WorkerQuarantined { worker, step, what, hash, majority, agreed, ranks }).await;
    }

    async fn release(&mut self, worker: WorkerId, reason: String) {
        self.tell(worker, &FromCoordinator::Released { reason: reason.clone() });
        self.links.remove(&worker);
        self.emit(Event::WorkerLeft { worker: worker.0, reason }).await;
    }

    async fn recall(&mut self, generation: u64, members: &[WorkerId], reason: String) {
        let message = FromCoordinator::Recall { generation, reason: reason.clone() };
        members.iter().for_each(|worker| self.tell(*worker, &message));
        match &mut self.recovery {
            Some(recovery) => recovery.again(&reason),
            None => self.recovery = Some(Recovery::begin(Instant::now(), &reason)),
        }
        self.emit(Event::RingRecalled { generation, reason }).await;
    }

    /// The newest step that a state from storage may be of. One that has taken over and knows of no step takes what is there.
    fn restore_up_to(&self) -> u64 {
        let recorded = self.config.failover.as_ref().and_then(|failover| failover.recorded);
        let knows = self.ledger.is_some() || recorded.is_some() || self.take_over.is_none();
        if knows { self.step } else { u64::MAX }
    }

    /// Gives a ring to its members.
    async fn form(&mut self, formation: Formation) -> Result<(), Ending> {
        self.settle_past(formation.step).await?;
        let places = formation.places.len();
        self.tell_all(&FromCoordinator::Form(formation.clone()))
            .map_err(|error| Ending::Over(untold(places, &error)))?;
        if let Some(recovery) = &mut self.recovery {
            recovery.form(Instant::now());
        }
        let (generation, world_size) = (formation.generation, formation.places.len() as u32);
        let resumed_from = formation.step;
        // The newest checkpoint may be that of the newest step: that the state was lost is told all the same.
        let restored = std::mem::take(&mut self.restoring);
        let fresh = self.ledger.is_none() || restored || resumed_from < self.step;
        let ledger = match self.ledger.take() {
            Some(ledger) => ledger.reformed(formation).map_err(|error| Ending::Over(failed(&error)))?,
            None => Ledger::new(self.config.membership.micro_batches, formation),
        };
        self.ledger = Some(ledger);
        if fresh {
            self.step = resumed_from;
            self.emit(Event::RunStarted { steps: self.config.steps, resumed_from }).await;
        }
        self.emit(Event::RingFormed { generation, world_size }).await;
        Ok(())
    }

    fn start(&mut self, generation: u64) {
        if let Some(recovery) = &mut self.recovery {
            recovery.start(Instant::now());
        }
        self.ask_all(&FromCoordinator::Start { generation });
    }

    fn tell(&self, worker: WorkerId, message: &FromCoordinator) {
        match (self.links.get(&worker), wire::encode(message)) {
            (Some(link), Ok(bytes)) => link.pass(worker, bytes.into()),
            (Some(_), Err(error)) => tracing::warn!(%worker, %error, "cannot be told"),
            (None, _) => {}
        }
    }

    /// Tells all the same, which for a ring of thousands is long: it is encoded once.
    fn tell_all(&self, message: &FromCoordinator) -> Result<(), WireError> {
        let bytes = Bytes::from(wire::encode(message)?);
        self.links.iter().for_each(|(worker, link)| link.pass(*worker, bytes.clone()));
        Ok(())
    }

    /// Tells all what always fits into a message.
    fn ask_all(&self, message: &FromCoordinator) {
        if let Err(error) = self.tell_all(message) {
            tracing::warn!(%error, "workers cannot be told");
        }
    }

    fn show(&mut self) {
        let generation = self.registry.formation().map_or(0, |formation| formation.generation);
        let moved = {
            let status = self.status.borrow();
            (status.phase, status.generation, status.step)
                != (phase_name(self.registry.phase()), generation, self.step)
        };
        if !moved && self.shown.elapsed() < SHOW_EVERY {
            return;
        }
        self.shown = Instant::now();
        let workers =
            self.registry.workers().map(|(worker, silent)| (worker.0, silent.as_secs_f64())).collect();
        let formation = self.registry.formation();
        self.status.send_modify(|status| {
            status.phase = phase_name(self.registry.phase());
            status.generation = generation;
            status.world_size = formation.map_or(0, |formation| formation.places.len());
            status.step = self.step;
            status.steps = self.config.steps;
            status.workers = workers;
        });
    }

    /// Says how the run ended, to the events and to all workers, and waits for them to leave.
    pub(super) async fn farewell(
        &mut self,
        end: &RunEnd,
        inbound: &mut mpsc::Receiver<(WorkerId, Inbound)>,
        limit: Duration,
    ) {
        self.emit(Event::RunEnding).await;
        let (outcome, finish) = match &end.outcome {
            Outcome::Completed(finish) => ("done", Some(finish)),
            Outcome::Stopped(finish) => ("interrupted", Some(finish)),
            Outcome::BadInput | Outcome::WorkerLost(_) | Outcome::Failed => ("failed", None),
        };
        let event = Event::RunEnded {
            outcome,
            error: finish.is_none().then(|| end.reason.clone()),
            unigram_loss: finish.and_then(|finish| finish.unigram_loss),
            held_out_loss: finish.and_then(|finish| finish.held_out_loss),
            parameters: finish.map(|finish| finish.parameters),
            state_hash: finish.map(|finish| format!("{:016x}", finish.state_hash)),
        };
        // Before workers are told, who then leave: nobody could come back to a coordinator that takes over.
        self.emit(event).await;
        self.ask_all(&FromCoordinator::End { reason: end.reason.clone() });
        let leave = async {
            while !self.links.is_empty() {
                match inbound.recv().await {
                    Some((worker, Inbound::Gone(_))) => drop(self.links.remove(&worker)),
                    // Who asks something is answered by the end of his line.
                    Some((_, _)) => {}
                    None => return,
                }
            }
        };
        // Who does not leave in time is left behind.
        let _ = timeout(limit.min(Duration::from_secs(2)), leave).await;
    }
}

impl Link {
    /// A worker that does not take its messages is as good as silent, and will be noticed so.
    fn pass(&self, worker: WorkerId, message: Bytes) {
        if self.outbox.try_send(message).is_err() {
            tracing::warn!(%worker, "does not take its messages");
        }
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Gathering => "gathering",
        Phase::Recalling => "recalling",
        Phase::Forming => "forming",
        Phase::Running => "running",
        Phase::Ended => "ended",
    }
}

/// How a run ends whose workers cannot be told of their ring.
fn untold(places: usize, error: &WireError) -> RunEnd {
    let reason = format!(
        "a ring of {places} workers cannot be told: {error}; allow fewer ([elastic] max_workers), or make micro-batches larger"
    );
    RunEnd { outcome: Outcome::Failed, reason }
}

pub(super) fn failed(error: &Disagreement) -> RunEnd {
    RunEnd { outcome: Outcome::Failed, reason: error.to_string() }
}

fn disagree(worker: WorkerId, disagreement: &Disagreement) -> membership::Event {
    let text = disagreement.to_string();
    membership::Event::Failed(worker, Failure { text, blame: Blame::Run })
}

/// What is wrong with a report of this ring: in another's name, or larger than any that is true. Reports wait for each
/// other, so each must be small.
pub(super) fn misreport(
    ring: &Formation,
    worker: WorkerId,
    report: &StepReport,
    micro_batches: u32,
) -> Option<String> {
    if ring.places.get(report.rank as usize).is_none_or(|place| place.worker != worker) {
        return Some(format!("it reported a step as rank {}, which it is not", report.rank));
    }
    let computed = report.micro_batches.len();
    if computed > micro_batches as usize {
        return Some(format!("it reported {computed} micro-batches in a step of {micro_batches}"));
    }
    let all: u64 = report.counts.iter().map(|&count| u64::from(count)).sum();
    if !report.counts.is_empty()
        && (report.counts.len() != ring.places.len() || all != u64::from(micro_batches))
    {
        return Some(format!("it reported shares {:?} of {micro_batches} micro-batches", report.counts));
    }
    let kinds = report.held.iter().chain(&report.sent).map(|(name, _)| name);
    let names: Vec<&String> = report.seconds.iter().map(|(name, _)| name).chain(kinds).collect();
    let wordy = names.iter().any(|name| name.len() > PHASE_BYTES_MAX);
    (wordy || names.len() > PHASES_MAX)
        .then(|| format!("it reported more than {PHASES_MAX} phases or kinds, or longer names than any has"))
}
