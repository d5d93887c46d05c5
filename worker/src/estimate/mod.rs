//! What a training will need, from shapes alone: memory of a worker, bytes on the wire, time, and the size of a checkpoint.
//!
//! Every line of memory stands for something that the code allocates, and names the place in a comment (`memory.rs`). Lines are
//! of the *fullest* rank, in the midst of a step.
//!
//! # Invariants
//! 1. Pure: nothing is opened, drawn or allocated in proportion to the model.
//!
//! Deliberately absent: what does not grow with the model (code, threads, sockets, the mapped dataset), the allocator's
//! rounding and what it keeps, the commit's few words, and blocks of sums that follow in 64 bits. So a worker takes more than this:
//! `tests/plan.rs` prints measured peaks beside plans.

mod memory;
#[cfg(test)]
mod tests;
mod time;
mod ways;
mod wire;

use serde::Serialize;

pub use self::memory::{Kind, Line};
pub use self::time::{Rates, Times};
pub use self::ways::{Way, way};
pub use self::wire::Wire;
use crate::plan::{Plan, Shard, Sum};
use crate::task::Outline;
use mattock_exact::BLOCK;

/// What one worker of a training needs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Workers.
    pub workers: u32,
    /// Parameters, padding excluded.
    pub parameters: u64,
    /// Tokens of a step, over all workers.
    pub tokens_per_step: u64,
    /// Micro-batches that the busiest worker computes in a step.
    pub micro_batches: u64,
    /// Memory of the fullest worker in the midst of a step.
    pub memory: Vec<Line>,
    /// The sum of these.
    pub memory_bytes: u64,
    /// What it needs before the first step, from a checkpoint or without: the state, or its part of that.
    pub start_bytes: u64,
    /// What it needs after the last step, while the last checkpoint is written and the held-out loss measured.
    pub end_bytes: u64,
    /// What a rank sends in a step, as if each were on a host of its own.
    pub wire: Wire,
    /// Floating-point operations of the busiest worker in a step.
    pub flops: f64,
    /// A checkpoint in storage, but for names, the tokenizer and a few lines of text.
    pub checkpoint_bytes: u64,
}

impl Estimate {
    /// Of a training by so many workers.
    pub fn new(outline: &Outline, plan: &Plan, workers: u32) -> Self {
        let workers = workers.max(1);
        let space = &outline.space;
        let (memory, end_bytes) = memory::fullest(outline, plan, workers);
        let (elements, parameters) = (space.len() as u64, space.parameter_count() as u64);
        let micro_batches = u64::from(plan.batch.micro_batches().div_ceil(workers));
        let tokens = outline.tokens_per_sample * u64::from(plan.batch.micro);
        // Two operations a parameter and token forward, twice as many backward; where blocks are given up, forward again.
        let again = plan.recompute || plan.parallel.shard == Shard::Full;
        let passes = if again { 8.0 } else { 6.0 };
        // `checkpoint/src/format`: f32 of each parameter and its two moments, and an i16 per block of 256.
        let exponents = if has_exponents(plan) { 2 * elements / BLOCK as u64 } else { 0 };
        Self {
            workers,
            parameters,
            tokens_per_step: outline.tokens_per_sample * u64::from(plan.batch.size),
            micro_batches,
            memory_bytes: memory.iter().map(|line| line.bytes).sum(),
            // `Beginnings`: all of `State`, or where that is divided what `Trainer::regroup` makes of it, with a block as it is drawn.
            start_bytes: memory::PROGRAM + memory::state(&memory) + 8 * memory::largest(space),
            end_bytes,
            memory,
            wire: Wire::new(outline, plan, workers),
            flops: passes * parameters as f64 * (tokens * micro_batches) as f64,
            checkpoint_bytes: 12 * parameters + exponents,
        }
    }

    /// The most memory that a worker needs at any time of a run.
    pub fn peak_bytes(&self) -> u64 {
        self.memory_bytes.max(self.start_bytes).max(self.end_bytes)
    }

    /// The memory of one kind.
    pub fn bytes(&self, kind: Kind) -> u64 {
        self.memory.iter().filter(|line| line.kind == kind).map(|line| line.bytes).sum()
    }
}

/// Whether block exponents are part of the state.
fn has_exponents(plan: &Plan) -> bool {
    matches!(plan.reduce.sum, Sum::Exact | Sum::Exact64)
}
