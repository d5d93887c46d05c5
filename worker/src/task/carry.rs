//! What flows from one block to the next: a list of tensors of any rank.
//!
//! Between blocks the graph is cut: each tensor becomes a leaf of the next block's graph, and its gradient there
//! seeds the backward pass of the block before. A parameter that two blocks share (a tied head) is simply carried
//! along, so its two gradients meet in the graph of the block that owns it, and nothing needs to know of it.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorMetadata, TensorPrimitive};

/// The tensors that a block hands to the next, in the order in which they were pushed.
#[derive(Clone)]
pub struct Carry<B: Backend> {
    tensors: Vec<FloatTensor<B>>,
}

impl<B: Backend> Default for Carry<B> {
    fn default() -> Self {
        Self { tensors: Vec::new() }
    }
}

impl<B: Backend> Carry<B> {
    /// Adds a tensor.
    #[must_use]
    pub fn with<const D: usize>(mut self, tensor: Tensor<B, D>) -> Self {
        self.tensors.push(tensor.into_primitive().tensor());
        self
    }

    /// The tensor that was pushed as number `index`.
    ///
    /// # Panics
    /// Where there is none, or where it has another rank: a bug of the task.
    pub fn get<const D: usize>(&self, index: usize) -> Tensor<B, D> {
        let tensor = self.tensors[index].clone();
        assert_eq!(tensor.shape().num_dims(), D, "tensor {index} of the carry has another rank");
        Tensor::from_primitive(TensorPrimitive::Float(tensor))
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

impl<B: AutodiffBackend> Carry<B> {
    /// The same values as leaves of a new graph.
    pub(crate) fn into_leaves(self) -> Self {
        let leaf = |tensor| B::float_set_require_grad(B::from_inner(B::inner(tensor)), true);
        Self { tensors: self.tensors.into_iter().map(leaf).collect() }
    }

    /// Values without a graph as leaves of one.
    pub(crate) fn leaves_of(values: Carry<B::InnerBackend>) -> Self {
        let leaf = |tensor| B::float_set_require_grad(B::from_inner(tensor), true);
        Self { tensors: values.tensors.into_iter().map(leaf).collect() }
    }

    /// The gradients of these leaves; `None` for a leaf that the loss does not depend on.
    pub(crate) fn gradients(&self, gradients: &mut B::Gradients) -> CarryGradients<B> {
        CarryGradients(self.tensors.iter().map(|tensor| B::grad_remove(tensor, gradients)).collect())
    }

    /// Runs the graph that made these tensors backward, from the gradients of the block that consumed them.
    ///
    /// The derivative of `sum(output * gradient)` by `output` is `gradient` itself, bit for bit.
    pub(crate) fn backward(self, from: CarryGradients<B>) -> Option<B::Gradients> {
        let seeds = self.tensors.into_iter().zip(from.0).filter_map(|(output, gradient)| {
            let product = B::float_mul(output, B::from_inner(gradient?));
            Some(B::float_sum(product))
        });
        seeds.reduce(B::float_add).map(B::backward)
    }
}

/// Gradients of a [`Carry`], in its order.
pub(crate) struct CarryGradients<B: AutodiffBackend>(Vec<Option<FloatTensor<B::InnerBackend>>>);
