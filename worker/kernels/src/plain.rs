//! The kernels in Burn's own operations: what every backend can run, and the reference for fused forms.

use burn::tensor::activation;
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, Int, Tensor};

pub(crate) fn norm<B: Backend>(
    x: Tensor<B, 3>,
    weight: Tensor<B, 1>,
    bias: Tensor<B, 1>,
    epsilon: f64,
) -> Tensor<B, 3> {
    let mean = x.clone().mean_dim(2);
    let centred = x - mean;
    let variance = centred.clone().powi_scalar(2).mean_dim(2);
    let normal = centred / (variance + epsilon).sqrt();
    normal * weight.unsqueeze::<3>() + bias.unsqueeze::<3>()
}

pub(crate) fn linear<B: Backend>(x: Tensor<B, 3>, weight: Tensor<B, 2>, bias: Tensor<B, 1>) -> Tensor<B, 3> {
    let [batch, time, inputs] = x.dims();
    let outputs = weight.dims()[1];
    let rows = x.reshape([batch * time, inputs]).matmul(weight) + bias.unsqueeze::<2>();
    rows.reshape([batch, time, outputs])
}

pub(crate) fn gelu<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 3> {
    let inner = (x.clone().powi_scalar(3) * 0.044_715 + x.clone()) * (2.0 / std::f64::consts::PI).sqrt();
    (inner.tanh() + 1.0) * x * 0.5
}

pub(crate) fn attention<B: Backend>(qkv: Tensor<B, 3>, heads: usize) -> Tensor<B, 3> {
    let [batch, time, columns] = qkv.dims();
    let (dim, width) = (columns / 3, columns / 3 / heads);
    let part = |index: usize| {
        let columns = index * dim..(index + 1) * dim;
        qkv.clone().slice([0..batch, 0..time, columns]).reshape([batch, time, heads, width]).swap_dims(1, 2)
    };
    let scores = part(0).matmul(part(1).transpose()) * (1.0 / (width as f64).sqrt());
    let future = Tensor::<B, 2, Bool>::tril_mask([time, time], 0, &qkv.device());
    let weights = activation::softmax(scores.mask_fill(future.unsqueeze::<4>(), f32::NEG_INFINITY), 3);
    weights.matmul(part(2)).swap_dims(1, 2).reshape([batch, time, dim])
}

pub(crate) fn cross_entropy<B: Backend>(logits: Tensor<B, 2>, targets: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let rows = targets.dims()[0];
    activation::log_softmax(logits, 1).gather(1, targets.reshape([rows, 1])).mean().neg()
}
