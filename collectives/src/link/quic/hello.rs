//! The first bytes of a connection: who calls whom, for which ring; and the answer.
//!
//! ```text
//! hello     0 4 magic "MTKH"   4 1 version   5 1 which ring   6 1 shape   7 1 zero   8 8 generation
//!          16 4 from          20 4 to       24 4 world size   28 4 chunk bytes
//! welcome   0 4 magic "MTKW"   4 1 version   5 3 zero
//! ```

use std::fmt;

use crate::ring::Shape;
use crate::{Generation, Rank};

pub(crate) const HELLO_BYTES: usize = 32;
pub(crate) const WELCOME: [u8; 8] = *b"MTKW\x02\0\0\0";
const HELLO: [u8; 5] = *b"MTKH\x02";

/// Which of a generation's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Part {
    /// That of all ranks.
    Whole = 0,
    /// That of one rank of each host.
    Leaders = 1,
    /// That of all ranks along which a line reduces.
    LineThere = 2,
    /// That of all ranks in the reverse order.
    LineBack = 3,
    /// None: messages from one rank to any other.
    Messages = 4,
}

impl Part {
    const ALL: [Self; 5] = [Self::Whole, Self::Leaders, Self::LineThere, Self::LineBack, Self::Messages];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Whole => "the ring",
            Self::Leaders => "the leaders' ring",
            Self::LineThere => "the line",
            Self::LineBack => "the line back",
            Self::Messages => "messages",
        })
    }
}

/// What the rank that opens a connection says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) part: Part,
    pub(crate) shape: Shape,
    pub(crate) generation: Generation,
    /// The rank that calls, in this ring.
    pub(crate) from: Rank,
    /// The rank that is called.
    pub(crate) to: Rank,
    pub(crate) world_size: u32,
    pub(crate) chunk_bytes: u32,
}

impl Hello {
    pub(crate) fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut wire = [0; HELLO_BYTES];
        wire[..5].copy_from_slice(&HELLO);
        (wire[5], wire[6]) = (self.part as u8, self.shape as u8);
        wire[8..16].copy_from_slice(&self.generation.0.to_le_bytes());
        let words = [self.from.0, self.to.0, self.world_size, self.chunk_bytes];
        for (place, word) in wire[16..].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        wire
    }

    /// `None` if it is no hello of this version.
    pub(crate) fn parse(wire: &[u8; HELLO_BYTES]) -> Option<Self> {
        if wire[..5] != HELLO || wire[7] != 0 {
            return None;
        }
        let part = Part::ALL.into_iter().find(|part| *part as u8 == wire[5])?;
        let shape = [Shape::Ring, Shape::Line].into_iter().find(|shape| *shape as u8 == wire[6])?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| wire[at + i]));
        let generation = u64::from_le_bytes(std::array::from_fn(|i| wire[8 + i]));
        Some(Self {
            part,
            shape,
            generation: Generation(generation),
            from: Rank(word(16)),
            to: Rank(word(20)),
            world_size: word(24),
            chunk_bytes: word(28),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_are_pinned() {
        let hello = Hello {
            part: Part::Leaders,
            shape: Shape::Line,
            generation: Generation(0x0102),
            from: Rank(1),
            to: Rank(2),
            world_size: 3,
            chunk_bytes: 1 << 18,
        };
        let golden = b"MTKH\x02\x01\x01\0\x02\x01\0\0\0\0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\0\0\x04\0";
        assert_eq!(&hello.encode(), golden);
        assert_eq!(Hello::parse(golden), Some(hello));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(mut wire in any::<[u8; HELLO_BYTES]>(), valid in 0usize..=8) {
            wire[..valid].copy_from_slice(&b"MTKH\x02\0\0\0"[..valid]);
            if let Some(hello) = Hello::parse(&wire) {
                prop_assert_eq!(hello.encode(), wire);
            }
        }
    }
}
