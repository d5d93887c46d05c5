//! Forward and backward over a sequence of blocks, one graph per block.
//!
//! Cutting the graph between blocks hands over each block's gradients while the earlier blocks still run
//! backward, and gives bitwise the same gradients as one graph would: the derivative of `sum(output * gradient)` by
//! `output` is `gradient` itself. There is no recomputation: every block's graph is kept until its backward ran.

use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Tensor};

use mattock_kernels::{Kernels, TrainBackend};

use crate::params::collect_gradients;
use crate::task::{Carry, Output, Pass, Task};

/// Gradients of one micro-batch.
///
/// `lengths` are the buckets' lengths, `scratch` is reused between calls. `sink` receives (block, gradient), the
/// last block first; the gradient is padded with zeros to the bucket's length. Returns the mean loss.
pub(crate) fn micro_batch<B: TrainBackend, T: Task>(
    task: &T,
    blocks: &[T::Block<B>],
    lengths: &[usize],
    batch: &T::Batch,
    pass: Pass,
    scratch: &mut Vec<f32>,
    mut sink: impl FnMut(usize, &[f32]),
) -> f32 {
    let (graphs, loss) = forward(task, blocks, batch, pass);
    let value = loss.clone().inner().into_scalar().elem::<f32>();
    let mut gradients = Some(loss.backward());
    for (index, graph) in graphs.into_iter().enumerate().rev() {
        if let Some(output) = graph.output {
            // What is left of the block above is only what its inputs are due.
            let from = gradients.take().map(|mut above| graph.above_inputs.gradients(&mut above));
            gradients = from.and_then(|from| output.backward(from));
        }
        scratch.clear();
        scratch.resize(lengths[index], 0.0);
        if let Some(gradients) = &mut gradients {
            collect_gradients(&blocks[index], gradients, scratch);
        }
        sink(index, scratch);
    }
    value
}

/// One block's part of the pass.
struct Graph<B: Backend> {
    /// What the block returned; `None` for the last, which returned the loss.
    output: Option<Carry<B>>,
    /// The same values as the next block's leaves.
    above_inputs: Carry<B>,
}

fn forward<B: TrainBackend, T: Task>(
    task: &T,
    blocks: &[T::Block<B>],
    batch: &T::Batch,
    pass: Pass,
) -> (Vec<Graph<B>>, Tensor<B, 1>) {
    let mut graphs = Vec::with_capacity(blocks.len());
    let mut input = None;
    for block in blocks {
        match task.forward(block, input.take(), batch, pass) {
            Output::Next(output) => {
                let leaves = output.clone().into_leaves();
                input = Some(leaves.clone());
                graphs.push(Graph { output: Some(output), above_inputs: leaves });
            }
            Output::Loss(loss) => {
                graphs.push(Graph { output: None, above_inputs: Carry::default() });
                assert_eq!(graphs.len(), blocks.len(), "only the last block of a task returns the loss");
                return (graphs, loss);
            }
        }
    }
    unreachable!("the last block of a task returns the loss")
}

/// The mean loss of a batch, without gradients.
pub(crate) fn evaluate<B: Kernels, T: Task>(task: &T, blocks: &[T::Block<B>], batch: &T::Batch) -> f32 {
    let mut input = None;
    for block in blocks {
        match task.forward(block, input.take(), batch, Pass::Evaluate) {
            Output::Next(output) => input = Some(output),
            Output::Loss(loss) => return loss.into_scalar().elem(),
        }
    }
    unreachable!("the last block of a task returns the loss")
}
