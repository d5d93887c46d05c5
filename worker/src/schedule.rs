//! The learning rate as a function of the step.

use crate::plan::{AdamW, Schedule};

/// Learning rate of `step` (from 0) in a run of `steps`.
///
/// Warm-up is linear and reaches the peak at its last step. The cosine ends at `final` times the peak after the last
/// step. All in f64 with [`libm`], so that it has the same bits on every machine.
pub fn learning_rate(optimizer: &AdamW, step: u64, steps: u64) -> f64 {
    let (Schedule::Constant { warmup } | Schedule::Cosine { warmup, .. }) = optimizer.schedule;
    if step < warmup {
        return optimizer.lr * (step + 1) as f64 / warmup as f64;
    }
    match optimizer.schedule {
        Schedule::Constant { .. } => optimizer.lr,
        Schedule::Cosine { last, .. } => {
            let done = ((step - warmup) as f64 / (steps - warmup).max(1) as f64).min(1.0);
            let falling = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * done));
            optimizer.lr * (last + (1.0 - last) * falling)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cosine() -> AdamW {
        let schedule = Schedule::Cosine { warmup: 10, last: 0.1 };
        AdamW { lr: 2.0, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0, clip: None, schedule }
    }

    #[test]
    fn it_rises_to_the_peak_and_falls_to_the_final_factor() {
        let rate = |step| learning_rate(&cosine(), step, 110);
        assert_eq!((rate(0), rate(9), rate(10)), (0.2, 2.0, 2.0));
        assert!((rate(60) - 1.1).abs() < 1e-12, "half way down");
        assert!((rate(110) - 0.2).abs() < 1e-12);
    }
}
