//! Forward and backward over a sequence of blocks, one graph per block.
//!
//! Cutting the graph between blocks hands over each block's gradients while the earlier blocks still run
//! backward, and gives bitwise the same gradients as one graph would: the derivative of `sum(output * gradient)` by
//! `output` is `gradient` itself. A block's graph is kept until its backward ran; or given up at once, and made again from the
//! block's input, which gives the same bits: the same kernels over the same values, random numbers from the same key.

use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Tensor};

use mattock_kernels::{Kernels, TrainBackend};

use crate::params::collect_gradients;
use crate::task::{Carry, Output, Pass, Task};

/// What a model of blocks runs one micro-batch through.
pub(crate) struct Model<'m, B: TrainBackend, T: Task> {
    pub(crate) task: &'m T,
    pub(crate) blocks: &'m [T::Block<B>],
    /// The buckets' lengths.
    pub(crate) lengths: &'m [usize],
    /// Whether a block's graph is given up after forward, and made again on the way back.
    pub(crate) recompute: bool,
}

/// One block's part of the pass.
struct Graph<B: Backend> {
    /// The leaves that the block got; none for the first.
    input: Option<Carry<B>>,
    /// What it returned; none for the last, which returned the loss, and where that is computed again.
    output: Option<Carry<B>>,
}

impl<B: TrainBackend, T: Task> Model<'_, B, T> {
    /// Gradients of one micro-batch.
    ///
    /// `scratch` is reused between calls. `sink` receives (block, gradient), the last block first; the gradient is padded with
    /// zeros to the bucket's length. Returns the mean loss.
    pub(crate) fn micro_batch(
        &self,
        batch: &T::Batch,
        pass: Pass,
        scratch: &mut Vec<f32>,
        mut sink: impl FnMut(usize, &[f32]),
    ) -> f32 {
        let (graphs, loss) = self.forward(batch, pass);
        let value = loss.clone().inner().into_scalar().elem::<f32>();
        let mut gradients = Some(loss.backward());
        let mut above: Option<Carry<B>> = None;
        for (index, Graph { mut input, output }) in graphs.into_iter().enumerate().rev() {
            if index + 1 < self.blocks.len() {
                let output = output.or_else(|| {
                    // Those that it got are leaves of a graph that is gone.
                    input = input.take().map(Carry::into_leaves);
                    match self.task.forward(&self.blocks[index], input.clone(), batch, pass) {
                        Output::Next(output) => Some(output),
                        Output::Loss(_) => None,
                    }
                });
                // What is left of the block above is only what its inputs are due.
                let from = above.take().zip(gradients.take());
                let from = from.map(|(above, mut gradients)| above.gradients(&mut gradients));
                gradients = output.zip(from).and_then(|(output, from)| output.backward(from));
            }
            scratch.clear();
            scratch.resize(self.lengths[index], 0.0);
            if let Some(gradients) = &mut gradients {
                collect_gradients(&self.blocks[index], gradients, scratch);
            }
            sink(index, scratch);
            above = input;
        }
        value
    }

    fn forward(&self, batch: &T::Batch, pass: Pass) -> (Vec<Graph<B>>, Tensor<B, 1>) {
        let mut graphs = Vec::with_capacity(self.blocks.len());
        let mut input: Option<Carry<B>> = None;
        for block in self.blocks {
            match self.task.forward(block, input.clone(), batch, pass) {
                Output::Next(output) => {
                    let leaves = output.clone().into_leaves();
                    let output = (!self.recompute).then_some(output);
                    graphs.push(Graph { input: input.replace(leaves), output });
                }
                Output::Loss(loss) => {
                    graphs.push(Graph { input, output: None });
                    let last = graphs.len() == self.blocks.len();
                    assert!(last, "only the last block of a task returns the loss");
                    return (graphs, loss);
                }
            }
        }
        unreachable!("the last block of a task returns the loss")
    }
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
