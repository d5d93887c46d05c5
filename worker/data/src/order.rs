//! The order of samples: a keyed permutation of each epoch, with O(1) seek.
//!
//! Position p of the run is place `p mod n` of epoch `p / n`. So resuming at any step is instant, and the order is a pure
//! function of seed and position, never of ranks (the idea of MosaicML streaming, without its shuffle buffers). A set
//! that is at hand as a whole is permuted as a whole; one that is streamed, a window of shards at a time.

use std::ops::Range;

use crate::permutation::Permutation;
pub use crate::windows::Cut;
use crate::windows::Windows;

/// The order of samples of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleOrder {
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Whole(Permutation),
    Windowed(Windows),
}

impl SampleOrder {
    /// An order of `samples` samples an epoch, permuted as a whole.
    ///
    /// # Panics
    /// Where there are no samples, or 2^62 and more.
    pub fn new(seed: u64, samples: u64) -> Self {
        Self { kind: Kind::Whole(Permutation::new(seed, samples)) }
    }

    /// An order that draws from `window` shards at a time, for steps of `size` samples in micro-batches of `micro`.
    ///
    /// # Panics
    /// Where the set has no more full shards than a window, or shards have no samples.
    pub fn windowed(seed: u64, cut: Cut, window: u64, size: u32, micro: u32) -> Self {
        Self { kind: Kind::Windowed(Windows::new(seed, cut, window, size, micro)) }
    }

    /// Samples of an epoch.
    pub fn samples(&self) -> u64 {
        match &self.kind {
            Kind::Whole(whole) => whole.len(),
            Kind::Windowed(windows) => windows.samples(),
        }
    }

    /// The sample at a position of the run, counted over all epochs.
    pub fn sample(&self, position: u64) -> u64 {
        match &self.kind {
            Kind::Whole(whole) => whole.at(position / whole.len(), position % whole.len()),
            Kind::Windowed(windows) => windows.sample(position),
        }
    }

    /// The shards that these micro-batches draw from at a step, and those that they draw from next; `None` where all are
    /// drawn from all the time.
    pub fn ahead(&self, step: u64, share: &[u32], micro: u32) -> Option<[Vec<u64>; 2]> {
        match &self.kind {
            Kind::Whole(_) => None,
            Kind::Windowed(windows) => Some(windows.ahead(step, share, micro)),
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
