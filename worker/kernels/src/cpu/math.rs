//! Element functions and sums over rows, in a form that compilers turn into vector code.
//!
//! No multiplication is fused with an addition and sums run in fixed lanes, so that the bits do not depend on how
//! wide the processor's vectors are.

/// Sums run in this many lanes, whatever the vector width.
const LANES: usize = 16;

/// The exponential, within 2 units in the last place (the polynomial is that of Cephes' `expf`).
///
/// Clamped to the finite normal range; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.0;
    const HIGH: f32 = 88.0;
    /// Adding this rounds to an integer, which then lies in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons, not `max` and `min`, which would lose a NaN.
    let x = if x < LOW { LOW } else { x };
    let x = if x > HIGH { HIGH } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    (p * r * r + r + 1.0) * power
}

/// The logistic function.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Adds `term(i)` for i in `0..length`, in fixed lanes.
#[inline(always)]
pub(super) fn sum(length: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = length - length % LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(start + lane);
        }
    }
    for (index, total) in (whole..length).zip(&mut lanes) {
        *total += term(index);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

/// The largest element; NaN where there is one.
#[inline(always)]
pub(super) fn largest(row: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane = greater(*lane, x));
    }
    lanes.iter_mut().zip(chunks.remainder()).for_each(|(lane, &x)| *lane = greater(*lane, x));
    lanes.into_iter().reduce(greater).unwrap_or(f32::NEG_INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_right_over_its_range() {
        let mut worst = 0.0f64;
        for step in -8700..8800 {
            let x = step as f32 * 0.01;
            let right = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / right - 1.0).abs());
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
        assert!(exp(f32::NAN).is_nan() && exp(0.0) == 1.0);
        assert!(exp(-1e9) < 1e-37 && exp(1e9) > 1e38);
    }

    #[test]
    fn sums_and_maxima_take_every_element_once() {
        for length in [0, 1, 15, 16, 17, 100] {
            let row: Vec<f32> = (0..length).map(|index| index as f32 - 7.0).collect();
            assert_eq!(sum(length, |index| row[index]), row.iter().sum::<f32>());
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest(&row), most, "{length}");
        }
        assert!(largest(&[1.0, f32::NAN, 2.0]).is_nan());
    }
}
