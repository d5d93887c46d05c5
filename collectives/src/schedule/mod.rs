//! Who sends which chunk to whom, in which order: pure arithmetic, no bytes.
//!
//! A payload is cut into one *segment* per rank ([`segment`]) and a segment into *chunks*. Each algorithm says, for
//! one rank, what it sends unasked, what will arrive, and what to do with it. Today there is one: [`ring`].

pub(crate) mod ring;

use std::ops::Range;

/// The elements of segment `index` when `len` elements are divided among `parts`: lengths differ by one at most, the
/// longer ones first.
///
/// # Panics
/// If `index` is not below `parts`.
pub fn segment(len: usize, parts: u32, index: u32) -> Range<usize> {
    assert!(index < parts, "segment {index} of {parts}");
    let (parts, index) = (parts as usize, index as usize);
    let (base, longer) = (len / parts, len % parts);
    let start = index * base + index.min(longer);
    start..start + base + usize::from(index < longer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_tile_the_payload_and_are_balanced(len in 0usize..5000, parts in 1u32..20) {
            let segments: Vec<_> = (0..parts).map(|i| segment(len, parts, i)).collect();
            prop_assert_eq!(segments[0].start, 0);
            prop_assert_eq!(segments[parts as usize - 1].end, len);
            for pair in segments.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
                prop_assert!(pair[0].len() - pair[1].len() <= 1);
            }
        }
    }
}
