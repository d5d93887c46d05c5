//! What of a payload belongs to which host where each rank has a segment of it, and in which pieces that travels: pure arithmetic,
//! the same on all ranks.
//!
//! A host's *share* is the segments of its ranks, one after the other. Shares travel in rounds: round `k` has the `k`-th part of
//! every share, so that all links between hosts are busy at once.
//!
//! ```text
//! host A has ranks 0 and 2, host B rank 1       share of A: 0 0 0 0 2 2 2 2     share of B: 1 1 1 1
//! rounds of two elements of each host           0 0 1 1 | 0 0 1 1 | 2 2 | 2 2
//! ```
//!
//! # Invariants
//! 1. Every element of the payload is in one round, once.
//! 2. Elements are counted in the order in which they travel, over all rounds: no two have the same number.

use std::ops::Range;

use crate::layout::Layout;
use crate::rank::{Rank, WorldSize};
use crate::schedule::Parts;

/// The shares of all hosts.
pub(super) struct Shares {
    /// By host: the segments of its ranks.
    hosts: Vec<Vec<Slice>>,
    /// Elements of each share in a round.
    piece_len: usize,
    /// Elements of the payload.
    len: usize,
    ranks: WorldSize,
}

/// Elements of one rank's segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) rank: Rank,
    /// In the payload.
    pub(super) elements: Range<usize>,
}

/// A part of every share.
pub(super) struct Round {
    /// By host.
    hosts: Vec<Vec<Slice>>,
    /// How many elements travel before.
    pub(super) start: usize,
    len: usize,
    ranks: WorldSize,
}

impl Shares {
    pub(super) fn new(layout: &Layout, parts: &Parts, ranks: WorldSize, piece_len: usize) -> Self {
        let slice = |&rank: &Rank| Slice { rank, elements: parts.segment(rank.0) };
        let hosts = (0..layout.hosts()).map(|host| layout.ranks_of(host).iter().map(slice).collect());
        Self { hosts: hosts.collect(), piece_len: piece_len.max(1), len: parts.len(), ranks }
    }

    /// How many rounds there are; one at least, so that what differs between ranks is found out.
    pub(super) fn rounds(&self) -> usize {
        let of_host = |share: &Vec<Slice>| length(share).div_ceil(self.piece_len);
        self.hosts.iter().map(of_host).max().unwrap_or(0).max(1)
    }

    /// Round `index`.
    pub(super) fn round(&self, index: usize) -> Round {
        let (before, end) = (index * self.piece_len, (index + 1) * self.piece_len);
        let start = self.hosts.iter().map(|share| before.min(length(share))).sum();
        let hosts = self.hosts.iter().map(|share| cut(share, before..end)).collect();
        Round { hosts, start, len: self.len, ranks: self.ranks }
    }
}

impl Round {
    /// How many elements travel in it.
    pub(super) fn len(&self) -> usize {
        self.hosts.iter().map(|slices| length(slices)).sum()
    }

    /// What belongs to that host.
    pub(super) fn of_host(&self, host: usize) -> &[Slice] {
        &self.hosts[host]
    }

    /// What belongs to the hosts, as their leaders divide it: in the order in which elements travel.
    pub(super) fn parts(&self) -> Parts {
        let mut end = self.start;
        let ends = self.hosts.iter().map(|slices| {
            end += length(slices);
            end
        });
        Parts::Shares { len: self.len, start: self.start, ends: ends.collect(), ranks: self.ranks }
    }

    /// Where its elements are in the payload: each with its place in the round, and as few as can be. One at least.
    pub(super) fn ranges(&self) -> Vec<(usize, Range<usize>)> {
        let mut ranges: Vec<(usize, Range<usize>)> = Vec::new();
        let mut at = 0;
        for Slice { elements, .. } in self.hosts.iter().flatten().filter(|slice| !slice.elements.is_empty()) {
            match ranges.last_mut() {
                Some((_, last)) if last.end == elements.start => last.end = elements.end,
                _ => ranges.push((at, elements.clone())),
            }
            at += elements.len();
        }
        if ranges.is_empty() {
            ranges.push((0, 0..0));
        }
        ranges
    }
}

/// Elements of slices.
fn length(slices: &[Slice]) -> usize {
    slices.iter().map(|slice| slice.elements.len()).sum()
}

/// These elements of a share, counted from its beginning: by rank, with an empty slice for who has none of them.
fn cut(share: &[Slice], wanted: Range<usize>) -> Vec<Slice> {
    let mut before = 0;
    let slice = |Slice { rank, elements }: &Slice| {
        let within = |place: usize| elements.start + place.saturating_sub(before).min(elements.len());
        let elements_cut = within(wanted.start)..within(wanted.end);
        before += elements.len();
        Slice { rank: *rank, elements: elements_cut }
    };
    share.iter().map(slice).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// All elements travel once, each to the host and the rank whose segment it is in, in numbers that leave no gap.
        #[test]
        fn every_element_travels_once(
            (hosts, lens) in (1usize..8).prop_flat_map(|ranks| (
                proptest::collection::vec(0u32..3, ranks), proptest::collection::vec(0usize..40, ranks),
            )),
            piece_len in 1usize..20,
        ) {
            let layout = Layout::of(&hosts, |a, b| a == b);
            let parts = Parts::uneven(&lens).unwrap();
            let shares = Shares::new(&layout, &parts, WorldSize::new(hosts.len() as u32).unwrap(), piece_len);
            let (mut seen, mut numbered) = (vec![0; parts.len()], 0);
            for index in 0..shares.rounds() {
                let round = shares.round(index);
                prop_assert_eq!(round.start, numbered);
                numbered += round.len();
                let divided = round.parts();
                prop_assert_eq!(divided.elements(), round.start..numbered);
                let mut in_order = Vec::new();
                for host in 0..layout.hosts() {
                    prop_assert!(length(round.of_host(host)) <= piece_len);
                    prop_assert_eq!(divided.segment(host as u32).len(), length(round.of_host(host)));
                    for (slice, rank) in round.of_host(host).iter().zip(layout.ranks_of(host)) {
                        prop_assert_eq!(slice.rank, *rank);
                        let own = parts.segment(rank.0);
                        prop_assert!(slice.elements.clone().all(|i| own.contains(&i)));
                        slice.elements.clone().for_each(|i| seen[i] += 1);
                        in_order.extend(slice.elements.clone());
                    }
                }
                let by_ranges: Vec<(usize, usize)> =
                    round.ranges().into_iter().flat_map(|(at, range)| (at..).zip(range)).collect();
                prop_assert_eq!(by_ranges, in_order.into_iter().enumerate().collect::<Vec<_>>());
            }
            prop_assert!(seen.iter().all(|&times| times == 1) && numbered == parts.len());
        }
    }
}
