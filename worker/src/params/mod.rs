//! The flat parameter space: where each parameter of each block lies in one array of f32.
//!
//! A *bucket* is the range of one model block, padded with zeros to whole 256-element blocks, so that block
//! exponents, shards and ranges of the ring never straddle two buckets. Padding never receives a gradient and so
//! stays zero.
//!
//! Deliberately absent: any knowledge of ranks. Who owns which range is decided elsewhere.

mod visit;

use std::ops::Range;

use burn::module::Module;
use burn::tensor::backend::Backend;
use mattock_exact::BLOCK;

use crate::task::Task;

pub(crate) use self::visit::{attach, attach_shared, collect_gradients, release, values, without_graph};

/// One parameter tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Dotted path, as in a checkpoint.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First element in the flat space.
    pub offset: usize,
}

impl Parameter {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its range in the flat space.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Where everything lies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Space {
    parameters: Vec<Parameter>,
    buckets: Vec<Range<usize>>,
}

impl Space {
    /// Lays out the blocks of a model in their order; `prefix` names each.
    pub fn of<B: Backend, M: Module<B>>(
        blocks: impl IntoIterator<Item = M>,
        prefix: impl Fn(usize) -> String,
    ) -> Self {
        let mut space = Self::default();
        for (index, block) in blocks.into_iter().enumerate() {
            let start = space.len();
            let mut offset = start;
            for (name, shape) in visit::shapes(&block, &prefix(index)) {
                let parameter = Parameter { name, shape, offset };
                offset += parameter.len();
                space.parameters.push(parameter);
            }
            space.buckets.push(start..start + (offset - start).next_multiple_of(BLOCK));
        }
        space
    }

    /// That of a task's model.
    pub fn of_task<T: Task>(task: &T) -> Self {
        let device = Default::default();
        Self::of(task.shapes::<mattock_kernels::Cpu>(&device), |index| task.prefix(index))
    }

    /// One vector a block, of these lengths.
    #[cfg(test)]
    pub(crate) fn of_lengths(lengths: &[usize]) -> Self {
        let mut space = Self::default();
        for (index, &length) in lengths.iter().enumerate() {
            let offset = space.len();
            space.parameters.push(Parameter { name: format!("{index}"), shape: vec![length], offset });
            space.buckets.push(offset..offset + length.next_multiple_of(BLOCK));
        }
        space
    }

    /// All parameters, in order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The padded range of each model block, in order and without gaps.
    pub fn buckets(&self) -> &[Range<usize>] {
        &self.buckets
    }

    /// Elements, padding included: a multiple of 256.
    pub fn len(&self) -> usize {
        self.buckets.last().map_or(0, |last| last.end)
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements without padding.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(Parameter::len).sum()
    }

    /// Stretches with and without weight decay, in order and without gaps: matrices decay, vectors do not.
    pub fn decay_ranges(&self) -> Vec<(Range<usize>, bool)> {
        let mut ranges: Vec<(Range<usize>, bool)> = Vec::new();
        let mut next = 0;
        for parameter in &self.parameters {
            let decays = parameter.shape.len() >= 2;
            let range = next..parameter.range().end;
            next = range.end;
            match ranges.last_mut() {
                Some((last, same)) if *same == decays => last.end = range.end,
                _ => ranges.push((range, decays)),
            }
        }
        match ranges.last_mut() {
            Some((last, _)) => last.end = self.len(),
            None => debug_assert!(self.is_empty()),
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        let parameter = |name: &str, shape: &[usize], offset| Parameter {
            name: name.into(),
            shape: shape.into(),
            offset,
        };
        Space {
            parameters: vec![
                parameter("a", &[3, 4], 0),
                parameter("b", &[5], 12),
                parameter("c", &[300], 256),
            ],
            buckets: vec![0..256, 256..768],
        }
    }

    #[test]
    fn decay_ranges_cover_the_space_once() {
        assert_eq!(space().decay_ranges(), vec![(0..12, true), (12..768, false)]);
    }

    #[test]
    fn padding_counts_towards_the_length_only() {
        assert_eq!((space().len(), space().parameter_count()), (768, 317));
    }
}
