//! Sharded state, from the ranks of one ring to those of the next.
//!
//! ```text
//! who has what ─ the last commit's total, to who missed it ─ exponents ─ ranges that somebody lacks ─ new shards
//! ```
//!
//! Every rank tells what it has, and all make the same plan of it. What a rank has stays as it is until all that it needs is there.
//!
//! # Invariants
//! 1. A rank goes from step s to s + 1 by the total of that step's commit only.
//! 2. Each element travels once to each rank that lacks it, from one that has it, and by no other.
//! 3. What a rank holds already is neither copied nor hashed again.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use mattock_collectives::{Buffer, CollectiveError, Group, Pending, Rank, Sum};
use mattock_exact::{BLOCK, Exponents};
use mattock_kernels::TrainBackend;

use super::former::Place;
use super::sharding::{Copied, Seat, Sharding};
use super::transfer::{PIECE, UNDER_WAY, spread_small};
use super::{StepError, Trainer};
use crate::commit::Ballot;
use crate::gate::Gate;
use crate::origin::OriginError;
use crate::partition::{Lost, Move, Stretches, plan};
use crate::phases::Phase;
use crate::state::State;
use crate::task::Task;

/// Takes in the three arrays over a range that has come.
type Keep<'k> = dyn FnMut(Range<usize>, [&[f32]; 3]) + 'k;

/// What a rank tells of itself.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Told {
    /// The step of its state, if it has any.
    step: Option<u64>,
    /// Its place among shards; rank 0 of 1 where it has all.
    place: Place,
    /// The place that it had before, if it still has what it had there.
    former: Option<Place>,
    /// Whether it can write the next step, given the total.
    pending: bool,
    /// Whether it has all of it where it lies, and has read nothing yet.
    at_origin: bool,
    /// Words of the total of its last commit.
    total: usize,
}

const TOLD_WORDS: usize = 7;

/// The tag of what moves.
const MOVES: u32 = 0;

impl Told {
    fn words(self) -> [i64; TOLD_WORDS] {
        let step = self.step.map_or(-1, u64::cast_signed);
        let Self { place, pending, at_origin, .. } = self;
        // A world of nobody says that there is none.
        let former = self.former.unwrap_or(Place { rank: 0, world: 0, copy: false });
        let flags = [place.copy, pending, at_origin, former.copy];
        let flags = (0..).zip(flags).map(|(bit, set)| i64::from(set) << bit).sum();
        let [rank, world, before, world_before] =
            [place.rank, place.world, former.rank, former.world].map(i64::from);
        [step, rank, world, flags, self.total as i64, before, world_before]
    }

    fn of(words: &[i64]) -> Self {
        let is_set = |bit: u32| words[3] >> bit & 1 != 0;
        let former = Place { rank: words[5] as u32, world: words[6] as u32, copy: is_set(3) };
        Self {
            step: u64::try_from(words[0]).ok(),
            place: Place { rank: words[1] as u32, world: (words[2] as u32).max(1), copy: is_set(0) },
            former: Some(former).filter(|former| former.world > 0),
            pending: is_set(1),
            at_origin: is_set(2),
            total: words[4] as usize,
        }
    }

    /// Its ranges of the flat space, apart from each other and in order.
    fn ranges(&self, buckets: &[Range<usize>]) -> Vec<Range<usize>> {
        let former = self.former.map(|former| former.ranges(buckets));
        apart(self.place.ranges(buckets).into_iter().chain(former.into_iter().flatten()).collect())
    }
}

/// The same elements, in ranges that do not overlap.
fn apart(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|range| range.start);
    let mut apart: Vec<Range<usize>> = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match apart.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => apart.push(range),
        }
    }
    apart
}

impl<B: TrainBackend, T: Task> Trainer<'_, B, T> {
    /// Enters a ring that starts after `step` steps, with this rank's shard of the state. All ranks of the group call this
    /// together; `has_state` says whether this one has any.
    ///
    /// # Errors
    /// [`StepError::ShardsLost`] where the ranks do not have all of the state, which all find alike; otherwise where the exchange
    /// breaks. What this rank had it still has then.
    pub fn regroup(
        &mut self,
        group: &Group,
        step: u64,
        has_state: bool,
        gate: &Gate,
    ) -> Result<(), StepError> {
        gate.wait();
        self.clock.enter(Phase::Transfer);
        self.go_back_to_origin();
        let mut told = self.tell_all(group, has_state)?;
        self.catch_up(group, step, &mut told, gate)?;
        let current = |told: &Told| told.step == Some(step);
        let nobody = StepError::ShardsLost { step, elements: self.space.len() };
        let source = told.iter().position(current).ok_or(nobody)?;
        let (ring, buddies) = (group.ring(), self.sharding.as_ref().is_some_and(|sharding| sharding.buddies));
        let seat = Seat::new(self.space.buckets(), ring.world_size().get(), ring.rank().0);
        let moves = moves(self.space.buckets(), &told, step, buddies)
            .map_err(|Lost { elements }| StepError::ShardsLost { step, elements })?;
        let exponents = match told.iter().all(current) {
            true => self.state.exponents.clone(),
            false => self.spread_exponents(group, Rank(source as u32))?,
        };
        let outdated = !current(&told[seat.rank as usize]);
        let before = seat.before().filter(|_| buddies);
        let taken = self.take_over(&seat, before, &moves, (step, outdated));
        let at_origin = told.iter().any(|told| current(told) && told.at_origin);
        let Taken { own: (held, mut state), mut copy, gifts } = match at_origin {
            true => self.agreed(group, step, taken)?,
            false => taken?,
        };
        self.carry_out(group, &moves, &gifts, &mut |range, arrays| {
            place(&held, &mut state, &range, arrays);
            if let Some(copy) = &mut copy {
                place(&copy.held, &mut copy.state, &range, arrays);
            }
        })?;
        state.exponents = exponents;
        if outdated {
            self.forget();
            // That of another step than the one it is at now.
            self.sharding.iter_mut().for_each(|sharding| sharding.total.clear());
            self.sharding.iter_mut().for_each(Sharding::forget_former);
        } else if !moves.is_empty() || at_origin {
            self.keep_former();
        }
        self.sit(seat, held, state, copy);
        Ok(())
    }

    fn tell_all(&self, group: &Group, has_state: bool) -> Result<Vec<Told>, CollectiveError> {
        let own = Told {
            step: has_state.then_some(self.state.step),
            place: self.place(),
            former: self.former_place(),
            pending: self.pending.is_some(),
            at_origin: self.origin.is_some(),
            total: self.sharding.as_ref().map_or(0, |sharding| sharding.total.len()),
        };
        let words = own.words().to_vec();
        let all = words.len() * group.ring().world_size().get() as usize;
        let told = group.all_gather(Arc::new(Buffer::from(words)), all, Buffer::default()).wait()?;
        Ok(told.chunks_exact(TOLD_WORDS).map(Told::of).collect())
    }

    /// Who contributed to the commit of `step`, and did not see its total, gets that from one who did, and writes the step.
    fn catch_up(
        &mut self,
        group: &Group,
        step: u64,
        told: &mut [Told],
        gate: &Gate,
    ) -> Result<(), StepError> {
        let late = |told: &Told| told.pending && told.step.is_some_and(|at| at + 1 == step);
        let knows = |told: &Told| told.step == Some(step) && told.total > 0;
        let (Some(source), true) = (told.iter().position(knows), told.iter().any(late)) else {
            return Ok(());
        };
        let own = group.ring().rank().0 as usize;
        let mut total: Vec<i32> = match &self.sharding {
            Some(sharding) if own == source => sharding.total.iter().map(|word| word.cast_signed()).collect(),
            _ => Vec::new(),
        };
        total.resize(told[source].total, 0);
        let total = spread_small(group, Rank(source as u32), &total)?;
        if late(&told[own]) {
            let words = total.into_iter().map(i32::cast_unsigned).collect();
            let total = Ballot::from_total(words, self.plan.batch.micro_batches() as usize);
            let generation = group.ring().generation().0;
            gate.open(generation, self.state.step, self.counted.keys().copied())?;
            self.write_pending(total, gate)?;
            gate.reported();
        }
        for told in told.iter_mut().filter(|told| late(told)) {
            told.step = Some(step);
        }
        Ok(())
    }

    /// The exponents of `root`, on every rank.
    fn spread_exponents(&self, group: &Group, root: Rank) -> Result<Exponents, CollectiveError> {
        let own = &self.state.exponents;
        let count = spread_small(group, root, &[own.eighths().len() as i64])?;
        let most = self.space.len() / BLOCK;
        let blocks = count.first().map_or(0, |&count| usize::try_from(count).unwrap_or(0)).min(most);
        let mut eighths: Vec<i32> = own.eighths().iter().map(|&eighths| eighths.into()).collect();
        eighths.resize(blocks, 0);
        let eighths = spread_small(group, root, &eighths)?;
        Ok(Exponents::from_eighths(eighths.into_iter().map(|eighths| eighths as i16).collect()))
    }

    /// What this rank will hold, filled with what it has of that; and what it gives to others, where that must be read first.
    fn take_over(
        &self,
        seat: &Seat,
        before: Option<u32>,
        moves: &[Move],
        (step, outdated): (u64, bool),
    ) -> Result<Taken, OriginError> {
        let own = Stretches::new(seat.map.parts(seat.rank));
        let copied = before.map(|before| Stretches::new(seat.map.parts(before))).unwrap_or_default();
        let mut gifts = Stretches::default();
        let states = match &self.origin {
            Some(origin) if !outdated => {
                let given = moves.iter().filter(|step| step.from == seat.rank);
                gifts = Stretches::new(given.map(|step| step.range.clone()).collect());
                origin.read(self.task, &self.space, &[&own, &copied, &gifts])?
            }
            _ => [&own, &copied, &gifts].map(|part| self.in_memory(part, step, outdated)).into(),
        };
        let [state, copy, given] =
            states.try_into().unwrap_or_else(|_| unreachable!("a state for each part"));
        let copy = before.map(|_| {
            let gradient = vec![0.0; copied.len()];
            Copied { gradient, held: copied, state: copy, hash: 0 }
        });
        Ok(Taken { own: (own, state), copy, gifts: (gifts, given) })
    }

    /// What was taken over, if all ranks have what they need; a flaw that some found is every rank's error.
    fn agreed(
        &self,
        group: &Group,
        step: u64,
        taken: Result<Taken, OriginError>,
    ) -> Result<Taken, StepError> {
        let (taken, what) = match taken {
            Ok(taken) => (Some(taken), None),
            Err(OriginError::Flawed(what)) => (None, Some(what)),
            // Without this rank the others will try again.
            Err(error) => return Err(error.into()),
        };
        let flaws = Arc::new(Buffer::from(vec![i64::from(taken.is_none())]));
        let flaws = group.all_reduce_now::<Sum<i64>>(flaws, Buffer::default())?;
        match taken {
            Some(taken) if flaws.first() == Some(&0) => Ok(taken),
            _ => Err(StepError::Flawed { step, what }),
        }
    }

    /// Arrays over a part, with what this rank has of it; the arrays that it has, where it has just these.
    fn in_memory(&self, held: &Stretches, step: u64, outdated: bool) -> State {
        if outdated {
            return State::blank(step, held.len());
        }
        let had = self.parts_held();
        if let Some((_, state)) = had.clone().find(|(from, _)| *from == held) {
            return State { exponents: Exponents::default(), ..state.clone() };
        }
        let mut state = State::blank(step, held.len());
        for (from, arrays) in had {
            for (array, from_array) in state.arrays_mut().into_iter().zip(arrays.arrays()) {
                held.copy_from(array, from, from_array);
            }
        }
        state
    }

    /// Sends and receives what moves, piece by piece: parameters, first and second moments in one buffer.
    ///
    /// All ranks go through the pieces in the same order, so that the oldest that is under way anywhere always has both its ends.
    fn carry_out(
        &self,
        group: &Group,
        moves: &[Move],
        gifts: &(Stretches, State),
        keep: &mut Keep<'_>,
    ) -> Result<(), CollectiveError> {
        let own = group.ring().rank().0;
        let mut under_way: VecDeque<Piece> = VecDeque::new();
        // Buffers that have gone out, or were taken in, to be filled again.
        let mut spare = Spare::default();
        for Move { from, to, range } in moves {
            let receives = to.contains(&own);
            let others: &[u32] = if *from == own {
                to
            } else if receives {
                &[own]
            } else {
                &[]
            };
            for (start, &to) in
                range.clone().step_by(PIECE / 3).flat_map(|start| others.iter().map(move |to| (start, to)))
            {
                let range = start..range.end.min(start + PIECE / 3);
                if under_way.len() == UNDER_WAY
                    && let Some(oldest) = under_way.pop_front()
                {
                    oldest.land(keep, &mut spare)?;
                }
                under_way.push_back(if *from == own {
                    let packed = self.packed(group, &range, gifts, spare.gone.pop());
                    Piece::Going(group.send(Rank(to), MOVES, Arc::clone(&packed)), packed)
                } else {
                    let output = spare.come.pop().filter(|output| output.len() == 3 * range.len());
                    let output = output.unwrap_or_else(|| Buffer::zeroed(3 * range.len()));
                    Piece::Coming(group.receive(Rank(*from), MOVES, output), range)
                });
            }
        }
        under_way.into_iter().try_for_each(|piece| piece.land(keep, &mut spare))
    }

    /// The three arrays over a range that this rank has: from its shard and its copy of another, or from what it has read.
    fn packed(
        &self,
        group: &Group,
        range: &Range<usize>,
        (given, read): &(Stretches, State),
        spare: Option<Arc<Buffer<f32>>>,
    ) -> Arc<Buffer<f32>> {
        let held = Stretches::new(vec![range.clone()]);
        let len = 3 * range.len();
        let mut packed = spare
            .and_then(Arc::into_inner)
            .filter(|spare| spare.len() == len)
            .unwrap_or_else(|| group.buffer(len));
        for (from, state) in self.parts_held().chain([(given, read)]) {
            for (array, from_array) in packed.chunks_exact_mut(range.len()).zip(state.arrays()) {
                held.copy_from(array, from, from_array);
            }
        }
        Arc::new(packed)
    }

    /// Takes its place among the shards of a ring.
    fn sit(&mut self, seat: Seat, held: Stretches, state: State, copy: Option<Copied>) {
        let known = self.known_hashes();
        let hash_of = |held: &Stretches, state: &State| {
            let known = known.iter().find(|(array, _)| Arc::ptr_eq(array, &state.parameters));
            known.map_or_else(|| state.part_hash(held), |(_, hash)| *hash)
        };
        let own_hash = hash_of(&held, &state);
        let copy = copy.map(|copy| Copied { hash: hash_of(&copy.held, &copy.state), ..copy });
        (self.own, self.state, self.pending, self.origin) = (held, state, None, None);
        self.gradient = self.gradients();
        let Some(sharding) = &mut self.sharding else { return };
        sharding.own_hash = own_hash;
        sharding.copy = copy;
        sharding.seat = Some(seat);
    }

    /// Hashes of the shards that this rank has had in a ring, by where their parameters lie.
    fn known_hashes(&self) -> Vec<(Arc<Vec<f32>>, u64)> {
        let Some(sharding) = self.sharding.as_ref().filter(|sharding| sharding.seat.is_some()) else {
            return Vec::new();
        };
        let own = (Arc::clone(&self.state.parameters), sharding.own_hash);
        let copy = sharding.copy.as_ref().map(|copy| (Arc::clone(&copy.state.parameters), copy.hash));
        std::iter::once(own).chain(copy).collect()
    }
}

/// What moves, so that each of the ranks has its shard of a state, and a copy of that of the rank before if `buddies`.
fn moves(buckets: &[Range<usize>], told: &[Told], step: u64, buddies: bool) -> Result<Vec<Move>, Lost> {
    let world = told.len() as u32;
    let have = told.iter().map(|told| match told.step == Some(step) {
        true => told.ranges(buckets),
        false => Vec::new(),
    });
    let copy = buddies && world > 1;
    let want = (0..world).map(|rank| Place { rank, world, copy }.ranges(buckets));
    plan(&have.collect::<Vec<_>>(), &want.collect::<Vec<_>>())
}

/// What a rank goes into a ring with.
struct Taken {
    own: (Stretches, State),
    copy: Option<Copied>,
    /// What others get of a state of which this rank has read nothing yet.
    gifts: (Stretches, State),
}

/// A part of a move that is under way.
enum Piece {
    Going(Pending<()>, Arc<Buffer<f32>>),
    Coming(Pending<Buffer<f32>>, Range<usize>),
}

impl Piece {
    /// Waits for it; what has come is kept.
    fn land(self, keep: &mut Keep<'_>, spare: &mut Spare) -> Result<(), CollectiveError> {
        match self {
            Self::Going(pending, buffer) => {
                pending.wait()?;
                spare.gone.push(buffer);
            }
            Self::Coming(pending, range) => {
                let (arrays, len) = (pending.wait()?, range.len());
                keep(range, [&arrays[..len], &arrays[len..2 * len], &arrays[2 * len..]]);
                spare.come.push(arrays);
            }
        }
        Ok(())
    }
}

/// Buffers that are not under way.
#[derive(Default)]
struct Spare {
    gone: Vec<Arc<Buffer<f32>>>,
    come: Vec<Buffer<f32>>,
}

/// Puts arrays over a range where they belong, as far as that is held.
fn place(held: &Stretches, state: &mut State, range: &Range<usize>, arrays: [&[f32]; 3]) {
    for (part, to) in held.overlaps(range.clone()) {
        let from = part.start - range.start..part.end - range.start;
        for (array, values) in state.arrays_mut().into_iter().zip(arrays) {
            array[to..to + part.len()].copy_from_slice(&values[from.clone()]);
        }
    }
}
