//! Clipping and the optimizer's update over the flat space.

use mattock_exact::{AdamWStep, adamw, exponent_hash, squared_norm};

use crate::params::Space;
use crate::plan::AdamW;
use crate::state::State;

/// Global norm of the gradient: squares are added over fixed blocks in fixed order.
pub(crate) fn norm(gradient: &[f32]) -> f64 {
    libm::sqrt(squared_norm(gradient))
}

/// Applies one update in place and counts the step; returns the hash of the new state.
pub(crate) fn apply(
    state: &mut State,
    space: &Space,
    gradient: &[f32],
    optimizer: &AdamW,
    lr: f64,
    grad_norm: f64,
) -> u64 {
    state.step += 1;
    let clip = match optimizer.clip {
        Some(limit) if grad_norm > limit => limit / grad_norm,
        Some(_) | None => 1.0,
    };
    let mut hash = exponent_hash(&state.exponents);
    for (range, decays) in space.decay_ranges() {
        let weight_decay = if decays { optimizer.weight_decay } else { 0.0 };
        let numbers = mattock_exact::AdamW { betas: optimizer.betas, eps: optimizer.eps, weight_decay };
        hash = hash.wrapping_add(adamw(
            &mut state.parameters[range.clone()],
            &mut state.first[range.clone()],
            &mut state.second[range.clone()],
            &gradient[range.clone()],
            &AdamWStep::new(&numbers, state.step, lr, clip),
            range.start as u64,
        ));
    }
    hash
}
