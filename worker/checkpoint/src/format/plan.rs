//! From the pieces that were saved to the elements that are needed: which bytes to read, and where they go. Pure.
//!
//! Saved is what the headers of the files say: runs of elements at places in pieces. Needed is what a reader names: ranges of
//! the flat space, whoever saved them and in however many shares. What both have in common is copied, and cut at the ends of
//! chunks, which are what is read and checked.
//!
//! # Invariants
//! 1. Every element that is needed and that a tensor has is copied exactly once, or the plan is refused.
//! 2. No chunk is read that has nothing that is needed, and none twice.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::layout::Layout;
use crate::slices::{common, normal};

/// Bytes of an element.
const WIDTH: u64 = size_of::<f32>() as u64;

/// Elements of an array that lie in a row in a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) piece: usize,
    /// First byte in the piece: a multiple of four.
    pub(crate) at: u64,
    pub(crate) array: usize,
    /// Elements of the flat space.
    pub(crate) elements: Range<usize>,
}

/// Elements that are needed, and where the first of them goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) array: usize,
    pub(crate) elements: Range<usize>,
    /// Index in what is handed to the reader.
    pub(crate) to: usize,
}

/// A run of elements to be copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Copy {
    pub(crate) piece: usize,
    pub(crate) at: u64,
    pub(crate) array: usize,
    pub(crate) to: usize,
    pub(crate) elements: usize,
}

/// What of a chunk goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fill {
    /// Bytes of the chunk.
    pub(crate) from: Range<usize>,
    pub(crate) array: usize,
    /// Elements of what is handed to the reader.
    pub(crate) to: Range<usize>,
}

/// Chunks to be read, by piece and number.
pub(crate) type Reads = BTreeMap<(usize, u64), Vec<Fill>>;

/// What of these ranges belongs to tensors; the ranges' elements follow each other in what is handed to the reader.
pub(crate) fn wanted(layout: &Layout, array: usize, ranges: &[Range<usize>]) -> Vec<Wanted> {
    let mut spans: Vec<Range<usize>> = layout.tensors().iter().map(|tensor| tensor.span()).collect();
    spans = normal(spans);
    let mut wanted = Vec::new();
    let mut before = 0;
    for range in normal(ranges.to_vec()) {
        let from = spans.partition_point(|span| span.end <= range.start);
        for elements in spans[from..].iter().map_while(|span| common(span, &range)) {
            wanted.push(Wanted { array, to: before + (elements.start - range.start), elements });
        }
        before += range.len();
    }
    wanted
}

/// Finds what is wanted in what was saved. Errors with what is missing, or saved twice.
pub(crate) fn plan(mut saved: Vec<Extent>, wanted: &[Wanted]) -> Result<Vec<Copy>, String> {
    saved.retain(|extent| !extent.elements.is_empty());
    saved.sort_by_key(|extent| (extent.array, extent.elements.start));
    let twice = saved
        .windows(2)
        .find(|pair| pair[0].array == pair[1].array && pair[0].elements.end > pair[1].elements.start);
    if let Some([_, again]) = twice {
        return Err(format!("elements {:?} of array {} are there twice", again.elements, again.array));
    }
    let mut copies = Vec::new();
    for Wanted { array, elements, to } in wanted {
        let mut next = elements.start;
        let from = saved.partition_point(|extent| (extent.array, extent.elements.end) <= (*array, next));
        for extent in saved[from..].iter().take_while(|extent| extent.array == *array) {
            let Some(both) = common(&extent.elements, elements).filter(|both| both.start == next) else {
                break;
            };
            copies.push(Copy {
                piece: extent.piece,
                at: extent.at + (both.start - extent.elements.start) as u64 * WIDTH,
                array: *array,
                to: to + (both.start - elements.start),
                elements: both.len(),
            });
            next = both.end;
        }
        if next < elements.end {
            return Err(format!("elements {next}..{} of array {array} are missing", elements.end));
        }
    }
    Ok(copies)
}

/// Cuts copies at the ends of chunks; `chunk_bytes` of a piece is a multiple of an element's size.
pub(crate) fn by_chunk(copies: &[Copy], chunk_bytes: impl Fn(usize) -> u64) -> Reads {
    let mut reads = Reads::new();
    for copy in copies {
        let chunk_bytes = chunk_bytes(copy.piece).max(WIDTH);
        let (mut at, mut to, end) = (copy.at, copy.to, copy.at + copy.elements as u64 * WIDTH);
        while at < end {
            let chunk = at / chunk_bytes;
            let stop = end.min((chunk + 1) * chunk_bytes);
            let elements = ((stop - at) / WIDTH) as usize;
            let start = (at - chunk * chunk_bytes) as usize;
            let from = start..start + elements * WIDTH as usize;
            let fill = Fill { from, array: copy.array, to: to..to + elements };
            reads.entry((copy.piece, chunk)).or_default().push(fill);
            (at, to) = (stop, to + elements);
        }
    }
    reads
}

/// Copies bytes of a chunk to the elements that they are; errors if it is shorter than it should be.
pub(crate) fn place(chunk: &[u8], from: &Range<usize>, to: &mut [f32]) -> Result<(), String> {
    let room: &mut [u8] = bytemuck::cast_slice_mut(to);
    if room.len() != from.len() {
        return Err(format!("{} bytes for {} of elements", from.len(), room.len()));
    }
    room.copy_from_slice(chunk.get(from.clone()).ok_or("a chunk ends too early")?);
    if cfg!(target_endian = "big") {
        to.iter_mut().for_each(|element| *element = f32::from_bits(element.to_bits().swap_bytes()));
    }
    Ok(())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
