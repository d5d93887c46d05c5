//! The order of samples: a keyed permutation of each epoch, with O(1) seek.
//!
//! Position p of the run is place `p mod n` of epoch `p / n`. Within an epoch, places are permuted by a Feistel network
//! over the next even number of bits, walking cycles until the result lies below n (Black and Rogaway, 2002). So
//! resuming at any step is instant, and the order is a pure function of seed and position, never of ranks (the idea
//! of MosaicML streaming, without its shuffle buffers).

use std::ops::Range;

use crate::keys::mix;

/// Rounds of the Feistel network: four make a pseudo-random permutation of a pseudo-random function.
const ROUNDS: u64 = 4;

/// The order of samples of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleOrder {
    seed: u64,
    samples: u64,
    half_bits: u32,
}

impl SampleOrder {
    /// An order of `samples` samples an epoch.
    ///
    /// # Panics
    /// Where there are no samples, or 2^62 and more.
    pub fn new(seed: u64, samples: u64) -> Self {
        assert!(samples > 0 && samples < 1 << 62, "an order needs samples");
        let bits = u64::BITS - (samples - 1).leading_zeros();
        Self { seed, samples, half_bits: bits.div_ceil(2).max(1) }
    }

    /// The sample at a position of the run, counted over all epochs.
    pub fn sample(&self, position: u64) -> u64 {
        let (epoch, mut place) = (position / self.samples, position % self.samples);
        loop {
            place = self.permute(epoch, place);
            if place < self.samples {
                return place;
            }
        }
    }

    /// The samples of one micro-batch: `micro` of the `size` samples of a step.
    pub fn micro_batch(
        &self,
        step: u64,
        index: u32,
        micro: u32,
        size: u32,
    ) -> impl Iterator<Item = u64> + use<> {
        let first = step * u64::from(size) + u64::from(index) * u64::from(micro);
        let positions: Range<u64> = first..first + u64::from(micro);
        let order = *self;
        positions.map(move |position| order.sample(position))
    }

    /// A permutation of the numbers of twice `half_bits` bits.
    fn permute(&self, epoch: u64, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let key = mix(self.seed ^ mix(epoch.wrapping_mul(ROUNDS).wrapping_add(round)));
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_epoch_is_a_permutation() {
        for samples in (1..70).chain([255, 256, 257, 1000, 4097]) {
            let order = SampleOrder::new(42, samples);
            for epoch in 0..3 {
                let seen: BTreeSet<u64> =
                    (0..samples).map(|place| order.sample(epoch * samples + place)).collect();
                assert_eq!(seen, (0..samples).collect(), "{samples} samples, epoch {epoch}");
            }
        }
    }

    #[test]
    fn epochs_and_seeds_have_orders_of_their_own() {
        let epoch = |seed, epoch: u64| -> Vec<u64> {
            let order = SampleOrder::new(seed, 100);
            (0..100).map(|place| order.sample(epoch * 100 + place)).collect()
        };
        assert_ne!(epoch(1, 0), epoch(1, 1));
        assert_ne!(epoch(1, 0), epoch(2, 0));
    }

    #[test]
    fn micro_batches_partition_a_step() {
        let order = SampleOrder::new(9, 1000);
        let parts: Vec<u64> = (0..4).flat_map(|index| order.micro_batch(7, index, 3, 12)).collect();
        let whole: Vec<u64> = (7 * 12..8 * 12).map(|position| order.sample(position)).collect();
        assert_eq!(parts, whole);
    }

    #[test]
    fn the_order_is_pinned() {
        let first: Vec<u64> =
            (0..8).map(|position| SampleOrder::new(42, 1_000_003).sample(position)).collect();
        assert_eq!(format!("{first:?}"), "[207898, 43638, 164726, 814773, 484948, 211115, 945164, 788448]");
    }
}
