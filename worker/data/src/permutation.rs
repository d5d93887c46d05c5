//! A keyed permutation with O(1) seek.
//!
//! A Feistel network over the next even number of bits, walking cycles until the result lies below the length (Black
//! and Rogaway, 2002): what is at a place is known without looking at any other.

use crate::keys::mix;

/// Rounds of the Feistel network: four make a pseudo-random permutation of a pseudo-random function.
const ROUNDS: u64 = 4;

/// A permutation of `0..len` for each key and epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Permutation {
    key: u64,
    len: u64,
    half_bits: u32,
}

impl Permutation {
    /// # Panics
    /// Where there is nothing to permute, or 2^62 and more.
    pub(crate) fn new(key: u64, len: u64) -> Self {
        assert!(len > 0 && len < 1 << 62, "an order needs samples");
        let bits = u64::BITS - (len - 1).leading_zeros();
        Self { key, len, half_bits: bits.div_ceil(2).max(1) }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// What is at a place, which must be below the length.
    pub(crate) fn at(&self, epoch: u64, mut place: u64) -> u64 {
        loop {
            place = self.shuffle(epoch, place);
            if place < self.len {
                return place;
            }
        }
    }

    /// A permutation of the numbers of twice `half_bits` bits.
    fn shuffle(&self, epoch: u64, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let key = mix(self.key ^ mix(epoch.wrapping_mul(ROUNDS).wrapping_add(round)));
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}
