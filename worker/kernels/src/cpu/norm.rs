//! Layer norm over rows (Ba, Kiros and Hinton, 2016), forward and backward, one pass over memory each.

use multiversion::multiversion;

use super::math::sum;
use super::rows;

/// `x [rows, width]` to `(y [rows, width], [mean, 1 / deviation] of each row)`.
pub(super) fn forward(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let mut y = vec![0.0; x.len()];
    let mut moments = vec![0.0; x.len() / width * 2];
    rows::each_with(&mut y, width, &mut moments, 2 * rows::STRETCH, |index, y, moments| {
        forward_rows(rows::stretch(x, width, index), weight, bias, epsilon, y, moments);
    });
    (y, moments)
}

/// Gradients `(of x, of weight, of bias)` from that of y.
pub(super) fn backward(
    x: &[f32],
    weight: &[f32],
    moments: &[f32],
    dy: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let stretches = (x.len() / width).div_ceil(rows::STRETCH);
    let mut dx = vec![0.0; x.len()];
    let mut partials = vec![0.0; stretches * 2 * width];
    rows::each_with(&mut dx, width, &mut partials, 2 * width, |index, dx, partial| {
        let (x, dy) = (rows::stretch(x, width, index), rows::stretch(dy, width, index));
        backward_rows(x, weight, rows::stretch(moments, 2, index), dy, dx, partial);
    });
    let mut both = rows::total(&partials, 2 * width);
    let dbias = both.split_off(width);
    (dx, both, dbias)
}

#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2"))]
fn forward_rows(x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, y: &mut [f32], moments: &mut [f32]) {
    let width = weight.len();
    let scale = 1.0 / width as f32;
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(moments.chunks_exact_mut(2));
    for ((x, y), moments) in rows {
        let mean = sum(width, |i| x[i]) * scale;
        let variance = sum(width, |i| (x[i] - mean) * (x[i] - mean)) * scale;
        let inverse = 1.0 / (variance + epsilon).sqrt();
        for i in 0..width {
            y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
        }
        moments.copy_from_slice(&[mean, inverse]);
    }
}

/// `partial` receives `[of weight, of bias]`.
#[multiversion(targets("x86_64+avx512f+avx512dq+avx512bw+avx512vl", "x86_64+avx2"))]
fn backward_rows(
    x: &[f32],
    weight: &[f32],
    moments: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    partial: &mut [f32],
) {
    let width = weight.len();
    let scale = 1.0 / width as f32;
    let (dweight, dbias) = partial.split_at_mut(width);
    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for (((x, dy), dx), moments) in rows.zip(moments.chunks_exact(2)) {
        let (mean, inverse) = (moments[0], moments[1]);
        let (weight, dweight, dbias) = (&weight[..width], &mut dweight[..width], &mut dbias[..width]);
        for i in 0..width {
            dx[i] = (x[i] - mean) * inverse;
            dweight[i] += dy[i] * dx[i];
            dbias[i] += dy[i];
        }
        let along = sum(width, |i| dy[i] * weight[i]) * scale;
        let across = sum(width, |i| dy[i] * weight[i] * dx[i]) * scale;
        for i in 0..width {
            dx[i] = (dy[i] * weight[i] - along - dx[i] * across) * inverse;
        }
    }
}
