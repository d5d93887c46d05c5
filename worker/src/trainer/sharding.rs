//! State divided among the ranks of a ring: what travels in a step beside the sums.
//!
//! ```text
//! gather parameters ─ compute ─ reduce-scatter ─ shift to the buddy ─ commit ─ update own shard, and the copy of another's
//! ```
//!
//! The update writes shards alone; the next step's gather brings them to everybody. So a ring may break anywhere and leaves
//! each rank with a shard of step s or s + 1, never between. A rank that has contributed to the commit, and did not see its
//! total, has all that it takes to write the step: the total comes from a rank that saw it ([`super::regroup`]).

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use mattock_checkpoint::room::give_back;
use mattock_collectives::{Buffer, CollectiveError, Element, Group, Sum};
use mattock_exact::{CHUNK, chunk_squares, exponent_hash};
use mattock_kernels::TrainBackend;

use super::Trainer;
use super::former::Former;
use super::room::Room;
use crate::commit::{Ballot, ShardVote};
use crate::gate::Gate;
use crate::params::release;
use crate::partition::{ShardMap, Stretches};
use crate::phases::Phase;
use crate::plan::{Parallel, Shard};
use crate::state::State;
use crate::storage::Part;
use crate::task::Task;

/// What a rank has of sharded state, beside its own shard.
pub(super) struct Sharding {
    /// Whether no rank has all parameters.
    pub(super) full: bool,
    /// Whether shards have a second holder.
    pub(super) buddies: bool,
    /// The ring for which state was divided; nothing while this rank has all of it.
    pub(super) seat: Option<Seat>,
    /// The shard of the rank before this one.
    pub(super) copy: Option<Copied>,
    /// What this rank had before this ring, until that commits a step.
    pub(super) former: Option<Former>,
    /// Hash of the own shard.
    pub(super) own_hash: u64,
    /// All parameters, by bucket, as the last gather brought them.
    replica: Vec<Buffer<f32>>,
    /// The own part of them, on its way.
    inputs: Vec<Arc<Buffer<f32>>>,
    /// For parameters of single blocks.
    pub(super) room: Room,
    /// The total of the last commit; empty before the first.
    pub(super) total: Vec<u32>,
}

/// A rank's place among shards.
pub(super) struct Seat {
    pub(super) map: ShardMap,
    pub(super) rank: u32,
    /// By bucket: how many elements each rank owns.
    pub(super) lens: Arc<[Vec<usize>]>,
}

/// The second copy of another rank's shard.
pub(super) struct Copied {
    pub(super) held: Stretches,
    pub(super) state: State,
    pub(super) gradient: Vec<f32>,
    pub(super) hash: u64,
}

impl Copied {
    /// A bucket of the other rank's gradient.
    fn take_in(&mut self, bucket: usize, gradient: &[f32]) {
        self.gradient[self.held.within(bucket)].copy_from_slice(gradient);
    }
}

impl Seat {
    pub(super) fn new(buckets: &[Range<usize>], world: u32, rank: u32) -> Self {
        let map = ShardMap::new(buckets, world);
        let lens = (0..buckets.len()).map(|bucket| map.lens(bucket)).collect();
        Self { map, rank, lens }
    }

    /// The rank whose shard this one holds a copy of, if ranks do that.
    pub(super) fn before(&self) -> Option<u32> {
        let world = self.map.world();
        (world > 1).then(|| (self.rank + world - 1) % world)
    }
}

impl Sharding {
    /// Of a rank that has all.
    pub(super) fn new(Parallel { shard, buddies }: Parallel, buckets: &[Range<usize>]) -> Self {
        Self {
            full: shard == Shard::Full,
            buddies,
            seat: None,
            copy: None,
            former: None,
            own_hash: 0,
            replica: buckets.iter().map(|_| Buffer::default()).collect(),
            inputs: buckets.iter().map(|_| Arc::default()).collect(),
            room: Room::default(),
            total: Vec::new(),
        }
    }
}

impl<B: TrainBackend, T: Task> Trainer<'_, B, T> {
    /// Whether each rank has a part of the state only.
    pub fn is_sharded(&self) -> bool {
        self.sharding.is_some()
    }

    /// Bytes of state that this rank holds, by kind: its own parameters and moments, its copies of another rank's, and all
    /// parameters as they were gathered.
    pub fn held_bytes(&self) -> Vec<(String, u64)> {
        let bytes = |elements: usize| (elements * size_of::<f32>()) as u64;
        let sharding = self.sharding.as_ref();
        let copy = sharding.and_then(|sharding| sharding.copy.as_ref()).map_or(0, |copy| copy.held.len());
        let gathered =
            sharding.map_or(0, |sharding| sharding.replica.iter().map(|bucket| bucket.len()).sum());
        let kinds = [
            ("parameters", self.own.len()),
            ("moments", 2 * self.own.len()),
            ("copies", 3 * copy),
            ("gathered", gathered),
        ];
        let held = kinds.into_iter().filter(|(_, elements)| *elements > 0);
        held.map(|(kind, elements)| (kind.to_owned(), bytes(elements))).collect()
    }

    /// Brings everybody's parameters to everybody.
    pub(super) fn gather_parameters(&mut self, group: &Group, gate: &Gate) -> Result<(), CollectiveError> {
        let Self { sharding: Some(Sharding { seat: Some(seat), replica, inputs, full: false, .. }), .. } =
            self
        else {
            return Ok(());
        };
        gate.wait();
        self.clock.enter(Phase::Exchange);
        let mut gathers = Vec::with_capacity(inputs.len());
        for (bucket, (input, output)) in inputs.iter_mut().zip(&mut *replica).enumerate() {
            let own = &self.state.parameters[self.own.within(bucket)];
            match Arc::get_mut(input) {
                Some(input) if input.len() == own.len() => input.copy_from_slice(own),
                _ => *input = Arc::new(group.buffer_of(own)),
            }
            let output = std::mem::take(output);
            gathers.push(group.all_gather_uneven(Arc::clone(input), &seat.lens[bucket], output));
        }
        for (output, gather) in replica.iter_mut().zip(gathers) {
            *output = gather.wait()?;
        }
        Ok(())
    }

    /// All parameters, on those that `keep` them. Where state is sharded, all ranks of the group call this together.
    ///
    /// # Errors
    /// Where the exchange breaks.
    pub fn parameters(&self, group: &Group, keep: bool) -> Result<Cow<'_, [f32]>, CollectiveError> {
        let Some(Sharding { seat: Some(seat), .. }) = &self.sharding else {
            return Ok(Cow::Borrowed(&self.state.parameters));
        };
        let mut all = Vec::new();
        for bucket in 0..self.space.buckets().len() {
            let gathered = self.gather_bucket(group, seat, bucket)?;
            if keep {
                all.extend_from_slice(&gathered);
            }
        }
        Ok(Cow::Owned(all))
    }

    /// What this rank writes to storage: the parameters of these elements, and its own moments, which it shares. All ranks of the
    /// group call this together.
    pub(crate) fn part(&self, group: &Group, weights: &[Range<usize>]) -> Result<Part, CollectiveError> {
        let mut parameters = Vec::with_capacity(weights.iter().map(ExactSizeIterator::len).sum());
        let wanted = Stretches::new(weights.to_vec());
        if let Some(Sharding { seat: Some(seat), .. }) = &self.sharding {
            for (bucket, whole) in self.space.buckets().iter().enumerate() {
                let gathered = self.gather_bucket(group, seat, bucket)?;
                for (part, _) in wanted.overlaps(whole.clone()) {
                    parameters.extend_from_slice(&gathered[part.start - whole.start..part.end - whole.start]);
                }
            }
        }
        Ok(Part {
            step: self.state.step,
            exponents: self.state.exponents.eighths().to_vec(),
            weights: (weights.to_vec(), Arc::new(parameters)),
            moments: (
                self.own.ranges().to_vec(),
                [Arc::clone(&self.state.first), Arc::clone(&self.state.second)],
            ),
        })
    }

    /// Gives up what only steps need, where the next step or ring makes it again.
    pub(crate) fn rest(&mut self) {
        self.blocks = std::mem::take(&mut self.blocks).into_iter().map(release).collect();
        let Some(sharding) = &mut self.sharding else { return };
        self.sum.rest();
        for array in [&mut self.gradient, &mut self.scratch] {
            give_back(std::mem::take(array));
        }
        if let Some(copy) = &mut sharding.copy {
            give_back(std::mem::take(&mut copy.gradient));
        }
        sharding.room = Room::default();
        sharding.replica.iter_mut().for_each(|bucket| *bucket = Buffer::default());
        sharding.inputs.iter_mut().for_each(|input| *input = Arc::default());
    }

    fn gather_bucket(
        &self,
        group: &Group,
        seat: &Seat,
        bucket: usize,
    ) -> Result<Buffer<f32>, CollectiveError> {
        gather(group, &self.state.parameters[self.own.within(bucket)], &seat.lens[bucket])
    }

    /// A bucket's parameters, as they were gathered last.
    pub(super) fn gathered(&self, bucket: usize) -> &[f32] {
        match &self.sharding {
            Some(Sharding { seat: Some(_), replica, .. }) => &replica[bucket],
            _ => &self.state.parameters[self.own.within(bucket)],
        }
    }

    /// Gives this rank's part of the gradient to its buddy, and receives that of the rank whose buddy it is.
    pub(super) fn hand_on(&mut self, group: &Group) -> Result<(), CollectiveError> {
        let Self { sum, gradient, own, .. } = self;
        let gradient = sum.decoded().unwrap_or(gradient);
        let Some(Sharding { seat: Some(seat), copy: Some(copy), .. }) = &mut self.sharding else {
            return Ok(());
        };
        // Bucket by bucket, for what travels is a copy; the next one leaves while one arrives.
        let mut before = None;
        for bucket in 0..seat.lens.len() {
            let own = Arc::new(Buffer::from(gradient[own.within(bucket)].to_vec()));
            let next = (bucket, group.shift(own, &seat.lens[bucket], Buffer::default()));
            if let Some((bucket, shift)) = before.replace(next) {
                copy.take_in(bucket, &shift.wait()?);
            }
        }
        if let Some((bucket, shift)) = before {
            copy.take_in(bucket, &shift.wait()?);
        }
        Ok(())
    }

    /// Adds to the ballot what this rank knows of its shard.
    pub(super) fn vote(&self, ballot: &mut Ballot) {
        let Some(Sharding { seat: Some(seat), copy, own_hash, .. }) = &self.sharding else { return };
        let (mut squares, mut chunks) = (Vec::new(), 0);
        for (bucket, range) in self.space.buckets().iter().enumerate() {
            let first = chunks + (self.own.ranges()[bucket].start - range.start).div_ceil(CHUNK);
            squares.extend((first..).zip(chunk_squares(&self.gradient()[self.own.within(bucket)])));
            chunks += range.len().div_ceil(CHUNK);
        }
        ballot.shard(&ShardVote {
            rank: seat.rank,
            world: seat.map.world(),
            own: *own_hash,
            before: copy.as_ref().map(|copy| copy.hash),
            chunks,
            squares: &squares,
        });
    }

    /// By which ranks tell that they compute with the same: for sharded state, a hash of the parameters that each gathered.
    pub(super) fn basis(&self) -> u64 {
        match &self.sharding {
            Some(Sharding { full: true, .. }) => exponent_hash(&self.state.exponents),
            Some(_) => exponent_hash(&self.state.exponents).wrapping_add(self.attached),
            None => self.state_hash.wrapping_add(self.attached),
        }
    }

    /// The hash of the whole state. Where it is sharded, all ranks of the group call this together.
    ///
    /// # Errors
    /// Where the exchange breaks.
    pub fn state_hash(&self, group: &Group) -> Result<u64, CollectiveError> {
        let Some(Sharding { seat: Some(_), own_hash, .. }) = &self.sharding else {
            return Ok(self.state_hash);
        };
        let own = Arc::new(Buffer::from(vec![own_hash.cast_signed()]));
        let sum = group.all_reduce_now::<Sum<i64>>(own, Buffer::default())?;
        let parts = sum.first().copied().unwrap_or_default().cast_unsigned();
        Ok(exponent_hash(&self.state.exponents).wrapping_add(parts))
    }

    /// The whole state, put together from all ranks' shards, on those that `keep` it. All ranks of the group call this together.
    ///
    /// # Errors
    /// Where the exchange breaks.
    pub fn whole_state(&self, group: &Group, keep: bool) -> Result<Option<State>, CollectiveError> {
        let Some(Sharding { seat: Some(seat), .. }) = &self.sharding else {
            return Ok(keep.then(|| self.state.clone()));
        };
        let mut whole = keep.then(|| State::blank(self.state.step, self.space.len()));
        for (array, own) in self.state.arrays().into_iter().enumerate() {
            for (bucket, range) in self.space.buckets().iter().enumerate() {
                let own = &own[self.own.within(bucket)];
                let gathered = gather(group, own, &seat.lens[bucket])?;
                if let Some(whole) = &mut whole {
                    whole.arrays_mut()[array][range.clone()].copy_from_slice(&gathered);
                }
            }
        }
        if let Some(whole) = &mut whole {
            whole.exponents.clone_from(&self.state.exponents);
        }
        Ok(whole)
    }
}

fn gather<E: Element>(group: &Group, own: &[E], lens: &[usize]) -> Result<Buffer<E>, CollectiveError> {
    group.all_gather_uneven(Arc::new(Buffer::from(own.to_vec())), lens, Buffer::default()).wait()
}
