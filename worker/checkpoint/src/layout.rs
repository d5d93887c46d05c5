//! Which tensor lies where in the flat space: the shape of a model, as far as a checkpoint cares.
//!
//! The trainer keeps parameters and optimizer state as flat arrays; files name tensors. A [`Layout`] joins the
//! two, checked once: names are unique, spans lie inside the flat space and do not overlap. Elements outside every
//! tensor (padding to whole blocks) are not stored and come back as zero.
//!
//! Deliberately absent: transposition and renaming. Whoever makes the layout has its tensors in the file's
//! layout already.

use std::collections::HashSet;
use std::ops::Range;

/// A named tensor and its place in the flat space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMeta {
    /// The name in the file, such as `transformer.h.0.ln_1.weight`.
    pub name: String,
    /// Row-major shape; a scalar's is empty.
    pub shape: Vec<usize>,
    /// Index of the first element in the flat space.
    pub offset: usize,
}

impl TensorMeta {
    /// Number of elements; saturates, so that a nonsensical shape fits no space.
    pub fn elements(&self) -> usize {
        self.shape.iter().fold(1, |product, &dim| product.saturating_mul(dim))
    }

    /// The tensor's span of the flat space.
    pub fn span(&self) -> Range<usize> {
        self.offset..self.offset.saturating_add(self.elements())
    }
}

/// The tensors of a model over a flat space of `elements` elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<TensorMeta>,
    elements: usize,
}

/// Why a list of tensors is not a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Two tensors share a name, or a name is empty or reserved by the file format.
    #[error("tensor name {name:?} is empty, reserved or used twice")]
    Name {
        /// The offending name.
        name: String,
    },
    /// A tensor reaches beyond the flat space.
    #[error("tensor {name} spans elements {start}..{end} of a flat space of {elements}")]
    Outside {
        /// The tensor.
        name: String,
        /// First element.
        start: usize,
        /// One past the last element.
        end: usize,
        /// Size of the flat space.
        elements: usize,
    },
    /// Two tensors share elements.
    #[error("tensors {first} and {second} overlap in the flat space")]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The one that starts before the first ends.
        second: String,
    },
}

impl Layout {
    /// Checks a list of tensors over a flat space; they are kept in the order given, which is their order in files.
    pub fn new(tensors: Vec<TensorMeta>, elements: usize) -> Result<Layout, LayoutError> {
        let mut names = HashSet::new();
        for tensor in &tensors {
            let name = &tensor.name;
            if name.is_empty() || name == "__metadata__" || !names.insert(name) {
                return Err(LayoutError::Name { name: name.clone() });
            }
            let Range { start, end } = tensor.span();
            if end > elements {
                return Err(LayoutError::Outside { name: name.clone(), start, end, elements });
            }
        }
        reject_overlap(&tensors)?;
        Ok(Layout { tensors, elements })
    }

    /// The tensors, in file order.
    pub fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    /// Size of the flat space in elements.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// BLAKE3 (hex) over names, shapes and places: two models with one fingerprint can exchange checkpoints.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let number = |hasher: &mut blake3::Hasher, n: usize| _ = hasher.update(&(n as u64).to_le_bytes());
        number(&mut hasher, self.elements);
        for tensor in &self.tensors {
            number(&mut hasher, tensor.name.len());
            hasher.update(tensor.name.as_bytes());
            number(&mut hasher, tensor.shape.len());
            tensor.shape.iter().for_each(|&dim| number(&mut hasher, dim));
            number(&mut hasher, tensor.offset);
        }
        hasher.finalize().to_hex().to_string()
    }
}

fn reject_overlap(tensors: &[TensorMeta]) -> Result<(), LayoutError> {
    let mut by_offset: Vec<&TensorMeta> = tensors.iter().filter(|t| t.elements() > 0).collect();
    by_offset.sort_by_key(|tensor| tensor.offset);
    for pair in by_offset.windows(2) {
        if pair[0].span().end > pair[1].offset {
            return Err(LayoutError::Overlap { first: pair[0].name.clone(), second: pair[1].name.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], offset: usize) -> TensorMeta {
        TensorMeta { name: name.into(), shape: shape.into(), offset }
    }

    #[test]
    fn gaps_and_any_order_are_fine() {
        let layout = Layout::new(vec![tensor("b", &[4], 8), tensor("a", &[2, 3], 0)], 12).unwrap();
        assert_eq!(layout.tensors()[0].span(), 8..12);
    }

    #[test]
    fn names_are_unique_and_not_reserved() {
        let twice = Layout::new(vec![tensor("a", &[1], 0), tensor("a", &[1], 1)], 2);
        assert_eq!(twice, Err(LayoutError::Name { name: "a".into() }));
        assert!(Layout::new(vec![tensor("__metadata__", &[1], 0)], 1).is_err());
    }

    #[test]
    fn spans_stay_inside_and_apart() {
        assert!(matches!(Layout::new(vec![tensor("a", &[3], 0)], 2), Err(LayoutError::Outside { .. })));
        assert!(matches!(
            Layout::new(vec![tensor("a", &[usize::MAX, 2], 1)], 2),
            Err(LayoutError::Outside { .. })
        ));
        let overlap = Layout::new(vec![tensor("a", &[3], 1), tensor("b", &[2], 0)], 4);
        assert_eq!(overlap, Err(LayoutError::Overlap { first: "b".into(), second: "a".into() }));
    }

    #[test]
    fn fingerprints_tell_models_apart() {
        let base = Layout::new(vec![tensor("a", &[2, 3], 0)], 6).unwrap();
        for other in [
            Layout::new(vec![tensor("b", &[2, 3], 0)], 6).unwrap(),
            Layout::new(vec![tensor("a", &[3, 2], 0)], 6).unwrap(),
            Layout::new(vec![tensor("a", &[2, 3], 0)], 7).unwrap(),
        ] {
            assert_ne!(base.fingerprint(), other.fingerprint());
        }
    }
}
