//! Exact sums of which each rank keeps its part only: every micro-batch's gradient is exchanged as it appears.
//!
//! Ranks go through a step in rounds of at most one micro-batch each, bucket by bucket. A bucket's words are reduced and scattered,
//! with their bounds, while the one below it is computed; what arrives is added up in 64 bits. No rank ever has a gradient of
//! more than a few buckets.
//!
//! # Invariants
//! 1. The sums, bounds and next exponents are those of [`super::exact`], however many rounds there are.
//! 2. All ranks make the same calls, in the same order, whether they have a micro-batch in a round or not.

use std::ops::Range;

use mattock_collectives::{Buffer, CollectiveError, Group, Pending, SaturatingSum, Sum};
use mattock_exact::{
    Accumulator, BLOCK, Dither, Exponents, Rounding, WideBlocks, decode_wide, packed_bytes, unpack,
    wide_blocks,
};

use super::flight::all_reduce;
use super::wire::Wire;
use super::{Summed, blocks_of};
use crate::partition::Stretches;

/// This rank's part of a step's sums.
pub(crate) struct ShardSum {
    rounding: Rounding,
    /// In 64 bits, over what is this rank's own.
    sums: Vec<i64>,
    /// Of all blocks.
    bounds: Vec<u64>,
    nonfinite: bool,
    under_way: Option<UnderWay>,
    /// Buffers of buckets that have landed, for the next of their length.
    spare: Vec<(Accumulator, Wire)>,
}

/// Buffers that are kept: of two lengths, or of buckets that follow each other.
const SPARE_MAX: usize = 2;

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
        self.bounds.clear();
        self.bounds.resize(blocks, 0);
    }

    /// Sends a bucket's gradient on its way, or nothing where this rank has no micro-batch; then takes in the one before it.
    pub(crate) fn exchange(
        &mut self,
        target: Target<'_>,
        gradient: Option<&[f32]>,
        exponents: &Exponents,
        key: u64,
    ) -> Result<(), CollectiveError> {
        let Target { group, bucket, range, lens, own } = target;
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
        let before = self.under_way.replace(UnderWay { bucket, blocks, accumulator, wire, bounds });
        before.map_or(Ok(()), |before| self.land(group, own, before))
    }

    /// Empty ones, for so many blocks.
    fn buffers(&mut self, blocks: usize) -> (Accumulator, Wire) {
        let fits = |(accumulator, _): &(Accumulator, Wire)| accumulator.bounds().len() == blocks;
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
        for (index, (words, sums)) in (first..).zip(arrived.zip(self.sums[within].chunks_exact_mut(BLOCK))) {
            if !wide.contains(&index) {
                unpack(words, bits, &mut block);
                sums.iter_mut().zip(block).for_each(|(sum, word)| *sum += i64::from(word));
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
            if let Some(at) = own.place((blocks.start + index) * BLOCK) {
                self.sums[at..at + BLOCK].iter_mut().zip(sums).for_each(|(own, sum)| *own += sum);
            }
        }
        Ok(())
    }

    pub(super) fn nonfinite(&self) -> bool {
        self.nonfinite
    }

    /// Decodes the mean over micro-batches of what is this rank's own, in the memory of the sums: see [`Self::gradient`].
    pub(super) fn finish(&mut self, exponents: &Exponents, own: &Stretches) -> Summed {
        let (mut sums, mut gradient) = ([0i64; BLOCK], [0f32; BLOCK]);
        for (bucket, range) in own.ranges().iter().enumerate() {
            let eighths = &exponents.eighths()[blocks_of(range)];
            let starts = own.within(bucket).step_by(BLOCK);
            for (start, eighths) in starts.zip(eighths.chunks(1)) {
                // A gradient takes half of a sum's place, so it never lies where a sum is that is still to be read.
                sums.copy_from_slice(&self.sums[start..start + BLOCK]);
                decode_wide(&sums, eighths, &self.rounding, &mut gradient);
                floats_mut(&mut self.sums)[start..start + BLOCK].copy_from_slice(&gradient);
            }
        }
        let wide_from = u64::from(self.rounding.wide_from());
        let wide_blocks = self.bounds.iter().filter(|&&bound| bound >= wide_from).count();
        Summed { exponents: exponents.next(&self.bounds), wide_blocks }
    }

    /// What was decoded last, until the next step begins.
    pub(super) fn gradient(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.sums)[..self.sums.len()]
    }

    /// Gives up all memory, until the next step begins.
    pub(super) fn rest(&mut self) {
        (self.sums, self.bounds, self.spare) = Default::default();
    }
}

fn floats_mut(sums: &mut [i64]) -> &mut [f32] {
    bytemuck::cast_slice_mut(sums)
}
