//! Exact sums in 64 bits throughout: the simple form, and the reference for [`super::exact`].

use std::ops::Range;

use mattock_collectives::{CollectiveError, Group, Sum};
use mattock_exact::{BLOCK, Dither, Exponents, Rounding, WideAccumulator, decode_wide};

use super::flight::{Flight, all_reduce};
use super::{Summed, blocks_of};
use crate::params::Space;
use crate::partition::Stretches;

/// One accumulator per bucket.
pub(crate) struct ExactSum64 {
    rounding: Rounding,
    buckets: Vec<Bucket>,
}

struct Bucket {
    /// In the flat space.
    range: Range<usize>,
    accumulator: WideAccumulator,
    flight: Flight<Sum<i64>>,
}

impl Bucket {
    fn blocks(&self) -> Range<usize> {
        blocks_of(&self.range)
    }
}

impl ExactSum64 {
    pub(super) fn new(space: &Space, rounding: Rounding) -> Self {
        let bucket = |range: &Range<usize>| Bucket {
            range: range.clone(),
            accumulator: WideAccumulator::new(range.len() / BLOCK, rounding),
            flight: Flight::new(range.len()),
        };
        Self { rounding, buckets: space.buckets().iter().map(bucket).collect() }
    }

    pub(super) fn begin(&mut self) {
        for bucket in &mut self.buckets {
            bucket.accumulator.reset();
            bucket.flight.input_mut().fill(0);
        }
    }

    pub(super) fn add(&mut self, bucket: usize, gradient: &[f32], exponents: &Exponents, key: u64) {
        let bucket = &mut self.buckets[bucket];
        let eighths = &exponents.eighths()[bucket.blocks()];
        let dither = Dither::new(key, bucket.blocks().start);
        bucket.accumulator.add(bucket.flight.input_mut(), gradient, eighths, &dither);
    }

    pub(super) fn send(&mut self, bucket: usize, group: &Group, lens: Option<&[usize]>) {
        self.buckets[bucket].flight.send(group, lens);
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
            let sums = bucket.flight.wait()?;
            decode_wide(sums, eighths, &self.rounding, &mut gradient[own.within(index)]);
        }
        let own = self.buckets.iter().flat_map(|bucket| bucket.accumulator.bounds());
        let bounds = all_reduce::<Sum<i64>>(group, own.map(|&bound| bound as i64).collect())?;
        let bounds: Vec<u64> = bounds.into_iter().map(|bound| bound as u64).collect();
        let wide_from = u64::from(self.rounding.wide_from());
        let wide_blocks = bounds.iter().filter(|&&bound| bound >= wide_from).count();
        Ok(Summed { exponents: exponents.next(&bounds), wide_blocks })
    }
}
