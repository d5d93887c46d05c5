//! AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), fused with the state hash.
//!
//! Element-wise, without FMA: the bits do not depend on vector width, sharding or who runs it.

use crate::hash::range_hash;
use crate::simd::widest;

/// Elements that are updated before they are hashed, while they are still in the cache.
const STRETCH: usize = 4096;

/// What stays the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first and second moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; 0 for parameters that do not decay.
    pub weight_decay: f64,
}

/// The numbers of one step, each rounded to f32 once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    clip: f32,
    keep: f32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    rate: f32,
    root_correction: f32,
    eps: f32,
}

impl AdamWStep {
    /// Step number `step`, from 1, at learning rate `lr`; the gradient is multiplied by `clip` first.
    pub fn new(optimizer: &AdamW, step: u64, lr: f64, clip: f64) -> Self {
        let [beta1, beta2] = optimizer.betas;
        let correction = |beta: f64| 1.0 - libm::pow(beta, step as f64);
        Self {
            clip: clip as f32,
            keep: (1.0 - lr * optimizer.weight_decay) as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            rate: (lr / correction(beta1)) as f32,
            root_correction: libm::sqrt(correction(beta2)) as f32,
            eps: optimizer.eps as f32,
        }
    }
}

/// Updates a stretch of the flat space in place; returns its contribution to the state hash.
///
/// `first` and `second` are the moments; `first_index` is the stretch's first element in the flat space.
///
/// # Panics
/// Where the slices differ in length.
pub fn adamw(
    parameters: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    gradient: &[f32],
    step: &AdamWStep,
    first_index: u64,
) -> u64 {
    let length = parameters.len();
    assert!(
        first.len() == length && second.len() == length && gradient.len() == length,
        "parameters, moments and gradient belong to the same stretch"
    );
    let moments = first.chunks_mut(STRETCH).zip(second.chunks_mut(STRETCH));
    let stretches = parameters.chunks_mut(STRETCH).zip(moments).zip(gradient.chunks(STRETCH));
    let mut hash = 0u64;
    let mut index = first_index;
    for ((parameters, (first, second)), gradient) in stretches {
        update(parameters, first, second, gradient, step);
        hash = hash.wrapping_add(range_hash(parameters, first, second, index));
        index += parameters.len() as u64;
    }
    hash
}

widest! {
    fn update(parameters: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32], step: &AdamWStep)
        = update_loop
}

#[inline(always)]
fn update_loop(
    parameters: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    gradient: &[f32],
    step: &AdamWStep,
) {
    let AdamWStep { clip, keep, beta1, beta2, one_minus_beta1, one_minus_beta2, rate, root_correction, eps } =
        *step;
    let moments = first.iter_mut().zip(second);
    for ((parameter, (first, second)), gradient) in parameters.iter_mut().zip(moments).zip(gradient) {
        let g = gradient * clip;
        *first = *first * beta1 + g * one_minus_beta1;
        *second = *second * beta2 + g * g * one_minus_beta2;
        let denominator = second.sqrt() / root_correction + eps;
        *parameter = *parameter * keep - rate * (*first / denominator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Exponents, state_hash};

    const OPTIMIZER: AdamW = AdamW { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 };

    fn values(length: usize, k: usize) -> Vec<f32> {
        (0..length).map(|index| ((index * k) % 101) as f32 * 0.01 - 0.5).collect()
    }

    #[test]
    fn it_follows_the_formula() {
        let (mut p, mut m, mut v) = ([1.0f32], [0.5f32], [0.25f32]);
        adamw(&mut p, &mut m, &mut v, &[2.0], &AdamWStep::new(&OPTIMIZER, 3, 0.01, 0.5), 0);
        let (m1, v1) = (0.9 * 0.5 + 0.1 * 1.0, 0.95 * 0.25 + 0.05 * 1.0);
        let (mhat, vhat) = (m1 / (1.0 - 0.9f64.powi(3)), v1 / (1.0 - 0.95f64.powi(3)));
        let expected = 1.0 * (1.0 - 0.01 * 0.1) - 0.01 * mhat / (vhat.sqrt() + 1e-8);
        assert!((f64::from(p[0]) - expected).abs() < 1e-6, "{} against {expected}", p[0]);
        assert!((f64::from(m[0]) - m1).abs() < 1e-6 && (f64::from(v[0]) - v1).abs() < 1e-6);
    }

    #[test]
    fn vectors_and_shards_give_the_bits_of_the_plain_loop() {
        let length = 2 * STRETCH + 13;
        let gradient = values(length, 13);
        let step = AdamWStep::new(&OPTIMIZER, 2, 1e-3, 0.7);
        let state = || {
            (
                values(length, 3),
                values(length, 5),
                values(length, 7).iter().map(|x| x * x).collect::<Vec<_>>(),
            )
        };
        let (mut p0, mut m0, mut v0) = state();
        update_loop(&mut p0, &mut m0, &mut v0, &gradient, &step);
        let (mut p, mut m, mut v) = state();
        let cut = 1001;
        let (a, b) = (gradient.split_at(cut), p.split_at_mut(cut));
        let (c, d) = (m.split_at_mut(cut), v.split_at_mut(cut));
        let upper = adamw(b.1, c.1, d.1, a.1, &step, cut as u64);
        let lower = adamw(b.0, c.0, d.0, a.0, &step, 0);
        assert!(p == p0 && m == m0 && v == v0);
        assert_eq!(upper.wrapping_add(lower), state_hash(&p, &m, &v, &Exponents::default()));
    }

    #[test]
    fn padding_stays_zero() {
        let (mut p, mut m, mut v) = ([0.0f32], [0.0f32], [0.0f32]);
        adamw(&mut p, &mut m, &mut v, &[0.0], &AdamWStep::new(&OPTIMIZER, 1, 0.1, 1.0), 0);
        assert_eq!((p, m, v), ([0.0], [0.0], [0.0]));
    }
}
