//! Randomness as a pure function: keyed by (seed, step, micro-batch, place), never by rank or time.
//!
//! The generator is SplitMix64 (Steele, Lea and Flood, 2014): a counter and a mixer, so any stream starts at once and
//! has the same bits on every machine. It is statistical randomness, not secrecy.

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's mixer: a bijection of 64 bits.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Which micro-batch something random is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MicroBatchKey {
    /// The run's.
    pub seed: u64,
    /// From 0.
    pub step: u64,
    /// From 0 to M - 1.
    pub micro_batch: u32,
}

impl MicroBatchKey {
    /// A stream of its own for each place in the model that needs one.
    pub fn stream(&self, place: u64) -> Stream {
        let words = [self.step, u64::from(self.micro_batch), place];
        Stream::new(words.into_iter().fold(self.seed, |key, word| mix(key.wrapping_add(STEP) ^ mix(word))))
    }
}

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Stream {
    state: u64,
}

impl Stream {
    /// Equal seeds give equal streams.
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// Normal deviates with mean 0 and variance 1 (Box and Muller, 1958).
#[derive(Debug, Clone)]
pub struct Normal {
    stream: Stream,
    spare: Option<f64>,
}

impl Normal {
    /// Equal seeds give equal deviates.
    pub fn new(seed: u64) -> Self {
        Self { stream: Stream::new(seed), spare: None }
    }

    /// The next deviate; `libm`, so that it has the same bits on every machine.
    pub fn draw(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.stream.uniform()));
        let (sine, cosine) = libm::sincos(2.0 * std::f64::consts::PI * self.stream.uniform());
        self.spare = Some(radius * sine);
        radius * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_pinned() {
        let mut stream = MicroBatchKey { seed: 1, step: 2, micro_batch: 3 }.stream(4);
        assert_eq!(
            format!("{:016x} {:016x}", stream.bits(), stream.bits()),
            "5a55afda95c48b20 2975653bf0fb4619"
        );
        assert_eq!(format!("{:016x}", Normal::new(1).draw().to_bits()), "bff285527d57a9a2");
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let first =
            |seed, step, micro_batch, place| MicroBatchKey { seed, step, micro_batch }.stream(place).bits();
        let all =
            [first(0, 0, 0, 0), first(1, 0, 0, 0), first(0, 1, 0, 0), first(0, 0, 1, 0), first(0, 0, 0, 1)];
        let distinct: std::collections::BTreeSet<u64> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn deviates_have_mean_zero_and_variance_one() {
        let mut normal = Normal::new(7);
        let draws: Vec<f64> = (0..100_000).map(|_| normal.draw()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }
}
