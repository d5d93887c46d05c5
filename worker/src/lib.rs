//! The worker: Burn training, exact gradient sums, checkpoints.

pub mod plan;
