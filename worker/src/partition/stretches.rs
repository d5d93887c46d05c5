//! Ranges of the flat space, one for each bucket, and where each lies in an array that holds just those.

use std::ops::Range;

/// What a rank holds, bucket by bucket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Stretches {
    ranges: Vec<Range<usize>>,
    /// Where each begins in the array.
    starts: Vec<usize>,
    len: usize,
}

impl Stretches {
    /// Of these ranges, one for each bucket, in order; some may be empty.
    pub(crate) fn new(ranges: Vec<Range<usize>>) -> Self {
        let mut len = 0;
        let start = |range: &Range<usize>| {
            let start = len;
            len += range.len();
            start
        };
        Self { starts: ranges.iter().map(start).collect(), ranges, len }
    }

    /// Elements of the array.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The ranges of the flat space, one for each bucket.
    pub(crate) fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Where a bucket's range lies in the array.
    pub(crate) fn within(&self, bucket: usize) -> Range<usize> {
        let start = self.starts[bucket];
        start..start + self.ranges[bucket].len()
    }

    /// What is held of a range of the flat space: the part of it, and where that begins in the array.
    pub(crate) fn overlaps(&self, range: Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> + '_ {
        let first = self.ranges.partition_point(|held| held.end <= range.start);
        let candidates = self.ranges.iter().zip(&self.starts).skip(first);
        candidates.take_while(move |(held, _)| held.start < range.end || held.is_empty()).filter_map(
            move |(held, at)| {
                let part = held.start.max(range.start)..held.end.min(range.end);
                (part.start < part.end).then(|| (part.clone(), at + part.start - held.start))
            },
        )
    }

    /// Where an element lies in the array, if it is held.
    pub(crate) fn place(&self, element: usize) -> Option<usize> {
        self.overlaps(element..element + 1).next().map(|(_, at)| at)
    }

    /// Copies what both hold.
    pub(crate) fn copy_from(&self, array: &mut [f32], other: &Self, from: &[f32]) {
        for range in other.ranges.iter().filter(|range| !range.is_empty()) {
            for (part, to) in self.overlaps(range.clone()) {
                if let Some(at) = other.place(part.start) {
                    array[to..to + part.len()].copy_from_slice(&from[at..at + part.len()]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_found_where_they_lie() {
        let held = Stretches::new(vec![10..20, 40..40, 50..53, 60..61]);
        assert_eq!((held.len(), held.within(2)), (14, 10..13));
        let flat: Vec<usize> = (10..20).chain(50..53).chain(60..61).collect();
        for element in 0..70 {
            assert_eq!(held.place(element), flat.iter().position(|&at| at == element), "element {element}");
        }
        let overlaps: Vec<_> = held.overlaps(15..52).collect();
        assert_eq!(overlaps, [(15..20, 5), (50..52, 10)]);
        assert_eq!(held.overlaps(20..50).count(), 0);
        assert_eq!(held.overlaps(41..60).collect::<Vec<_>>(), [(50..53, 10)]);
    }

    #[test]
    fn what_both_hold_is_copied() {
        let (from, to) = (Stretches::new(vec![0..10, 20..30]), Stretches::new(vec![5..12, 18..25]));
        let values: Vec<f32> = (0..10).chain(20..30).map(|at| at as f32).collect();
        let mut array = vec![-1.0; 14];
        to.copy_from(&mut array, &from, &values);
        let expected = [5, 6, 7, 8, 9, -1, -1, -1, -1, 20, 21, 22, 23, 24].map(|at| at as f32);
        assert_eq!(array, expected);
    }
}
