//! From the summed integers back to a gradient.

use crate::exponents::power_of_two_f64;
use crate::simd::widest;
use crate::{BLOCK, Rounding, packed_bytes, unpack};

/// The blocks whose sums must be exchanged in 64 bits, given the saturating sums of all ranks' bounds.
pub fn wide_blocks(summed_bounds: &[u32], rounding: &Rounding) -> Vec<usize> {
    let from = rounding.wide_from();
    summed_bounds.iter().enumerate().filter(|&(_, &bound)| bound >= from).map(|(index, _)| index).collect()
}

/// The second exchange: for each wide block its 256 sums in 64 bits, then its bound.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WideBlocks {
    words: Vec<i64>,
}

impl WideBlocks {
    /// Appends one block of this rank.
    pub fn push(&mut self, sums: &[i64; BLOCK], bound: u64) {
        self.words.extend_from_slice(sums);
        self.words.push(bound as i64);
    }

    /// What is to be summed over ranks, wrapping.
    pub fn into_words(self) -> Vec<i64> {
        self.words
    }

    /// Splits the total into (sums, bound) of each block.
    pub fn split(total: &[i64]) -> impl Iterator<Item = (&[i64], u64)> {
        total.chunks_exact(BLOCK + 1).map(|block| (&block[..BLOCK], block[BLOCK] as u64))
    }
}

/// The mean gradient of the blocks of a bucket, from sums as [`pack`](crate::pack) left them, and as they were added since.
///
/// # Panics
/// Where the lengths do not belong to the same blocks.
pub fn decode(sums: &[u8], eighths: &[i16], rounding: &Rounding, gradient: &mut [f32]) {
    let block_bytes = packed_bytes(BLOCK, rounding.bits());
    assert_eq!(sums.len(), packed_bytes(gradient.len(), rounding.bits()), "one sum per element");
    assert_eq!(eighths.len() * BLOCK, gradient.len(), "one exponent per block");
    let mut words = [0; BLOCK];
    let blocks = sums.chunks_exact(block_bytes).zip(gradient.chunks_exact_mut(BLOCK)).zip(eighths);
    for ((sums, gradient), &eighths) in blocks {
        unpack(sums, rounding.bits(), &mut words);
        decode_block(&words, factor(eighths, rounding), gradient);
    }
}

/// The mean gradient of the blocks of a bucket, from sums in words of 32 bits, however many of them travelled.
///
/// # Panics
/// Where the lengths do not belong to the same blocks.
pub fn decode_words(sums: &[i32], eighths: &[i16], rounding: &Rounding, gradient: &mut [f32]) {
    assert_eq!(sums.len(), gradient.len(), "one sum per element");
    assert_eq!(eighths.len() * BLOCK, gradient.len(), "one exponent per block");
    let blocks = sums.chunks_exact(BLOCK).zip(gradient.chunks_exact_mut(BLOCK)).zip(eighths);
    for ((sums, gradient), &eighths) in blocks {
        decode_block(sums, factor(eighths, rounding), gradient);
    }
}

/// The mean gradient of the blocks of a bucket, from 64-bit sums: the same bits where fewer were enough.
///
/// # Panics
/// Where the lengths do not belong to the same blocks.
pub fn decode_wide(sums: &[i64], eighths: &[i16], rounding: &Rounding, gradient: &mut [f32]) {
    assert_eq!(sums.len(), gradient.len(), "one sum per element");
    assert_eq!(eighths.len() * BLOCK, gradient.len(), "one exponent per block");
    let blocks = sums.chunks_exact(BLOCK).zip(gradient.chunks_exact_mut(BLOCK)).zip(eighths);
    for ((sums, gradient), &eighths) in blocks {
        let factor = factor(eighths, rounding);
        sums.iter().zip(gradient).for_each(|(&sum, value)| *value = (sum as f64 * factor) as f32);
    }
}

/// What an integer of the sum is worth in the mean.
fn factor(eighths: i16, rounding: &Rounding) -> f64 {
    power_of_two_f64(-rounding.shift_of_sums(eighths)) / f64::from(rounding.micro_batches())
}

widest! {
    fn decode_block(sums: &[i32], factor: f64, gradient: &mut [f32]) = decode_block_loop
}

#[inline(always)]
fn decode_block_loop(sums: &[i32], factor: f64, gradient: &mut [f32]) {
    for (&sum, value) in sums.iter().zip(gradient) {
        *value = (f64::from(sum) * factor) as f32;
    }
}
