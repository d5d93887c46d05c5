//! The training state: all that one step hands to the next.

use mattock_exact::{Exponents, state_hash};

use crate::params::{Space, values};
use crate::task::Task;

/// Parameters, moments and exponents after `step` steps, each over the whole flat space.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Parameters.
    pub parameters: Vec<f32>,
    /// First moments of AdamW.
    pub first: Vec<f32>,
    /// Second moments of AdamW.
    pub second: Vec<f32>,
    /// An exponent per 256 elements; empty until the first step has measured them, and for plain sums.
    pub exponents: Exponents,
}

impl State {
    /// The state before the first step: a pure function of task and seed, whatever the device.
    pub fn initial<T: Task>(task: &T, seed: u64) -> (Space, Self) {
        let blocks = task.blocks::<mattock_kernels::Cpu>(seed, &Default::default());
        let space = Space::of(&blocks, |index| task.prefix(index));
        let mut parameters = vec![0.0; space.len()];
        for (block, range) in blocks.iter().zip(space.buckets()) {
            let values = values(block);
            parameters[range.start..range.start + values.len()].copy_from_slice(&values);
        }
        let zeros = vec![0.0; space.len()];
        let state = Self {
            step: 0,
            parameters,
            first: zeros.clone(),
            second: zeros,
            exponents: Exponents::default(),
        };
        (space, state)
    }

    /// The state hash: a sum over elements, independent of order and sharding.
    pub fn hash(&self) -> u64 {
        state_hash(&self.parameters, &self.first, &self.second, &self.exponents)
    }
}
