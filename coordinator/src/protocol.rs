//! Control messages between workers and coordinator.
//!
//! rkyv archives, checked (bytecheck) before use; see [`wire`](crate::wire) for framing, limits and version. A
//! tensor never travels here: the coordinator learns what was computed, not its values.

#![allow(missing_docs, reason = "of the types that rkyv derives; every item here has its own")]

use rkyv::{Archive, Deserialize, Serialize};

use crate::ids::WorkerId;

/// What a worker asks for before it has a certificate.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Enroll {
    /// The join token's.
    pub secret: Vec<u8>,
    /// A certificate signing request for the worker's own key, DER.
    pub request: Vec<u8>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum Enrolled {
    /// A certificate for `worker`, DER.
    Certificate {
        /// The id that the certificate names.
        worker: WorkerId,
        /// DER.
        certificate: Vec<u8>,
    },
    /// Not admitted.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

/// What a worker tells of itself.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct About {
    /// Process id on its host.
    pub pid: u32,
    /// Host name.
    pub host: String,
    /// Where its ring neighbours reach it.
    pub address: String,
    /// Binary, device and processor features: equal ones give equal bits.
    pub fingerprint: String,
}

/// One rank's account of a step.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct StepReport {
    /// The ring in which it was done.
    pub generation: u64,
    /// Steps done, this one included.
    pub step: u64,
    /// The reporting rank.
    pub rank: u32,
    /// Mean over micro-batches, before the update.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Hash of the state before the step.
    pub hash_before: u64,
    /// Hash of the state after the step; where that is divided among workers, the next step tells it.
    pub state_hash: Option<u64>,
    /// Tokens of the whole step.
    pub tokens: u64,
    /// Blocks of sums that followed in 64 bits.
    pub wide_blocks: u64,
    /// Micro-batches that this rank computed.
    pub micro_batches: Vec<u32>,
    /// By rank: how many each had, in order; empty in a ring's first step, where the formation says which.
    pub counts: Vec<u32>,
    /// Bytes sent to the next rank in this step.
    pub tx_bytes: u64,
    /// Bytes received from the previous rank in this step.
    pub rx_bytes: u64,
    /// Bytes of state that this rank holds, by kind.
    pub held: Vec<(String, u64)>,
    /// Bytes of `tx_bytes` by the operation that they were sent for.
    pub sent: Vec<(String, u64)>,
    /// Seconds by phase.
    pub seconds: Vec<(String, f64)>,
}

/// Ranks whose shares change, for one is slower than others.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Rebalance {
    /// The ring's.
    pub generation: u64,
    /// The step after which they do.
    pub step: u64,
    /// Microseconds of a micro-batch, of the rank in the middle.
    pub median_micros: u32,
    /// Whose shares, and how.
    pub shifts: Vec<Shift>,
}

/// One rank's share that changes.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Shift {
    /// Whose.
    pub rank: u32,
    /// Micro-batches of a step until now.
    pub before: u32,
    /// From now on.
    pub after: u32,
    /// Microseconds that one takes it.
    pub micros: u32,
}

/// How a worker's part of the run ended.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Finish {
    /// Steps done.
    pub step: u64,
    /// Whether all steps are done; else it was asked to stop.
    pub completed: bool,
    /// Hash of the final state.
    pub state_hash: u64,
    /// Loss on held-out samples, from the rank that measured it.
    pub held_out_loss: Option<f64>,
    /// Loss of a unigram model of the training tokens, where the task has one.
    pub unigram_loss: Option<f64>,
    /// Parameters of the model.
    pub parameters: u64,
}

/// Whose fault it is that a worker cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Blame {
    /// The user's input: every worker would say the same.
    Input,
    /// The run's: every worker would meet the same.
    Run,
    /// This worker's alone: others may go on without it.
    Worker,
}

/// Why a worker cannot go on.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Failure {
    /// What happened, and what to do.
    pub text: String,
    /// Whose fault it is.
    pub blame: Blame,
}

/// A ring that does not hold any more, as one of its members sees it. The member is well, and waits for another ring.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Break {
    /// The ring's.
    pub generation: u64,
    /// The rank that was lost, where it is known.
    pub lost_rank: Option<u32>,
    /// What happened.
    pub text: String,
}

/// What a worker holds of the run's state, and of the step that comes next.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Holding {
    /// Steps done in its state; none where it has no state.
    pub step: Option<u64>,
    /// Micro-batches of the next step whose gradients it has added up.
    pub done: Vec<u32>,
    /// The one that it computes now, and will have added up before it takes part in another ring.
    pub running: Option<u32>,
    /// Hash of its state, where it knows that without the others.
    pub state_hash: Option<u64>,
    /// Hash of the parameters that it computes the next step with, once it does.
    pub basis: Option<u64>,
    /// Hash of a micro-batch's gradient as it computes it, where ranks have found different ones.
    pub audit: Option<u64>,
}

impl Holding {
    /// A state, and nothing of the next step.
    pub fn at(step: u64) -> Self {
        Self { step: Some(step), ..Self::default() }
    }
}

/// A worker whose coordinator has died, to the one that took over.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Return {
    /// As it said to the one before.
    pub about: About,
    /// The highest incarnation of a coordinator that it knows of.
    pub incarnation: u64,
}

/// Worker to coordinator.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum FromWorker {
    /// First message.
    Hello(About),
    /// May be put into a ring.
    Ready {
        /// Steps done in the state that it loaded; none where it is to get one from the others.
        step: Option<u64>,
    },
    /// The answer to a recall: this is what it holds, and nothing will be added to it before the next ring.
    Held {
        /// The ring that was recalled.
        generation: u64,
        /// What it holds.
        holding: Holding,
    },
    /// Its ring does not hold any more.
    Broken(Break),
    /// It was told to leave: to be left out of the next ring.
    Leaving {
        /// Why.
        reason: String,
    },
    /// Both links of this generation's ring are up.
    Linked {
        /// The ring's.
        generation: u64,
    },
    /// A step was committed.
    Step(StepReport),
    /// Shares of a ring change; its first rank says so.
    Rebalanced(Rebalance),
    /// A checkpoint is durable.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// Where it is.
        url: String,
        /// Its size.
        bytes: u64,
        /// From snapshot to manifest.
        seconds: f64,
    },
    /// Something that the user should know.
    Notice {
        /// In words.
        text: String,
    },
    /// Done.
    Finished(Finish),
    /// Cannot go on.
    Failed(Failure),
    /// Alive.
    Heartbeat,
    /// Alive, and this far.
    Pulse(Pulse),
    /// First message of a worker that was let in by a coordinator which has died.
    Return(Return),
    /// A ring that it was in; the reports that follow are of that ring. The oldest first.
    Past(Formation),
    /// What it holds since its coordinator has died, as the answer to a recall would be.
    Returned(Holding),
    /// First and only message of somebody who is no worker: the run is to have so many.
    Scale {
        /// On all hosts together.
        workers: u32,
    },
}

/// How far a worker's training is, as its listening thread sees it: a process may live although its training does not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Pulse {
    /// Grows with every piece of work that is begun or done.
    pub progress: u64,
    /// Whether it works, and does not wait for others.
    pub busy: bool,
    /// The longest that a piece of work has taken it so far.
    pub slowest_ms: u64,
}

/// A place in a ring.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Place {
    /// Who.
    pub worker: WorkerId,
    /// Where neighbours reach it.
    pub address: String,
    /// Micro-batches of each step that are its own.
    pub micro_batches: Vec<u32>,
    /// Those of the first step: what it holds of it already, and what is missing.
    pub first: Vec<u32>,
}

impl Place {
    /// Its micro-batches of the step after `done`, in a ring that starts at `start`.
    pub fn share(&self, start: u64, done: u64) -> &[u32] {
        if done == start { &self.first } else { &self.micro_batches }
    }
}

/// A ring: places in the order of ranks.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Formation {
    /// Grows with every ring.
    pub generation: u64,
    /// Steps done when it starts to train.
    pub step: u64,
    /// The rank that gives its state to everybody, where some have none of this step.
    pub source: Option<u32>,
    /// By rank.
    pub places: Vec<Place>,
}

/// Coordinator to worker.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum FromCoordinator {
    /// Admitted.
    Welcome {
        /// The run's id.
        run: String,
        /// The resolved recipe; opaque here.
        recipe: String,
        /// What else a worker must know; opaque here.
        settings: String,
        /// Whether the run is under way: its state comes from the others then, not from storage.
        under_way: bool,
        /// The coordinator's, where another could take over from it; else 0.
        incarnation: u64,
    },
    /// Not admitted.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// Link up with your neighbours.
    Form(Formation),
    /// This ring is over: drop it, and say what you hold.
    Recall {
        /// The ring's.
        generation: u64,
        /// Why.
        reason: String,
    },
    /// Nobody has the run's state any more: load it from storage, and be ready.
    Restore {
        /// The newest step that counts.
        up_to: u64,
    },
    /// All are linked: train.
    Start {
        /// The ring's.
        generation: u64,
    },
    /// It may leave: the others go on without it.
    Released {
        /// Why.
        reason: String,
    },
    /// Ask all ranks, at the next commit, to stop after that step.
    Stop,
    /// The run is over.
    End {
        /// Why.
        reason: String,
    },
    /// Alive.
    Heartbeat,
    /// The run is going to have as many workers as it was asked to.
    Scaling {
        /// How many there are now.
        there: u32,
    },
}
