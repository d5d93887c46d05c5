//! The operations in which a language model spends its time, as a trait over backends.
//!
//! Each has a plain form in Burn's own operations, which every backend can run and which is the reference. A
//! backend overrides one where a fused form saves passes over memory. All shapes are row-major.
//!
//! Deliberately absent: anything about workers, ranks or sums.

use burn::tensor::activation;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Bool, Int, Tensor};

/// Operations of a decoder block, with a plain form for every backend.
pub trait Kernels: Backend {
    /// Layer norm over the last dimension (Ba, Kiros and Hinton, 2016): `x [b, t, d]`, `weight` and `bias` `[d]`.
    fn norm(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        let mean = x.clone().mean_dim(2);
        let centred = x - mean;
        let variance = centred.clone().powi_scalar(2).mean_dim(2);
        let normal = centred / (variance + epsilon).sqrt();
        normal * weight.unsqueeze::<3>() + bias.unsqueeze::<3>()
    }

    /// `x [b, t, i] * weight [i, o] + bias [o]`.
    fn linear(x: Tensor<Self, 3>, weight: Tensor<Self, 2>, bias: Tensor<Self, 1>) -> Tensor<Self, 3> {
        let [batch, time, inputs] = x.dims();
        let outputs = weight.dims()[1];
        let rows = x.reshape([batch * time, inputs]).matmul(weight) + bias.unsqueeze::<2>();
        rows.reshape([batch, time, outputs])
    }

    /// GELU in its tanh form, as GPT-2 has it (Hendrycks and Gimpel, 2016).
    fn gelu(x: Tensor<Self, 3>) -> Tensor<Self, 3> {
        let inner = (x.clone().powi_scalar(3) * 0.044_715 + x.clone()) * (2.0 / std::f64::consts::PI).sqrt();
        (inner.tanh() + 1.0) * x * 0.5
    }

    /// Causal multi-head attention: `qkv [b, t, 3d]` with columns q, k, v; returns `[b, t, d]`.
    fn attention(qkv: Tensor<Self, 3>, heads: usize) -> Tensor<Self, 3> {
        let [batch, time, columns] = qkv.dims();
        let (dim, width) = (columns / 3, columns / 3 / heads);
        let part = |index: usize| {
            let columns = index * dim..(index + 1) * dim;
            qkv.clone()
                .slice([0..batch, 0..time, columns])
                .reshape([batch, time, heads, width])
                .swap_dims(1, 2)
        };
        let scores = part(0).matmul(part(1).transpose()) * (1.0 / (width as f64).sqrt());
        let future = Tensor::<Self, 2, Bool>::tril_mask([time, time], 0, &qkv.device());
        let weights = activation::softmax(scores.mask_fill(future.unsqueeze::<4>(), f32::NEG_INFINITY), 3);
        weights.matmul(part(2)).swap_dims(1, 2).reshape([batch, time, dim])
    }

    /// Mean over rows of the cross entropy in nats: `logits [n, v]`, `targets [n]`; returns `[1]`.
    fn cross_entropy(logits: Tensor<Self, 2>, targets: Tensor<Self, 1, Int>) -> Tensor<Self, 1> {
        let rows = targets.dims()[0];
        activation::log_softmax(logits, 1).gather(1, targets.reshape([rows, 1])).mean().neg()
    }
}

impl Kernels for crate::backend::Cpu {}
impl Kernels for burn::backend::Autodiff<crate::backend::Cpu> {}
#[cfg(feature = "cuda")]
impl Kernels for crate::backend::Cuda {}
#[cfg(feature = "cuda")]
impl Kernels for burn::backend::Autodiff<crate::backend::Cuda> {}

/// A backend that can be trained on: it keeps a graph, and both it and what lies below have the kernels.
pub trait TrainBackend: AutodiffBackend<InnerBackend: Kernels> + Kernels {}

impl<B: AutodiffBackend<InnerBackend: Kernels> + Kernels> TrainBackend for B {}
