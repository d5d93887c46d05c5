//! A worker's process, as far as membership sees it: what worker/src/session.rs and control.rs do, around a real
//! [`Member`].
//!
//! Its listening thread takes messages in while its main thread loads, links, computes or waits; only a dead process,
//! a pause or a frozen host stops both. The state is a step count, and its hash a pure function of it.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Instruction, Member};
use mattock_coordinator::protocol::{
    About, Failure, Finish, Formation, FromCoordinator, FromWorker, StepReport,
};

use crate::facts::Fact;
use crate::network::Parcel;
use crate::seeds::trace;
use crate::sim::{Happening, Sim};
use crate::swarm::{HEARTBEATS, TIMEOUT};

const fn ms(range: RangeInclusive<u64>) -> RangeInclusive<Duration> {
    Duration::from_millis(*range.start())..=Duration::from_millis(*range.end())
}

/// What the main thread is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// The process starts.
    Booting,
    /// It said hello and awaits the welcome.
    Joining,
    /// It loads its state.
    Loading,
    /// It waits for instructions.
    Idle,
    /// It brings up links.
    Linking,
    /// It computes gradients.
    Computing,
    /// It has contributed to the commit of a step, and awaits the total.
    Exchanging,
    /// It writes the last checkpoint.
    Finishing,
    /// It is done with the run, and waits to hear how it ended.
    Leaving,
    /// The process has ended.
    Gone,
}

/// Its place in a ring that is linked.
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
    /// Steps done.
    pub(crate) step: u64,
    pub(crate) finished: bool,
    /// What is wrong with its memory: nothing, if 0.
    pub(crate) flipped: u64,
    /// How its work will fail, if so.
    pub(crate) ailing: Option<Failure>,
    /// Whether it reports steps twice.
    pub(crate) repeats: bool,
    pub(crate) paused_until: Option<Duration>,
    /// What waits for the end of the pause.
    pub(crate) deferred: Vec<Happening>,
    /// Its host is gone without a word.
    pub(crate) frozen: bool,
    bad_input: bool,
    stop: bool,
    /// Changes whenever the main thread turns to something else.
    token: u64,
    instructions: VecDeque<Instruction>,
}

impl Worker {
    pub(crate) fn is_gone(&self) -> bool {
        self.stage == Stage::Gone
    }

    /// Whether it may join yet.
    pub(crate) fn is_coming(&self) -> bool {
        matches!(self.stage, Stage::Booting | Stage::Joining)
    }

    /// How its process would end.
    pub(crate) fn bad_input(&self) -> bool {
        self.bad_input
    }

    /// The hash of its state: a pure function of the steps done, unless its memory is bad.
    pub(crate) fn state_hash(&self) -> u64 {
        (self.step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.flipped
    }
}

/// The loss of a step, by the same reasoning.
fn loss(step: u64) -> f64 {
    1.0 / (step + 1) as f64
}

impl Sim {
    /// That worker.
    pub(crate) fn worker(&mut self, id: WorkerId) -> &mut Worker {
        self.workers.get_mut(&id).unwrap()
    }

    /// Starts a process that wants to become a worker.
    pub(crate) fn boot(&mut self, fingerprint: &'static str, local: bool) -> WorkerId {
        let id = WorkerId(self.workers.len() as u64);
        let worker = Worker {
            id,
            local,
            fingerprint,
            stage: Stage::Booting,
            member: None,
            seat: None,
            step: self.setup.start,
            finished: false,
            flipped: 0,
            ailing: None,
            repeats: false,
            paused_until: None,
            deferred: Vec::new(),
            frozen: false,
            bad_input: false,
            stop: false,
            token: 0,
            instructions: VecDeque::new(),
        };
        self.workers.insert(id, worker);
        let takes = self.rng.duration(&ms(0..=500));
        self.turn_to(id, Stage::Booting, Some(takes));
        id
    }

    /// The main thread turns to something, and is woken when it is done.
    fn turn_to(&mut self, id: WorkerId, stage: Stage, takes: Option<Duration>) {
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

    fn report(&mut self, id: WorkerId, message: FromWorker) {
        self.send_up(id, Parcel::Message(message));
    }

    pub(crate) fn worker_beats(&mut self, id: WorkerId) {
        self.report(id, FromWorker::Heartbeat);
        self.schedule_in(TIMEOUT / HEARTBEATS, Happening::Heartbeat(id));
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
            Stage::Loading => {
                let step = worker.step;
                self.report(id, FromWorker::Ready { step });
                self.idle(id);
            }
            Stage::Linking => self.has_linked(id),
            Stage::Computing => self.exchange(id),
            Stage::Finishing => self.has_finished(id),
            // Nobody said what it waited for.
            Stage::Joining | Stage::Leaving => self.exit(id),
            Stage::Idle | Stage::Exchanging | Stage::Gone => {}
        }
    }

    fn say_hello(&mut self, id: WorkerId) {
        let fingerprint = self.worker(id).fingerprint.to_owned();
        let (pid, host, address) = (id.0 as u32, String::new(), format!("worker-{}", id.0));
        self.report(id, FromWorker::Hello(About { pid, host, address, fingerprint }));
        self.turn_to(id, Stage::Joining, Some(TIMEOUT));
    }

    /// The listening thread takes in what has arrived.
    pub(crate) fn worker_receives(&mut self, id: WorkerId) {
        let Some(parcel) = self.network.next_down(id) else { return };
        let worker = self.worker(id);
        let instruction = match (parcel, &mut worker.member) {
            (Parcel::Message(message), Some(member)) => member.receive(message),
            (Parcel::Message(FromCoordinator::Welcome { .. }), None) => return self.load(id),
            (Parcel::Message(_) | Parcel::Gone(_), None) => return self.exit(id),
            (Parcel::Gone(cause), Some(_)) => Some(Instruction::End { reason: cause.to_owned() }),
        };
        let Some(instruction) = instruction else { return };
        trace(|| format!("{:?} {id} is told: {instruction:?}", self.now));
        self.observe(&Fact::Instructed(id, &instruction));
        match &instruction {
            Instruction::Stop => return self.worker(id).stop = true,
            Instruction::Link { .. } | Instruction::End { .. } => self.cancel(id),
            Instruction::Train(_) => {}
        }
        self.worker(id).instructions.push_back(instruction);
        match self.worker(id).stage {
            Stage::Idle => self.follow(id),
            Stage::Leaving => self.say_goodbye(id),
            _ => {}
        }
    }

    fn load(&mut self, id: WorkerId) {
        self.worker(id).member = Some(Member::new(id));
        let takes = self.rng.duration(&ms(1..=1_000));
        self.turn_to(id, Stage::Loading, Some(takes));
        self.worker_beats(id);
    }

    fn idle(&mut self, id: WorkerId) {
        self.turn_to(id, Stage::Idle, None);
        self.follow(id);
    }

    /// Follows the coordinator from ring to ring.
    fn follow(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        match worker.instructions.pop_front() {
            Some(Instruction::Link { rank, formation }) => {
                if formation.step != worker.step {
                    return self.fail(id, nonsense("a ring for another step"));
                }
                worker.seat =
                    Some(Seat { rank, formation: formation.clone(), cancelled: false, broken: None });
                self.turn_to(id, Stage::Linking, None);
                self.call_neighbours(id, &formation, rank);
            }
            Some(Instruction::Train(_)) if worker.seat.is_none() => {
                self.fail(id, nonsense("a start without a ring"));
            }
            Some(Instruction::Train(_)) => self.next_step(id),
            Some(Instruction::End { .. }) => self.exit(id),
            Some(Instruction::Stop) | None => {}
        }
    }

    fn has_linked(&mut self, id: WorkerId) {
        let Some(generation) = self.worker(id).seat.as_ref().map(|seat| seat.formation.generation) else {
            return;
        };
        self.observe(&Fact::Linked(id, generation));
        self.report(id, FromWorker::Linked { generation });
        self.idle(id);
    }

    fn next_step(&mut self, id: WorkerId) {
        if self.worker(id).step >= self.setup.steps {
            return self.finish(id);
        }
        let takes = self.rng.duration(&ms(1..=100));
        self.turn_to(id, Stage::Computing, Some(takes));
    }

    /// Takes part in the commit of a step, if its ring still holds.
    fn exchange(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let (stop, step) = (worker.stop, worker.step + 1);
        let Some(seat) = worker.seat.clone() else { return };
        match (seat.cancelled, seat.broken) {
            (true, _) => self.leave(id),
            (false, Some(rank)) => self.fail(id, lost_neighbour(rank)),
            (false, None) => {
                self.turn_to(id, Stage::Exchanging, None);
                self.contribute(&seat, step, stop);
            }
        }
    }

    /// The total of a step is there: the state is written, and the coordinator told.
    pub(crate) fn worker_commits(&mut self, id: WorkerId, generation: u64, step: u64) {
        let Some(total) = self.rings.get(&generation).and_then(|ring| ring.total(step)).cloned() else {
            return;
        };
        let worker = self.worker(id);
        let Some(seat) = worker.seat.clone().filter(|seat| seat.formation.generation == generation) else {
            return;
        };
        if worker.stage != Stage::Exchanging || step != worker.step + 1 || seat.cancelled {
            return;
        }
        worker.step = step;
        self.observe(&Fact::Committed { worker: id, generation, step, counts: &total.counts });
        self.report_step(id, &seat);
        match total.stop {
            true => self.finish(id),
            false => self.next_step(id),
        }
    }

    fn report_step(&mut self, id: WorkerId, seat: &Seat) {
        let worker = self.worker(id);
        let (step, repeats) = (worker.step, worker.repeats);
        let report = StepReport {
            generation: seat.formation.generation,
            step,
            rank: seat.rank,
            loss: loss(step),
            grad_norm: 1.0,
            lr: 1.0,
            state_hash: worker.state_hash(),
            tokens: 1,
            wide_blocks: 0,
            micro_batches: seat.formation.places[seat.rank as usize].micro_batches.clone(),
            tx_bytes: 1,
            rx_bytes: 1,
            seconds: Vec::new(),
        };
        self.observe(&Fact::Reported(id, &report));
        if repeats {
            self.report(id, FromWorker::Step(report.clone()));
        }
        self.report(id, FromWorker::Step(report));
    }

    fn finish(&mut self, id: WorkerId) {
        let writes = self.worker(id).seat.as_ref().is_some_and(|seat| seat.rank == 0);
        let takes = match (writes, self.rng.chance(10)) {
            (false, _) => Duration::ZERO,
            (true, false) => self.rng.duration(&ms(1..=500)),
            // A far store takes longer than the timeout; the worker is heard of all the while.
            (true, true) => self.rng.duration(&ms(500..=15_000)),
        };
        self.turn_to(id, Stage::Finishing, Some(takes));
    }

    fn has_finished(&mut self, id: WorkerId) {
        let steps = self.setup.steps;
        let worker = self.worker(id);
        worker.finished = true;
        let writes = worker.seat.as_ref().is_some_and(|seat| seat.rank == 0);
        let finish = Finish {
            step: worker.step,
            completed: worker.step >= steps,
            state_hash: worker.state_hash(),
            held_out_loss: writes.then_some(0.5),
            unigram_loss: None,
            parameters: 1,
        };
        self.report(id, FromWorker::Finished(finish));
        self.idle(id);
    }

    /// The coordinator's word ends what the ring is at, but not a computation under way.
    fn cancel(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        // A ring that is being linked is not guarded yet.
        if worker.stage == Stage::Linking {
            return;
        }
        if let Some(seat) = &mut worker.seat {
            seat.cancelled = true;
            if worker.stage == Stage::Exchanging {
                self.leave(id);
            }
        }
    }

    pub(crate) fn worker_loses_neighbour(&mut self, id: WorkerId, generation: u64, rank: u32) {
        let worker = self.worker(id);
        let Some(seat) = worker.seat.as_mut().filter(|seat| seat.formation.generation == generation) else {
            return;
        };
        seat.broken = Some(rank);
        if worker.stage == Stage::Exchanging {
            self.fail(id, lost_neighbour(rank));
        }
    }

    /// Tells the coordinator why it cannot go on.
    fn fail(&mut self, id: WorkerId, failure: Failure) {
        trace(|| format!("{:?} {id} fails: {}", self.now, failure.text));
        self.worker(id).bad_input = failure.bad_input;
        self.report(id, FromWorker::Failed(failure));
        self.leave(id);
    }

    /// Drops its ring, and waits to hear how the run ends.
    fn leave(&mut self, id: WorkerId) {
        self.ring_breaks_at(id);
        self.worker(id).seat = None;
        self.turn_to(id, Stage::Leaving, Some(TIMEOUT));
        self.say_goodbye(id);
    }

    fn say_goodbye(&mut self, id: WorkerId) {
        while let Some(instruction) = self.worker(id).instructions.pop_front() {
            if matches!(instruction, Instruction::End { .. }) {
                return self.exit(id);
            }
        }
    }

    /// The process ends in good order.
    fn exit(&mut self, id: WorkerId) {
        self.ring_breaks_at(id);
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

fn nonsense(text: &str) -> Failure {
    Failure { text: text.to_owned(), bad_input: false, lost_rank: None }
}

fn lost_neighbour(rank: u32) -> Failure {
    Failure { text: format!("rank {rank} was lost"), bad_input: false, lost_rank: Some(rank) }
}
