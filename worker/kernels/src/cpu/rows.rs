//! Work on the rows of a matrix, over threads, in stretches of fixed size.
//!
//! What is added up over rows is added within a stretch first and then stretch by stretch in order, so that the
//! number of threads leaves no trace in the bits.

use rayon::prelude::*;

/// Rows of one stretch.
pub(super) const STRETCH: usize = 64;

/// Adds up what each stretch contributed, in order: `partials [stretches, width]`.
pub(super) fn total(partials: &[f32], width: usize) -> Vec<f32> {
    let mut total = vec![0.0f32; width];
    for partial in partials.chunks_exact(width) {
        total.iter_mut().zip(partial).for_each(|(total, part)| *total += part);
    }
    total
}

/// Runs `work(stretch index, its part of out)` for each stretch of `out [rows, width]`.
pub(super) fn each(out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Send + Sync) {
    let stretches = out.par_chunks_mut(STRETCH * width).enumerate();
    stretches.for_each(|(index, part)| work(index, part));
}

/// As [`each`], with a part of a second output of `other` elements a stretch.
pub(super) fn each_with(
    out: &mut [f32],
    width: usize,
    second: &mut [f32],
    other: usize,
    work: impl Fn(usize, &mut [f32], &mut [f32]) + Send + Sync,
) {
    let stretches = out.par_chunks_mut(STRETCH * width).zip(second.par_chunks_mut(other)).enumerate();
    stretches.for_each(|(index, (part, more))| work(index, part, more));
}

/// The rows of stretch `index` of a matrix `[rows, width]`.
pub(super) fn stretch(matrix: &[f32], width: usize, index: usize) -> &[f32] {
    let start = index * STRETCH * width;
    &matrix[start..matrix.len().min(start + STRETCH * width)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_the_matrix_once() {
        let rows = 2 * STRETCH + 3;
        let matrix: Vec<f32> = (0..rows * 5).map(|index| index as f32).collect();
        let mut out = vec![0.0; matrix.len()];
        each(&mut out, 5, |index, part| part.copy_from_slice(stretch(&matrix, 5, index)));
        assert_eq!(out, matrix);
        assert_eq!(total(&[1.0, 2.0, 10.0, 20.0], 2), [11.0, 22.0]);
    }
}
