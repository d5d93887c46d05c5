//! Clipping and the optimizer's update over what a rank holds of the flat space.

use mattock_exact::{AdamWStep, adamw};

use crate::params::Space;
use crate::partition::Stretches;
use crate::plan::AdamW;
use crate::state::State;

/// The numbers of one update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Update<'a> {
    pub(crate) optimizer: &'a AdamW,
    /// The step that it makes, from 1.
    pub(crate) step: u64,
    pub(crate) lr: f64,
    /// Of the mean gradient over the whole space.
    pub(crate) grad_norm: f64,
}

impl Update<'_> {
    /// Updates the parameters and moments in place that `held` says lie in `state`; returns their contribution to the hash of
    /// the new state.
    pub(crate) fn apply(&self, state: &mut State, held: &Stretches, space: &Space, gradient: &[f32]) -> u64 {
        let Self { optimizer, step, lr, grad_norm } = *self;
        let clip = match optimizer.clip {
            Some(limit) if grad_norm > limit => limit / grad_norm,
            Some(_) | None => 1.0,
        };
        let [parameters, first, second] = state.arrays_mut();
        let mut hash = 0u64;
        for (range, decays) in space.decay_ranges() {
            let weight_decay = if decays { optimizer.weight_decay } else { 0.0 };
            let numbers = mattock_exact::AdamW { betas: optimizer.betas, eps: optimizer.eps, weight_decay };
            let numbers = AdamWStep::new(&numbers, step, lr, clip);
            for (part, start) in held.overlaps(range) {
                let within = start..start + part.len();
                hash = hash.wrapping_add(adamw(
                    &mut parameters[within.clone()],
                    &mut first[within.clone()],
                    &mut second[within.clone()],
                    &gradient[within],
                    &numbers,
                    part.start as u64,
                ));
            }
        }
        hash
    }
}
