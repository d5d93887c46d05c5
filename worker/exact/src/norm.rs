//! The squared norm, by a fixed tree: the same bits whoever owns which chunk, and for any vector width.

use crate::simd::widest;

/// Elements of a chunk: what shards are made of, and what a norm is added up by; part of what defines a result.
pub const CHUNK: usize = 4096;
/// Lanes of a chunk; part of what defines a result.
const LANES: usize = 16;

/// The sums of squares of a stretch's chunks, in f64, in their order: of each, 16 lanes in order, then the lanes.
///
/// A stretch begins at a chunk; its last chunk may be shorter.
pub fn chunk_squares(values: &[f32]) -> impl Iterator<Item = f64> + '_ {
    values.chunks(CHUNK).map(chunk)
}

/// The norm of all chunks: their squares are added in their order.
pub fn norm(squares: impl IntoIterator<Item = f64>) -> f64 {
    libm::sqrt(squares.into_iter().fold(0.0, |sum, squares| sum + squares))
}

widest! {
    fn chunk(values: &[f32]) -> f64 = chunk_loop
}

#[inline(always)]
fn chunk_loop(values: &[f32]) -> f64 {
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
    fn it_is_the_root_of_the_sum_of_squares_whatever_the_length() {
        for length in [0, 1, 15, 17, CHUNK, CHUNK * 2 + 19] {
            let values: Vec<f32> = (0..length).map(|index| (index % 7) as f32 - 3.0).collect();
            let exact: i64 = (0..length).map(|index| (index as i64 % 7 - 3).pow(2)).sum();
            assert_eq!(norm(chunk_squares(&values)), libm::sqrt(exact as f64));
            let baseline: f64 = values.chunks(CHUNK).map(chunk_loop).sum();
            assert_eq!(baseline, exact as f64, "the baseline form");
        }
    }

    #[test]
    fn who_owns_which_chunk_does_not_count() {
        let values: Vec<f32> = (0..CHUNK * 3 + 5).map(|index| (index as f32 * 0.37).sin()).collect();
        let whole = norm(chunk_squares(&values));
        for cut in [0, CHUNK, 2 * CHUNK, 3 * CHUNK] {
            let (low, high) = values.split_at(cut);
            assert_eq!(norm(chunk_squares(low).chain(chunk_squares(high))), whole);
        }
    }
}
