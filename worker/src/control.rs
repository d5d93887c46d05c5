//! The coordinator's voice within a worker: a thread that listens while training computes.
//!
//! Training blocks in collectives; when the coordinator says that the ring or the run is over, this thread cancels the
//! ring at once, and training finds the reason here. A recall it answers itself, so that nobody waits for a computation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mattock_collectives::Group;
use mattock_coordinator::membership::{Instruction, Member};
use mattock_coordinator::protocol::FromWorker;
use mattock_coordinator::{Client, Report, Reporter};

use crate::gate::Gate;

/// How often the thread looks whether it is still wanted.
const PULSE: Duration = Duration::from_millis(200);
/// How often, in parts of the timeout, the coordinator hears how far training is.
const PULSES_PER_TIMEOUT: u32 = 8;
/// Instructions that may wait: more than a run can have rings in a while.
const INSTRUCTIONS_MAX: usize = 64;

/// What both threads see.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    dismissed: AtomicBool,
    /// The run has ended, or goes on without this worker.
    over: AtomicBool,
    ring: Mutex<Option<Arc<Group>>>,
    gate: Gate,
    /// Why this worker is to leave, until the coordinator is told.
    leave: Mutex<Option<String>>,
}

impl Shared {
    fn take_leave(&self) -> Option<String> {
        self.leave.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn cancel(&self, cause: &str) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ring) = ring {
            ring.cancel(cause);
        }
    }
}

/// The coordinator, as training sees it.
pub(crate) struct Control {
    shared: Arc<Shared>,
    reporter: Reporter,
    instructions: Receiver<Instruction>,
    thread: JoinHandle<()>,
}

impl Control {
    pub(crate) fn start(client: Client, timeout: Duration) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let reporter = client.reporter();
        let (sender, instructions) = mpsc::sync_channel(INSTRUCTIONS_MAX);
        let listener = Arc::clone(&shared);
        let thread = thread::Builder::new().name("mattock-listen".to_owned()).spawn(move || {
            listen(&client, &listener, &sender, timeout / PULSES_PER_TIMEOUT);
            client.close();
        })?;
        Ok(Self { shared, reporter, instructions, thread })
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
        let (shared, reporter) = (Arc::clone(&self.shared), self.reporter.clone());
        thread::Builder::new().name("mattock-leave".to_owned()).spawn(move || {
            while let Ok(reason) = reasons.recv() {
                *shared.leave.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                thread::sleep(patience);
                if let Some(reason) = shared.take_leave() {
                    // Where the coordinator is gone there is nothing to leave.
                    let _ = reporter.send(FromWorker::Leaving { reason });
                }
            }
        })?;
        Ok(())
    }

    /// Whether nobody waits for this ring's links any more: it is recalled, or the run is over for this worker.
    pub(crate) fn is_over(&self, generation: u64) -> bool {
        self.shared.gate.is_recalled(generation) || self.shared.over.load(Ordering::Relaxed)
    }

    /// Between two steps: tells the coordinator if this worker is to leave.
    pub(crate) fn leave_if_asked(&self) {
        if let Some(reason) = self.shared.take_leave() {
            self.report(FromWorker::Leaving { reason });
        }
    }

    /// Makes `ring` the one that is cancelled when the coordinator says so.
    pub(crate) fn guard(&self, ring: &Arc<Group>) {
        *self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(ring));
    }

    /// Reports something. Where nobody listens any more, what comes next says so: [`next`](Self::next).
    pub(crate) fn report(&self, report: Report) {
        if let Err(error) = self.reporter.send(report) {
            tracing::debug!(%error, "a report was not sent");
        }
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
        let Self { shared, reporter, thread, .. } = self;
        shared.dismissed.store(true, Ordering::Relaxed);
        drop(reporter);
        // A panic there has been printed already.
        let _ = thread.join();
    }
}

fn listen(client: &Client, shared: &Shared, instructions: &SyncSender<Instruction>, every: Duration) {
    let (mut member, reporter) = (Member::new(client.worker()), client.reporter());
    let mut told = Instant::now();
    while !shared.dismissed.load(Ordering::Relaxed) {
        if told.elapsed() >= every && member.generation().is_some() {
            told = Instant::now();
            // Where nobody hears it, the next message says so.
            let _ = reporter.send(FromWorker::Pulse(shared.gate.pulse()));
        }
        let message = match client.receive(PULSE.min(every)) {
            Ok(Some(message)) => message,
            Ok(None) => continue,
            Err(error) => {
                shared.over.store(true, Ordering::Relaxed);
                shared.cancel(&error.to_string());
                return;
            }
        };
        let Some(instruction) = member.receive(message) else { continue };
        match &instruction {
            Instruction::Stop => {
                shared.stop.store(true, Ordering::Relaxed);
                continue;
            }
            Instruction::Recall { generation, reason } => {
                let (generation, holding) = (*generation, shared.gate.freeze(*generation));
                if let Err(error) = reporter.send(FromWorker::Held { generation, holding }) {
                    return shared.cancel(&error.to_string());
                }
                shared.cancel(reason);
            }
            Instruction::Link { .. } => shared.cancel("another ring is formed"),
            Instruction::End { reason } | Instruction::Leave { reason } => {
                shared.over.store(true, Ordering::Relaxed);
                shared.cancel(reason);
            }
            Instruction::Train(_) | Instruction::Restore { .. } => {}
        }
        if instructions.try_send(instruction).is_err() {
            return;
        }
    }
}
