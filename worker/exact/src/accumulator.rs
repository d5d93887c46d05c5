//! One rank's sum of rounded micro-batch gradients, over one bucket.
//!
//! [`Accumulator`] keeps 32-bit words and, beside them, 64-bit sums for the few blocks that need them. The words are
//! the low halves of the true sums always, also of a promoted block, because their wrapping sum over ranks is what is
//! exchanged for every block. [`WideAccumulator`] keeps 64 bits throughout under the same rounding: it is the
//! reference. The words themselves belong to the caller, who hands them to a collective.

use std::collections::BTreeMap;

use crate::dither::{BlockDither, Dither, round_off, round_off_narrow};
use crate::exponents::{power_of_two, power_of_two_f64, shift};
use crate::simd::widest;
use crate::{BLOCK, Rounding};

/// A sum of bounds below this fits 32 bits.
const NARROW: u64 = 1 << 31;

/// Bounds and flags that both accumulators keep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Tally {
    /// Sum over micro-batches of max|q|, per block; q is what it is with 32 bits.
    bounds: Vec<u64>,
    /// Elements that hit the saturation.
    saturated: u64,
    /// Whether an infinity or NaN was met.
    nonfinite: bool,
}

/// 32-bit sums, promoted block by block; the words are the caller's.
#[derive(Debug, Clone)]
pub struct Accumulator {
    rounding: Rounding,
    tally: Tally,
    promoted: BTreeMap<usize, Box<[i64; BLOCK]>>,
}

/// 64-bit sums; the words are the caller's.
#[derive(Debug, Clone)]
pub struct WideAccumulator {
    rounding: Rounding,
    tally: Tally,
}

/// One block of a micro-batch, rounded.
struct Rounded {
    /// What is summed.
    values: [i64; BLOCK],
    /// What counts towards the bound.
    largest: u64,
}

impl Tally {
    fn new(blocks: usize) -> Self {
        Self { bounds: vec![0; blocks], ..Self::default() }
    }

    fn reset(&mut self) {
        self.bounds.fill(0);
        self.saturated = 0;
        self.nonfinite = false;
    }

    /// Rounds a block that may hold anything.
    fn round(&mut self, block: &[f32], eighths: i16, rounding: Rounding, dither: BlockDither) -> Rounded {
        let (saturation, dropped) = (rounding.saturation(), rounding.dropped());
        let scale = power_of_two_f64(shift(eighths));
        let mut rounded = Rounded { values: [0; BLOCK], largest: 0 };
        for ((value, sum), element) in block.iter().zip(&mut rounded.values).zip(0..) {
            if !value.is_finite() {
                self.nonfinite = true;
                continue;
            }
            // Exact: an f32 times a power of two is an f64; so there is one rounding, to the integer.
            let wanted = (f64::from(*value) * scale).round_ties_even();
            let q = (wanted as i64).clamp(-saturation, saturation);
            self.saturated += u64::from(wanted.abs() > saturation as f64);
            rounded.largest = rounded.largest.max(q.unsigned_abs());
            *sum = round_off(q, dropped, dither.bits(element));
        }
        rounded
    }
}

impl Accumulator {
    /// For a bucket of this many blocks.
    pub fn new(blocks: usize, rounding: Rounding) -> Self {
        Self { rounding, tally: Tally::new(blocks), promoted: BTreeMap::new() }
    }

    /// Forgets all micro-batches; the caller zeroes the words.
    pub fn reset(&mut self) {
        self.tally.reset();
        self.promoted.clear();
    }

    /// Adds one micro-batch's gradient of the bucket to `words`; `dither` is that micro-batch's.
    ///
    /// # Panics
    /// Where the lengths of words, gradient and exponents do not belong to the same blocks.
    pub fn add(&mut self, words: &mut [i32], gradient: &[f32], eighths: &[i16], dither: &Dither) {
        assert_eq!(words.len(), gradient.len(), "one word per element");
        assert_eq!(eighths.len() * BLOCK, gradient.len(), "one exponent per block");
        let blocks = words.chunks_exact_mut(BLOCK).zip(gradient.chunks_exact(BLOCK)).zip(eighths);
        for (index, ((words, gradient), &eighths)) in blocks.enumerate() {
            let scale = power_of_two(shift(eighths));
            let largest = largest_bits(gradient);
            let scaled = f32::from_bits(largest) * scale;
            if scaled < NARROW as f32 && !self.promoted.contains_key(&index) {
                // Rounding is monotone, so the largest element gives the largest integer.
                let bound = self.tally.bounds[index] + scaled.round_ties_even() as u64;
                if bound < NARROW {
                    self.tally.bounds[index] = bound;
                    match self.rounding.dropped() {
                        0 => add_narrow(words, gradient, scale),
                        dropped => add_dithered(words, gradient, scale, dropped, dither.block(index)),
                    }
                    continue;
                }
            }
            self.add_wide(index, words, gradient, eighths, dither.block(index));
        }
    }

    /// The slow way, for blocks whose own sum may need more than 32 bits.
    fn add_wide(
        &mut self,
        index: usize,
        words: &mut [i32],
        gradient: &[f32],
        eighths: i16,
        dither: BlockDither,
    ) {
        let rounded = self.tally.round(gradient, eighths, self.rounding, dither);
        self.tally.bounds[index] += rounded.largest;
        let sums = self.promoted.entry(index).or_insert_with(|| sign_extended(words));
        for ((word, sum), q) in words.iter_mut().zip(sums.iter_mut()).zip(rounded.values) {
            *sum += q;
            *word = *sum as i32;
        }
    }

    /// The bound of each block, in units of 32 bits.
    pub fn bounds(&self) -> &[u64] {
        &self.tally.bounds
    }

    /// The 64-bit sums of one block, whether it was promoted or not.
    pub fn wide_sums(&self, index: usize, words: &[i32]) -> [i64; BLOCK] {
        match self.promoted.get(&index) {
            Some(sums) => **sums,
            None => *sign_extended(&words[index * BLOCK..(index + 1) * BLOCK]),
        }
    }

    /// Elements that were clipped to the largest integer.
    pub fn saturated(&self) -> u64 {
        self.tally.saturated
    }

    /// Whether an infinity or NaN was met; such an element counts as zero.
    pub fn nonfinite(&self) -> bool {
        self.tally.nonfinite
    }
}

impl WideAccumulator {
    /// For a bucket of this many blocks.
    pub fn new(blocks: usize, rounding: Rounding) -> Self {
        Self { rounding, tally: Tally::new(blocks) }
    }

    /// Forgets all micro-batches; the caller zeroes the words.
    pub fn reset(&mut self) {
        self.tally.reset();
    }

    /// Adds one micro-batch's gradient of the bucket to `words`; `dither` is that micro-batch's.
    ///
    /// # Panics
    /// Where the lengths of words, gradient and exponents do not belong to the same blocks.
    pub fn add(&mut self, words: &mut [i64], gradient: &[f32], eighths: &[i16], dither: &Dither) {
        assert_eq!(words.len(), gradient.len(), "one word per element");
        assert_eq!(eighths.len() * BLOCK, gradient.len(), "one exponent per block");
        let blocks = words.chunks_exact_mut(BLOCK).zip(gradient.chunks_exact(BLOCK)).zip(eighths);
        for (index, ((words, gradient), &eighths)) in blocks.enumerate() {
            let rounded = self.tally.round(gradient, eighths, self.rounding, dither.block(index));
            self.tally.bounds[index] += rounded.largest;
            words.iter_mut().zip(rounded.values).for_each(|(word, q)| *word += q);
        }
    }

    /// The bound of each block, in units of 32 bits.
    pub fn bounds(&self) -> &[u64] {
        &self.tally.bounds
    }

    /// Elements that were clipped to the largest integer.
    pub fn saturated(&self) -> u64 {
        self.tally.saturated
    }

    /// Whether an infinity or NaN was met; such an element counts as zero.
    pub fn nonfinite(&self) -> bool {
        self.tally.nonfinite
    }
}

fn sign_extended(words: &[i32]) -> Box<[i64; BLOCK]> {
    let mut sums = Box::new([0; BLOCK]);
    sums.iter_mut().zip(words).for_each(|(sum, &word)| *sum = i64::from(word));
    sums
}

widest! {
    /// The bits of the largest |value|; those of an infinity or NaN are larger than all finite ones.
    fn largest_bits(block: &[f32]) -> u32 = largest_bits_loop
}

#[inline(always)]
fn largest_bits_loop(block: &[f32]) -> u32 {
    block.iter().map(|value| value.to_bits() & 0x7fff_ffff).fold(0, u32::max)
}

widest! {
    /// Adds `round(value * scale)` to each word, where all products are below 2^31 in magnitude.
    fn add_narrow(words: &mut [i32], block: &[f32], scale: f32) = add_narrow_loop
}

#[inline(always)]
fn add_narrow_loop(words: &mut [i32], block: &[f32], scale: f32) {
    for (word, value) in words.iter_mut().zip(block) {
        let rounded = (value * scale).round_ties_even();
        // SAFETY: the caller compared the largest product with 2^31, and none is NaN.
        *word = word.wrapping_add(unsafe { rounded.to_int_unchecked::<i32>() });
    }
}

widest! {
    /// [`add_narrow`], with the low bits rounded away.
    fn add_dithered(words: &mut [i32], block: &[f32], scale: f32, dropped: u32, dither: BlockDither)
        = add_dithered_loop
}

#[inline(always)]
fn add_dithered_loop(words: &mut [i32], block: &[f32], scale: f32, dropped: u32, dither: BlockDither) {
    for ((word, value), element) in words.iter_mut().zip(block).zip(0..) {
        let rounded = (value * scale).round_ties_even();
        // SAFETY: the caller compared the largest product with 2^31, and none is NaN.
        let q = unsafe { rounded.to_int_unchecked::<i32>() };
        *word = word.wrapping_add(round_off_narrow(q, dropped, dither.bits(element)));
    }
}
