//! The fused kernels as nodes of Burn's autodiff graph: each keeps what its way back needs, and no more.

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Tensor, TensorMetadata};
use burn_flex::FlexTensor;

use super::{attention, attention_shape, cross_entropy, floats, gelu, indices, linear, norm};
use super::{primitive, slice, slice_mut, tensor, wrapped};
use crate::backend::Cpu;
use crate::kernels::Kernels;

type Graph = Autodiff<Cpu>;
type Node = FloatTensor<Graph>;

/// An operation with `N` inputs whose gradients are computed by `backward` from the state that was kept.
trait Fused<const N: usize>: Copy + Send + std::fmt::Debug + 'static {
    /// What is kept for the way back.
    type State: Clone + Send + std::fmt::Debug + 'static;

    /// The gradient of each input that `wanted` asks for, from that of the output, which has no gaps.
    fn gradients(self, state: Self::State, wanted: [bool; N], dy: FlexTensor) -> [Option<FlexTensor>; N];
}

/// Burn's trait, for all of ours.
#[derive(Debug, Clone, Copy)]
struct Step<F>(F);

impl<F: Fused<N>, const N: usize> Backward<Cpu, N> for Step<F> {
    type State = F::State;

    fn backward(self, ops: Ops<F::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = floats(grads.consume::<Cpu>(&ops.node));
        let ids: [Option<NodeId>; N] = ops.parents.map(|parent| parent.map(|node| node.id));
        let found = self.0.gradients(ops.state, ids.map(|id| id.is_some()), dy);
        for (id, gradient) in ids.into_iter().zip(found) {
            if let (Some(id), Some(gradient)) = (id, gradient) {
                grads.register::<Cpu>(id, gradient);
            }
        }
    }
}

/// Ties an output to its inputs; the state is dropped where nothing asks for gradients.
fn finish<F: Fused<N>, const N: usize>(
    fused: F,
    inputs: [&Node; N],
    output: FlexTensor,
    state: F::State,
) -> Node {
    let prepared = Step(fused).prepare::<NoCheckpointing>(inputs.map(|input| input.node.clone()));
    match prepared.compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(state, output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    }
}

impl Kernels for Graph {
    fn norm(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 3> {
        let shape = x.dims();
        let nodes = [primitive(x), primitive(weight), primitive(bias)];
        let [x, weight, bias] = nodes.each_ref().map(|node| floats(node.primitive.clone()));
        let (y, moments) = norm::forward(slice(&x), slice(&weight), slice(&bias), epsilon as f32);
        wrapped(finish(Norm, nodes.each_ref(), tensor(y, shape), (x, weight, moments)))
    }

    fn linear(x: Tensor<Self, 3>, weight: Tensor<Self, 2>, bias: Tensor<Self, 1>) -> Tensor<Self, 3> {
        let [batch, time, _] = x.dims();
        let outputs = weight.dims()[1];
        let nodes = [primitive(x), primitive(weight), primitive(bias)];
        let [x, weight, bias] = nodes.each_ref().map(|node| floats(node.primitive.clone()));
        let y = linear::forward(slice(&x), slice(&weight), slice(&bias));
        wrapped(finish(Linear, nodes.each_ref(), tensor(y, [batch, time, outputs]), (x, weight)))
    }

    fn gelu(x: Tensor<Self, 3>) -> Tensor<Self, 3> {
        let shape = x.dims();
        let node = primitive(x);
        let x = floats(node.primitive.clone());
        wrapped(finish(Gelu, [&node], tensor(gelu::forward(slice(&x)), shape), x))
    }

    fn attention(qkv: Tensor<Self, 3>, heads: usize) -> Tensor<Self, 3> {
        let shape = attention_shape(qkv.dims(), heads);
        let node = primitive(qkv);
        let qkv = floats(node.primitive.clone());
        let (y, weights) = attention::forward(shape, slice(&qkv));
        let y = tensor(y, [shape.batch, shape.time, shape.heads * shape.width]);
        let count = weights.len();
        wrapped(finish(Attention(shape), [&node], y, (qkv, tensor(weights, [count]))))
    }

    fn cross_entropy(logits: Tensor<Self, 2>, targets: Tensor<Self, 1, Int>) -> Tensor<Self, 1> {
        let vocab = logits.dims()[1];
        let targets = indices(targets.into_primitive(), vocab);
        let mut node = primitive(logits);
        // Probabilities take the logits' place, without a copy where nobody else holds them.
        let gone = tensor(Vec::new(), [0]);
        let mut logits = floats(std::mem::replace(&mut node.primitive, gone));
        let loss = cross_entropy::forward(slice_mut(&mut logits), vocab, &targets);
        wrapped(finish(CrossEntropy, [&node], tensor(vec![loss], [1]), (logits, targets)))
    }
}

#[derive(Debug, Clone, Copy)]
struct Norm;

impl Fused<3> for Norm {
    type State = (FlexTensor, FlexTensor, Vec<f32>);

    fn gradients(self, state: Self::State, wanted: [bool; 3], dy: FlexTensor) -> [Option<FlexTensor>; 3] {
        let (x, weight, moments) = state;
        let width = weight.shape().num_elements();
        let (dx, dweight, dbias) = norm::backward(slice(&x), slice(&weight), &moments, slice(&dy));
        let [rows, time, _] = x.shape().dims::<_>();
        [
            wanted[0].then(|| tensor(dx, [rows, time, width])),
            wanted[1].then(|| tensor(dweight, [width])),
            wanted[2].then(|| tensor(dbias, [width])),
        ]
    }
}

#[derive(Debug, Clone, Copy)]
struct Linear;

impl Fused<3> for Linear {
    type State = (FlexTensor, FlexTensor);

    fn gradients(self, state: Self::State, wanted: [bool; 3], dy: FlexTensor) -> [Option<FlexTensor>; 3] {
        let (x, weight) = state;
        let [inputs, outputs] = weight.shape().dims::<_>();
        let [batch, time, _] = x.shape().dims::<_>();
        let dy = slice(&dy);
        [
            wanted[0].then(|| tensor(linear::backward_x(slice(&weight), dy, outputs), [batch, time, inputs])),
            wanted[1].then(|| tensor(linear::backward_weight(slice(&x), dy, outputs), [inputs, outputs])),
            wanted[2].then(|| tensor(linear::backward_bias(dy, outputs), [outputs])),
        ]
    }
}

#[derive(Debug, Clone, Copy)]
struct Gelu;

impl Fused<1> for Gelu {
    type State = FlexTensor;

    fn gradients(self, x: FlexTensor, _: [bool; 1], mut dy: FlexTensor) -> [Option<FlexTensor>; 1] {
        gelu::backward(slice(&x), slice_mut(&mut dy));
        [Some(dy)]
    }
}

#[derive(Debug, Clone, Copy)]
struct Attention(attention::Shape);

impl Fused<1> for Attention {
    type State = (FlexTensor, FlexTensor);

    fn gradients(self, state: Self::State, _: [bool; 1], dy: FlexTensor) -> [Option<FlexTensor>; 1] {
        let (qkv, weights) = state;
        let shape = qkv.shape().dims::<3>();
        [Some(tensor(attention::backward(self.0, slice(&qkv), slice(&weights), slice(&dy)), shape))]
    }
}

#[derive(Debug, Clone, Copy)]
struct CrossEntropy;

impl Fused<1> for CrossEntropy {
    type State = (FlexTensor, Vec<i32>);

    fn gradients(self, state: Self::State, _: [bool; 1], dy: FlexTensor) -> [Option<FlexTensor>; 1] {
        let (mut probabilities, targets) = state;
        let [_, vocab] = probabilities.shape().dims::<_>();
        cross_entropy::backward(slice_mut(&mut probabilities), vocab, &targets, slice(&dy)[0]);
        [Some(probabilities)]
    }
}
