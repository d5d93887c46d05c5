//! What the simulation sees happen, as plain facts that invariants are held against.

use std::collections::BTreeSet;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::event::StepRecord;
use mattock_coordinator::membership::{Action, Event, Instruction, Phase};
use mattock_coordinator::protocol::{Holding, StepReport};

use crate::state::State;

/// One run's figures.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    /// Workers that the run was told to wait for.
    pub(crate) expected: u32,
    /// With fewer the run waits.
    pub(crate) min_workers: u32,
    /// No more than this are admitted.
    pub(crate) max_workers: u32,
    /// M.
    pub(crate) micro_batches: u32,
    /// Steps of the whole run.
    pub(crate) steps: u64,
    /// Steps that were done before.
    pub(crate) start: u64,
    /// A checkpoint is written after each so many steps.
    pub(crate) checkpoint_every: u64,
    /// Whether different fingerprints may train together.
    pub(crate) mixed: bool,
    /// Whether a ring waits for somebody who is about to come in another's place.
    pub(crate) divided: bool,
}

impl Setup {
    /// Workers of the first ring.
    pub(crate) fn quorum(&self) -> usize {
        self.expected.min(self.max_workers) as usize
    }
}

/// Why a run may end otherwise than by completing its steps, or lose a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    /// Something happened to this worker, or between it and others: it may be lost.
    Trouble(WorkerId),
    /// A process has ended, and no other takes its place.
    Abandoned,
    /// This worker was told to leave.
    Leave(WorkerId),
    /// The user wants another number of workers: anybody may be sent away.
    Scale,
    /// The user wants to stop.
    Stop,
    /// The user's input is at fault.
    BadInput,
    /// A state is not what it should be.
    Corruption,
    /// This worker's is not, and the rest of its ring is a majority.
    Flipped(WorkerId),
    /// Anything else that ends a run.
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
    /// A worker has answered the recall of this generation.
    Told {
        /// Who.
        worker: WorkerId,
        /// The ring's.
        generation: u64,
        /// What it said.
        holding: &'a Holding,
    },
    /// A worker has got a state from another.
    Received(WorkerId, State),
    /// A worker begins the first step of a ring.
    Entered {
        /// Who.
        worker: WorkerId,
        /// The ring's.
        generation: u64,
        /// Steps done in its state.
        step: u64,
        /// What it has added up of the next.
        kept: &'a BTreeSet<u32>,
    },
    /// A worker begins to compute a micro-batch.
    Began {
        /// Who.
        worker: WorkerId,
        /// Its ring.
        generation: u64,
        /// Which.
        index: u32,
    },
    /// A worker holds the total of a step, and writes its state.
    Committed {
        /// Who.
        worker: WorkerId,
        /// Its ring.
        generation: u64,
        /// After the step.
        state: State,
        /// How often each micro-batch was counted.
        counts: &'a [u32],
    },
    /// A checkpoint is whole.
    Saved(State),
    /// The coordinator takes a report in.
    Counted(WorkerId, &'a StepReport),
    /// A worker tells of a step.
    Reported(WorkerId, &'a StepReport),
    /// The ledger has the step.
    Recorded(&'a StepRecord),
    /// Another coordinator has the run: it knows nobody yet.
    TookOver,
    /// Something went wrong, or the user did something.
    Caused(Cause),
    /// From here on nothing goes wrong any more.
    FaultsStopped,
    /// Three timeouts, and the time that the work takes, later.
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
