//! The operations in which a language model spends its time, as a trait over backends.
//!
//! Each has a [plain](crate::plain) form in Burn's own operations, which every backend can run and which is the
//! reference. A backend overrides one where a fused form saves passes over memory. All shapes are row-major.
//!
//! Deliberately absent: anything about workers, ranks or sums.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Int, Tensor};

use crate::plain;

/// Operations of a decoder block, with a plain form for every backend.
pub trait Kernels: Backend {
    /// Layer norm over the last dimension (Ba, Kiros and Hinton, 2016): `x [b, t, d]`, `weight` and `bias` `[d]`.
    fn norm(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        plain::norm(x, weight, bias, epsilon)
    }

    /// `x [b, t, i] * weight [i, o] + bias [o]`.
    fn linear(x: Tensor<Self, 3>, weight: Tensor<Self, 2>, bias: Tensor<Self, 1>) -> Tensor<Self, 3> {
        plain::linear(x, weight, bias)
    }

    /// GELU in its tanh form, as GPT-2 has it (Hendrycks and Gimpel, 2016).
    fn gelu(x: Tensor<Self, 3>) -> Tensor<Self, 3> {
        plain::gelu(x)
    }

    /// Causal multi-head attention: `qkv [b, t, 3d]` with columns q, k, v; returns `[b, t, d]`.
    fn attention(qkv: Tensor<Self, 3>, heads: usize) -> Tensor<Self, 3> {
        plain::attention(qkv, heads)
    }

    /// Mean over rows of the cross entropy in nats: `logits [n, v]`, `targets [n]`; returns `[1]`.
    fn cross_entropy(logits: Tensor<Self, 2>, targets: Tensor<Self, 1, Int>) -> Tensor<Self, 1> {
        plain::cross_entropy(logits, targets)
    }
}

#[cfg(feature = "cuda")]
impl Kernels for crate::backend::Cuda {}
#[cfg(feature = "cuda")]
impl Kernels for burn::backend::Autodiff<crate::backend::Cuda> {}

/// A backend that can be trained on: it keeps a graph, and both it and what lies below have the kernels.
pub trait TrainBackend: AutodiffBackend<InnerBackend: Kernels> + Kernels {}

impl<B: AutodiffBackend<InnerBackend: Kernels> + Kernels> TrainBackend for B {}
