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
    /// Hash of the state after the step.
    pub state_hash: u64,
    /// Tokens of the whole step.
    pub tokens: u64,
    /// Blocks of sums that followed in 64 bits.
    pub wide_blocks: u64,
    /// Micro-batches that this rank computed.
    pub micro_batches: Vec<u32>,
    /// Bytes sent to the next rank in this step.
    pub tx_bytes: u64,
    /// Bytes received from the previous rank in this step.
    pub rx_bytes: u64,
    /// Seconds by phase.
    pub seconds: Vec<(String, f64)>,
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

/// Why a worker cannot go on.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub struct Failure {
    /// What happened, and what to do.
    pub text: String,
    /// Whether it is the user's input that is at fault.
    pub bad_input: bool,
    /// The rank that was lost, where a ring broke.
    pub lost_rank: Option<u32>,
}

/// Worker to coordinator.
#[derive(Debug, Clone, PartialEq, Archive, Serialize, Deserialize)]
pub enum FromWorker {
    /// First message.
    Hello(About),
    /// State is loaded; may be put into a ring.
    Ready {
        /// Steps done.
        step: u64,
    },
    /// Both links of this generation's ring are up.
    Linked {
        /// The ring's.
        generation: u64,
    },
    /// A step was committed.
    Step(StepReport),
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
}

/// A ring: places in the order of ranks.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Formation {
    /// Grows with every ring.
    pub generation: u64,
    /// Steps done by all its members.
    pub step: u64,
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
    },
    /// Not admitted.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// Link up with your neighbours.
    Form(Formation),
    /// All are linked: train.
    Start {
        /// The ring's.
        generation: u64,
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
}
