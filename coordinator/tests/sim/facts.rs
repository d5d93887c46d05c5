//! What the simulation sees happen, as plain facts that invariants are held against.

use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::event::StepRecord;
use mattock_coordinator::membership::{Action, Event, Instruction, Phase};
use mattock_coordinator::protocol::StepReport;

/// One run's figures.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    /// Workers that the run was told to wait for.
    pub(crate) expected: u32,
    /// No more than this are admitted.
    pub(crate) max_workers: u32,
    /// M.
    pub(crate) micro_batches: u32,
    /// Steps of the whole run.
    pub(crate) steps: u64,
    /// Steps that were done before.
    pub(crate) start: u64,
    /// Whether different fingerprints may train together.
    pub(crate) mixed: bool,
}

impl Setup {
    /// Workers of the ring, if all goes well.
    pub(crate) fn quorum(&self) -> usize {
        self.expected.min(self.max_workers) as usize
    }
}

/// Why a run may end otherwise than by completing its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    /// Something happened to this worker, or between it and others.
    Trouble(WorkerId),
    /// The user wants to stop.
    Stop,
    /// The user's input is at fault.
    BadInput,
    /// Anything else that no worker is to blame for as lost.
    Failure,
}

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Fact<'a> {
    /// The registry took in an event.
    Decided {
        /// The event.
        event: &'a Event,
        /// What it decided.
        actions: &'a [Action],
        /// Where the run is now.
        phase: Phase,
        /// When it wants to be called again.
        deadline: Option<Duration>,
    },
    /// A message meant something to a worker.
    Instructed(WorkerId, &'a Instruction),
    /// A worker's links are up.
    Linked(WorkerId, u64),
    /// A worker holds the total of a step, and writes its state.
    Committed {
        /// Who.
        worker: WorkerId,
        /// Its ring.
        generation: u64,
        /// Steps done, this one included.
        step: u64,
        /// How often each micro-batch was counted.
        counts: &'a [u32],
    },
    /// A worker tells of a step.
    Reported(WorkerId, &'a StepReport),
    /// The ledger has the step.
    Recorded(&'a StepRecord),
    /// Something went wrong, or the user did something.
    Caused(Cause),
    /// From here on nothing goes wrong any more.
    FaultsStopped,
    /// Three timeouts later.
    TimeIsUp,
}

/// An invariant does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("after {at:?}, {invariant}: {text}")]
pub(crate) struct Violation {
    /// Since the start of the run.
    pub(crate) at: Duration,
    /// The name of its file.
    pub(crate) invariant: &'static str,
    /// What was seen.
    pub(crate) text: String,
}
