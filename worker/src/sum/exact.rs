//! Exact sums in 32 bits or fewer, with a second exchange for the blocks that need 64.

use std::ops::Range;

use mattock_collectives::{CollectiveError, Group, SaturatingSum, Sum};
use mattock_exact::{
    Accumulator, BLOCK, Dither, Exponents, Rounding, WideBlocks, decode, decode_wide, wide_blocks,
};

use super::flight::all_reduce;
use super::wire::Wire;
use super::{Summed, blocks_of};
use crate::params::Space;
use crate::partition::Stretches;

/// One accumulator per bucket.
pub(crate) struct ExactSum {
    rounding: Rounding,
    buckets: Vec<Bucket>,
}

struct Bucket {
    /// In the flat space.
    range: Range<usize>,
    accumulator: Accumulator,
    wire: Wire,
}

impl Bucket {
    fn blocks(&self) -> Range<usize> {
        blocks_of(&self.range)
    }
}

impl ExactSum {
    pub(super) fn new(space: &Space, rounding: Rounding) -> Self {
        let bucket = |range: &Range<usize>| Bucket {
            range: range.clone(),
            accumulator: Accumulator::new(range.len() / BLOCK, rounding),
            wire: Wire::new(range.len(), rounding.bits()),
        };
        Self { rounding, buckets: space.buckets().iter().map(bucket).collect() }
    }

    pub(super) fn begin(&mut self) {
        for bucket in &mut self.buckets {
            bucket.accumulator.reset();
            bucket.wire.words_mut().fill(0);
        }
    }

    pub(super) fn add(&mut self, bucket: usize, gradient: &[f32], exponents: &Exponents, key: u64) {
        let bucket = &mut self.buckets[bucket];
        let eighths = &exponents.eighths()[bucket.blocks()];
        let dither = Dither::new(key, bucket.blocks().start);
        bucket.accumulator.add(bucket.wire.words_mut(), gradient, eighths, &dither);
    }

    pub(super) fn send(&mut self, bucket: usize, group: &Group, lens: Option<&[usize]>) {
        self.buckets[bucket].wire.send(group, lens);
    }

    pub(super) fn nonfinite(&self) -> bool {
        self.buckets.iter().any(|bucket| bucket.accumulator.nonfinite())
    }

    pub(super) fn finish(
        &mut self,
        group: &Group,
        exponents: &Exponents,
        own: &Stretches,
        gradient: &mut [f32],
    ) -> Result<Summed, CollectiveError> {
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            let eighths = &exponents.eighths()[blocks_of(&own.ranges()[index])];
            let sums = bucket.wire.wait()?;
            decode(sums, eighths, &self.rounding, &mut gradient[own.within(index)]);
        }
        let bounds = self.buckets.iter().flat_map(|bucket| bucket.accumulator.bounds());
        let bounds = bounds.map(|&bound| u32::try_from(bound).unwrap_or(u32::MAX)).collect();
        let summed = all_reduce::<SaturatingSum>(group, bounds)?;
        let wide = wide_blocks(&summed, &self.rounding);
        let mut bounds: Vec<u64> = summed.into_iter().map(u64::from).collect();
        if !wide.is_empty() {
            self.finish_wide(group, &wide, exponents, (own, gradient), &mut bounds)?;
        }
        Ok(Summed { exponents: exponents.next(&bounds), wide_blocks: wide.len() })
    }

    /// The second exchange: 64-bit sums and bounds of the blocks whose sums may have wrapped.
    fn finish_wide(
        &self,
        group: &Group,
        wide: &[usize],
        exponents: &Exponents,
        (own, gradient): (&Stretches, &mut [f32]),
        bounds: &mut [u64],
    ) -> Result<(), CollectiveError> {
        let mut payload = WideBlocks::default();
        for &block in wide {
            let holds = |bucket: &&Bucket| bucket.blocks().contains(&block);
            let bucket = self.buckets.iter().find(holds).expect("buckets cover the space");
            let index = block - bucket.blocks().start;
            let sums = bucket.accumulator.wide_sums(index, bucket.wire.words());
            payload.push(&sums, bucket.accumulator.bounds()[index]);
        }
        let total = all_reduce::<Sum<i64>>(group, payload.into_words())?;
        for (&block, (sums, bound)) in wide.iter().zip(WideBlocks::split(&total)) {
            bounds[block] = bound;
            if let Some(at) = own.place(block * BLOCK) {
                let out = &mut gradient[at..at + BLOCK];
                decode_wide(sums, &exponents.eighths()[block..=block], &self.rounding, out);
            }
        }
        Ok(())
    }
}
