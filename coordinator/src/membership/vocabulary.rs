//! What a registry is told, and what it decides: plain data on both sides.

use std::fmt;
use std::time::Duration;

use crate::ids::WorkerId;
use crate::protocol::{Break, Failure, Finish, Formation, Holding, Pulse};

/// What a registry must know of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// M of the recipe.
    pub micro_batches: u32,
    /// Workers to wait for before the first ring.
    pub expected: u32,
    /// With fewer workers than this, the run waits.
    pub min_workers: u32,
    /// No more than this are admitted.
    pub max_workers: u32,
    /// How long a silent worker is waited for.
    pub timeout: Duration,
    /// Whether workers with different fingerprints may train together.
    pub mixed: bool,
    /// Whether each worker holds a part of the state, which moves to others when their number changes.
    pub divided: bool,
}

impl Config {
    /// Workers of the first ring: no more are waited for than are admitted.
    pub(super) fn quorum(&self) -> usize {
        self.expected.min(self.max_workers) as usize
    }
}

/// A worker that wants to take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Where ring neighbours reach it.
    pub address: String,
    /// Binary, device and processor features.
    pub fingerprint: String,
}

/// What happens to a registry.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A worker said hello.
    Joined(WorkerId, Candidate),
    /// A worker said hello that a coordinator before this one had let in.
    CameBack(WorkerId, Candidate),
    /// It tells of a ring that it was in.
    Past(WorkerId, Formation),
    /// It says what it holds.
    Returned(WorkerId, Holding),
    /// Anything was heard of a worker.
    Heard(WorkerId),
    /// A worker said how far its training is.
    Pulse(WorkerId, Pulse),
    /// A worker may be put into a ring; with the steps done in the state that it has loaded, if it has one.
    Ready(WorkerId, Option<u64>),
    /// A worker's links of this generation are up.
    Linked(WorkerId, u64),
    /// A worker's answer to the recall of this generation.
    Held(WorkerId, u64, Holding),
    /// A worker's ring does not hold any more.
    Broken(WorkerId, Break),
    /// All ranks have committed a step.
    Stepped,
    /// Ranks tell of different states after the same step.
    Disagreed(String),
    /// A worker is done.
    Finished(WorkerId, Finish),
    /// A worker cannot go on.
    Failed(WorkerId, Failure),
    /// A worker was told to leave.
    Leaving(WorkerId, String),
    /// A worker's process or connection is gone.
    Lost(WorkerId, String),
    /// A process has ended, and nobody starts another in its place.
    Abandoned {
        /// How it ended.
        cause: String,
        /// Whether it said that the user's input is at fault.
        bad_input: bool,
        /// Processes that may still become workers, or are.
        left: usize,
    },
    /// A process has ended, and another was started in its place.
    Replaced,
    /// The user wants no more workers than this: the newest leave.
    Shrink(u32),
    /// The user wants to stop.
    StopRequested,
    /// Time has passed.
    Tick,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Completed(Finish),
    /// Stopped on request, after a checkpoint.
    Stopped(Finish),
    /// The user's input is at fault.
    BadInput,
    /// The last worker was lost, and no other comes.
    WorkerLost(WorkerId),
    /// Something else.
    Failed,
}

/// How a worker differs from more than half of its ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dissent {
    /// Steps done.
    pub step: u64,
    /// What differs: the state, or the parameters that are computed with.
    pub what: &'static str,
    /// Its hash.
    pub got: u64,
    /// That of the others.
    pub want: u64,
    /// How many ranks agree on that.
    pub agreed: usize,
    /// Of how many.
    pub ranks: usize,
}

impl fmt::Display for Dissent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, what, got, want, agreed, ranks } = self;
        write!(
            f,
            "its {what} after step {step} has hash {got:016x}, that of {agreed} of {ranks} ranks is {want:016x}: its memory or \
             processor did something wrong"
        )
    }
}

/// What the driver does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Let the worker in.
    Admit(WorkerId),
    /// Send it away before it was let in.
    Refuse(WorkerId, String),
    /// It is lost: should it still be there, nothing that it says counts any more.
    Lose(WorkerId, String),
    /// Its state is not that of the majority: nothing of what it has said of open steps counts. It is lost next.
    Quarantine(WorkerId, Dissent),
    /// It leaves, and is free to go.
    Release(WorkerId, String),
    /// End this ring: each of these members says what it holds.
    Recall {
        /// The ring's.
        generation: u64,
        /// Members that are still there.
        members: Vec<WorkerId>,
        /// Why.
        reason: String,
    },
    /// These workers load the state from storage, for nobody has it any more.
    Restore(Vec<WorkerId>),
    /// Training waits for more workers.
    Wait {
        /// How many are ready.
        ready: usize,
        /// How many it takes.
        needed: usize,
    },
    /// Give a ring to all its members.
    Form(Formation),
    /// Tell all members of the ring to train.
    Start(Formation),
    /// Ask all members to stop after a step.
    Stop,
    /// The run is over: tell everybody.
    End(Outcome, String),
}

/// Where the run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for workers.
    Gathering,
    /// A ring is over; its members say what they hold.
    Recalling,
    /// Members link up.
    Forming,
    /// Members train.
    Running,
    /// Over.
    Ended,
}
