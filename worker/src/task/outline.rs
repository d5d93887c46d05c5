//! What memory and traffic of a training depend on: shapes, without values.

use crate::params::Space;

/// The shapes of a model and of its samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// Where parameters lie.
    pub space: Space,
    /// Tokens (or whatever throughput is counted in) of a sample.
    pub tokens_per_sample: u64,
    /// By block, where the task can tell.
    pub activations: Option<Vec<Activations>>,
}

/// What a block's forward pass leaves in memory, in bytes per sample: an estimate, for allocators round up and backward
/// needs room of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Activations {
    /// What its backward pass needs, beside its input.
    pub kept: u64,
    /// What it hands to the next block, which keeps it as its input.
    pub output: u64,
}
