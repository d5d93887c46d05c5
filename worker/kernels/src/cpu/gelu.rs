//! GELU in its tanh form (Hendrycks and Gimpel, 2016), written with the logistic function:
//! `0.5 x (1 + tanh u) = x sigmoid(2u)`, `2u = c (x + k x^3)`.

use multiversion::multiversion;

use super::math::sigmoid;
use super::rows;

/// `2 sqrt(2 / pi)`.
const C: f32 = 1.595_769;
const K: f32 = 0.044_715;
/// Elements of a row, as far as threads are concerned.
const WIDTH: usize = 256;

pub(super) fn forward(x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    rows::each(&mut y, WIDTH, |index, y| forward_loop(rows::stretch(x, WIDTH, index), y));
    y
}

/// The gradient of x, written over that of y.
pub(super) fn backward(x: &[f32], dy: &mut [f32]) {
    rows::each(dy, WIDTH, |index, dy| backward_loop(rows::stretch(x, WIDTH, index), dy));
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2"))]
fn forward_loop(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x * sigmoid(C * (x + K * x * x * x));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2"))]
fn backward_loop(x: &[f32], dy: &mut [f32]) {
    for (d, &x) in dy.iter_mut().zip(x) {
        let s = sigmoid(C * (x + K * x * x * x));
        let slope = C * (1.0 + 3.0 * K * x * x);
        *d *= s + x * s * (1.0 - s) * slope;
    }
}
