//! Exact sums of which each rank keeps its part only: every micro-batch's gradient is exchanged as it appears.
//!
//! Ranks go through a step in rounds of at most one micro-batch each, bucket by bucket. A bucket's words are reduced and scattered,
//! with their bounds, while the one below it is computed; what arrives is added up in 32 bits, and in 64 where bounds say that these
//! may not be enough. No rank ever has a gradient of more than a few buckets.
//!
//! # Invariants
//! 1. The sums, bounds and next exponents are those of [`super::exact`], however many rounds there are.
//! 2. All ranks make the same calls, in the same order, whether they have a micro-batch in a round or not.

use std::collections::BTreeMap;
use std::ops::Range;

use mattock_checkpoint::room::give_back;
use mattock_collectives::{Buffer, CollectiveError, Group, Pending, SaturatingSum, Sum};
use mattock_exact::{
    Accumulator, BLOCK, Dither, Exponents, Rounding, WideBlocks, decode_wide, decode_words, packed_bytes,
    unpack, wide_blocks,
};

use super::flight::all_reduce;
use super::wire::Wire;
use super::{Summed, blocks_of};
use crate::partition::Stretches;

/// This rank's part of a step's sums.
pub(crate) struct ShardSum {
    rounding: Rounding,
    /// Over what is this rank's own; in the end the memory of its gradient.
    sums: Vec<i32>,
    /// In 64 bits, of those own blocks whose bound is past [`NARROW_MAX`].
    promoted: BTreeMap<usize, Box<[i64; BLOCK]>>,
    /// Of all blocks.
    bounds: Vec<u64>,
    nonfinite: bool,
    under_way: Option<UnderWay>,
    /// Buffers of buckets that have landed, for the next of their length.
    spare: Vec<(Accumulator, Wire)>,
}

/// A sum with such a bound fits 32 bits.
const NARROW_MAX: u64 = i32::MAX as u64;

/// Buffers that are kept: of several lengths, or where links still hold on to some.
const SPARE_MAX: usize = 3;

/// A bucket whose words and bounds travel.
struct UnderWay {
    bucket: usize,
    blocks: Range<usize>,
    accumulator: Accumulator,
    wire: Wire,
    bounds: Pending<Buffer<u32>>,
}

/// A bucket, as the sums need to know it.
#[derive(Clone, Copy)]
pub(crate) struct Target<'t> {
    pub(crate) group: &'t Group,
    /// Its number, and its range of the flat space.
    pub(crate) bucket: usize,
    pub(crate) range: &'t Range<usize>,
    /// How many elements are each rank's.
    pub(crate) lens: &'t [usize],
    /// What is this rank's own.
    pub(crate) own: &'t Stretches,
}

impl ShardSum {
    pub(super) fn new(rounding: Rounding) -> Self {
        Self {
            rounding,
            sums: Vec::new(),
            promoted: BTreeMap::new(),
            bounds: Vec::new(),
            nonfinite: false,
            under_way: None,
            spare: Vec::new(),
        }
    }

    /// Begins a step in which so many elements are this rank's own, of so many blocks in all.
    pub(crate) fn begin(&mut self, own: usize, blocks: usize) {
        self.under_way = None;
        self.nonfinite = false;
        self.sums.clear();
        self.sums.resize(own, 0);
        self.promoted.clear();
        self.bounds.clear();
        self.bounds.resize(blocks, 0);
    }

    /// Takes in the bucket that is under way, which has had the time in which this one was computed; then sends this one's gradient, or
    /// nothing where this rank has no micro-batch, from the same memory.
    pub(crate) fn exchange(
        &mut self,
        target: Target<'_>,
        gradient: Option<&[f32]>,
        exponents: &Exponents,
        key: u64,
    ) -> Result<(), CollectiveError> {
        let Target { group, bucket, range, lens, own } = target;
        self.end_round(group, own)?;
        let blocks = blocks_of(range);
        let (mut accumulator, mut wire) = self.buffers(blocks.len());
        if let Some(gradient) = gradient {
            let dither = Dither::new(key, blocks.start);
            let eighths = &exponents.eighths()[blocks.clone()];
            accumulator.add(wire.words_mut(), gradient, eighths, &dither);
        }
        self.nonfinite |= accumulator.nonfinite();
        wire.send(group, Some(lens));
        let bounds = accumulator.bounds().iter().map(|&bound| u32::try_from(bound).unwrap_or(u32::MAX));
        let bounds = Buffer::from(bounds.collect::<Vec<u32>>());
        let bounds = group.all_reduce::<SaturatingSum>(bounds.into(), Buffer::default());
        self.under_way = Some(UnderWay { bucket, blocks, accumulator, wire, bounds });
        Ok(())
    }

    /// Empty ones, for so many blocks.
    fn buffers(&mut self, blocks: usize) -> (Accumulator, Wire) {
        let fits = |(accumulator, wire): &(Accumulator, Wire)| {
            accumulator.bounds().len() == blocks && wire.is_free()
        };
        match self.spare.iter().position(fits) {
            Some(at) => {
                let (mut accumulator, mut wire) = self.spare.swap_remove(at);
                accumulator.reset();
                wire.words_mut().fill(0);
                (accumulator, wire)
            }
            None => {
                let wire = Wire::new(blocks * BLOCK, self.rounding.bits());
                (Accumulator::new(blocks, self.rounding), wire)
            }
        }
    }

    /// Takes in what is still under way: the round is over.
    pub(crate) fn end_round(&mut self, group: &Group, own: &Stretches) -> Result<(), CollectiveError> {
        let last = self.under_way.take();
        last.map_or(Ok(()), |last| self.land(group, own, last))
    }

    /// Adds what arrived of a bucket.
    fn land(&mut self, group: &Group, own: &Stretches, landing: UnderWay) -> Result<(), CollectiveError> {
        let UnderWay { bucket, blocks, accumulator, mut wire, bounds } = landing;
        let (bits, within) = (self.rounding.bits(), own.within(bucket));
        let first = own.ranges()[bucket].start / BLOCK - blocks.start;
        let words = wire.wait()?;
        let bounds = bounds.wait()?;
        let wide = wide_blocks(&bounds, &self.rounding);
        for (index, bound) in bounds.iter().enumerate() {
            if !wide.contains(&index) {
                self.bounds[blocks.start + index] += u64::from(*bound);
            }
        }
        let mut block = [0i32; BLOCK];
        let arrived = words.chunks_exact(packed_bytes(BLOCK, bits));
        for (index, (words, start)) in (first..).zip(arrived.zip(within.step_by(BLOCK))) {
            if !wide.contains(&index) {
                unpack(words, bits, &mut block);
                self.add(start, self.bounds[blocks.start + index], &block);
            }
        }
        if !wide.is_empty() {
            self.land_wide(group, own, &blocks, &wide, (&accumulator, &wire))?;
        }
        if self.spare.len() == SPARE_MAX {
            self.spare.remove(0);
        }
        self.spare.push((accumulator, wire));
        Ok(())
    }

    /// Adds to the own block that starts there, whose bound is now this.
    fn add(&mut self, start: usize, bound: u64, words: &[i32; BLOCK]) {
        if bound > NARROW_MAX {
            return self.add_wide(start, bound, &words.map(i64::from));
        }
        self.sums[start..start + BLOCK].iter_mut().zip(words).for_each(|(sum, word)| *sum += word);
    }

    /// The same, of words that came in 64 bits.
    fn add_wide(&mut self, start: usize, bound: u64, words: &[i64]) {
        let narrow = &mut self.sums[start..start + BLOCK];
        if bound <= NARROW_MAX {
            // What fits in the end fits on the way there: no word is larger than its block's bound.
            narrow.iter_mut().zip(words).for_each(|(sum, &word)| *sum += word as i32);
            return;
        }
        let promoted = self.promoted.entry(start / BLOCK).or_insert_with(|| {
            let mut sums = Box::new([0; BLOCK]);
            sums.iter_mut().zip(narrow).for_each(|(sum, narrow)| *sum = i64::from(*narrow));
            sums
        });
        promoted.iter_mut().zip(words).for_each(|(sum, word)| *sum += word);
    }

    /// The second exchange: 64-bit sums and bounds of the blocks whose sums may have wrapped.
    fn land_wide(
        &mut self,
        group: &Group,
        own: &Stretches,
        blocks: &Range<usize>,
        wide: &[usize],
        (accumulator, wire): (&Accumulator, &Wire),
    ) -> Result<(), CollectiveError> {
        let mut payload = WideBlocks::default();
        for &index in wide {
            payload.push(&accumulator.wide_sums(index, wire.words()), accumulator.bounds()[index]);
        }
        let total = all_reduce::<Sum<i64>>(group, payload.into_words())?;
        for (&index, (sums, bound)) in wide.iter().zip(WideBlocks::split(&total)) {
            self.bounds[blocks.start + index] += bound;
            if let Some(start) = own.place((blocks.start + index) * BLOCK) {
                self.add_wide(start, self.bounds[blocks.start + index], sums);
            }
        }
        Ok(())
    }

    pub(super) fn nonfinite(&self) -> bool {
        self.nonfinite
    }

    /// Decodes the mean over micro-batches of what is this rank's own, in the memory of the sums: see [`Self::gradient`].
    pub(super) fn finish(&mut self, exponents: &Exponents, own: &Stretches) -> Summed {
        let (mut sums, mut gradient) = ([0; BLOCK], [0f32; BLOCK]);
        for (bucket, range) in own.ranges().iter().enumerate() {
            let eighths = &exponents.eighths()[blocks_of(range)];
            let starts = own.within(bucket).step_by(BLOCK);
            for (start, eighths) in starts.zip(eighths.chunks(1)) {
                let words = &mut self.sums[start..start + BLOCK];
                match self.promoted.get(&(start / BLOCK)) {
                    Some(sums) => decode_wide(&sums[..], eighths, &self.rounding, &mut gradient),
                    None => {
                        sums.copy_from_slice(words);
                        decode_words(&sums, eighths, &self.rounding, &mut gradient);
                    }
                }
                words.copy_from_slice(bytemuck::cast_slice(&gradient));
            }
        }
        let wide_from = u64::from(self.rounding.wide_from());
        let wide_blocks = self.bounds.iter().filter(|&&bound| bound >= wide_from).count();
        Summed { exponents: exponents.next(&self.bounds), wide_blocks }
    }

    /// What was decoded last, until the next step begins.
    pub(super) fn gradient(&self) -> &[f32] {
        bytemuck::cast_slice(&self.sums)
    }

    /// Gives up all memory, until the next step begins.
    pub(super) fn rest(&mut self) {
        give_back(std::mem::take(&mut self.sums));
        (self.promoted, self.bounds, self.spare) = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use mattock_exact::Bits;

    use super::*;

    /// One block stays narrow all the way, one leaves 32 bits on the way, and one comes in 64 bits and fits 32.
    #[test]
    fn sums_that_leave_32_bits_are_those_of_64() {
        const LARGE: i32 = i32::MAX / 2;
        let rounding = Rounding::new(4, Bits::B32);
        let words = |block: usize, round: usize| -> [i32; BLOCK] {
            std::array::from_fn(|at| match block {
                0 => at as i32 - 100 * round as i32,
                1 => LARGE - (at * round) as i32,
                _ => -(at as i32) << 20,
            })
        };
        let own = Stretches::new(vec![Range { start: 0, end: 3 * BLOCK }]);
        let (mut sum, mut wide) = (ShardSum::new(rounding), vec![0i64; 3 * BLOCK]);
        sum.begin(3 * BLOCK, 3);
        for round in 0..4 {
            for block in 0..3 {
                let words = words(block, round);
                let largest = words.iter().map(|word| u64::from(word.unsigned_abs())).max().unwrap_or(0);
                sum.bounds[block] += largest;
                let (start, bound) = (block * BLOCK, sum.bounds[block]);
                match block {
                    2 => sum.add_wide(start, bound, &words.map(i64::from)),
                    _ => sum.add(start, bound, &words),
                }
                wide[start..].iter_mut().zip(words).for_each(|(sum, word)| *sum += i64::from(word));
            }
        }
        assert_eq!(sum.promoted.keys().collect::<Vec<_>>(), [&1]);
        assert!(wide[BLOCK..2 * BLOCK].iter().all(|&sum| sum > i64::from(i32::MAX)));
        let exponents = Exponents::from_eighths(vec![0, 8, -8]);
        let mut gradient = vec![0.0; 3 * BLOCK];
        decode_wide(&wide, exponents.eighths(), &rounding, &mut gradient);
        sum.finish(&exponents, &own);
        assert_eq!(sum.gradient(), gradient);
    }
}
