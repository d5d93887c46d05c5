//! The training loop's heart: one step, from parameters to parameters.
//!
//! ```text
//! attach ─ for each micro-batch: forward, backward, round ─┬─ finish sums ─ commit ─ update, hash
//!                                 buckets of the last leave ┘
//! ```
//! Where state is sharded, parameters are gathered first, and each rank updates its shard (`sharding.rs`).
//!
//! # Invariants
//! 1. State is written only after the commit point, so it is at step s or s + 1, never between.
//! 2. Nothing here depends on rank or world size but which micro-batches are computed.
//! 3. What was added up of a step outlives a ring that breaks: the next ring's first step begins with it.
//!
//! Deliberately absent: membership, checkpoints, reports. The session calls [`Trainer::step`] and does those.

mod audit;
mod blocks;
mod error;
mod former;
mod regroup;
mod room;
mod rounds;
mod sharding;
#[cfg(test)]
mod tests;
mod transfer;
mod trial;

use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use mattock_collectives::{Buffer, CollectiveError, Group, Rank, SaturatingSum};
use mattock_data::keys::MicroBatchKey;
use mattock_exact::{BLOCK, Exponents, block_maxima, chunk_squares, exponent_hash, norm, parameter_hash};
use mattock_kernels::TrainBackend;

use self::audit::{Audit, with_loss};
pub use self::error::{SHARDS_LOST, StepError};
use self::sharding::Sharding;
use crate::beginning::Beginning;
use crate::commit::{Ballot, CommitError, Verdict};
use crate::faults::{Death, Moment};
use crate::gate::Gate;
use crate::gradients;
use crate::origin::Origin;
use crate::params::{Space, attach, release};
use crate::partition::Stretches;
use crate::phases::{Clock, Phase};
use crate::plan::{Plan, Shard};
use crate::samples;
use crate::schedule::learning_rate;
use crate::state::State;
use crate::sum::{GradientSum, Summed};
use crate::task::{Pass, Task, TaskError};
use crate::update::Update;

/// The place of rounding among what draws random numbers for a micro-batch; those of the model count from 0.
const ROUNDING: u64 = u64::MAX;

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
    /// Hash of the state before the step.
    pub hash_before: u64,
    /// Hash of the state after the step; where that is sharded, the next step tells it.
    pub state_hash: Option<u64>,
    /// Whether some rank was asked to stop.
    pub stop: bool,
    /// Blocks whose sum may have needed more bits than the recipe gives it, and followed in 64.
    pub wide_blocks: usize,
    /// By rank: how many microseconds a micro-batch took it, 0 where it had none.
    pub times: Vec<u32>,
}

/// For how long a state that is being read is not written; then the reader keeps the old arrays, and writing makes new ones.
const LOAN_LIMIT: Duration = Duration::from_secs(1);

/// Dropped when a state that was lent is no longer read.
pub(crate) struct Loan(#[allow(dead_code, reason = "it is dropped")] mpsc::Sender<()>);

/// A worker's half of the training: state, model on the device, and sums.
pub struct Trainer<'a, B: TrainBackend, T: Task> {
    task: &'a T,
    plan: &'a Plan,
    space: Space,
    /// Over what is this rank's own of it.
    state: State,
    own: Stretches,
    /// Where all of the state lies, while none of it was read.
    origin: Option<Origin>,
    /// Of the state, where a rank has all of it.
    state_hash: u64,
    /// Of the parameters that the step is computed with: what has changed in memory since they were written shows here.
    attached: u64,
    sharding: Option<Sharding>,
    device: B::Device,
    blocks: Vec<T::Block<B>>,
    /// Those that keep no graph; one is taken while it has parameters.
    inner: Vec<Option<T::Block<B::InnerBackend>>>,
    lengths: Vec<usize>,
    sum: GradientSum,
    /// The micro-batches of the next step that `sum` holds, with their losses.
    counted: BTreeMap<u32, f32>,
    /// Whether `sum` holds those only.
    clean: bool,
    /// Block maxima of the first micro-batch, from which the first exponents come.
    maxima: Option<Vec<f32>>,
    /// Under which `sum` rounds.
    exponents: Exponents,
    /// What the sums of a step say that this rank has contributed to the commit of, and has not written.
    pending: Option<Summed>,
    /// This rank's part of the mean gradient, where sums do not keep it themselves.
    gradient: Vec<f32>,
    scratch: Vec<f32>,
    /// Ends when the state is no longer read by another thread.
    lent: Option<mpsc::Receiver<()>>,
    clock: Clock,
    /// How many microseconds a micro-batch of this step has taken, or is said to have taken.
    took: u32,
    audit: Audit,
    /// Whether its gradients are wrong on purpose.
    pub(crate) wrong: bool,
    pub(crate) death: Death,
    pub(crate) said_to_take: Option<u32>,
}

impl<'a, B: TrainBackend, T: Task> Trainer<'a, B, T> {
    /// Starts from what the worker has.
    pub(crate) fn new(
        task: &'a T,
        plan: &'a Plan,
        space: Space,
        beginning: Beginning,
        device: B::Device,
    ) -> Self {
        // Values are put in before each step, or for each block.
        let blocks = task.shapes::<B>(&device).map(release).collect();
        let inner = task.shapes::<B::InnerBackend>(&device).map(release).map(Some).collect();
        let lengths: Vec<usize> = space.buckets().iter().map(ExactSizeIterator::len).collect();
        let mut trainer = Self {
            task,
            plan,
            state_hash: 0,
            attached: 0,
            state: State::blank(0, 0),
            own: Stretches::default(),
            origin: None,
            sharding: None,
            device,
            blocks,
            inner,
            lengths,
            sum: GradientSum::new(plan, &space, plan.reduce.bits),
            counted: BTreeMap::new(),
            clean: false,
            maxima: None,
            exponents: Exponents::default(),
            pending: None,
            gradient: Vec::new(),
            scratch: Vec::new(),
            lent: None,
            clock: Clock::start(),
            took: 0,
            audit: Audit::default(),
            wrong: false,
            death: Death::default(),
            said_to_take: None,
            space,
        };
        trainer.replace(beginning);
        trainer
    }

    /// The state after the last step; where it is sharded, this rank's part of it.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Hash of the state, where this rank has all of it.
    pub fn known_hash(&self) -> Option<u64> {
        self.sharding.is_none().then_some(self.state_hash)
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

    /// What is added up of `share`, this worker's part of the next step: nothing that can be used, where anything else is
    /// added up too.
    pub fn holds(&self, share: &[u32]) -> Vec<u32> {
        // Where gradients are scattered as they appear, a step is done as a whole.
        let full = self.sharding.as_ref().is_some_and(|sharding| sharding.full);
        let usable = !full && self.counted.keys().all(|index| share.contains(index));
        self.counted.keys().copied().filter(|_| usable).collect()
    }

    /// Keeps what it [`holds`](Self::holds) of `share`, and forgets what cannot be used.
    pub fn resume(&mut self, share: &[u32]) -> Vec<u32> {
        let kept = self.holds(share);
        if kept.is_empty() {
            self.forget();
        }
        kept
    }

    /// Forgets what was added up; the sums themselves only when they are needed again, for links may hold them still.
    fn forget(&mut self) {
        self.counted.clear();
        self.audit.forget();
        self.clean = false;
    }

    /// Takes another state in place of what it has. Where state is divided, no array is made before it is known of which part.
    pub(crate) fn replace(&mut self, beginning: Beginning) {
        self.forget();
        let divided = self.plan.parallel.shard != Shard::None;
        self.sharding = divided.then(|| Sharding::new(self.plan.parallel, self.space.buckets()));
        // What was summed of another state's step.
        (self.origin, self.pending) = (None, None);
        self.state = match beginning {
            Beginning::Whole(state) => state,
            Beginning::Nothing => State::blank(0, if divided { 0 } else { self.space.len() }),
            Beginning::At { step, exponents, origin } => {
                self.origin = Some(origin);
                State { exponents, ..State::blank(step, 0) }
            }
        };
        let all = self.state.parameters.len() == self.space.len();
        let held = self.space.buckets().iter().map(|bucket| if all { bucket.clone() } else { 0..0 });
        self.own = Stretches::new(held.collect());
        self.gradient = self.gradients();
        self.state_hash = self.state.hash();
    }

    /// Room for a gradient of what this rank holds, where it needs any.
    fn gradients(&self) -> Vec<f32> {
        vec![0.0; if self.sum.decoded().is_some() { 0 } else { self.own.len() }]
    }

    /// The state, for somebody who reads it while the next step is computed, and drops what comes with it when that is done: until
    /// then, or for long enough, the state is not written, so that nothing is copied for it.
    pub(crate) fn lend(&mut self) -> (State, Loan) {
        let (loan, back) = mpsc::channel();
        self.lent = Some(back);
        (self.state.clone(), Loan(loan))
    }

    /// Waits until the state is no longer read.
    fn reclaim(&mut self) {
        if let Some(back) = self.lent.take() {
            self.clock.enter(Phase::Checkpoint);
            // Nothing is ever sent: it ends when the other side is dropped.
            let _: Result<(), _> = back.recv_timeout(LOAN_LIMIT);
        }
    }

    /// The ring is over: time goes to what comes between rings.
    pub fn pause(&mut self) {
        self.clock.enter(Phase::Recovery);
    }

    /// What a memory does that fails: no hash is told of it.
    pub(crate) fn flip_bit(&mut self) {
        let flipped = |value: &mut f32| *value = f32::from_bits(value.to_bits() ^ 1 << 20);
        let [parameters, ..] = self.state.arrays_mut();
        parameters.first_mut().map(flipped);
    }

    /// Does one step together with the other ranks of the group, who compute the other micro-batches.
    ///
    /// `stop` asks all ranks to end after this step.
    ///
    /// # Errors
    /// [`StepError`]; then nothing was written, and what was added up is kept for the next attempt.
    pub fn step(
        &mut self,
        group: &Group,
        share: &[u32],
        gate: &Gate,
        stop: bool,
    ) -> Result<StepDone, StepError> {
        let total = self.contribute(group, share, gate, stop)?;
        self.death.at(Moment::Committed);
        let times = total.times(group.ring().world_size().get()).to_vec();
        Ok(StepDone { times, ..self.write_pending(total, gate)? })
    }

    /// Does what can be done before the commit, and contributes to that; returns the total.
    fn contribute(
        &mut self,
        group: &Group,
        share: &[u32],
        gate: &Gate,
        stop: bool,
    ) -> Result<Ballot, StepError> {
        self.took = 0;
        if self.plan.parallel.shard == Shard::Full {
            let before = self.clock.own_work();
            self.compute_in_rounds(group, share, gate)?;
            self.note_time(before, share.len());
        } else {
            self.gather_parameters(group, gate)?;
            self.attach();
            gate.computes_with(self.attached);
            self.settle_exponents(group, gate)?;
            self.compute(group, share, gate)?;
            self.audit(group, gate)?;
        }
        gate.wait();

        self.clock.enter(Phase::Exchange);
        let summed = self.sum.finish(group, &self.exponents, &self.own, &mut self.gradient)?;
        self.hand_on(group)?;
        self.death.at(Moment::Summed);
        self.pending = Some(summed);
        let mut ballot = self.ballot(stop);
        ballot.took(group.ring().rank().0, group.ring().world_size().get(), self.took);
        self.vote(&mut ballot);
        Ok(self.commit(group, ballot)?)
    }

    /// So many micro-batches have taken what was worked since `before`.
    fn note_time(&mut self, before: f64, micro_batches: usize) {
        let seconds = self.clock.own_work() - before;
        let each = (seconds * 1e6 / micro_batches as f64).clamp(1.0, f64::from(u32::MAX)) as u32;
        self.took = if micro_batches == 0 { 0 } else { self.said_to_take.unwrap_or(each) };
    }

    /// This rank's part of the mean gradient of the step that was summed last.
    fn gradient(&self) -> &[f32] {
        self.sum.decoded().unwrap_or(&self.gradient)
    }

    /// Puts the parameters into the model's blocks, as leaves of new graphs.
    fn attach(&mut self) {
        self.clock.enter(Phase::Other);
        let buckets = self.space.buckets().iter().enumerate();
        let parts = buckets.map(|(bucket, range)| parameter_hash(self.gathered(bucket), range.start as u64));
        self.attached = parts.fold(0, u64::wrapping_add);
        let blocks = std::mem::take(&mut self.blocks);
        let attach = |(bucket, block)| attach(block, self.gathered(bucket), &self.device);
        self.blocks = blocks.into_iter().enumerate().map(attach).collect();
    }

    /// The step's exponents: those of the state, or for the first step from the maxima of micro-batch 0, which rank 0
    /// measures. Every rank takes part in that, whatever it measured in a ring before: some may be new.
    fn settle_exponents(&mut self, group: &Group, gate: &Gate) -> Result<(), StepError> {
        if !self.sum.has_exponents() || !self.state.exponents.is_empty() {
            self.exponents.clone_from(&self.state.exponents);
            return Ok(());
        }
        let is_root = group.ring().rank() == Rank(0);
        let measured = match self.maxima.take() {
            _ if !is_root => None,
            Some(measured) => Some(measured),
            None => Some(self.measure()?),
        };
        self.maxima.clone_from(&measured);
        self.spread_maxima(group, gate, measured)
    }

    /// The first exponents, from the maxima that rank 0 has measured.
    fn spread_maxima(
        &mut self,
        group: &Group,
        gate: &Gate,
        measured: Option<Vec<f32>>,
    ) -> Result<(), StepError> {
        self.clock.enter(Phase::Exchange);
        gate.wait();
        let maxima = match measured {
            Some(measured) => {
                group.broadcast(Arc::new(Buffer::from(measured.clone()))).wait()?;
                measured
            }
            None => {
                let zeros = vec![0.0f32; self.space.len() / BLOCK];
                group.receive_broadcast(Rank(0), zeros.into()).wait()?.into_vec()
            }
        };
        self.exponents = Exponents::from_maxima(&maxima, self.plan.batch.micro_batches());
        self.maxima = Some(maxima);
        Ok(())
    }

    /// The largest gradient of each block in micro-batch 0.
    fn measure(&mut self) -> Result<Vec<f32>, TaskError> {
        let mut maxima = vec![0.0f32; self.space.len() / BLOCK];
        let firsts: Vec<usize> = self.space.buckets().iter().map(|range| range.start / BLOCK).collect();
        let batch = self.batch_of(0)?;
        self.gradients_of(0, &batch, |bucket, gradient, _, _| {
            let measured = block_maxima(gradient);
            maxima[firsts[bucket]..][..measured.len()].copy_from_slice(&measured);
        });
        Ok(maxima)
    }

    /// Computes what is missing of the share; buckets leave with the last micro-batch.
    fn compute(&mut self, group: &Group, share: &[u32], gate: &Gate) -> Result<(), StepError> {
        let missing: Vec<u32> =
            share.iter().copied().filter(|index| !self.counted.contains_key(index)).collect();
        self.pending = None;
        samples::follow(self.task, self.plan, self.state.step, share);
        if !std::mem::replace(&mut self.clean, true) {
            self.sum.begin();
        }
        let seat = self.sharding.as_ref().and_then(|sharding| sharding.seat.as_ref());
        let lens: Option<Arc<[Vec<usize>]>> = seat.map(|seat| Arc::clone(&seat.lens));
        let lens_of = |bucket: usize| lens.as_ref().map(|lens| &lens[bucket][..]);
        let (before, starts, death) = (self.clock.own_work(), self.starts(), self.death);
        let middle = starts.len() / 2;
        for (position, &index) in missing.iter().enumerate() {
            let last = position + 1 == missing.len();
            // Before the micro-batch begins: who waits for a store does not hang, and has nothing to tell of.
            let batch = self.batch_of(index)?;
            gate.begin(index)?;
            let key = self.key_of(index).stream(ROUNDING).bits();
            let mut hash = self.is_audited(index).then_some(0u64);
            let loss = self.gradients_of(index, &batch, |bucket, gradient, sum, exponents| {
                if let Some(hash) = &mut hash {
                    *hash = hash.wrapping_add(parameter_hash(gradient, starts[bucket]));
                }
                sum.add(bucket, gradient, exponents, key);
                if last {
                    sum.send(bucket, group, lens_of(bucket));
                    (bucket == middle).then(|| death.at(Moment::Buckets));
                }
            });
            if let Some(hash) = hash {
                self.audit.keep(index, with_loss(hash, loss));
            }
            self.counted.insert(index, loss);
            gate.end(index);
        }
        self.note_time(before, missing.len());
        if missing.is_empty() {
            (0..self.lengths.len()).rev().for_each(|bucket| self.sum.send(bucket, group, lens_of(bucket)));
        }
        Ok(())
    }

    fn key_of(&self, micro_batch: u32) -> MicroBatchKey {
        MicroBatchKey { seed: self.plan.seed, step: self.state.step, micro_batch }
    }

    /// The samples of a micro-batch.
    fn batch_of(&mut self, index: u32) -> Result<T::Batch, TaskError> {
        self.clock.enter(Phase::Data);
        samples::micro_batch(self.task, self.plan, self.state.step, index)
    }

    /// Runs one micro-batch forward and backward; `sink` receives each bucket's gradient, the last block's first.
    fn gradients_of(
        &mut self,
        index: u32,
        batch: &T::Batch,
        mut sink: impl FnMut(usize, &[f32], &mut GradientSum, &Exponents),
    ) -> f32 {
        let pass = Pass::Train(self.key_of(index));
        let Self { task, plan, blocks, inner, lengths, scratch, clock, sum, exponents, wrong, .. } = self;
        let inner = plan.recompute.then_some(&mut inner[..]);
        let mut model = gradients::Model { task: *task, blocks, lengths, inner };
        clock.enter(Phase::Compute);
        model.micro_batch(batch, pass, scratch, |bucket, gradient| {
            clock.enter(Phase::Round);
            match *wrong {
                false => sink(bucket, gradient, sum, exponents),
                true => sink(bucket, &vec![1e-3; gradient.len()], sum, exponents),
            }
            clock.enter(Phase::Compute);
        })
    }

    /// What this rank contributes to the commit.
    fn ballot(&self, stop: bool) -> Ballot {
        let mut ballot = Ballot::new(self.plan.batch.micro_batches() as usize, self.basis());
        self.counted.iter().for_each(|(&index, &loss)| ballot.count(index as usize, loss));
        if self.sum.nonfinite() {
            ballot.nonfinite();
        }
        if stop {
            ballot.stop();
        }
        ballot
    }

    /// The commit point: no state is written before this returns.
    fn commit(&mut self, group: &Group, ballot: Ballot) -> Result<Ballot, CollectiveError> {
        let words = Arc::new(ballot.into_words().into());
        let total = group.all_reduce_now::<SaturatingSum>(words, Buffer::default())?;
        Ok(Ballot::from_total(total.into_vec(), self.plan.batch.micro_batches() as usize))
    }

    /// What the total says: the verdict, the norm of the gradient, and the hash of the state before the step.
    fn decide(&self, total: &Ballot) -> Result<(Verdict, f64, u64), CommitError> {
        let step = self.state.step;
        let verdict = total.verdict(step, self.plan.reduce.nonfinite)?;
        if let Some(Sharding { seat: Some(seat), copy, .. }) = &self.sharding {
            let shards = total.shards(step, seat.map.world(), copy.is_some())?;
            let hash = exponent_hash(&self.state.exponents).wrapping_add(shards.hash);
            return Ok((verdict, norm(shards.squares), hash));
        }
        let buckets = 0..self.own.ranges().len();
        let squares = buckets.flat_map(|bucket| chunk_squares(&self.gradient()[self.own.within(bucket)]));
        Ok((verdict, norm(squares), self.state_hash))
    }

    /// Writes the step that this rank contributed to the commit of, if the total allows it.
    fn write_pending(&mut self, total: Ballot, gate: &Gate) -> Result<StepDone, StepError> {
        let (verdict, grad_norm, hash_before) = self.decide(&total)?;
        self.reclaim();
        gate.commit(self.state.step + 1)?;
        self.clock.enter(Phase::Update);
        let Some(Summed { exponents, wide_blocks }) = self.pending.take() else {
            unreachable!("the total of a commit is that of contributions, and this rank made one");
        };
        let lr = learning_rate(&self.plan.optimizer, self.state.step, self.plan.steps);
        self.sharding.iter_mut().for_each(Sharding::forget_former);
        let state_hash = match verdict.update {
            true => self.update(lr, grad_norm, exponents),
            false => self.skip(),
        };
        if let Some(sharding) = &mut self.sharding {
            sharding.total = total.into_words();
        }
        self.forget();
        gate.holds_state(state_hash);
        let Verdict { loss, stop, .. } = verdict;
        let step = self.state.step;
        Ok(StepDone {
            step,
            loss,
            grad_norm,
            lr,
            hash_before,
            state_hash,
            stop,
            wide_blocks,
            times: Vec::new(),
        })
    }

    /// Writes the state after an update; returns its hash, where this rank has all of it.
    fn update(&mut self, lr: f64, grad_norm: f64, exponents: Exponents) -> Option<u64> {
        let Self { state, own, space, gradient, sum, sharding, plan, death, .. } = self;
        let gradient = sum.decoded().unwrap_or(gradient);
        state.step += 1;
        state.exponents = exponents;
        let update = Update { optimizer: &plan.optimizer, step: state.step, lr, grad_norm };
        let hash = update.apply(state, own, space, gradient);
        death.at(Moment::Updating);
        if let Some(sharding) = sharding {
            sharding.own_hash = hash;
            if let Some(copy) = &mut sharding.copy {
                copy.state.step = state.step;
                copy.hash = update.apply(&mut copy.state, &copy.held, space, &copy.gradient);
            }
            if sharding.seat.is_some() {
                return None;
            }
        }
        self.state_hash = hash.wrapping_add(exponent_hash(&self.state.exponents));
        Some(self.state_hash)
    }

    /// Counts the step, and leaves parameters and moments as they are.
    fn skip(&mut self) -> Option<u64> {
        self.state.step += 1;
        self.state.exponents.clone_from(&self.exponents);
        if let Some(Sharding { seat: Some(_), copy, .. }) = &mut self.sharding {
            if let Some(copy) = copy {
                copy.state.step = self.state.step;
            }
            return None;
        }
        self.state_hash = self.state.hash();
        Some(self.state_hash)
    }
}
