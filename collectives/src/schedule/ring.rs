//! Collectives as chunks that travel around a ring (Patarasuk and Yuan, 2009; the same as in NCCL and Gloo).
//!
//! Rank `r` sends the chunks of one segment in *pass* 0. Whoever receives chunk `c` in pass `k` adds its own input
//! to it or keeps it, and sends it on in pass `k + 1`, unless it was the last pass. Nothing else happens:
//!
//! ```text
//! N = 3, segments a b c         reduce-scatter (passes 0, 1)          all-gather (passes 2, 3)
//! rank 0 sends   c                b + own                               a (complete)       c
//! rank 1 sends   a                c + own                               b (complete)       a
//! rank 2 sends   b                a + own                               c (complete)       b
//! ```
//!
//! After `N - 1` passes segment `r` is complete at rank `r`: that is reduce-scatter; all-gather is the copy passes
//! alone; all-reduce is one after the other, chunk by chunk, without waiting in between. A broadcast is one segment
//! that starts at the root; a shift is the first pass of an all-gather; along a line, all reduce one segment that starts at rank 0. Reduce, gather, scatter and all-to-all travel as the operation that brings everybody
//! what somebody needs: [`Collective::pattern`]. Where lengths are uneven, an empty segment travels as one empty chunk.
//!
//! # Invariants
//! 1. A segment is reduced along ranks `s + 1, s + 2, .., s`: the order of additions depends on the world size only.
//! 2. A rank sends `2 (N - 1) / N` of the payload in an all-reduce, half of it in each part.
//! 3. On an ordered link the chunks of one pass arrive in the order of their index.

use std::ops::Range;

use super::Parts;
use crate::collective::Collective;
use crate::rank::{Rank, WorldSize};
use crate::ring::Ring;

/// What one rank sends and receives in one collective.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    ring: Ring,
    collective: Collective,
    /// How its chunks travel.
    pattern: Collective,
    parts: Parts,
    chunk_len: usize,
    /// Everything begins at rank 0, and each rank behind it adds its own.
    is_line: bool,
}

/// What to do with a chunk that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Add the own input and send the partial sum on.
    Reduce,
    /// Add the own input: the sum is complete.
    Complete,
    /// It is a result already: keep it.
    Store,
}

/// A chunk on its way: where in the payload, in which pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// How many hops it has behind it.
    pub(crate) pass: u32,
    /// Its number within the segment.
    pub(crate) index: u32,
    /// Its elements within the payload.
    pub(crate) elements: Range<usize>,
}

impl Schedule {
    /// For a payload in chunks of at most `chunk_len` elements.
    pub(crate) fn new(ring: Ring, collective: Collective, parts: Parts, chunk_len: usize) -> Self {
        assert!(chunk_len > 0, "a chunk holds at least one element");
        Self { ring, collective, pattern: collective.pattern(), parts, chunk_len, is_line: false }
    }

    /// The way there of an operation along a line: reduced along ranks `0, 1, ..`, and complete at the last one.
    pub(crate) fn towards_the_last(
        ring: Ring,
        collective: Collective,
        parts: Parts,
        chunk_len: usize,
    ) -> Self {
        let pattern = Collective::ReduceScatter;
        Self { pattern, is_line: true, ..Self::new(ring, collective, parts, chunk_len) }
    }

    /// The way back, in the ring of the reverse order: from its first rank to all others.
    pub(crate) fn from_the_first(ring: Ring, collective: Collective, parts: Parts, chunk_len: usize) -> Self {
        let pattern = Collective::Broadcast { root: Rank(0) };
        Self { pattern, ..Self::new(ring, collective, parts, chunk_len) }
    }

    pub(crate) fn collective(&self) -> Collective {
        self.collective
    }

    /// How many ranks' inputs are reduced.
    pub(crate) fn ranks(&self) -> WorldSize {
        match &self.parts {
            Parts::Piece { ranks, .. } | Parts::Shares { ranks, .. } => *ranks,
            _ => self.ring.world_size(),
        }
    }

    /// Elements of the whole payload.
    pub(crate) fn len(&self) -> usize {
        self.parts.len()
    }

    /// The chunk `index` of what this rank sends unasked, while there is one.
    pub(crate) fn own_chunk(&self, index: u32) -> Option<Chunk> {
        self.chunk_of(self.own_segment()?, 0, index)
    }

    /// The chunk that must arrive as `index` of `pass`, if there is one.
    pub(crate) fn arriving(&self, pass: u32, index: u32) -> Option<Chunk> {
        if !self.arriving_passes().contains(&pass) {
            return None;
        }
        self.chunk_of(self.arriving_segment(pass), pass, index)
    }

    /// What to do with chunks that arrive in `pass`.
    pub(crate) fn role(&self, pass: u32) -> Role {
        let last_reduction = self.hops().wrapping_sub(1);
        match self.pattern {
            Collective::AllGather | Collective::Broadcast { .. } | Collective::Shift { .. } => Role::Store,
            _ if pass < last_reduction => Role::Reduce,
            _ if pass == last_reduction => Role::Complete,
            _ => Role::Store,
        }
    }

    /// Whether chunks that arrive in `pass` travel on.
    pub(crate) fn forwards(&self, pass: u32) -> bool {
        pass + 1 < self.passes()
    }

    /// How many chunks arrive in all.
    pub(crate) fn arrivals(&self) -> u64 {
        self.arriving_passes().map(|pass| self.chunks(&self.arriving_segment(pass))).sum()
    }

    /// How many chunks this rank sends in all.
    pub(crate) fn sends(&self) -> u64 {
        let own = self.own_segment().map_or(0, |own| self.chunks(&own));
        let forwarded = self.arriving_passes().filter(|&pass| self.forwards(pass));
        own + forwarded.map(|pass| self.chunks(&self.arriving_segment(pass))).sum::<u64>()
    }

    /// The passes in which something may arrive here.
    pub(crate) fn arriving_passes(&self) -> Range<u32> {
        match self.origin().map(|origin| self.distance_from(origin)) {
            None => 0..self.passes(),
            Some(0) => 0..0,
            Some(distance) => distance - 1..distance,
        }
    }

    /// How many times a chunk hops, at most.
    fn passes(&self) -> u32 {
        match self.pattern {
            Collective::AllReduce | Collective::Barrier => 2 * self.hops(),
            Collective::Shift { .. } => self.hops().min(1),
            _ => self.hops(),
        }
    }

    /// Hops from a rank to the one behind it.
    fn hops(&self) -> u32 {
        self.ring.world_size().get() - 1
    }

    /// The one rank that sends unasked, where it is one.
    fn origin(&self) -> Option<Rank> {
        match self.pattern {
            Collective::Broadcast { root } => Some(root),
            _ => self.is_line.then_some(Rank(0)),
        }
    }

    fn distance_from(&self, root: Rank) -> u32 {
        self.ring.minus(self.ring.rank(), root.0).0
    }

    /// The elements this rank sends in pass 0; `None` for those who wait for the root.
    fn own_segment(&self) -> Option<Range<usize>> {
        if self.hops() == 0 {
            return None;
        }
        match self.origin() {
            Some(origin) => (self.ring.rank() == origin).then(|| self.parts.elements()),
            None => Some(self.segment_sent_by(self.ring.rank(), 0)),
        }
    }

    fn arriving_segment(&self, pass: u32) -> Range<usize> {
        match self.origin() {
            Some(_) => self.parts.elements(),
            None => self.segment_sent_by(self.ring.prev(), pass),
        }
    }

    /// Where every rank sends a segment unasked: what `rank` sends in `pass`. Reductions start one segment behind the own one, so that the
    /// own one is completed here.
    fn segment_sent_by(&self, rank: Rank, pass: u32) -> Range<usize> {
        let start = match self.pattern {
            Collective::AllGather | Collective::Shift { .. } => rank,
            _ => self.ring.minus(rank, 1),
        };
        self.parts.segment(self.ring.minus(start, pass).0)
    }

    fn chunks(&self, segment: &Range<usize>) -> u64 {
        (segment.len().div_ceil(self.chunk_len) as u64).max(self.has_empty_chunks().into())
    }

    fn has_empty_chunks(&self) -> bool {
        match self.parts {
            Parts::Uneven { .. } => true,
            Parts::Shares { .. } => self.collective.is_uneven(),
            Parts::Even { .. } | Parts::Piece { .. } => false,
        }
    }

    fn chunk_of(&self, segment: Range<usize>, pass: u32, index: u32) -> Option<Chunk> {
        let start = segment.start + (index as usize).checked_mul(self.chunk_len)?;
        let end = segment.end.min(start.saturating_add(self.chunk_len));
        let is_chunk = start < segment.end || (index == 0 && self.has_empty_chunks());
        is_chunk.then_some(Chunk { pass, index, elements: start..end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Generation;
    use crate::schedule::segment;
    use proptest::prelude::*;

    fn schedule(rank: u32, ranks: u32, collective: Collective, len: usize) -> Schedule {
        let ranks = WorldSize::new(ranks).unwrap();
        let ring = Ring::new(Rank(rank), ranks, Generation(0)).unwrap();
        let parts = match collective {
            _ if collective.is_uneven() => {
                let lens: Vec<usize> = (0..ranks.get() as usize).map(|rank| len * rank % 7).collect();
                Parts::uneven(&lens).unwrap()
            }
            _ => Parts::Even { len, ranks },
        };
        Schedule::new(ring, collective, parts, 3)
    }

    proptest! {
        /// What a rank sends in a pass is exactly what its next neighbour expects to arrive.
        #[test]
        fn neighbours_agree(
            (ranks, rank, root) in (2u32..10).prop_flat_map(|n| (Just(n), 0..n, 0..n)),
            len in 0usize..200,
            kind in 0usize..7,
        ) {
            let broadcast = Collective::Broadcast { root: Rank(root) };
            let uneven = Collective::AllGatherUneven { lengths: 0 };
            let (scatter, shift) =
                (Collective::ReduceScatterUneven { lengths: 0 }, Collective::Shift { lengths: 0 });
            let even = [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather];
            let collective = [even[0], even[1], even[2], broadcast, uneven, scatter, shift][kind];
            let me = schedule(rank, ranks, collective, len);
            let next = schedule((rank + 1) % ranks, ranks, collective, len);
            prop_assert_eq!(me.sends(), next.arrivals());
            for index in 0.. {
                prop_assert_eq!(me.own_chunk(index), next.arriving(0, index));
                if me.own_chunk(index).is_none() { break }
            }
            for pass in me.arriving_passes().filter(|&pass| me.forwards(pass)) {
                let sent = me.arriving(pass, 0).map(|chunk| chunk.elements);
                prop_assert_eq!(sent, next.arriving(pass + 1, 0).map(|chunk| chunk.elements));
            }
        }

        /// Each rank completes its own segment in a reduction.
        #[test]
        fn own_segment_is_completed_here((ranks, rank) in (2u32..10).prop_flat_map(|n| (Just(n), 0..n))) {
            let me = schedule(rank, ranks, Collective::ReduceScatter, 100);
            let last = ranks - 2;
            prop_assert_eq!(me.role(last), Role::Complete);
            prop_assert_eq!(me.arriving(last, 0).unwrap().elements.start, segment(100, ranks, rank).start);
        }
    }

    #[test]
    fn alone_there_is_nothing_to_send() {
        let alone = schedule(0, 1, Collective::AllReduce, 100);
        assert_eq!((alone.sends(), alone.arrivals()), (0, 0));
    }
}
