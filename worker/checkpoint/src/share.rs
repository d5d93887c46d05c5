//! Shares: a checkpoint divided among writers that do not speak with each other.
//!
//! Each of n writers holds some elements of the state and writes these, and nothing else, as pieces of its own; then a small
//! record of them. Whoever finds the records of all shares writes the manifest. All of it hangs on one question: which
//! records belong together? Those of one [`key`]: a hash of what is saved, by how many, and in which attempt. So
//! shares of two attempts never mix, and two writers of one share (one that was given up and its successor) write the same
//! bytes under the same names.
//!
//! # Weights are divided between tensors
//! Weights must open in any tool, so each share's file is a safetensors file of whole tensors, and an index joins them. The
//! other ways were: parts of one multipart upload, which folders do not have, and for which S3 wants 5 MiB in a row where a
//! shard has a few blocks; or ranges of one file, which S3 does not have. Where parameters are sharded, they are
//! gathered for it block by block, and a tensor's writer keeps it. Moments are of no use to other tools, and are divided anywhere.
//!
//! Deliberately absent: ranks, and the question who holds what. A share is a number; divisions are proposals.

use std::ops::Range;

use crate::layout::Layout;
use crate::slices::normal;

/// One writer's part of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which, from 0.
    pub index: u32,
    /// Of how many.
    pub of: u32,
    /// Tells attempts of one step apart: a ring's generation, say. The same for all shares of one.
    pub attempt: u64,
}

impl Share {
    /// All of it: one writer alone.
    pub const WHOLE: Share = Share { index: 0, of: 1, attempt: 0 };

    /// Whether nobody else writes.
    pub fn is_whole(self) -> bool {
        self.of == 1
    }

    /// This share of so many elements, divided evenly at multiples of `block`.
    pub fn of_elements(self, elements: usize, block: usize) -> Range<usize> {
        let (blocks, block) = (elements.div_ceil(block.max(1)) as u128, block.max(1));
        let cut = |n: u32| {
            let at = blocks * u128::from(n) / u128::from(self.of.max(1));
            usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(block).min(elements)
        };
        cut(self.index)..cut(self.index.saturating_add(1))
    }

    /// This share of the weights: whole tensors that follow each other, as evenly as their sizes allow.
    pub fn of_tensors(self, layout: &Layout) -> Vec<Range<usize>> {
        let total: u128 = layout.tensors().iter().map(|tensor| tensor.elements() as u128).sum();
        let mut before = 0;
        let mut ours = Vec::new();
        for tensor in layout.tensors() {
            let elements = tensor.elements() as u128;
            // Whoever has its middle has it.
            let writer = (2 * before + elements) * u128::from(self.of) / (2 * total).max(1);
            if writer == u128::from(self.index) && elements > 0 {
                ours.push(tensor.span());
            }
            before += elements;
        }
        normal(ours)
    }
}

/// What the records of one attempt have in common: 16 hexadecimal digits.
pub(crate) fn key(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::TensorMeta;

    fn shares(of: u32) -> impl Iterator<Item = Share> {
        (0..of).map(move |index| Share { index, of, attempt: 0 })
    }

    proptest! {
        #[test]
        fn elements_are_divided_without_gap_or_overlap(elements in 0..5000_usize, block in 1..300_usize, of in 1..9_u32) {
            let mut end = 0;
            for share in shares(of) {
                let range = share.of_elements(elements, block);
                prop_assert_eq!(range.start, end);
                prop_assert!(range.end == elements || range.end % block == 0);
                prop_assert!(range.len() <= (elements.div_ceil(block).div_ceil(of as usize)) * block);
                end = range.end;
            }
            prop_assert_eq!(end, elements);
        }

        #[test]
        fn every_tensor_has_one_writer(sizes in proptest::collection::vec(0..40_usize, 1..12), of in 1..9_u32) {
            let mut tensors = Vec::new();
            let mut offset = 0;
            for (n, &size) in sizes.iter().enumerate() {
                tensors.push(TensorMeta { name: format!("t{n}"), shape: vec![size], offset });
                offset += size + n % 3;
            }
            let layout = Layout::new(tensors, offset).unwrap();
            let divided: Vec<Vec<Range<usize>>> = shares(of).map(|share| share.of_tensors(&layout)).collect();
            let all = normal(layout.tensors().iter().map(|tensor| tensor.span()).collect());
            prop_assert_eq!(normal(divided.concat()), all);
            let elements = |ranges: &[Range<usize>]| ranges.iter().map(Range::len).sum::<usize>();
            let most = elements(&divided.concat()).div_ceil(of as usize) + sizes.iter().max().unwrap();
            prop_assert!(divided.iter().all(|ours| elements(ours) <= most));
        }
    }

    #[test]
    fn keys_tell_apart_where_parts_end() {
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
    }
}
