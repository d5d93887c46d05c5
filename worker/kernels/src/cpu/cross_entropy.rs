//! Cross entropy of rows of logits with their targets, keeping the probabilities for the way back.

use multiversion::multiversion;

use super::math::{exp, largest, sum};
use super::rows;

/// Turns `logits [n, v]` into probabilities in place; returns the mean loss in nats.
pub(super) fn forward(logits: &mut [f32], vocab: usize, targets: &[i32]) -> f32 {
    let mut losses = vec![0.0; targets.len()];
    rows::each_with(logits, vocab, &mut losses, rows::STRETCH, |index, rows, losses| {
        forward_rows(rows, vocab, &targets[index * rows::STRETCH..], losses);
    });
    let total: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
    (total / targets.len() as f64) as f32
}

/// Turns probabilities into the gradient of the logits in place, where `dy` is that of the mean loss.
pub(super) fn backward(probabilities: &mut [f32], vocab: usize, targets: &[i32], dy: f32) {
    let scale = dy / targets.len() as f32;
    rows::each(probabilities, vocab, |index, rows| {
        rows.iter_mut().for_each(|p| *p *= scale);
        for (row, &target) in rows.chunks_exact_mut(vocab).zip(&targets[index * rows::STRETCH..]) {
            row[target as usize] -= scale;
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2"))]
fn forward_rows(rows: &mut [f32], vocab: usize, targets: &[i32], losses: &mut [f32]) {
    for ((row, &target), loss) in rows.chunks_exact_mut(vocab).zip(targets).zip(losses) {
        let most = largest(row);
        let wanted = row[target as usize] - most;
        row.iter_mut().for_each(|x| *x = exp(*x - most));
        let mass = sum(vocab, |i| row[i]);
        let inverse = 1.0 / mass;
        row.iter_mut().for_each(|x| *x *= inverse);
        *loss = libm::logf(mass) - wanted;
    }
}
