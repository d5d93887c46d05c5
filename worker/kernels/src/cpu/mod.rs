//! The kernels for the CPU, fused: Burn's own operations make several passes over memory where one will do.
//!
//! Each operation is a pair of plain functions over slices, in a file of its own; [`graph`] ties them to Burn's
//! autodiff. All give the same bits for any number of threads and any vector width; products of matrices are the
//! `gemm` crate's, which chooses its kernels by the processor's features.

mod attention;
mod cross_entropy;
mod gelu;
mod gemm;
mod graph;
mod linear;
mod math;
mod norm;
mod rows;
#[cfg(test)]
mod tests;

use burn::tensor::backend::Backend;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive};
use burn_flex::FlexTensor;

use crate::backend::Cpu;
use crate::kernels::Kernels;

impl Kernels for Cpu {
    fn norm(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        let shape = x.dims();
        let (x, weight, bias) = (floats(primitive(x)), floats(primitive(weight)), floats(primitive(bias)));
        let (y, _) = norm::forward(slice(&x), slice(&weight), slice(&bias), epsilon as f32);
        wrapped(tensor(y, shape))
    }

    fn linear(x: Tensor<Self, 3>, weight: Tensor<Self, 2>, bias: Tensor<Self, 1>) -> Tensor<Self, 3> {
        let [batch, time, _] = x.dims();
        let outputs = weight.dims()[1];
        let (x, weight, bias) = (floats(primitive(x)), floats(primitive(weight)), floats(primitive(bias)));
        wrapped(tensor(linear::forward(slice(&x), slice(&weight), slice(&bias)), [batch, time, outputs]))
    }

    fn gelu(x: Tensor<Self, 3>) -> Tensor<Self, 3> {
        let shape = x.dims();
        wrapped(tensor(gelu::forward(slice(&floats(primitive(x)))), shape))
    }

    fn attention(qkv: Tensor<Self, 3>, heads: usize) -> Tensor<Self, 3> {
        let shape = attention_shape(qkv.dims(), heads);
        let (y, _) = attention::forward(shape, slice(&floats(primitive(qkv))));
        wrapped(tensor(y, [shape.batch, shape.time, shape.heads * shape.width]))
    }

    fn cross_entropy(logits: Tensor<Self, 2>, targets: Tensor<Self, 1, Int>) -> Tensor<Self, 1> {
        let vocab = logits.dims()[1];
        let targets = indices(targets.into_primitive(), vocab);
        let mut logits = floats(primitive(logits));
        let loss = cross_entropy::forward(slice_mut(&mut logits), vocab, &targets);
        wrapped(tensor(vec![loss], [1]))
    }
}

fn attention_shape([batch, time, columns]: [usize; 3], heads: usize) -> attention::Shape {
    attention::Shape { batch, time, heads, width: columns / 3 / heads }
}

fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

fn wrapped<B: Backend, const D: usize>(tensor: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

/// The same values without gaps.
fn floats(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The elements of a tensor without gaps, row-major.
fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("the CPU backend computes in f32, and the tensor has no gaps")
}

/// The same, to be written: copied first where somebody else holds it too.
fn slice_mut(tensor: &mut FlexTensor) -> &mut [f32] {
    let (start, end) = tensor.layout().contiguous_offsets().expect("the tensor has no gaps");
    &mut tensor.storage_mut()[start..end]
}

/// A tensor of these elements, without a copy.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Classes as they come, checked once: every one below `classes`.
fn indices(tensor: IntTensor<Cpu>, classes: usize) -> Vec<i32> {
    let data = tensor.into_data();
    let indices: Vec<i32> = data.iter::<i32>().collect();
    let known = |&index: &i32| usize::try_from(index).is_ok_and(|index| index < classes);
    assert!(indices.iter().all(known), "a target is not among the {classes} classes");
    indices
}
