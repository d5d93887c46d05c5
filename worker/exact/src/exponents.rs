//! Block exponents: the scale under which the next gradient is rounded.
//!
//! An exponent `e` is the base-2 logarithm of what a block's sum may reach, in eighths, so that it can fall slowly. It
//! comes from the *bound* of the last sum, the sum over micro-batches of max|q|, which all ranks know; the bound does
//! not shrink when gradients cancel, so a quiet step does not make the next one overflow. All arithmetic is on
//! integers.

use crate::BLOCK;

/// Bits of head-room: a gradient may grow fourfold before its block becomes wide.
const HEADROOM: i32 = 2;
/// Eighths in an octave.
const EIGHTHS: i32 = 8;
/// A block's exponent falls by this much a step at most.
const DECAY: i32 = 1;
/// No exponent is further than this below the highest of the model.
const SPREAD: i32 = 16 * EIGHTHS;
/// Keeps `2^shift` a finite, normal f32.
const LOWEST: i32 = -97 * EIGHTHS;
/// Above what an f32 gradient times any number of micro-batches reaches.
const HIGHEST: i32 = 152 * EIGHTHS;

/// `floor(2^63 * 2^(i/8))` for i in 0..8.
const EIGHTH_POWERS: [u64; 8] = [
    9_223_372_036_854_775_808,
    10_058_158_527_438_640_870,
    10_968_499_650_544_839_023,
    11_961_233_684_655_323_370,
    13_043_817_825_332_782_212,
    14_224_384_202_002_324_189,
    15_511_800_964_685_064_948,
    16_915_738_899_553_466_670,
];

/// An exponent per block of 256 elements, in eighths; part of the training state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exponents {
    eighths: Vec<i16>,
}

impl Exponents {
    /// Exponents as they were saved.
    pub fn from_eighths(eighths: Vec<i16>) -> Self {
        Self { eighths }
    }

    /// The first step's exponents: from the maxima of |gradient| of one micro-batch per block, times the number of
    /// micro-batches.
    pub fn from_maxima(maxima: &[f32], micro_batches: u32) -> Self {
        let wanted = maxima.iter().map(|&maximum| log2_of_multiple(maximum, micro_batches));
        Self::settle(wanted.collect())
    }

    /// The exponents after a sum, whose bounds are in units of the rounded integers.
    ///
    /// `e' = max(log2 of the bound rounded up, e - 1/8, highest e' of the model - 16)`.
    ///
    /// # Panics
    /// Where there is not one bound per block.
    #[must_use]
    pub fn next(&self, bounds: &[u64]) -> Self {
        assert_eq!(bounds.len(), self.eighths.len(), "one bound per block");
        let wanted = self.eighths.iter().zip(bounds).map(|(&e, &bound)| {
            let measured = ceil_log2_eighths(bound).map(|log2| log2 - EIGHTHS * shift(e));
            Some(measured.map_or(i32::from(e) - DECAY, |measured| measured.max(i32::from(e) - DECAY)))
        });
        Self::settle(wanted.collect())
    }

    /// Lifts everything to the floor under the highest; blocks without a value take the floor.
    fn settle(wanted: Vec<Option<i32>>) -> Self {
        let highest = wanted.iter().flatten().copied().max().unwrap_or(LOWEST);
        let floor = highest - SPREAD;
        let settle =
            |wanted: Option<i32>| wanted.map_or(floor, |wanted| wanted.max(floor)).clamp(LOWEST, HIGHEST);
        Self { eighths: wanted.into_iter().map(|wanted| settle(wanted) as i16).collect() }
    }

    /// In eighths, one per block.
    pub fn eighths(&self) -> &[i16] {
        &self.eighths
    }

    /// Blocks.
    pub fn len(&self) -> usize {
        self.eighths.len()
    }

    /// Whether nothing was measured yet.
    pub fn is_empty(&self) -> bool {
        self.eighths.is_empty()
    }
}

/// `q = round(g * 2^shift)`.
pub(crate) fn shift(eighths: i16) -> i32 {
    31 - HEADROOM - (i32::from(eighths) + EIGHTHS - 1).div_euclid(EIGHTHS)
}

/// `2^power` as f32, for a power in the normal range.
pub(crate) fn power_of_two(power: i32) -> f32 {
    debug_assert!((-126..=127).contains(&power));
    f32::from_bits(((power + 127) as u32) << 23)
}

/// `2^power` as f64, for a power in the normal range.
pub(crate) fn power_of_two_f64(power: i32) -> f64 {
    debug_assert!((-1022..=1023).contains(&power));
    f64::from_bits(((power + 1023) as u64) << 52)
}

/// `ceil(8 log2 n)`; `None` for zero.
fn ceil_log2_eighths(n: u64) -> Option<i32> {
    let zeros = n.checked_ilog2()?;
    let normal = n << (63 - zeros);
    let eighth = EIGHTH_POWERS.iter().position(|&power| normal <= power).unwrap_or(EIGHTH_POWERS.len());
    Some(zeros as i32 * EIGHTHS + eighth as i32)
}

/// `ceil(8 log2(value * multiple))`; `None` for zero. What is not finite counts as the largest finite number.
fn log2_of_multiple(value: f32, multiple: u32) -> Option<i32> {
    let value = if value.is_finite() { value } else { f32::MAX };
    let bits = value.to_bits() & 0x7fff_ffff;
    let (mantissa, power) = match bits >> 23 {
        0 => (bits, -149),
        exponent => ((bits & 0x7f_ffff) | 0x80_0000, exponent as i32 - 150),
    };
    ceil_log2_eighths(u64::from(mantissa) * u64::from(multiple)).map(|log2| log2 + EIGHTHS * power)
}

/// The largest |gradient| of each block; infinities and NaN count as the largest finite number.
pub fn block_maxima(gradient: &[f32]) -> Vec<f32> {
    let maximum = |block: &[f32]| {
        let bits = block.iter().map(|value| value.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        f32::from_bits(bits.min(f32::MAX.to_bits()))
    };
    gradient.chunks(BLOCK).map(maximum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_rounded_up_to_eighths() {
        assert_eq!(ceil_log2_eighths(0), None);
        assert_eq!(ceil_log2_eighths(1), Some(0));
        assert_eq!(ceil_log2_eighths(2), Some(8));
        assert_eq!(ceil_log2_eighths(3), Some(13), "8 log2 3 = 12.68");
        assert_eq!(ceil_log2_eighths(1 << 40), Some(320));
        assert_eq!(ceil_log2_eighths((1 << 40) + 1), Some(321));
        assert_eq!(ceil_log2_eighths(u64::MAX), Some(512));
        assert_eq!(log2_of_multiple(1.0, 3), Some(13));
        assert_eq!(log2_of_multiple(0.25, 1), Some(-16));
        assert_eq!(log2_of_multiple(f32::from_bits(1), 1), Some(-149 * 8));
        assert_eq!(log2_of_multiple(0.0, 8), None);
    }

    #[test]
    fn logarithms_agree_with_floating_point() {
        for n in (1u64..5000).chain((0..36).map(|bit| (1 << bit) + 12345)) {
            let expected = (8.0 * libm::log2(n as f64) - 1e-9).ceil() as i32;
            assert_eq!(ceil_log2_eighths(n), Some(expected), "{n}");
        }
    }

    #[test]
    fn exponents_rise_at_once_and_fall_by_an_eighth() {
        let start = Exponents::from_maxima(&[1.0, 1.0, 1.0], 8);
        assert_eq!(start.eighths(), [24, 24, 24]);
        // Bounds of 2^29 are what the exponents stood for: twice that is an octave more, nothing is an eighth less, and
        // so is little.
        let next = start.next(&[1 << (31 - HEADROOM + 1), 0, 1 << 20]);
        assert_eq!(next.eighths(), [32, 23, 23]);
    }

    #[test]
    fn no_block_is_further_below_the_highest_than_sixteen_octaves() {
        let start = Exponents::from_maxima(&[1.0, 1e-30, 0.0], 1);
        assert_eq!(start.eighths(), [0, -SPREAD as i16, -SPREAD as i16]);
    }

    #[test]
    fn scales_are_finite_for_any_exponent() {
        for maximum in [f32::from_bits(1), f32::MAX] {
            let exponents = Exponents::from_maxima(&[maximum], u32::MAX);
            let scale = power_of_two(shift(exponents.eighths()[0]));
            assert!(scale.is_normal(), "{maximum}");
        }
    }
}
