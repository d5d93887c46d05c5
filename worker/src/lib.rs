//! The worker: Burn training, exact gradient sums, checkpoints.

mod gradients;
mod params;
pub mod phases;
mod commit;
pub mod plan;
pub mod schedule;
pub mod state;
pub mod task;
