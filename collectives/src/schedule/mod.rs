//! Who sends which chunk to whom, in which order: pure arithmetic, no bytes.
//!
//! A payload is cut into one *segment* per rank ([`segment`]) and a segment into *chunks*. Each algorithm says, for
//! one rank, what it sends unasked, what will arrive, and what to do with it. Today there is one: [`ring`].

pub(crate) mod ring;

use std::ops::Range;
use std::sync::Arc;

use crate::rank::WorldSize;

/// The elements of segment `index` when `len` elements are divided among `parts`: lengths differ by one at most, the
/// longer ones first.
///
/// # Panics
/// If `index` is not below `parts`.
pub fn segment(len: usize, parts: u32, index: u32) -> Range<usize> {
    assert!(index < parts, "segment {index} of {parts}");
    let (parts, index) = (parts as usize, index as usize);
    let (base, longer) = (len / parts, len % parts);
    let start = index * base + index.min(longer);
    start..start + base + usize::from(index < longer)
}

/// How a payload is divided among the ranks: a segment for each, in their order.
#[derive(Clone, Debug)]
pub(crate) enum Parts {
    /// By [`segment`].
    Even { len: usize, ranks: WorldSize },
    /// Of any lengths: where each ends.
    Uneven { ends: Arc<[usize]> },
    /// Only these elements of a payload of `len`, divided among some members of a group of so many `ranks`.
    Piece { len: usize, elements: Range<usize>, members: WorldSize, ranks: WorldSize },
    /// Only some elements of a payload of `len`, which are counted in the order in which they travel: they begin at `start`, and
    /// those of each member end there. For a group of so many `ranks`.
    Shares { len: usize, start: usize, ends: Arc<[usize]>, ranks: WorldSize },
}

impl Parts {
    /// Of these lengths; `None` where no memory holds so much.
    pub(crate) fn uneven(lens: &[usize]) -> Option<Self> {
        let mut end = 0usize;
        let ends = lens.iter().map(|&len| {
            end = end.checked_add(len)?;
            Some(end)
        });
        Some(Self::Uneven { ends: ends.collect::<Option<_>>()? })
    }

    /// Elements of the whole payload.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Even { len, .. } | Self::Piece { len, .. } | Self::Shares { len, .. } => *len,
            Self::Uneven { ends } => ends.last().copied().unwrap_or(0),
        }
    }

    /// The elements that travel.
    pub(crate) fn elements(&self) -> Range<usize> {
        match self {
            Self::Piece { elements, .. } => elements.clone(),
            Self::Shares { start, ends, .. } => *start..ends.last().copied().unwrap_or(*start),
            _ => 0..self.len(),
        }
    }

    /// The elements of a rank's segment.
    pub(crate) fn segment(&self, rank: u32) -> Range<usize> {
        match self {
            Self::Even { len, ranks } => segment(*len, ranks.get(), rank),
            Self::Uneven { ends } => between(0, ends, rank),
            Self::Shares { start, ends, .. } => between(*start, ends, rank),
            Self::Piece { elements, members, .. } => {
                let part = segment(elements.len(), members.get(), rank);
                elements.start + part.start..elements.start + part.end
            }
        }
    }

    /// The length of the longest segment.
    pub(crate) fn longest(&self) -> usize {
        match self {
            Self::Even { .. } | Self::Piece { .. } => self.segment(0).len(),
            Self::Uneven { ends } | Self::Shares { ends, .. } => {
                (0..ends.len() as u32).map(|rank| self.segment(rank).len()).max().unwrap_or(0)
            }
        }
    }
}

/// What ends there, from where the one before does, or from `start`.
fn between(start: usize, ends: &[usize], index: u32) -> Range<usize> {
    let before = (index as usize).checked_sub(1).map_or(start, |before| ends[before]);
    before..ends[index as usize]
}

/// What tells lists of lengths apart (FNV-1a, folded): by accident, two have the same once in four thousand million.
pub(crate) fn digest(lens: &[usize]) -> u32 {
    let bytes = lens.iter().flat_map(|&len| (len as u64).to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ hash >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_tile_the_payload_and_are_balanced(len in 0usize..5000, parts in 1u32..20) {
            let segments: Vec<_> = (0..parts).map(|i| segment(len, parts, i)).collect();
            prop_assert_eq!(segments[0].start, 0);
            prop_assert_eq!(segments[parts as usize - 1].end, len);
            for pair in segments.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
                prop_assert!(pair[0].len() - pair[1].len() <= 1);
            }
        }

        #[test]
        fn uneven_parts_tile_the_payload(lens in proptest::collection::vec(0usize..50, 1..10)) {
            let parts = Parts::uneven(&lens).unwrap();
            let mut end = 0;
            for (rank, &len) in (0..).zip(&lens) {
                prop_assert_eq!(parts.segment(rank), end..end + len);
                end += len;
            }
            prop_assert_eq!((parts.len(), Some(parts.longest())), (end, lens.iter().max().copied()));
        }
    }

    #[test]
    fn digests_are_pinned() {
        assert_eq!(digest(&[3, 0, 500]), 0x3b76_98c8);
        assert_ne!(digest(&[2, 2]), digest(&[4, 0]));
        assert_ne!(digest(&[0]), digest(&[0, 0]));
        assert!(Parts::uneven(&[usize::MAX, 1]).is_none());
    }
}
