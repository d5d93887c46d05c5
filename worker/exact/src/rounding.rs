//! What all ranks of a run agree on before they round anything: how many bits a sum has.
//!
//! A gradient is always rounded to the integers of 32 bits first, and bounds are counted in those: exponents follow the
//! same rule whatever the bits. Where a sum has fewer, the low bits of each micro-batch's integers are then rounded away,
//! up or down at random ([`Dither`](crate::Dither)), so that their expectation stays what it was:
//!
//! ```text
//! gradient ─ nearest ─> q: 32 bits and more ─ up or down ─> q' = q / 2^(31 - bits), what is summed
//!                       └─ max|q| ─> bounds, next exponents
//! ```
//!
//! One of the two bits of head-room goes too. Sums that double within a step are rare (below 0.3% of the blocks of a small GPT,
//! most of them in the first steps), so what they cost as wide blocks is less than the bit is worth to all others.
//!
//! # Invariants
//! 1. `|q'| <= (|q| >> dropped) + 1` where anything is dropped, so the bounds of `q` bound the sum of `q'`: [`Rounding::wide_from`].
//! 2. With 32 bits nothing is random.

use crate::exponents::shift;

/// The bits of a sum that crosses the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bits {
    /// Coarse: for links so slow that nothing else matters.
    B8,
    /// Two sums in three bytes.
    B12,
    /// Half of what f32 takes.
    B16,
    /// Three bytes.
    B24,
    /// As precise as f32; the only one without randomness.
    B32,
}

impl Bits {
    /// All there are, the fewest first.
    pub const ALL: [Self; 5] = [Self::B8, Self::B12, Self::B16, Self::B24, Self::B32];

    /// How many.
    pub fn count(self) -> u32 {
        match self {
            Self::B8 => 8,
            Self::B12 => 12,
            Self::B16 => 16,
            Self::B24 => 24,
            Self::B32 => 32,
        }
    }

    /// The most micro-batches whose sum fits as a rule: each takes a step of the sum's range, for being rounded up.
    pub fn micro_batches_max(self) -> u32 {
        1 << (self.count() - 3)
    }
}

/// What all accumulators of a run agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounding {
    bits: Bits,
    micro_batches: u32,
    saturation: i64,
}

impl Rounding {
    /// For sums over this many micro-batches: none can overflow 63 bits.
    pub fn new(micro_batches: u32, bits: Bits) -> Self {
        let room = micro_batches.max(1).next_power_of_two().ilog2();
        Self { bits, micro_batches, saturation: 1 << (62 - room) }
    }

    /// The bits of a sum.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// Micro-batches of a step.
    pub fn micro_batches(&self) -> u32 {
        self.micro_batches
    }

    /// A block whose summed bound reaches this is wide: its sum may not fit the bits.
    pub fn wide_from(&self) -> u32 {
        let dropped = self.dropped();
        let limit = 1u32 << (self.bits.count() - 1);
        if dropped == 0 {
            return limit;
        }
        // Each micro-batch may have been rounded up by one.
        limit.saturating_sub(self.micro_batches) << dropped
    }

    /// The largest |q| of a micro-batch; in units of 32 bits.
    pub(crate) fn saturation(&self) -> i64 {
        self.saturation
    }

    /// How many low bits of a micro-batch's integers are rounded away.
    pub(crate) fn dropped(&self) -> u32 {
        match self.bits {
            Bits::B32 => 0,
            bits => 31 - bits.count(),
        }
    }

    /// A sum is worth `sum / 2^shift`.
    pub(crate) fn shift_of_sums(&self, eighths: i16) -> i32 {
        shift(eighths) - self.dropped() as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_fewer_bits_a_block_is_wide_earlier() {
        let wide_from = |bits| Rounding::new(8, bits).wide_from();
        assert_eq!(wide_from(Bits::B32), 1 << 31);
        assert_eq!(wide_from(Bits::B16), ((1 << 15) - 8) << 15);
        assert_eq!(wide_from(Bits::B8), 120 << 23);
        assert_eq!(Rounding::new(1000, Bits::B8).wide_from(), 0, "all blocks are");
    }

    #[test]
    fn as_many_micro_batches_as_are_allowed_leave_a_steady_block_narrow() {
        for bits in Bits::ALL {
            // What a block's bound reaches in the step that its exponent was measured for.
            let steady = 1 << 29;
            assert!(Rounding::new(bits.micro_batches_max(), bits).wide_from() > steady, "{bits:?}");
        }
    }
}
