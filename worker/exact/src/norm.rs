//! The squared norm, by a fixed tree: the same bits whoever owns which block, and for any vector width.

use crate::simd::widest;

/// Elements of a block of the sum; part of what defines a result.
const NORM_BLOCK: usize = 65_536;
/// Lanes of a block; part of what defines a result.
const LANES: usize = 16;

/// Sum of squares in f64: 16 lanes within blocks of 65,536 elements, then lanes, then blocks, all in order.
pub fn squared_norm(values: &[f32]) -> f64 {
    values.chunks(NORM_BLOCK).map(block).fold(0.0, |sum, block| sum + block)
}

widest! {
    fn block(values: &[f32]) -> f64 = block_loop
}

#[inline(always)]
fn block_loop(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(*value) * f64::from(*value);
    }
    lanes.iter().fold(0.0, |sum, lane| sum + lane)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_sum_of_squares_whatever_the_length() {
        for length in [0, 1, 15, 17, 65_536, 65_536 * 2 + 19] {
            let values: Vec<f32> = (0..length).map(|index| (index % 7) as f32 - 3.0).collect();
            let exact: i64 = (0..length).map(|index| (index as i64 % 7 - 3).pow(2)).sum();
            assert_eq!(squared_norm(&values), exact as f64);
            assert_eq!(
                values.chunks(NORM_BLOCK).map(block_loop).sum::<f64>(),
                exact as f64,
                "the baseline form"
            );
        }
    }
}
