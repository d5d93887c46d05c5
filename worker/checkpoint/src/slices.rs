//! Some elements of a flat array: the ranges that a writer holds, and their values one after the other.

use std::ops::Range;
use std::sync::Arc;

/// Ranges of a flat array in ascending order, and the values of just these elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Slices {
    ranges: Vec<Range<usize>>,
    /// Before each range, the number of values.
    starts: Vec<usize>,
    values: Arc<Vec<f32>>,
}

/// Ranges that are not in order, overlap, or do not fit the values: a bug of the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{values} values do not fit ranges of {elements} elements, or the ranges overlap")]
pub struct SlicesError {
    /// Values given.
    pub values: usize,
    /// Elements of the ranges.
    pub elements: usize,
}

impl Slices {
    /// Joins ranges (ascending, without overlap) with the values of their elements.
    pub fn new(ranges: &[Range<usize>], values: Arc<Vec<f32>>) -> Result<Slices, SlicesError> {
        let apart = ranges.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let elements = ranges.iter().fold(0_usize, |sum, range| sum.saturating_add(range.len()));
        if !apart || elements != values.len() {
            return Err(SlicesError { values: values.len(), elements });
        }
        let ranges = normal(ranges.to_vec());
        let starts = ranges.iter().scan(0, |sum, range| {
            let start = *sum;
            *sum += range.len();
            Some(start)
        });
        Ok(Slices { starts: starts.collect(), ranges, values })
    }

    /// A whole flat array.
    pub fn whole(values: Arc<Vec<f32>>) -> Slices {
        Slices { ranges: normal(vec![0..values.len()]), starts: vec![0], values }
    }

    /// Copies ranges (ascending, without overlap) out of a flat array.
    ///
    /// # Panics
    /// Where a range reaches beyond the array.
    pub fn cut(flat: &[f32], ranges: &[Range<usize>]) -> Slices {
        let ranges = normal(ranges.to_vec());
        let mut values = Vec::with_capacity(ranges.iter().map(Range::len).sum());
        ranges.iter().for_each(|range| values.extend_from_slice(&flat[range.clone()]));
        Slices::new(&ranges, Arc::new(values)).expect("values were taken from these ranges")
    }

    /// The ranges, in order; none empty, none touching the next.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    pub(crate) fn values(&self) -> &Arc<Vec<f32>> {
        &self.values
    }

    /// Whether all these elements are held.
    pub(crate) fn has(&self, elements: &Range<usize>) -> bool {
        elements.is_empty() || self.place(elements).is_some()
    }

    /// Where the values of these elements are, if all of them are held.
    pub(crate) fn place(&self, elements: &Range<usize>) -> Option<Range<usize>> {
        let at = self.ranges.partition_point(|range| range.end < elements.end);
        let range = self.ranges.get(at).filter(|range| range.start <= elements.start)?;
        let start = self.starts[at] + (elements.start - range.start);
        Some(start..start + elements.len())
    }
}

/// In order, without empty ranges, and those that touch or overlap joined.
pub(crate) fn normal(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What two ranges have in common, if anything.
pub(crate) fn common(a: &Range<usize>, b: &Range<usize>) -> Option<Range<usize>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (!both.is_empty()).then_some(both)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_found_where_they_were_put() {
        let flat: Vec<f32> = (0..20).map(|n| n as f32).collect();
        let slices = Slices::cut(&flat, &[2..4, 4..6, 10..13]);
        assert_eq!(slices.ranges(), [2..6, 10..13]);
        assert_eq!(**slices.values(), [2.0, 3.0, 4.0, 5.0, 10.0, 11.0, 12.0]);
        assert_eq!(slices.place(&(3..6)), Some(1..4));
        assert_eq!(slices.place(&(10..13)), Some(4..7));
        for absent in [0..1, 5..7, 5..11, 12..14, 19..20] {
            assert_eq!(slices.place(&absent), None, "{absent:?}");
        }
    }

    #[test]
    fn ranges_that_overlap_or_do_not_fit_are_refused() {
        let values = || Arc::new(vec![0.0; 4]);
        assert!(Slices::new(&[0..2, 1..3], values()).is_err());
        assert!(Slices::new(&[4..6, 0..2], values()).is_err());
        assert!(Slices::new(&[0..2, 4..5], values()).is_err());
        assert!(Slices::new(&[0..2, 4..6], values()).is_ok());
    }
}
