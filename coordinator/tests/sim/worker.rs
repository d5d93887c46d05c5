//! A worker's process, and its listening thread: what worker/src/control.rs does, around a real [`Member`].
//!
//! The listening thread takes messages in while the main thread loads, links, computes or waits, and answers a recall by
//! itself; only a dead process, a pause or a frozen host stops both. [`session`](crate::session) is the main thread.

use std::collections::{BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Instruction, Member};
use mattock_coordinator::protocol::{
    About, Failure, Finish, Formation, FromCoordinator, FromWorker, Holding, Pulse,
};

use crate::facts::Fact;
use crate::network::Parcel;
use crate::seeds::trace;
use crate::sim::{Happening, Sim};
use crate::state::{Gate, State};
use crate::succession::Journal;
use crate::swarm::{HEARTBEATS, TIMEOUT};

pub(crate) const fn ms(range: RangeInclusive<u64>) -> RangeInclusive<Duration> {
    Duration::from_millis(*range.start())..=Duration::from_millis(*range.end())
}

/// What the main thread is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// The process starts.
    Booting,
    /// It said hello and awaits the welcome.
    Joining,
    /// It opens its task, or loads a state from storage.
    Loading,
    /// It waits for instructions.
    Idle,
    /// It brings up links.
    Linking,
    /// It gives its state to others, or gets one.
    Transferring,
    /// It computes a micro-batch.
    Computing,
    /// It has contributed to the commit of a step, and awaits the total.
    Exchanging,
    /// It writes its state after a commit, and reports.
    Writing,
    /// It writes the last checkpoint.
    Finishing,
    /// It is done with the run, and waits to hear how it ended.
    Leaving,
    /// The process has ended.
    Gone,
}

/// Its place in a ring.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    pub(crate) rank: u32,
    pub(crate) formation: Formation,
    /// The coordinator said that it is over.
    pub(crate) cancelled: bool,
    /// The neighbour that was lost.
    pub(crate) broken: Option<u32>,
}

/// A worker's process.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) local: bool,
    pub(crate) fingerprint: &'static str,
    pub(crate) stage: Stage,
    pub(crate) member: Option<Member>,
    pub(crate) seat: Option<Seat>,
    pub(crate) state: State,
    /// Whether that is the state of some step, all of it.
    pub(crate) whole: bool,
    /// Micro-batches of the next step that it has added up.
    pub(crate) counted: BTreeSet<u32>,
    /// The one that it computes.
    pub(crate) computes: u32,
    pub(crate) finish: Option<Finish>,
    pub(crate) gate: Gate,
    /// Where it loads from storage: the newest step that counts.
    pub(crate) restores: Option<u64>,
    pub(crate) instructions: VecDeque<Instruction>,
    /// How its work will fail, if so.
    pub(crate) ailing: Option<Failure>,
    /// Pieces of work, begun and done; since when it is at one, and the longest so far.
    pieces: u64,
    busy_since: Option<Duration>,
    slowest: Duration,
    /// Whether its next micro-batch takes longer than the timeout.
    pub(crate) slow: bool,
    /// Whether it reports steps twice.
    pub(crate) repeats: bool,
    pub(crate) paused_until: Option<Duration>,
    /// What waits for the end of the pause.
    pub(crate) deferred: Vec<Happening>,
    /// Its host is gone without a word.
    pub(crate) frozen: bool,
    /// Its listening thread hangs; that which says that it is alive does not.
    pub(crate) deaf: bool,
    /// Whether the user asked it to stop.
    pub(crate) stop: bool,
    /// How its process ends: as it should, for bad input, or otherwise.
    pub(crate) status: Option<Status>,
    /// Processes before it in its place that have ended without a step.
    pub(crate) fruitless: u32,
    /// The recall that its listening thread answers once a step is written.
    owes: Option<(u64, String)>,
    /// What has arrived, and waits for the listening thread.
    backlog: VecDeque<Parcel<FromCoordinator>>,
    /// Changes whenever the main thread turns to something else.
    token: u64,
    /// The coordinator that it is connected to, or was last.
    pub(crate) to: u64,
    /// Whether it is.
    pub(crate) line: bool,
    /// The run is over for it.
    pub(crate) over: bool,
    /// The ring whose step it finishes without a coordinator.
    pub(crate) drains: Option<u64>,
    /// Until when it looks for the next coordinator.
    pub(crate) looks_until: Option<Duration>,
    pub(crate) journal: Journal,
}

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Success,
    BadInput,
    Failure,
}

impl Worker {
    fn new(id: WorkerId, fingerprint: &'static str, local: bool, state: State) -> Self {
        Self {
            id,
            local,
            fingerprint,
            stage: Stage::Booting,
            member: None,
            seat: None,
            state,
            whole: false,
            counted: BTreeSet::new(),
            computes: 0,
            finish: None,
            gate: Gate::default(),
            restores: None,
            instructions: VecDeque::new(),
            ailing: None,
            pieces: 0,
            busy_since: None,
            slowest: Duration::ZERO,
            slow: false,
            repeats: false,
            paused_until: None,
            deferred: Vec::new(),
            frozen: false,
            deaf: false,
            stop: false,
            status: None,
            fruitless: 0,
            owes: None,
            backlog: VecDeque::new(),
            token: 0,
            to: 0,
            line: false,
            over: false,
            drains: None,
            looks_until: None,
            journal: Journal::default(),
        }
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.stage == Stage::Gone
    }

    /// Whether it may join yet.
    pub(crate) fn is_coming(&self) -> bool {
        matches!(self.stage, Stage::Booting | Stage::Joining)
    }

    /// Whether it is without a coordinator, and on its way to the next.
    pub(crate) fn comes_back(&self) -> bool {
        !self.is_gone() && (self.drains.is_some() || self.looks_until.is_some())
    }

    /// What it holds once this ring is over, unless a step is being written.
    pub(crate) fn freeze(&mut self, generation: u64) -> Option<Holding> {
        let holding = self.gate.freeze(generation)?;
        Some(Holding { state_hash: holding.step.map(|_| self.state.hash), ..holding })
    }

    /// Its ring's number.
    pub(crate) fn generation(&self) -> Option<u64> {
        self.seat.as_ref().map(|seat| seat.formation.generation)
    }
}

impl Sim {
    /// That worker.
    pub(crate) fn worker(&mut self, id: WorkerId) -> &mut Worker {
        self.workers.get_mut(&id).unwrap()
    }

    /// Starts a process that wants to become a worker.
    pub(crate) fn boot(&mut self, fingerprint: &'static str, local: bool) -> WorkerId {
        let id = WorkerId(self.workers.len() as u64);
        let start = self.serial(self.setup.start);
        let mut worker = Worker::new(id, fingerprint, local, start);
        worker.gate.broken = self.sabotage == Some(crate::sabotage::Sabotage::GoesOn);
        self.workers.insert(id, worker);
        let takes = self.rng.duration(&ms(0..=500));
        self.turn_to(id, Stage::Booting, Some(takes));
        id
    }

    /// The main thread turns to something, and is woken when it is done.
    pub(crate) fn turn_to(&mut self, id: WorkerId, stage: Stage, takes: Option<Duration>) {
        trace(|| format!("{:?} {id} is {stage:?}", self.now));
        let worker = self.worker(id);
        worker.stage = stage;
        worker.token += 1;
        let token = worker.token;
        if let Some(takes) = takes {
            self.schedule_in(takes, Happening::Wake(id, token));
        }
    }

    /// Links to both neighbours come up in a while.
    pub(crate) fn link_soon(&mut self, id: WorkerId) {
        let (takes, token) = (self.rng.duration(&ms(1..=200)), self.worker(id).token);
        self.schedule_in(takes, Happening::Wake(id, token));
    }

    /// Tells the coordinator, if there is one.
    pub(crate) fn report(&mut self, id: WorkerId, message: FromWorker) {
        let worker = self.worker(id);
        worker.journal.keep(&message);
        if worker.line {
            self.send_up(id, Parcel::Message(message));
        }
    }

    pub(crate) fn worker_beats(&mut self, id: WorkerId) {
        self.report(id, FromWorker::Heartbeat);
        let worker = self.worker(id);
        let listens = !worker.deaf && worker.owes.is_none();
        if listens && worker.member.as_ref().is_some_and(|member| member.generation().is_some()) {
            let (progress, busy) = (worker.pieces, worker.busy_since.is_some());
            let slowest_ms = worker.slowest.as_millis() as u64;
            self.report(id, FromWorker::Pulse(Pulse { progress, busy, slowest_ms }));
        }
        self.schedule_in(TIMEOUT / HEARTBEATS, Happening::Heartbeat(id));
    }

    /// A piece of work ends, and another begins, or it is others' turn.
    pub(crate) fn works(&mut self, id: WorkerId, busy: bool) {
        let now = self.now;
        let worker = self.worker(id);
        if let Some(since) = worker.busy_since {
            worker.slowest = worker.slowest.max(now - since);
        }
        worker.pieces += 1;
        worker.busy_since = busy.then_some(now);
    }

    /// What the main thread was doing is done.
    pub(crate) fn worker_wakes(&mut self, id: WorkerId, token: u64) {
        let worker = self.worker(id);
        if worker.token != token {
            return;
        }
        let works =
            matches!(worker.stage, Stage::Loading | Stage::Linking | Stage::Computing | Stage::Finishing);
        if let Some(failure) = worker.ailing.take_if(|_| works) {
            return self.fail(id, failure);
        }
        match worker.stage {
            Stage::Booting => self.say_hello(id),
            Stage::Loading => self.has_loaded(id),
            Stage::Linking => self.has_linked(id),
            Stage::Computing => self.has_computed(id),
            Stage::Writing => self.has_written(id),
            Stage::Finishing => self.has_finished(id),
            // Nobody said what it waited for.
            Stage::Joining | Stage::Leaving => self.exit(id, Status::Failure),
            Stage::Idle | Stage::Transferring | Stage::Exchanging | Stage::Gone => {}
        }
    }

    fn say_hello(&mut self, id: WorkerId) {
        let to = self.coordinator.incarnation;
        let worker = self.worker(id);
        (worker.to, worker.line) = (to, true);
        let fingerprint = worker.fingerprint.to_owned();
        let (pid, host, address) = (id.0 as u32, String::new(), format!("worker-{}", id.0));
        self.report(id, FromWorker::Hello(About { pid, host, address, fingerprint }));
        self.turn_to(id, Stage::Joining, Some(TIMEOUT));
    }

    /// The listening thread takes in what has arrived, unless it hangs or waits for a step to be written.
    pub(crate) fn worker_receives(&mut self, id: WorkerId, number: u64) {
        if let Some(parcel) = self.network.next_down(id, number) {
            self.worker(id).backlog.push_back(parcel);
            self.listen(id);
        }
    }

    /// Works off what has arrived.
    pub(crate) fn listen(&mut self, id: WorkerId) {
        loop {
            let worker = self.worker(id);
            if worker.deaf || worker.owes.is_some() || worker.is_gone() {
                return;
            }
            let Some(parcel) = worker.backlog.pop_front() else { return };
            self.hear(id, parcel);
        }
    }

    fn hear(&mut self, id: WorkerId, parcel: Parcel<FromCoordinator>) {
        let lease = self.lease;
        let worker = self.worker(id);
        let instruction = match (parcel, &mut worker.member) {
            (Parcel::Message(message), Some(member)) => member.receive(message),
            // Another has the run.
            (Parcel::Message(FromCoordinator::Welcome { incarnation, .. }), None) if incarnation < lease => {
                return self.exit(id, Status::Failure);
            }
            (Parcel::Message(FromCoordinator::Welcome { under_way, .. }), None) => {
                worker.member = Some(Member::new(id));
                worker.whole = !under_way;
                let takes = self.rng.duration(&ms(1..=1_000));
                self.turn_to(id, Stage::Loading, Some(takes));
                return self.worker_beats(id);
            }
            (Parcel::Message(_) | Parcel::Gone(_), None) => return self.exit(id, Status::Failure),
            (Parcel::Gone(cause), Some(_)) => return self.lose_line(id, cause),
        };
        let Some(instruction) = instruction else { return };
        trace(|| format!("{:?} {id} is told: {instruction:?}", self.now));
        self.observe(&Fact::Instructed(id, &instruction));
        match &instruction {
            Instruction::Stop => return self.worker(id).stop = true,
            Instruction::Recall { generation, reason } => return self.answer(id, *generation, reason),
            Instruction::Link { formation, .. } => {
                self.worker(id).journal.enter(formation);
                self.cancel(id);
            }
            Instruction::End { .. } | Instruction::Leave { .. } => {
                self.worker(id).over = true;
                self.cancel(id);
            }
            Instruction::Train(_) | Instruction::Restore { .. } => {}
        }
        self.instruct(id, instruction);
    }

    /// Says what it holds, as soon as no step is being written.
    fn answer(&mut self, id: WorkerId, generation: u64, reason: &str) {
        let worker = self.worker(id);
        let Some(holding) = worker.freeze(generation) else {
            worker.owes = Some((generation, reason.to_owned()));
            return;
        };
        trace(|| format!("{:?} {id} holds {holding:?}", self.now));
        self.observe(&Fact::Told { worker: id, generation, holding: &holding });
        self.report(id, FromWorker::Held { generation, holding });
        self.cancel(id);
        self.instruct(id, Instruction::Recall { generation, reason: reason.to_owned() });
    }

    /// The step is written and reported: the listening thread need not wait any more.
    pub(crate) fn has_reported(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        worker.gate.reported();
        if let Some((generation, reason)) = worker.owes.take() {
            self.answer(id, generation, &reason);
            self.listen(id);
        }
        self.hold_now(id);
    }

    /// Hands an instruction to the main thread.
    pub(crate) fn instruct(&mut self, id: WorkerId, instruction: Instruction) {
        let worker = self.worker(id);
        let recalled = match &instruction {
            Instruction::Recall { generation, .. } => Some(*generation),
            // Who links up is told of the end of the run, or of its part in it, too.
            Instruction::End { .. } | Instruction::Leave { .. } => worker.generation(),
            _ => None,
        };
        worker.instructions.push_back(instruction);
        match worker.stage {
            Stage::Idle => self.follow(id),
            Stage::Leaving => self.say_goodbye(id),
            // It looks every few milliseconds whether the ring is still wanted.
            Stage::Linking if recalled.is_some() && recalled >= worker.generation() => self.idle(id),
            _ => {}
        }
    }

    /// The coordinator's word ends what the ring is at, but not a computation under way.
    pub(crate) fn cancel(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        // A ring that is being linked is not guarded yet.
        if worker.stage == Stage::Linking {
            return;
        }
        if let Some(seat) = &mut worker.seat {
            seat.cancelled = true;
            if matches!(worker.stage, Stage::Exchanging | Stage::Transferring) {
                self.part_ends(id);
            }
        }
    }

    /// The process ends in good order.
    pub(crate) fn exit(&mut self, id: WorkerId, status: Status) {
        self.drop_seat(id);
        self.worker(id).status.get_or_insert(status);
        self.send_up(id, Parcel::Gone("it has left"));
        self.process_ends(id);
    }

    /// The process has ended, in whatever way; a launcher learns of it soon.
    pub(crate) fn process_ends(&mut self, id: WorkerId) {
        self.turn_to(id, Stage::Gone, None);
        if self.worker(id).local {
            let takes = self.rng.duration(&ms(0..=100));
            self.schedule_in(takes, Happening::Exited(id));
        }
    }
}
