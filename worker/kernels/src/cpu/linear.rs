//! `y = x * weight + bias` over rows, with the bias in place before the product is added.

use super::gemm::{View, add_product, multiplied};
use super::rows;

/// `x [rows, inputs]`, `weight [inputs, outputs]`, `bias [outputs]`; returns `[rows, outputs]`.
pub(super) fn forward(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let (inputs, outputs) = (weight.len() / bias.len(), bias.len());
    let rows = x.len() / inputs;
    let mut y = Vec::with_capacity(rows * outputs);
    (0..rows).for_each(|_| y.extend_from_slice(bias));
    add_product(&mut y, View::new(x, rows, inputs, inputs), View::new(weight, inputs, outputs, outputs));
    y
}

/// The gradient of x from `dy [rows, outputs]`.
pub(super) fn backward_x(weight: &[f32], dy: &[f32], outputs: usize) -> Vec<f32> {
    let (inputs, rows) = (weight.len() / outputs, dy.len() / outputs);
    let weight = View::new(weight, inputs, outputs, outputs);
    multiplied(View::new(dy, rows, outputs, outputs), weight.transposed())
}

/// The gradient of the weight.
pub(super) fn backward_weight(x: &[f32], dy: &[f32], outputs: usize) -> Vec<f32> {
    let rows = dy.len() / outputs;
    let inputs = x.len() / rows;
    multiplied(View::new(x, rows, inputs, inputs).transposed(), View::new(dy, rows, outputs, outputs))
}

/// The gradient of the bias.
pub(super) fn backward_bias(dy: &[f32], outputs: usize) -> Vec<f32> {
    let stretches = (dy.len() / outputs).div_ceil(rows::STRETCH);
    let mut partials = vec![0.0; stretches * outputs];
    let parts = partials.chunks_exact_mut(outputs).enumerate();
    parts.for_each(|(index, part)| {
        for row in rows::stretch(dy, outputs, index).chunks_exact(outputs) {
            part.iter_mut().zip(row).for_each(|(total, d)| *total += d);
        }
    });
    rows::total(&partials, outputs)
}
