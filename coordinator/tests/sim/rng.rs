//! Where all chance comes from: SplitMix64 (Steele et al., 2014), so that a seed means the same everywhere.

use std::ops::RangeInclusive;
use std::time::Duration;

/// A sequence of random numbers.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give neighbouring sequences.
        let mut rng = Self(seed.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        rng
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Within the range, both ends included.
    pub(crate) fn number(&mut self, range: &RangeInclusive<u64>) -> u64 {
        let span = range.end() - range.start();
        range.start() + self.next() % (span + 1)
    }

    /// Within the range, to the microsecond.
    pub(crate) fn duration(&mut self, range: &RangeInclusive<Duration>) -> Duration {
        let micros = |duration: &Duration| duration.as_micros() as u64;
        Duration::from_micros(self.number(&(micros(range.start())..=micros(range.end()))))
    }

    /// True in `percent` of a hundred cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.number(&(0..=99)) < percent
    }

    /// One of these; none where there are none.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let last = from.len().checked_sub(1)? as u64;
        from.get(self.number(&(0..=last)) as usize).copied()
    }
}
