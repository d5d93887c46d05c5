//! The state hash: a wrapping sum of mixed elements, independent of order and sharding.
//!
//! It is a fingerprint against accidents (a lost update, a flipped bit, a swapped shard), cheap enough to be always on.
//! It is no cryptographic hash: what is stored is protected by BLAKE3.

use crate::Exponents;
use crate::simd::widest;

/// Odd constants with well-mixed bits (the golden ratio, and the multipliers of SplitMix64; Steele et al., 2014).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;
/// Keeps the indices of exponents apart from those of parameters.
const EXPONENTS: u64 = 1 << 63;

/// Mixes what belongs to one index.
#[inline(always)]
fn mix(index: u64, low: u64, high: u64) -> u64 {
    let key = (index ^ SECOND).wrapping_mul(STEP);
    let first = (low ^ key).wrapping_mul(FIRST);
    let second = (first ^ (first >> 31) ^ high).wrapping_mul(SECOND);
    second ^ (second >> 29)
}

widest! {
    /// The contribution of a stretch of parameters with their moments, from element `first_index` of the flat space.
    pub fn range_hash(parameters: &[f32], first: &[f32], second: &[f32], first_index: u64) -> u64 = range_hash_loop
}

#[inline(always)]
fn range_hash_loop(parameters: &[f32], first: &[f32], second: &[f32], first_index: u64) -> u64 {
    let elements = parameters.iter().zip(first).zip(second);
    elements.zip(first_index..).fold(0, |sum, (((parameter, first), second), index)| {
        let low = u64::from(parameter.to_bits()) | u64::from(first.to_bits()) << 32;
        sum.wrapping_add(mix(index, low, u64::from(second.to_bits())))
    })
}

widest! {
    /// The contribution of a stretch of parameters to a hash of these alone, by which copies of them are told apart; no part of
    /// the state hash.
    pub fn parameter_hash(parameters: &[f32], first_index: u64) -> u64 = parameter_hash_loop
}

#[inline(always)]
fn parameter_hash_loop(parameters: &[f32], first_index: u64) -> u64 {
    let mixed = parameters.iter().zip(first_index..);
    mixed.fold(0, |sum, (parameter, index)| sum.wrapping_add(mix(index, parameter.to_bits().into(), 0)))
}

/// The contribution of the exponents.
pub fn exponent_hash(exponents: &Exponents) -> u64 {
    let mixed = exponents.eighths().iter().zip(EXPONENTS..);
    mixed.fold(0, |sum, (&eighths, index)| sum.wrapping_add(mix(index, eighths as u16 as u64, 0)))
}

/// The hash of a whole state: parameters, first and second moments over the flat space, and exponents.
pub fn state_hash(parameters: &[f32], first: &[f32], second: &[f32], exponents: &Exponents) -> u64 {
    range_hash(parameters, first, second, 0).wrapping_add(exponent_hash(exponents))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> [Vec<f32>; 3] {
        let values = |k: usize| (0..37).map(|index| ((index * k) % 11) as f32 * 0.3 - 1.0).collect();
        [values(3), values(5), values(7)]
    }

    fn hash([parameters, first, second]: &[Vec<f32>; 3]) -> u64 {
        state_hash(parameters, first, second, &Exponents::from_eighths(vec![-3, 4]))
    }

    #[test]
    fn every_bit_counts() {
        let reference = hash(&state());
        for part in 0..3 {
            for index in 0..37 {
                for bit in 0..32 {
                    let mut changed = state();
                    changed[part][index] = f32::from_bits(changed[part][index].to_bits() ^ (1 << bit));
                    assert_ne!(hash(&changed), reference, "part {part}, element {index}, bit {bit}");
                }
            }
        }
    }

    #[test]
    fn places_count() {
        let mut swapped = state();
        swapped[0].swap(1, 2);
        assert_ne!(hash(&swapped), hash(&state()));
        let mut parts = state();
        parts.swap(0, 1);
        assert_ne!(hash(&parts), hash(&state()));
        let exponents = |eighths: [i16; 2]| exponent_hash(&Exponents::from_eighths(eighths.to_vec()));
        assert_ne!(exponents([1, 2]), exponents([2, 1]));
    }

    #[test]
    fn sharding_does_not_count() {
        let [parameters, first, second] = state();
        let part = |range: std::ops::Range<usize>| {
            range_hash(
                &parameters[range.clone()],
                &first[range.clone()],
                &second[range.clone()],
                range.start as u64,
            )
        };
        let whole = range_hash_loop(&parameters, &first, &second, 0);
        assert_eq!(part(20..37).wrapping_add(part(0..20)), whole);
    }

    #[test]
    fn the_hash_is_pinned() {
        assert_eq!(format!("{:016x}", hash(&state())), "90199919b02fa313");
    }
}
