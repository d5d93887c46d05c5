//! The pieces of a snapshot, as streams of bytes cut from its arrays: no piece ever exists as a whole in memory.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::{CONFIG, EXPONENTS, M, MODEL, OPTIMIZER, RECIPE, TOKENIZER, V, exponents, safetensors};
use crate::layout::Layout;
use crate::snapshot::Snapshot;

/// An object to be written: its name below the checkpoint's folder, and its bytes in order.
pub(crate) struct Piece {
    pub(crate) name: &'static str,
    segments: Vec<Segment>,
}

/// A run of bytes that lies together in memory.
enum Segment {
    Bytes(Bytes),
    Floats(Arc<Vec<f32>>, Range<usize>),
    Shorts(Arc<Vec<i16>>),
}

/// Every piece of a snapshot, small ones first: a store that refuses does so before much was sent.
pub(crate) fn pieces(snapshot: &Snapshot) -> Vec<Piece> {
    let files = &snapshot.files;
    let small = [
        Some((CONFIG, &files.config_json)),
        files.tokenizer_json.as_ref().map(|tokenizer| (TOKENIZER, tokenizer)),
        files.recipe_toml.as_ref().map(|recipe| (RECIPE, recipe)),
    ];
    let small = small.into_iter().flatten();
    let mut pieces: Vec<Piece> =
        small.map(|(name, bytes)| Piece { name, segments: vec![Segment::Bytes(bytes.clone())] }).collect();
    let count = Bytes::copy_from_slice(&exponents::header(snapshot.exponents.len()));
    let values = Segment::Shorts(Arc::clone(&snapshot.exponents));
    pieces.push(Piece { name: EXPONENTS, segments: vec![Segment::Bytes(count), values] });
    pieces.push(tensors(MODEL, &snapshot.layout, &[("", &snapshot.params)]));
    pieces.push(tensors(OPTIMIZER, &snapshot.layout, &[(M, &snapshot.m), (V, &snapshot.v)]));
    pieces
}

fn tensors(name: &'static str, layout: &Layout, arrays: &[(&str, &Arc<Vec<f32>>)]) -> Piece {
    let each = || arrays.iter().flat_map(|&array| layout.tensors().iter().map(move |tensor| (array, tensor)));
    let header =
        safetensors::header(each().map(|((suffix, _), t)| (format!("{}{suffix}", t.name), t.shape.clone())));
    let data = each().map(|((_, values), tensor)| Segment::Floats(Arc::clone(values), tensor.span()));
    Piece { name, segments: std::iter::once(Segment::Bytes(header.into())).chain(data).collect() }
}

impl Piece {
    /// Size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| (segment.len() * segment.width()) as u64).sum()
    }

    /// The bytes in order, in parts of `part_bytes` (a multiple of 4); the last may be shorter.
    pub(crate) fn parts(&self, part_bytes: usize) -> Parts<'_> {
        Parts { segments: &self.segments, taken: 0, part_bytes }
    }
}

impl Segment {
    /// Number of elements.
    fn len(&self) -> usize {
        match self {
            Segment::Bytes(bytes) => bytes.len(),
            Segment::Floats(_, span) => span.len(),
            Segment::Shorts(values) => values.len(),
        }
    }

    /// Bytes per element.
    fn width(&self) -> usize {
        match self {
            Segment::Bytes(_) => 1,
            Segment::Floats(..) => size_of::<f32>(),
            Segment::Shorts(_) => size_of::<i16>(),
        }
    }

    /// Appends the bytes of some of its elements.
    fn append(&self, elements: Range<usize>, to: &mut Vec<u8>) {
        let at = to.len();
        to.resize(at + elements.len() * self.width(), 0);
        let room = &mut to[at..];
        match self {
            Segment::Bytes(bytes) => room.copy_from_slice(&bytes[elements]),
            Segment::Floats(values, span) => {
                let values = &values[span.start + elements.start..span.start + elements.end];
                room.as_chunks_mut()
                    .0
                    .iter_mut()
                    .zip(values)
                    .for_each(|(to, value)| *to = value.to_le_bytes());
            }
            Segment::Shorts(values) => {
                let values = &values[elements];
                room.as_chunks_mut()
                    .0
                    .iter_mut()
                    .zip(values)
                    .for_each(|(to, value)| *to = value.to_le_bytes());
            }
        }
    }
}

/// Iterator over a piece's parts; see [`Piece::parts`].
pub(crate) struct Parts<'a> {
    /// What is left, of which the first has lost `taken` elements.
    segments: &'a [Segment],
    taken: usize,
    part_bytes: usize,
}

impl Iterator for Parts<'_> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let mut part = Vec::new();
        while let Some((segment, rest)) = self.segments.split_first() {
            let fit = (self.part_bytes - part.len()) / segment.width();
            let end = segment.len().min(self.taken.saturating_add(fit));
            if part.is_empty() {
                part.reserve_exact(self.part_bytes);
            }
            segment.append(self.taken..end, &mut part);
            if end < segment.len() {
                self.taken = end;
                break;
            }
            (self.segments, self.taken) = (rest, 0);
        }
        (!part.is_empty()).then(|| part.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece() -> Piece {
        let floats = Arc::new(vec![1.0, 2.0, 3.0, 4.0]);
        let shorts = Arc::new(vec![1, -1]);
        let segments = vec![
            Segment::Bytes(Bytes::from_static(b"12345678")),
            Segment::Floats(Arc::clone(&floats), 1..4),
            Segment::Floats(floats, 0..1),
            Segment::Shorts(shorts),
        ];
        Piece { name: "x", segments }
    }

    #[test]
    fn parts_are_full_but_the_last_and_join_to_the_whole() {
        let mut whole = b"12345678".to_vec();
        [2.0_f32, 3.0, 4.0, 1.0].iter().for_each(|x| whole.extend(x.to_le_bytes()));
        whole.extend([1, 0, 0xff, 0xff]);
        for part_bytes in (4..40).step_by(4) {
            let parts: Vec<Bytes> = piece().parts(part_bytes).collect();
            let (last, full) = parts.split_last().unwrap();
            assert!(full.iter().all(|part| part.len() == part_bytes) && last.len() <= part_bytes);
            assert_eq!(parts.concat(), whole, "parts of {part_bytes}");
            assert_eq!(piece().bytes(), whole.len() as u64);
        }
    }

    #[test]
    fn an_empty_piece_has_no_parts() {
        let empty = Piece { name: "x", segments: vec![Segment::Bytes(Bytes::new())] };
        assert_eq!(empty.parts(8).count(), 0);
    }
}
