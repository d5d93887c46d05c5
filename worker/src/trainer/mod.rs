//! The training loop's heart: one step, from parameters to parameters.
//!
//! ```text
//! attach ─ for each micro-batch: forward, backward, round ─┬─ finish sums ─ commit ─ update, hash
//!                                 buckets of the last leave ┘
//! ```
//!
//! # Invariants
//! 1. State is written only after the commit point, so it is at step s or s + 1, never between.
//! 2. Nothing here depends on rank or world size but which micro-batches are computed.
//!
//! Deliberately absent: membership, checkpoints, reports. The session calls [`Trainer::step`] and does those.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use mattock_collectives::{Buffer, CollectiveError, Group, Rank, SaturatingSum};
use mattock_data::keys::MicroBatchKey;
use mattock_exact::{BLOCK, Exponents, block_maxima};
use mattock_kernels::TrainBackend;

use crate::commit::{Ballot, CommitError, Verdict};
use crate::gradients;
use crate::params::{Space, attach};
use crate::phases::{Clock, Phase};
use crate::plan::Plan;
use crate::samples;
use crate::schedule::learning_rate;
use crate::state::State;
use crate::sum::GradientSum;
use crate::task::{Pass, Task};
use crate::update;

/// The place of rounding among what draws random numbers for a micro-batch; those of the model count from 0.
const ROUNDING: u64 = u64::MAX;

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// The exchange failed; nothing was written, and the step can be run again.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The total says that the step may not be written.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepDone {
    /// The step, from 1: how many are done.
    pub step: u64,
    /// Mean loss over the micro-batches, before the update.
    pub loss: f64,
    /// Global norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Hash of the state after the step.
    pub state_hash: u64,
    /// Whether some rank was asked to stop.
    pub stop: bool,
    /// Blocks whose sum may have needed more bits than the recipe gives it, and followed in 64.
    pub wide_blocks: usize,
}

/// A worker's half of the training: state, model on the device, and sums.
pub struct Trainer<'a, B: TrainBackend, T: Task> {
    task: &'a T,
    plan: &'a Plan,
    space: Space,
    state: State,
    device: B::Device,
    blocks: Vec<T::Block<B>>,
    lengths: Vec<usize>,
    sum: GradientSum,
    gradient: Vec<f32>,
    scratch: Vec<f32>,
    clock: Clock,
}

impl<'a, B: TrainBackend, T: Task> Trainer<'a, B, T> {
    /// Starts from `state`, whatever wrote it.
    pub fn new(task: &'a T, plan: &'a Plan, space: Space, state: State, device: B::Device) -> Self {
        let blocks = task.blocks::<B>(plan.seed, &device);
        let lengths: Vec<usize> = space.buckets().iter().map(ExactSizeIterator::len).collect();
        let sum = GradientSum::new(plan, &space);
        let gradient = vec![0.0; space.len()];
        Self {
            task,
            plan,
            state,
            device,
            blocks,
            lengths,
            sum,
            gradient,
            scratch: Vec::new(),
            clock: Clock::start(),
            space,
        }
    }

    /// The state after the last step.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Where parameters lie.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Where it computes.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// The stopwatch, for what is done between steps.
    pub fn clock(&mut self) -> &mut Clock {
        &mut self.clock
    }

    /// Runs the next step: computes `assigned` micro-batches, sums over the group, updates.
    ///
    /// `stop` asks all ranks to end after this step.
    pub fn step(&mut self, group: &Group, assigned: &[u32], stop: bool) -> Result<StepDone, StepError> {
        self.attach();
        if self.state.exponents.is_empty() && self.sum.has_exponents() {
            self.measure_exponents(group)?;
        }
        let mut ballot = Ballot::new(self.plan.batch.micro_batches() as usize);
        self.compute(group, assigned, &mut ballot);

        self.clock.enter(Phase::Exchange);
        let summed = self.sum.finish(group, &self.state.exponents, &mut self.gradient)?;
        if self.sum.nonfinite() {
            ballot.nonfinite();
        }
        if stop {
            ballot.stop();
        }
        let verdict = self.commit(group, ballot)?;

        self.clock.enter(Phase::Update);
        Ok(self.write(&verdict, summed.exponents, summed.wide_blocks))
    }

    /// Puts the parameters into the model's blocks, as leaves of new graphs.
    fn attach(&mut self) {
        self.clock.enter(Phase::Other);
        let blocks = std::mem::take(&mut self.blocks);
        let parts = blocks.into_iter().zip(self.space.buckets());
        let parameters = &self.state.parameters;
        self.blocks =
            parts.map(|(block, range)| attach(block, &parameters[range.clone()], &self.device)).collect();
    }

    /// The first step's exponents: from the maxima of micro-batch 0, as rank 0 measures them.
    fn measure_exponents(&mut self, group: &Group) -> Result<(), StepError> {
        let mut maxima = vec![0.0f32; self.space.len() / BLOCK];
        let root = Rank(0);
        if group.ring().rank() == root {
            let firsts: Vec<usize> = self.space.buckets().iter().map(|range| range.start / BLOCK).collect();
            self.gradients_of(0, |bucket, gradient, _| {
                let measured = block_maxima(gradient);
                maxima[firsts[bucket]..][..measured.len()].copy_from_slice(&measured);
            });
            self.clock.enter(Phase::Exchange);
            let measured = Arc::new(Buffer::from(maxima));
            group.broadcast(Arc::clone(&measured)).wait()?;
            maxima = measured.to_vec();
        } else {
            self.clock.enter(Phase::Exchange);
            maxima = group.receive_broadcast(root, maxima.into()).wait()?.into_vec();
        }
        self.state.exponents = Exponents::from_maxima(&maxima, self.plan.batch.micro_batches());
        Ok(())
    }

    /// Computes the assigned micro-batches; buckets leave with the last one.
    fn compute(&mut self, group: &Group, assigned: &[u32], ballot: &mut Ballot) {
        self.sum.begin();
        for (position, &index) in assigned.iter().enumerate() {
            let last = position + 1 == assigned.len();
            let exponents = std::mem::take(&mut self.state.exponents);
            let key = self.key_of(index).stream(ROUNDING).bits();
            let loss = self.gradients_of(index, |bucket, gradient, sum| {
                sum.add(bucket, gradient, &exponents, key);
                if last {
                    sum.send(bucket, group);
                }
            });
            self.state.exponents = exponents;
            ballot.count(index as usize, loss);
        }
        if assigned.is_empty() {
            (0..self.lengths.len()).rev().for_each(|bucket| self.sum.send(bucket, group));
        }
    }

    fn key_of(&self, micro_batch: u32) -> MicroBatchKey {
        MicroBatchKey { seed: self.plan.seed, step: self.state.step, micro_batch }
    }

    /// Runs one micro-batch forward and backward; `sink` receives each bucket's gradient, the last block's first.
    fn gradients_of(&mut self, index: u32, mut sink: impl FnMut(usize, &[f32], &mut GradientSum)) -> f32 {
        let key = self.key_of(index);
        let Self { task, plan, blocks, lengths, scratch, clock, sum, .. } = self;
        clock.enter(Phase::Data);
        let step = self.state.step;
        let batch = samples::micro_batch(*task, plan, step, index);
        let pass = Pass::Train(key);
        clock.enter(Phase::Compute);
        gradients::micro_batch::<B, T>(*task, blocks, lengths, &batch, pass, scratch, |bucket, gradient| {
            clock.enter(Phase::Round);
            sink(bucket, gradient, sum);
            clock.enter(Phase::Compute);
        })
    }

    /// The commit point: no state is written before this returns.
    fn commit(&mut self, group: &Group, ballot: Ballot) -> Result<Verdict, StepError> {
        let words = Arc::new(ballot.into_words().into());
        let total = group.all_reduce_now::<SaturatingSum>(words, Buffer::default())?;
        Ok(Ballot::from_total(total.into_vec()).verdict(self.state.step, self.plan.reduce.nonfinite)?)
    }

    /// Writes the state after the commit point.
    fn write(&mut self, verdict: &Verdict, exponents: Exponents, wide_blocks: usize) -> StepDone {
        let lr = learning_rate(&self.plan.optimizer, self.state.step, self.plan.steps);
        let grad_norm = update::norm(&self.gradient);
        let state_hash = if verdict.update {
            self.state.exponents = exponents;
            update::apply(&mut self.state, &self.space, &self.gradient, &self.plan.optimizer, lr, grad_norm)
        } else {
            self.state.step += 1;
            self.state.hash()
        };
        let Verdict { loss, stop, .. } = *verdict;
        StepDone { step: self.state.step, loss, grad_norm, lr, state_hash, stop, wide_blocks }
    }
}
