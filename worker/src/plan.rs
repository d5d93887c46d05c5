//! The checked plan of a run: what a recipe says, with every default filled in and every value in range.
//!
//! The root package parses what the user wrote and builds this; behind it nothing is optional or unchecked. The
//! `[model]` and `[data]` tables stay opaque here: they belong to the [`Task`](crate::task::Task).
//!
//! Deliberately absent: the number of workers. It is scheduling, and leaves no trace in the result.

use std::time::Duration;

pub use mattock_exact::Bits;
use serde::{Deserialize, Serialize};

/// A table of the recipe that belongs to the task.
pub type Table = serde_json::Map<String, serde_json::Value>;

/// Everything that defines a run's result, and how it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The recipe's name.
    pub name: String,
    /// Root of all randomness: initial parameters, sample order, dropout.
    pub seed: u64,
    /// The task's `[model]` table.
    pub model: Table,
    /// The task's `[data]` table; paths are absolute.
    pub data: Table,
    /// Whether a block's activations are given up after forward, and computed again on the way back: it costs time, saves memory, and
    /// leaves no trace in the result.
    pub recompute: bool,
    /// Shape of a step.
    pub batch: Batch,
    /// The optimizer and its schedule.
    pub optimizer: AdamW,
    /// Number of steps of the whole run.
    pub steps: u64,
    /// How gradients are summed.
    pub reduce: Reduce,
    /// Where and when checkpoints are written.
    pub checkpoint: Checkpoint,
    /// How state is divided among workers.
    pub parallel: Parallel,
    /// Bounds on the number of workers, and the one knob for time.
    pub elastic: Elastic,
}

/// A step's batch: `size / micro` micro-batches of one fixed shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Sequences (samples) per step.
    pub size: u32,
    /// Sequences (samples) per micro-batch; divides `size`.
    pub micro: u32,
}

impl Batch {
    /// M, the number of micro-batches of a step.
    pub fn micro_batches(&self) -> u32 {
        self.size / self.micro
    }
}

/// AdamW with decoupled weight decay (Loshchilov and Hutter, 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first and second moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Applied to parameters of two or more dimensions.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; nothing is clipped where absent.
    pub clip: Option<f64>,
    /// Learning rate over the steps.
    pub schedule: Schedule,
}

/// Learning rate over the steps, as a factor of the peak.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Schedule {
    /// Linear warm-up, then constant.
    Constant {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
    },
    /// Linear warm-up, then half a cosine down to `final` at the last step.
    Cosine {
        /// Steps of warm-up.
        #[serde(default)]
        warmup: u64,
        /// Factor at the last step.
        #[serde(rename = "final", default)]
        last: f64,
    },
}

/// How gradients are summed over micro-batches and ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reduce {
    /// The arithmetic of the sum.
    pub sum: Sum,
    /// The bits of an exact sum that cross the ring; 32 for all others, and where they are still to be chosen.
    pub bits: Bits,
    /// Whether the run's first ring chooses the bits, by its links.
    pub auto: bool,
    /// What to do about infinities and NaN in a gradient.
    pub nonfinite: NonFinite,
}

/// The arithmetic of the gradient sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sum {
    /// Integers of [`Reduce::bits`] with bounds; the rare wide blocks follow in 64 bits. Same result for any number of
    /// workers.
    Exact,
    /// 64-bit integers throughout: the reference for [`Sum::Exact`], with the same result.
    Exact64,
    /// Plain f32: deterministic for one world size only.
    F32,
    /// bf16 on the wire: deterministic for one world size only.
    Bf16,
}

/// What to do about infinities and NaN in a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// End the run with an error before anything is written.
    Stop,
    /// Leave the parameters as they are in this step, and go on.
    Skip,
}

/// How state is divided among workers: like their number, it leaves no trace in the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parallel {
    /// What is divided.
    pub shard: Shard,
    /// Whether each shard has a second holder, so that a worker's death costs no checkpoint.
    pub buddies: bool,
}

/// What is divided among workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shard {
    /// Nothing: each has all state.
    None,
    /// The optimizer's moments and the update (ZeRO-1; Rajbhandari et al., 2020); parameters are gathered before each step.
    Optimizer,
    /// Parameters, too: a block's are gathered just before it is computed, and given up after (ZeRO-3, FSDP; Zhao et al., 2023).
    Full,
}

/// Where and when checkpoints are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// A folder or URL (`file://`, `s3://`); `{out}` stands for the run's folder.
    pub to: String,
    /// Steps between checkpoints; 0 for one at the end only.
    pub every: u64,
    /// Complete checkpoints to keep.
    pub keep: u32,
    /// Beside these, those of every so many steps are kept; none for 0.
    pub keep_every: u64,
    /// Bytes that a worker's uploads hold at a time, beside its copy of the state.
    pub memory: u64,
}

/// Bounds on the number of workers, and the one knob for time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elastic {
    /// The run waits for this many workers.
    pub min_workers: u32,
    /// No more workers than this are admitted.
    pub max_workers: u32,
    /// How long a silent peer is waited for. Every other interval derives from it.
    pub timeout: Duration,
    /// Micro-batches of a million that a second rank computes too.
    pub audit: u32,
}
