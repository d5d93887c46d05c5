//! A step in which no rank has all parameters: micro-batches in rounds, all ranks at the same block at the same time.
//!
//! A rank that has fewer micro-batches than others takes part in their last rounds without one. What was added up belongs to the
//! step as a whole: where a ring breaks, the step begins again.

use std::sync::Arc;

use mattock_collectives::{Buffer, Group, Max, Rank, Sum};
use mattock_exact::{BLOCK, block_maxima};
use mattock_kernels::TrainBackend;

use super::blocks::{Gathers, Round, Sink};
use super::sharding::Sharding;
use super::{ROUNDING, StepError, Trainer};
use crate::faults::Moment;
use crate::gate::Gate;
use crate::params::Space;
use crate::samples;
use crate::sum::{GradientSum, Target};
use crate::task::{Pass, Task};

impl<B: TrainBackend, T: Task> Trainer<'_, B, T> {
    /// Computes all of a step's micro-batches together with the other ranks.
    pub(super) fn compute_in_rounds(
        &mut self,
        group: &Group,
        share: &[u32],
        gate: &Gate,
    ) -> Result<(), StepError> {
        self.pending = None;
        self.forget();
        gate.proceed()?;
        samples::follow(self.task, self.plan, self.state.step, share);
        self.exponents.clone_from(&self.state.exponents);
        if self.state.exponents.is_empty() {
            let is_root = group.ring().rank() == Rank(0);
            let mut maxima = vec![0.0f32; self.space.len() / BLOCK];
            self.round(group, gate, is_root.then_some(0), Some(&mut maxima))?;
            self.spread_maxima(group, gate, is_root.then_some(maxima))?;
        }
        let own = Arc::new(Buffer::from(vec![share.len() as i64]));
        let most = group.all_reduce_now::<Max<i64>>(own, Buffer::default())?;
        if let GradientSum::Sharded(sum) = &mut self.sum {
            sum.begin(self.own.len(), self.space.len() / BLOCK);
        }
        for round in 0..most.first().map_or(0, |&most| most.max(0) as usize) {
            let index = share.get(round).copied();
            let loss = self.round(group, gate, index, None)?;
            self.counted.extend(index.zip(loss));
        }
        Ok(())
    }

    /// One micro-batch of this rank, or none, while the others have one each; returns its loss. Gradients are added up, or only
    /// measured.
    pub(super) fn round(
        &mut self,
        group: &Group,
        gate: &Gate,
        index: Option<u32>,
        maxima: Option<&mut Vec<f32>>,
    ) -> Result<Option<f32>, StepError> {
        let batch = index.map(|index| self.batch_of(index)).transpose()?;
        let batch = batch.zip(index.map(|index| Pass::Train(self.key_of(index))));
        let key = index.map_or(0, |index| self.key_of(index).stream(ROUNDING).bits());
        let Self {
            task,
            space,
            state,
            own,
            sharding,
            device,
            inner,
            lengths,
            scratch,
            clock,
            sum,
            exponents,
            death,
            ..
        } = self;
        let Some(Sharding { seat: Some(seat), room, .. }) = sharding else {
            unreachable!("a ring with sharded state begins with a regroup");
        };
        let mut blocks: Vec<Option<T::Block<B>>> =
            std::mem::take(&mut self.blocks).into_iter().map(Some).collect();
        let run = Round {
            task: *task,
            batch,
            device,
            gathers: Gathers { group, parameters: &state.parameters, own, lens: &seat.lens, room },
            gate,
            clock,
            blocks: &mut blocks,
            inner,
        };
        let loss = match (maxima, sum) {
            (Some(maxima), _) => run.run(lengths, scratch, &mut |bucket, gradient| {
                measure(space, bucket, gradient, maxima);
                Ok(())
            }),
            (None, GradientSum::Sharded(sum)) => {
                let sink: &mut Sink<'_> = &mut |bucket, gradient| {
                    let (range, lens) = (&space.buckets()[bucket], &seat.lens[bucket][..]);
                    (bucket == lengths.len() / 2).then(|| death.at(Moment::Buckets));
                    sum.exchange(Target { group, bucket, range, lens, own }, gradient, exponents, key)
                };
                let loss = run.run(lengths, scratch, sink);
                loss.and_then(|loss| Ok(sum.end_round(group, own).map(|()| loss)?))
            }
            (None, _) => unreachable!("sums are sharded where parameters are"),
        };
        self.blocks = blocks.into_iter().flatten().collect();
        loss
    }

    /// Mean loss over all held-out samples, which the ranks of the group divide among themselves; `None` where there are none, or
    /// where a rank cannot read them, which is that rank's error. All ranks call this together.
    ///
    /// # Errors
    /// [`StepError`].
    pub(crate) fn held_out(&mut self, group: &Group, gate: &Gate) -> Result<Option<f64>, StepError> {
        let read = self.task.held_out(self.plan.batch.micro as usize);
        let count = read.as_ref().map_or(-1, |batches| batches.len() as i64);
        gate.wait();
        let least = Arc::new(Buffer::from(vec![-count]));
        let least =
            -group.all_reduce_now::<Max<i64>>(least, Buffer::default())?.first().copied().unwrap_or(1);
        let batches = read?;
        if least <= 0 {
            return Ok(None);
        }
        let (rank, world) = (group.ring().rank().0 as usize, group.ring().world_size().get() as usize);
        let sizes: Vec<usize> = batches.iter().map(|(size, _)| *size).collect();
        let mut losses = vec![0i64; sizes.len()];
        let mut own = batches.into_iter().enumerate().skip(rank).step_by(world);
        for _ in 0..sizes.len().div_ceil(world) {
            let (index, batch) = own.next().map(|(index, (_, batch))| (index, batch)).unzip();
            let loss = self.evaluate(group, gate, batch)?;
            if let (Some(index), Some(loss)) = (index, loss) {
                losses[index] = loss.to_bits().into();
            }
        }
        gate.wait();
        let losses = group.all_reduce_now::<Sum<i64>>(Arc::new(Buffer::from(losses)), Buffer::default())?;
        let losses = losses.iter().map(|&bits| f64::from(f32::from_bits(bits as u32)));
        let total: f64 = losses.zip(&sizes).map(|(loss, &size)| loss * size as f64).sum();
        Ok(Some(total / sizes.iter().sum::<usize>() as f64))
    }

    /// The loss of a batch, or none, while the others have one each.
    fn evaluate(
        &mut self,
        group: &Group,
        gate: &Gate,
        batch: Option<T::Batch>,
    ) -> Result<Option<f32>, StepError> {
        let Self { task, state, own, sharding, device, inner, clock, .. } = self;
        let Some(Sharding { seat: Some(seat), room, .. }) = sharding else {
            unreachable!("a ring with sharded state begins with a regroup");
        };
        let round: Round<'_, B, T> = Round {
            task: *task,
            batch: batch.map(|batch| (batch, Pass::Evaluate)),
            device,
            gathers: Gathers { group, parameters: &state.parameters, own, lens: &seat.lens, room },
            gate,
            clock,
            // Nothing keeps a graph here.
            blocks: &mut [],
            inner,
        };
        round.evaluate()
    }
}

/// Notes the largest gradient of each block of a bucket.
fn measure(space: &Space, bucket: usize, gradient: Option<&[f32]>, maxima: &mut [f32]) {
    let measured = gradient.map(block_maxima).unwrap_or_default();
    let first = space.buckets()[bucket].start / BLOCK;
    maxima[first..first + measured.len()].copy_from_slice(&measured);
}
