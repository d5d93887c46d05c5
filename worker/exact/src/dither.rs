//! Which way a gradient is rounded: randomness as a function of (run, step, micro-batch, parameter).
//!
//! To drop the low `d` bits of an integer, a random number below `2^d` is added first and the sum is cut: what lies a
//! fraction `f` of the way to the next value is rounded up with probability `f`, so the expectation is exact and errors of
//! many micro-batches cancel instead of adding up. The random number is a hash of the parameter's place under the
//! micro-batch's key, all in integers: whoever computes the micro-batch, on whatever processor, gets the same one.
//!
//! Deliberately absent: state. Nothing is drawn in sequence, so nothing depends on what was drawn before.

/// Odd constants with well-mixed bits (the golden ratio, and the multipliers of SplitMix64; Steele et al., 2014).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;

/// The random numbers of one micro-batch, from one block of the flat space on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dither {
    key: u64,
    first_block: u64,
}

/// The random numbers of one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockDither {
    offset: u32,
    salt: u32,
}

impl Dither {
    /// `key` is the micro-batch's: a good hash of (seed, step, micro-batch). `first_block` is where in the flat space the
    /// bucket begins.
    pub const fn new(key: u64, first_block: usize) -> Self {
        Self { key, first_block: first_block as u64 }
    }

    /// Of a block of the bucket.
    pub(crate) fn block(&self, index: usize) -> BlockDither {
        let place = (self.first_block + index as u64).wrapping_add(1).wrapping_mul(STEP);
        let mixed = self.key.wrapping_add(place);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(FIRST);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(SECOND);
        let mixed = mixed ^ (mixed >> 31);
        BlockDither { offset: mixed as u32, salt: (mixed >> 32) as u32 }
    }
}

impl BlockDither {
    /// 32 random bits for an element of the block.
    #[inline(always)]
    pub(crate) fn bits(self, element: u32) -> u32 {
        // The mixer is lowbias32 (Wellons, 2018), salted in its middle.
        let mixed = self.offset.wrapping_add(element.wrapping_mul(STEP as u32));
        let mixed = (mixed ^ (mixed >> 16)).wrapping_mul(0x7feb_352d);
        let mixed = (mixed ^ (mixed >> 15) ^ self.salt).wrapping_mul(0x846c_a68b);
        mixed ^ (mixed >> 16)
    }
}

/// `q / 2^dropped`, rounded up or down by 32 random bits.
#[inline(always)]
pub(crate) fn round_off(q: i64, dropped: u32, random: u32) -> i64 {
    let low = q & ((1 << dropped) - 1);
    (q >> dropped) + ((low + (i64::from(random) >> (32 - dropped))) >> dropped)
}

/// [`round_off`] for integers of 32 bits and `dropped` from 1 to 31.
#[inline(always)]
pub(crate) fn round_off_narrow(q: i32, dropped: u32, random: u32) -> i32 {
    let low = q as u32 & ((1 << dropped) - 1);
    (q >> dropped).wrapping_add(((low + (random >> (32 - dropped))) >> dropped) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn random_bits_are_pinned() {
        let block = Dither::new(7, 3).block(2);
        assert_eq!(
            [block.bits(0), block.bits(1), block.bits(255)],
            [418_403_637, 3_256_993_615, 898_606_552]
        );
    }

    #[test]
    fn a_bucket_begins_where_it_lies() {
        let bits = |dither: Dither, index| dither.block(index).bits(9);
        assert_eq!(bits(Dither::new(7, 3), 2), bits(Dither::new(7, 0), 5));
        let distinct = [(7, 3, 2), (8, 3, 2), (7, 4, 2), (7, 3, 4)];
        let distinct: std::collections::BTreeSet<u32> =
            distinct.map(|(key, first, index)| bits(Dither::new(key, first), index)).into();
        assert_eq!(distinct.len(), 4);
    }

    #[test]
    fn over_all_random_numbers_the_mean_is_exact() {
        for q in -300i64..300 {
            let sum: i64 = (0..1 << 6).map(|random: u32| round_off(q, 6, random << 26)).sum();
            assert_eq!(sum, q, "64 times the mean of {q} / 64");
        }
    }

    #[test]
    fn random_bits_are_uniform_and_independent_of_their_neighbours() {
        // An interpreter takes a thousand times as long.
        let (blocks, elements) = (if cfg!(miri) { 4 } else { 400 }, 256);
        let mut ones = [0u32; 32];
        let (mut flips, mut pairs) = ([0u32; 32], 0);
        for block in 0..blocks {
            let dither = Dither::new(0x1234_5678_9abc_def0, 0).block(block);
            for element in 0..elements {
                let (bits, next) = (dither.bits(element), dither.bits(element + 1));
                for (bit, (ones, flips)) in ones.iter_mut().zip(&mut flips).enumerate() {
                    *ones += bits >> bit & 1;
                    *flips += (bits ^ next) >> bit & 1;
                }
                pairs += 1;
            }
        }
        // Five standard deviations of a fair coin.
        let (half, spread) = (f64::from(pairs) / 2.0, 2.5 * f64::from(pairs).sqrt());
        for (bit, (ones, flips)) in ones.iter().zip(flips).enumerate() {
            assert!((f64::from(*ones) - half).abs() < spread, "bit {bit}: {ones} of {pairs}");
            assert!((f64::from(flips) - half).abs() < spread, "bit {bit} flips {flips} times of {pairs}");
        }
    }

    proptest! {
        #[test]
        fn both_forms_are_one(q in any::<i32>(), dropped in 1u32..32, random in any::<u32>()) {
            prop_assert_eq!(i64::from(round_off_narrow(q, dropped, random)), round_off(q.into(), dropped, random));
        }

        #[test]
        fn the_result_is_one_of_the_two_neighbours(q in any::<i32>(), dropped in 0u32..32, random in any::<u32>()) {
            let (q, result) = (i64::from(q), round_off(q.into(), dropped, random));
            prop_assert!(result == q >> dropped || result == -(-q >> dropped), "{result}");
            prop_assert!(result.unsigned_abs() <= (q.unsigned_abs() >> dropped) + u64::from(dropped > 0));
        }
    }
}
