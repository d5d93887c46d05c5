//! The coordinator's voice within a worker: a thread that listens while training computes.
//!
//! Training blocks in collectives; when the coordinator says that the ring or the run is over, this thread cancels the
//! ring at once, and training finds the reason here. A recall it answers itself, so that nobody waits for a computation.
//!
//! Where the coordinator itself is gone, this thread lets the step that is under way be finished, holds what there is, and
//! comes back with it to whoever takes over. Training sees a recall, and then the next ring.

mod linking;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mattock_collectives::{Group, Node};
use mattock_coordinator::membership::{Instruction, Member};
use mattock_coordinator::protocol::FromWorker;
use mattock_coordinator::{Client, ClientError, Report, Reporter};

use self::linking::{Linker, Outcome, Request};
use crate::gate::Gate;
use crate::journal::Journal;
use crate::succession::Succession;

pub(crate) use self::linking::Seat;

/// How often the thread looks whether it is still wanted.
const PULSE: Duration = Duration::from_millis(200);
/// How often, in parts of the timeout, the coordinator hears how far training is.
const PULSES_PER_TIMEOUT: u32 = 8;
/// Where the coordinator says nothing, it is looked for another this often in a timeout.
const SUCCESSORS_PER_TIMEOUT: u32 = 4;
/// Where the coordinator is gone, the step that is under way is waited for this part of the timeout: who comes back must be
/// there before it is missed.
const DRAIN: u32 = 2;
/// A worker that has said that it leaves begins nothing for this long, so that nothing of it is lost: it is let go in far less.
const LEAVE_PAUSE: Duration = Duration::from_millis(50);
/// Instructions that may wait: more than a run can have rings in a while.
const INSTRUCTIONS_MAX: usize = 64;

/// What both threads see.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    dismissed: AtomicBool,
    /// The run has ended, or goes on without this worker.
    over: AtomicBool,
    /// The newest ring that is to be linked.
    wanted: AtomicU64,
    /// The newest whose links are up, with its generation.
    ring: Mutex<(u64, Option<Arc<Group>>)>,
    gate: Gate,
    /// Why this worker is to leave, until the coordinator is told.
    leave: Mutex<Option<String>>,
    line: Mutex<Line>,
}

/// The way to the coordinator, if there is one now, and what it was told.
#[derive(Default)]
struct Line {
    reporter: Option<Reporter>,
    journal: Journal,
}

impl Shared {
    fn take_leave(&self) -> Option<String> {
        self.leave.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports something; without a coordinator, what the next one must know is kept for it.
    fn report(&self, report: Report) {
        let reporter = {
            let mut line = self.line();
            line.journal.keep(&report);
            line.reporter.clone()
        };
        // Not under the lock: it waits while the queue is full.
        if let Some(Err(error)) = reporter.map(|reporter| reporter.send(report)) {
            tracing::debug!(%error, "a report was not sent");
        }
    }

    /// Makes `group` the one that is cancelled when the coordinator says so.
    fn guard(&self, generation: u64, group: &Arc<Group>) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.0 <= generation {
            *ring = (generation, Some(Arc::clone(group)));
        }
    }

    /// Whether nobody waits for this ring's links any more: it is recalled, or another wanted, or the run is over for this worker.
    fn is_over(&self, generation: u64) -> bool {
        self.gate.is_recalled(generation)
            || self.wanted.load(Ordering::Relaxed) > generation
            || self.over.load(Ordering::Relaxed)
            || self.dismissed.load(Ordering::Relaxed)
    }

    fn cancel(&self, cause: &str) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).1.take();
        if let Some(ring) = ring {
            ring.cancel(cause);
        }
    }
}

/// The coordinator, as training sees it.
pub(crate) struct Control {
    shared: Arc<Shared>,
    instructions: Receiver<Instruction>,
    /// One for each ring that is to be linked, in the order of those instructions.
    seats: Receiver<Outcome>,
    threads: [JoinHandle<()>; 2],
}

impl Control {
    /// Links come from `node`. Without a `succession` the run ends for this worker with its coordinator.
    pub(crate) fn start(
        client: Client,
        node: Node,
        timeout: Duration,
        succession: Option<Succession>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.line().reporter = Some(client.reporter());
        let (sender, instructions) = mpsc::sync_channel(INSTRUCTIONS_MAX);
        let (links, requests) = mpsc::sync_channel(INSTRUCTIONS_MAX);
        let (seated, seats) = mpsc::sync_channel(INSTRUCTIONS_MAX);
        let linker = Linker { shared: Arc::clone(&shared), node, seats: seated };
        let member = Member::new(client.worker());
        let mut listener = Listener {
            shared: Arc::clone(&shared),
            instructions: sender,
            links,
            member,
            timeout,
            succession,
        };
        let linking = named("mattock-link").spawn(move || linker.link_all(&requests))?;
        let listening = named("mattock-listen").spawn(move || listener.listen_to_all(client))?;
        Ok(Self { shared, instructions, seats, threads: [listening, linking] })
    }

    /// Whether the user wants the run to stop.
    pub(crate) fn stop_requested(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    /// What this worker holds, as the coordinator may ask at any moment.
    pub(crate) fn gate(&self) -> &Gate {
        &self.shared.gate
    }

    /// Lets this worker leave the run when it hears of a reason: after the step that it is in, or after `patience` where that
    /// takes longer. The thread ends when `reasons` does.
    pub(crate) fn leave_on(&self, reasons: Receiver<String>, patience: Duration) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        named("mattock-leave").spawn(move || {
            while let Ok(reason) = reasons.recv() {
                *shared.leave.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                thread::sleep(patience);
                if let Some(reason) = shared.take_leave() {
                    shared.report(FromWorker::Leaving { reason });
                }
            }
        })?;
        Ok(())
    }

    /// Whether this ring is over, or the run for this worker.
    pub(crate) fn is_over(&self, generation: u64) -> bool {
        self.shared.is_over(generation)
    }

    /// Between two steps: tells the coordinator if this worker is to leave, and lets it a moment to end the ring before the next
    /// step is begun; not where the last `is_done`.
    pub(crate) fn leave_if_asked(&self, generation: u64, is_done: bool) {
        if let Some(reason) = self.shared.take_leave() {
            self.report(FromWorker::Leaving { reason });
            if !is_done {
                self.shared.gate.await_recall(generation, LEAVE_PAUSE);
            }
        }
    }

    /// The seat in the ring that the last [`Instruction::Link`] was of, once its links are up; nothing where they are not wanted
    /// any more. That they are too late, or the ring is recalled, ends the wait.
    ///
    /// # Errors
    /// What makes no sense in that ring.
    pub(crate) fn seat(&self) -> Result<Option<Seat>, String> {
        // Where nobody links up any more, the next instruction says why.
        self.seats.recv().unwrap_or(Ok(None))
    }

    /// Reports something. Where nobody listens any more, what comes next says so: [`next`](Self::next).
    pub(crate) fn report(&self, report: Report) {
        self.shared.report(report);
    }

    /// Waits for what to do next; `None` where nothing came in time, an end where the coordinator is gone.
    pub(crate) fn next(&self, limit: Duration) -> Option<Instruction> {
        match self.instructions.recv_timeout(limit) {
            Ok(instruction) => Some(instruction),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Instruction::End { reason: "the coordinator is gone".to_owned() })
            }
        }
    }

    /// Sends what is queued and ends the connection.
    pub(crate) fn close(self) {
        let Self { shared, seats, threads, .. } = self;
        shared.dismissed.store(true, Ordering::Relaxed);
        drop(seats);
        for thread in threads {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

fn named(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.to_owned())
}

/// The listening thread.
struct Listener {
    shared: Arc<Shared>,
    instructions: SyncSender<Instruction>,
    links: SyncSender<Request>,
    member: Member,
    timeout: Duration,
    succession: Option<Succession>,
}

impl Listener {
    /// Listens to one coordinator after the other, until the run is over for this worker.
    fn listen_to_all(&mut self, mut client: Client) {
        loop {
            let gone = self.listen(&client);
            let seen = client.incarnation();
            client.close();
            let Some(gone) = gone.filter(|_| !self.shared.over.load(Ordering::Relaxed)) else { return };
            match self.hold(&gone, seen) {
                Ok(next) => client = next,
                Err(reason) => {
                    self.shared.over.store(true, Ordering::Relaxed);
                    self.shared.cancel(&reason);
                    // Where training does not take it, the end of this thread says as much.
                    let _ = self.instructions.try_send(Instruction::End { reason });
                    return;
                }
            }
        }
    }

    /// Listens to a coordinator; returns why it is gone, or nothing where nobody listens any more.
    fn listen(&mut self, client: &Client) -> Option<String> {
        let (every, reporter) = (self.timeout / PULSES_PER_TIMEOUT, client.reporter());
        let (mut told, mut looked) = (Instant::now(), None);
        while !self.shared.dismissed.load(Ordering::Relaxed) {
            if told.elapsed() >= every && self.member.generation().is_some() {
                told = Instant::now();
                // Where nobody hears it, the next message says so.
                let _ = reporter.send(FromWorker::Pulse(self.shared.gate.pulse()));
            }
            let message = match client.receive(PULSE.min(every)) {
                Ok(Some(message)) => message,
                Ok(None) if client.is_silent() && self.is_alone(client.incarnation(), &mut looked) => {
                    return Some("the coordinator fell silent".to_owned());
                }
                Ok(None) => continue,
                Err(error) => return Some(error.to_string()),
            };
            let Some(instruction) = self.member.receive(message) else { continue };
            if let Err(gone) = self.prepare(&instruction, &reporter) {
                return Some(gone.to_string());
            }
            if instruction != Instruction::Stop {
                self.instructions.try_send(instruction).ok()?;
            }
        }
        None
    }

    /// Whether a coordinator that says nothing need not be waited for: another has taken over, or none ever will. Else it may only be
    /// late, and training needs it not.
    fn is_alone(&self, incarnation: u64, looked: &mut Option<Instant>) -> bool {
        let Some(succession) = &self.succession else { return true };
        let every = self.timeout / SUCCESSORS_PER_TIMEOUT;
        if looked.is_some_and(|at: Instant| at.elapsed() < every) {
            return false;
        }
        *looked = Some(Instant::now());
        succession.above(incarnation).is_some()
    }

    /// What an instruction means at once, whatever training is at.
    fn prepare(&self, instruction: &Instruction, reporter: &Reporter) -> Result<(), ClientError> {
        let shared = &self.shared;
        match instruction {
            Instruction::Stop => shared.stop.store(true, Ordering::Relaxed),
            Instruction::Recall { generation, reason } => {
                let (generation, holding) = (*generation, shared.gate.freeze(*generation));
                let told = reporter.send(FromWorker::Held { generation, holding });
                shared.cancel(reason);
                told?;
            }
            Instruction::Link { rank, formation } => {
                shared.line().journal.enter(formation);
                shared.wanted.store(formation.generation, Ordering::Relaxed);
                shared.cancel("another ring is formed");
                // As many may wait as instructions, and where those are not taken any more this worker ends.
                let _ = self.links.try_send((*rank, formation.clone()));
            }
            Instruction::End { reason } | Instruction::Leave { reason } => {
                shared.over.store(true, Ordering::Relaxed);
                shared.cancel(reason);
            }
            Instruction::Train(_) | Instruction::Restore { .. } => {}
        }
        Ok(())
    }

    /// The coordinator is gone: ends the ring after the step that is under way, and comes back to whoever takes over.
    fn hold(&self, gone: &str, seen: u64) -> Result<Client, String> {
        let shared = &self.shared;
        shared.line().reporter = None;
        let succession = self.succession.as_ref().filter(|_| seen > 0).ok_or(gone)?;
        tracing::warn!(
            "{gone}: finishing the step that is under way, and holding it for the next coordinator"
        );
        let generation = self.member.generation();
        if let Some(generation) = generation {
            shared.gate.drain(generation, self.timeout / DRAIN);
            let reason = "the coordinator is gone".to_owned();
            shared.cancel(&reason);
            let recalled = Instruction::Recall { generation, reason };
            self.instructions.try_send(recalled).map_err(|_| "training hangs".to_owned())?;
        }
        let client = succession.come_back(seen, self.timeout, &shared.dismissed)?;
        tracing::warn!("back at the run: coordinator of incarnation {}", client.incarnation());
        // Under the lock, so that nothing that training reports meanwhile comes before this.
        let mut line = shared.line();
        let holding = generation.filter(|_| !line.journal.is_ready());
        let holding = holding.map(|generation| FromWorker::Returned(shared.gate.freeze(generation)));
        let (reporter, standing) = (client.reporter(), line.journal.standing());
        for message in line.journal.retell().into_iter().chain(holding).chain(standing) {
            if reporter.send(message).is_err() {
                // It is gone too: the next message says so.
                break;
            }
        }
        line.reporter = Some(reporter);
        Ok(client)
    }
}
