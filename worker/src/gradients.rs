//! Forward and backward over a sequence of blocks, one graph per block.
//!
//! Cutting the graph between blocks hands over each block's gradients while the earlier blocks still run
//! backward, and gives bitwise the same gradients as one graph would: the derivative of `sum(output * gradient)` by
//! `output` is `gradient` itself. A block's graph is kept until its backward ran; or given up at once, and made again from the
//! block's input, which gives the same bits: the same kernels over the same values, random numbers from the same key.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{ElementConversion, Tensor};

use mattock_kernels::{Kernels, TrainBackend};

use crate::params::{collect_gradients, release, without_graph};
use crate::task::{Carry, Output, Pass, Task};

/// What a model of blocks runs one micro-batch through.
pub(crate) struct Model<'m, B: TrainBackend, T: Task> {
    pub(crate) task: &'m T,
    pub(crate) blocks: &'m [T::Block<B>],
    /// The buckets' lengths.
    pub(crate) lengths: &'m [usize],
    /// The same blocks without a graph and without parameters, where activations are computed again: nothing is kept in forward
    /// then, and a block's graph made on the way back. (Burn keeps a graph until it ran backward, also where nobody has it any more.)
    pub(crate) inner: Option<&'m mut Inner<B, T>>,
}

/// Blocks without a graph; one is taken while it has parameters.
pub(crate) type Inner<B, T> = [Option<<T as Task>::Block<<B as AutodiffBackend>::InnerBackend>>];

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
        &mut self,
        batch: &T::Batch,
        pass: Pass,
        scratch: &mut Vec<f32>,
        mut sink: impl FnMut(usize, &[f32]),
    ) -> f32 {
        let (graphs, loss) = match self.inner.take() {
            Some(inner) => self.forward_without_graphs(inner, batch, pass),
            None => self.forward(batch, pass),
        };
        let value = loss.clone().inner().into_scalar().elem::<f32>();
        let mut gradients = Some(loss.backward());
        let mut above: Option<Carry<B>> = None;
        for (index, Graph { input, output }) in graphs.into_iter().enumerate().rev() {
            if index + 1 < self.blocks.len() {
                let output = output.or_else(|| {
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
            scratch.resize(self.lengths[index], 0.0);
            match &mut gradients {
                Some(gradients) => collect_gradients(&self.blocks[index], gradients, scratch),
                None => scratch.fill(0.0),
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
                    graphs.push(Graph { input: input.replace(leaves), output: Some(output) });
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

impl<B: TrainBackend, T: Task> Model<'_, B, T> {
    fn forward_without_graphs(
        &self,
        inner: &mut Inner<B, T>,
        batch: &T::Batch,
        pass: Pass,
    ) -> (Vec<Graph<B>>, Tensor<B, 1>) {
        let mut graphs = Vec::with_capacity(self.blocks.len());
        let mut values: Option<Carry<B::InnerBackend>> = None;
        for (block, inner) in self.blocks.iter().zip(inner) {
            let input = values.clone().map(Carry::leaves_of);
            graphs.push(Graph { input: input.clone(), output: None });
            if graphs.len() == self.blocks.len() {
                let Output::Loss(loss) = self.task.forward(block, input, batch, pass) else { break };
                return (graphs, loss);
            }
            let Some(module) = inner.take().map(|inner| without_graph(block, inner)) else { break };
            let output = self.task.forward(&module, values.take(), batch, pass);
            *inner = Some(release(module));
            let Output::Next(output) = output else { break };
            values = Some(output);
        }
        unreachable!("the last block of a task, and no other, returns the loss")
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
