//! A micro-batch over blocks of which no rank has all parameters: gathered just in time, and given up after use.
//!
//! ```text
//! forward   b is there: gather(b + 1) | block b, keeping its input      .. last block: the loss, and backward at once
//! backward  b is there: gather(b - 1) | block b again from its input, its gradients ─> reduce-scatter(b)
//! ```
//!
//! Computing a block again gives the bits that it gave before: the same kernels over the same values, and random numbers drawn
//! from the same key. So the gradients are those of [`crate::gradients`].
//!
//! # Invariants
//! 1. All ranks make the same exchanges in the same order, also those that have no micro-batch.
//! 2. At most two blocks' parameters are there at a time: those that are computed with, where they came if the device computes
//!    in this memory, and those that come.

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{ElementConversion, Tensor};
use bytes::Bytes;
use mattock_collectives::{Buffer, CollectiveError, Group, Pending};
use mattock_kernels::TrainBackend;

use super::StepError;
use super::room::Room;
use crate::gate::Gate;
use crate::gradients::Inner;
use crate::params::{attach_shared, collect_gradients, release};
use crate::partition::Stretches;
use crate::phases::{Clock, Phase};
use crate::task::{Carry, Output, Pass, Task};

/// Own parts of parameters, to be put together with the others'.
pub(super) struct Gathers<'g> {
    pub(super) group: &'g Group,
    pub(super) parameters: &'g [f32],
    pub(super) own: &'g Stretches,
    /// By bucket: how many elements each rank has.
    pub(super) lens: &'g [Vec<usize>],
    /// Where the parameters of blocks come.
    pub(super) room: &'g Room,
}

impl Gathers<'_> {
    fn begin(&mut self, bucket: usize) -> Pending<Buffer<f32>> {
        let input = self.group.buffer_of(&self.parameters[self.own.within(bucket)]);
        self.group.all_gather_uneven(input.into(), &self.lens[bucket], self.room.take())
    }
}

/// One rank's part of a round.
pub(super) struct Round<'r, B: TrainBackend, T: Task> {
    pub(super) task: &'r T,
    /// The micro-batch, if this rank has one, and how it is run.
    pub(super) batch: Option<(T::Batch, Pass)>,
    pub(super) device: &'r B::Device,
    pub(super) gathers: Gathers<'r>,
    pub(super) gate: &'r Gate,
    pub(super) clock: &'r mut Clock,
    /// By block; taken while it has parameters.
    pub(super) blocks: &'r mut [Option<T::Block<B>>],
    /// The same, for what keeps no graph. (Burn keeps one until it ran backward, also where nobody has it any more.)
    pub(super) inner: &'r mut Inner<B, T>,
}

/// What forward leaves for backward.
struct Kept<B: TrainBackend> {
    /// The inputs of all blocks but the first and the last.
    inputs: Vec<Carry<B::InnerBackend>>,
    /// What the last block got, as leaves of its graph, and the loss that it returned; it still has its parameters.
    last: Option<Carry<B>>,
    loss: Tensor<B, 1>,
}

/// The parameters of the last block, which come, and what goes into it.
type LastInput<B> =
    (Pending<Buffer<f32>>, Option<Carry<<B as burn::tensor::backend::AutodiffBackend>::InnerBackend>>);

const LAST: &str = "the last block of a task, and no other, returns the loss";

/// Receives a bucket's gradient, the last block's first; nothing where this rank has no micro-batch.
pub(super) type Sink<'s> = dyn FnMut(usize, Option<&[f32]>) -> Result<(), CollectiveError> + 's;

impl<B: TrainBackend, T: Task> Round<'_, B, T> {
    /// Runs it; returns the loss of this rank's micro-batch. `lengths` are the buckets', `scratch` is reused.
    pub(super) fn run(
        mut self,
        lengths: &[usize],
        scratch: &mut Vec<f32>,
        sink: &mut Sink<'_>,
    ) -> Result<Option<f32>, StepError> {
        let kept = self.forward()?;
        self.backward(kept, lengths, scratch, sink)
    }

    /// Runs it forward only; returns the loss.
    pub(super) fn evaluate(mut self) -> Result<Option<f32>, StepError> {
        let (coming, input) = self.below_the_last(&mut |_| {})?;
        let last = self.inner.len() - 1;
        self.arrive_inner(last, coming)?;
        match self.without_graph(last, input) {
            Some(Output::Loss(loss)) => Ok(Some(loss.into_scalar().elem())),
            Some(Output::Next(_)) => unreachable!("{LAST}"),
            None => Ok(None),
        }
    }

    /// Waits for a block's parameters, which `put_in` takes if they are used.
    fn arrive(
        &mut self,
        pending: Pending<Buffer<f32>>,
        put_in: impl FnOnce(&mut Self, Bytes),
    ) -> Result<(), StepError> {
        self.gate.wait();
        self.clock.enter(Phase::Exchange);
        let parameters = pending.wait()?;
        self.gate.proceed()?;
        self.clock.enter(Phase::Compute);
        let parameters = self.gathers.room.lend(parameters);
        if self.batch.is_some() {
            put_in(self, parameters);
        }
        Ok(())
    }

    /// The same, for a block that is to have a graph.
    fn arrive_outer(&mut self, block: usize, pending: Pending<Buffer<f32>>) -> Result<(), StepError> {
        self.arrive(pending, |round, parameters| fill(&mut round.blocks[block], parameters, round.device))
    }

    /// The same, for a block that is to have none.
    fn arrive_inner(&mut self, block: usize, pending: Pending<Buffer<f32>>) -> Result<(), StepError> {
        self.arrive(pending, |round, parameters| fill(&mut round.inner[block], parameters, round.device))
    }

    /// Runs a block without a graph, if this rank has a micro-batch, and gives its parameters up.
    fn without_graph(
        &mut self,
        block: usize,
        input: Option<Carry<B::InnerBackend>>,
    ) -> Option<Output<B::InnerBackend>> {
        let (batch, pass) = self.batch.as_ref()?;
        let module = self.inner[block].take()?;
        let output = self.task.forward(&module, input, batch, *pass);
        self.inner[block] = Some(release(module));
        Some(output)
    }

    /// Runs all blocks but the last without a graph; `keep` gets their outputs. Returns the last block's parameters, which come, and
    /// its input.
    fn below_the_last(
        &mut self,
        keep: &mut dyn FnMut(&Carry<B::InnerBackend>),
    ) -> Result<LastInput<B>, StepError> {
        let mut input = None;
        let mut coming = self.gathers.begin(0);
        for block in 0..self.inner.len() - 1 {
            self.arrive_inner(block, coming)?;
            coming = self.gathers.begin(block + 1);
            input = match self.without_graph(block, input) {
                Some(Output::Next(output)) => Some(output),
                Some(Output::Loss(_)) => unreachable!("{LAST}"),
                None => None,
            };
            input.iter().for_each(&mut *keep);
        }
        Ok((coming, input))
    }

    /// Gives a block's parameters up.
    fn leave(&mut self, block: usize) {
        let module = self.blocks[block].take();
        self.blocks[block] = module.map(release);
    }

    fn forward(&mut self) -> Result<Option<Kept<B>>, StepError> {
        let mut inputs = Vec::with_capacity(self.blocks.len());
        let (coming, input) = self.below_the_last(&mut |output| inputs.push(output.clone()))?;
        // That of the last block becomes the leaves of its graph.
        inputs.pop();
        let last = self.blocks.len() - 1;
        self.arrive_outer(last, coming)?;
        let (Some((batch, pass)), Some(module)) = (&self.batch, &self.blocks[last]) else { return Ok(None) };
        let input = input.map(Carry::leaves_of);
        match self.task.forward(module, input.clone(), batch, *pass) {
            Output::Loss(loss) => Ok(Some(Kept { inputs, last: input, loss })),
            Output::Next(_) => unreachable!("{LAST}"),
        }
    }

    fn backward(
        &mut self,
        kept: Option<Kept<B>>,
        lengths: &[usize],
        scratch: &mut Vec<f32>,
        sink: &mut Sink<'_>,
    ) -> Result<Option<f32>, StepError> {
        let loss = kept.as_ref().map(|kept| value(&kept.loss));
        let (mut inputs, mut last, mut gradients) = match kept {
            Some(Kept { inputs, last, loss }) => (inputs, last, Some(loss.backward())),
            None => (Vec::new(), None, None),
        };
        // The leaves of the block above, whose gradients are those of this block's output.
        let mut above: Option<Carry<B>> = None;
        let mut coming: Option<Pending<Buffer<f32>>> = None;
        for block in (0..self.blocks.len()).rev() {
            // The last block's parameters, and its leaves, are those that the loss came from.
            let again = coming.is_some();
            let leaves = if again { inputs.pop().map(Carry::leaves_of) } else { last.take() };
            if let Some(pending) = coming.take() {
                self.arrive_outer(block, pending)?;
            }
            coming = block.checked_sub(1).map(|next| self.gathers.begin(next));
            if again {
                gradients = self.again(block, leaves.clone(), above.take(), gradients.take());
            }
            above = leaves;
            self.gate.proceed()?;
            self.clock.enter(Phase::Round);
            let gradient = self.batch.is_some().then(|| {
                scratch.resize(lengths[block], 0.0);
                match (&mut gradients, &self.blocks[block]) {
                    (Some(gradients), Some(module)) => collect_gradients(module, gradients, scratch),
                    _ => scratch.fill(0.0),
                }
                &scratch[..]
            });
            self.gate.wait();
            sink(block, gradient)?;
            self.leave(block);
        }
        Ok(loss)
    }

    /// Computes a block again, from the leaves that were its input, and runs it backward.
    fn again(
        &self,
        block: usize,
        leaves: Option<Carry<B>>,
        above: Option<Carry<B>>,
        gradients: Option<B::Gradients>,
    ) -> Option<B::Gradients> {
        let ((batch, pass), module) = (self.batch.as_ref()?, self.blocks[block].as_ref()?);
        let from = above?.gradients(&mut gradients?);
        match self.task.forward(module, leaves, batch, *pass) {
            Output::Next(output) => output.backward(from),
            Output::Loss(_) => None,
        }
    }
}

/// Puts parameters into a module.
fn fill<B: Backend, M: Module<B>>(module: &mut Option<M>, parameters: Bytes, device: &B::Device) {
    *module = module.take().map(|module| attach_shared(module, parameters, device));
}

fn value<B: TrainBackend>(loss: &Tensor<B, 1>) -> f32 {
    loss.clone().inner().into_scalar().elem()
}
