//! The training state: all that one step hands to the next.

use std::sync::Arc;

use mattock_checkpoint::room::zeros;
use mattock_exact::{Exponents, range_hash, state_hash};

use crate::origin;
use crate::params::Space;
use crate::partition::Stretches;
use crate::task::{Task, TaskError};

/// Parameters, moments and exponents after `step` steps, each over the whole flat space; or, within a trainer whose state is
/// sharded, parameters and moments over what a rank holds of it.
///
/// A clone shares the arrays; whoever writes to one that is shared gets a copy.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Parameters.
    pub parameters: Arc<Vec<f32>>,
    /// First moments of AdamW.
    pub first: Arc<Vec<f32>>,
    /// Second moments of AdamW.
    pub second: Arc<Vec<f32>>,
    /// An exponent per 256 elements; empty until the first step has measured them, and for plain sums.
    pub exponents: Exponents,
}

impl State {
    /// The state before the first step: a pure function of task and seed, whatever the device.
    ///
    /// # Errors
    /// Where the task has parameters to start from, and they cannot be read.
    pub fn initial<T: Task>(task: &T, space: &Space, seed: u64) -> Result<Self, TaskError> {
        let all = Stretches::new(space.buckets().to_vec());
        let state = origin::initial(task, seed, space, &[&all])?.pop();
        Ok(state.unwrap_or_else(|| Self::blank(0, space.len())))
    }

    /// Zeros for so many elements, and no exponents.
    pub(crate) fn blank(step: u64, elements: usize) -> Self {
        let zeros = || Arc::new(zeros(elements));
        Self { step, parameters: zeros(), first: zeros(), second: zeros(), exponents: Exponents::default() }
    }

    /// The arrays over what is held of the flat space, to be written.
    pub(crate) fn arrays_mut(&mut self) -> [&mut Vec<f32>; 3] {
        [&mut self.parameters, &mut self.first, &mut self.second].map(Arc::make_mut)
    }

    pub(crate) fn arrays(&self) -> [&[f32]; 3] {
        [&self.parameters, &self.first, &self.second]
    }

    /// The contribution of parameters and moments to the state hash, where they are over this much of the flat space.
    pub(crate) fn part_hash(&self, held: &Stretches) -> u64 {
        let part = |bucket: usize| {
            let (within, start) = (held.within(bucket), held.ranges()[bucket].start as u64);
            let [parameters, first, second] = self.arrays().map(|array| &array[within.clone()]);
            range_hash(parameters, first, second, start)
        };
        (0..held.ranges().len()).map(part).fold(0, u64::wrapping_add)
    }

    /// The state hash: a sum over elements, independent of order and sharding.
    pub fn hash(&self) -> u64 {
        state_hash(&self.parameters, &self.first, &self.second, &self.exponents)
    }
}
