//! Reduce-scatter and all-gather where some ranks share a host, in rounds that take a part of every host's share
//! (see [`shares`](super::shares)):
//!
//! ```text
//! reduce-scatter    all reduce a round to the leader -> leaders reduce-scatter, each keeps its host's -> scatter it within
//! all-gather        gather the host's part at the leader -> leaders all-gather the round -> spread it within
//! ```
//!
//! A link between hosts so carries `(h - 1) / h` of the payload for `h` hosts, in either. Round a ring of all `n` ranks it is
//! `(n - 1) / n`, even where neighbours share hosts as far as they can: a half more with two hosts of two ranks, three quarters
//! more with two of four. Where they do not, each host sends that once for every rank that it has.
//!
//! What the ranks of a host have in memory they read there, and pieces overlap, as in an all-reduce; the invariants of that hold,
//! and one more: an element is added along the ranks `1, 2, .., 0` of each host, then along the hosts behind the one that keeps
//! it, and that last. So floats have bits that depend on who is where and whose segment they are in, and on no length.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::shares::{Round, Shares};
use super::within::{Within, piece_len};
use super::{Between, Ended, LEADER, WINDOW};
use crate::buffer::Buffer;
use crate::collective::{Collective, OpId};
use crate::error::Phase;
use crate::group::order::{Combine, Order};
use crate::pending::Pending;
use crate::reduction::Element;
use crate::schedule::Parts;
use crate::shm::calls::Call;
use crate::shm::engine::{Engine, Turn};
use crate::transfer::Buffers;

/// One operation on its way through its rounds.
pub(super) struct Scattered<'a, E> {
    pub(super) within: Within<'a>,
    shares: Shares,
    /// How elements are combined; an all-gather does not.
    combine: Option<Combine<E>>,
    /// This rank's segment.
    own: Range<usize>,
    /// Which elements of the payload the output holds.
    output_holds: Range<usize>,
    /// Rounds between hosts, the oldest first; leaders have them.
    under_way: VecDeque<Pending<Buffer<E>>>,
}

impl<'a, E: Element> Scattered<'a, E> {
    pub(super) fn new(between: &'a Between, engine: &'a Engine, op: OpId, order: &Order<E>) -> Self {
        let layout = &between.layout;
        let shares = Shares::new(
            layout,
            &order.parts,
            between.whole.world_size(),
            piece_len::<E>(engine, layout.hosts()),
        );
        let payload = order.payload();
        Self {
            within: Within { between, engine, op, payload, phase: Phase::Queued, bytes_done: 0 },
            shares,
            combine: order.reduction,
            own: order.parts.segment(between.whole.rank().0),
            output_holds: order.buffers.output_holds.clone(),
            under_way: VecDeque::new(),
        }
    }

    /// All rounds, in an order that depends on nothing but how the payload is divided.
    pub(super) fn run(&mut self, turn: &mut Turn, buffers: Buffers<E>) -> Result<Buffer<E>, Ended> {
        let Buffers { input, mut output, .. } = buffers;
        let rounds = self.shares.rounds();
        let window = rounds.min(WINDOW);
        for step in 0..rounds + window {
            if step < rounds {
                self.within.phase = Phase::Reducing { pass: step as u32 };
                let round = self.shares.round(step);
                match self.combine {
                    Some(combine) => {
                        self.reduce(turn, &round, combine, input.as_deref().unwrap_or(&output))?
                    }
                    None => self.gather(turn, &round, input.as_deref().unwrap_or(&output))?,
                }
            }
            if let Some(step) = step.checked_sub(window) {
                self.within.phase = Phase::Copying { pass: step as u32 };
                let round = self.shares.round(step);
                let result = match self.under_way.pop_front() {
                    Some(pending) => pending.wait()?,
                    None => Buffer::default(),
                };
                self.within.bytes_done += size_of_val(&result[..]) as u64;
                match self.combine {
                    Some(_) => self.scatter(turn, &round, &result, &mut output)?,
                    None => self.spread(turn, &round, &result, &mut output)?,
                }
            }
        }
        Ok(output)
    }

    /// Reduces a round within the host; leaders send it on its way.
    fn reduce(
        &mut self,
        turn: &mut Turn,
        round: &Round,
        combine: Combine<E>,
        input: &Buffer<E>,
    ) -> Result<(), Ended> {
        let is_leader = self.within.is_leader();
        let mut sum = self.within.engine.scratch::<E>(if is_leader { round.len() } else { 0 });
        for (at, range) in round.ranges() {
            let out = at..at + range.len();
            if self.within.is_alone() {
                sum[out].copy_from_slice(&input[range]);
                continue;
            }
            // As one segment, the leader's: so the order of additions does not depend on where a round begins.
            let mut lens = vec![0; self.within.engine.ring().world_size().get() as usize];
            lens[LEADER.0 as usize] = range.len();
            let parts = Parts::uneven(&lens).expect("a part of a payload is no longer than the payload");
            let call = Call {
                parts,
                fold: Some(combine.partial()),
                input: Some(bytemuck::cast_slice(&input[range.clone()])),
                input_at: self.within.offset_of(input, &range),
                output: bytemuck::cast_slice_mut(if is_leader { &mut sum[out] } else { &mut [] }),
                ..self.within.call::<E>(turn, Collective::Reduce { root: LEADER }, range.len())
            };
            self.within.run(turn, call)?;
        }
        if is_leader {
            let parts = round.parts();
            let (all, ours) = (parts.elements(), parts.segment(self.host()));
            let output = self.within.engine.scratch(ours.len());
            let pending =
                self.within.send(parts, Some(combine.kernel()), (Arc::new(sum), all), (output, ours));
            self.under_way.push_back(pending);
        }
        Ok(())
    }

    /// Gives the ranks of this host their parts of what is the host's.
    fn scatter(
        &mut self,
        turn: &mut Turn,
        round: &Round,
        result: &Buffer<E>,
        output: &mut Buffer<E>,
    ) -> Result<(), Ended> {
        let own = self.own_slice(round);
        let place = own.start - self.output_holds.start..own.end - self.output_holds.start;
        if self.within.is_alone() {
            output[place].copy_from_slice(result);
            return Ok(());
        }
        let parts = self.parts_of_host(round);
        if parts.len() == 0 {
            return Ok(());
        }
        let call = self.within.call::<E>(turn, Collective::Scatter { root: LEADER }, parts.len());
        let call = Call {
            parts,
            input: Some(bytemuck::cast_slice(result)),
            input_at: self.within.offset_of(result, &(0..0)),
            output: bytemuck::cast_slice_mut(&mut output[place]),
            ..call
        };
        self.within.run_after_network(turn, call)
    }

    /// Brings the host's part of a round to the leader, which sends it on its way. The input is this rank's segment.
    fn gather(&mut self, turn: &mut Turn, round: &Round, input: &Buffer<E>) -> Result<(), Ended> {
        let own = self.own_slice(round);
        let own = own.start - self.own.start..own.end - self.own.start;
        let is_leader = self.within.is_leader();
        let parts = self.parts_of_host(round);
        let mut held = self.within.engine.scratch::<E>(if is_leader { parts.len() } else { 0 });
        if self.within.is_alone() {
            held.copy_from_slice(&input[own]);
        } else {
            let call = Call {
                input: Some(bytemuck::cast_slice(&input[own.clone()])),
                input_at: self.within.offset_of(input, &own),
                output: bytemuck::cast_slice_mut(&mut held),
                ..self.within.call::<E>(turn, Collective::Gather { root: LEADER }, parts.len())
            };
            self.within.run(turn, Call { parts, ..call })?;
        }
        if is_leader {
            let parts = round.parts();
            let (all, ours) = (parts.elements(), parts.segment(self.host()));
            let mut output = self.within.engine.scratch(all.len());
            output[ours.start - all.start..ours.end - all.start].copy_from_slice(&held);
            let pending = self.within.send(parts, None, (Arc::new(held), ours), (output, all));
            self.under_way.push_back(pending);
        }
        Ok(())
    }

    /// Gives all ranks of this host the whole round.
    fn spread(
        &mut self,
        turn: &mut Turn,
        round: &Round,
        result: &Buffer<E>,
        output: &mut Buffer<E>,
    ) -> Result<(), Ended> {
        let ranges = round.ranges();
        if self.within.is_leader() {
            put(&ranges, result, output);
        }
        if self.within.is_alone() {
            return Ok(());
        }
        let call = self.within.call::<E>(turn, Collective::Broadcast { root: LEADER }, round.len());
        match &ranges[..] {
            _ if self.within.is_leader() => {
                let input_at = self.within.offset_of(result, &(0..0));
                let call = Call { input: Some(bytemuck::cast_slice(result)), input_at, ..call };
                self.within.run_after_network(turn, call)
            }
            [(_, range)] => {
                let output = bytemuck::cast_slice_mut(&mut output[range.clone()]);
                self.within.run_after_network(turn, Call { output, ..call })
            }
            _ => {
                let mut read = self.within.engine.scratch::<E>(round.len());
                let call = Call { output: bytemuck::cast_slice_mut(&mut read), ..call };
                self.within.run_after_network(turn, call)?;
                put(&ranges, &read, output);
                Ok(())
            }
        }
    }

    fn host(&self) -> u32 {
        self.within.between.host as u32
    }

    /// What of a round is in this rank's segment.
    fn own_slice(&self, round: &Round) -> Range<usize> {
        let rank = self.within.between.whole.rank();
        let slices = round.of_host(self.within.between.host);
        slices.iter().find(|slice| slice.rank == rank).map_or(0..0, |slice| slice.elements.clone())
    }

    /// How this host's part of a round is divided among its ranks.
    fn parts_of_host(&self, round: &Round) -> Parts {
        let slices = round.of_host(self.within.between.host);
        let lens: Vec<usize> = slices.iter().map(|slice| slice.elements.len()).collect();
        Parts::uneven(&lens).expect("a part of a payload is no longer than the payload")
    }
}

/// Elements of a round into their places.
fn put<E: Element>(ranges: &[(usize, Range<usize>)], round: &[E], output: &mut [E]) {
    for (at, range) in ranges {
        output[range.clone()].copy_from_slice(&round[*at..*at + range.len()]);
    }
}
