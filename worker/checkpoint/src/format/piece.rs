//! The pieces of a snapshot, as streams of bytes cut from its arrays: no piece ever exists as a whole in memory.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::entries::{Entry, entries, groups, holds};
use super::{CONFIG, EXPONENTS, Kind, RECIPE, TOKENIZER, exponents, safetensors};
use crate::folder::aligned;
use crate::share::Share;
use crate::slices::Slices;
use crate::snapshot::Snapshot;

/// An object to be written: its name below the checkpoint's folder, and its bytes in order.
pub(crate) struct Piece {
    pub(crate) name: String,
    /// Of which elements it has values.
    pub(crate) holds: Vec<Range<usize>>,
    segments: Vec<Segment>,
}

/// A run of bytes that lies together in memory.
enum Segment {
    Bytes(Bytes),
    Floats(Arc<Vec<f32>>, Range<usize>),
    Shorts(Arc<Vec<i16>>),
}

/// Every piece of a snapshot, small ones first: a store that refuses does so before much was sent. Files of tensors are cut
/// between tensors where they would be longer than `file_bytes`, so that what does not change can be told from what does.
pub(crate) fn pieces(snapshot: &Snapshot, key: &str, file_bytes: u64) -> Vec<Piece> {
    let mut pieces = if snapshot.share.index == 0 { small(snapshot) } else { Vec::new() };
    let names = Names { share: snapshot.share, key };
    pieces.extend(files(snapshot, Kind::Weights, &[&snapshot.params], &names, file_bytes));
    pieces.extend(files(snapshot, Kind::Moments, &[&snapshot.m, &snapshot.v], &names, file_bytes));
    pieces
}

/// What lies beside the tensors.
fn small(snapshot: &Snapshot) -> Vec<Piece> {
    let files = &snapshot.files;
    let small = [
        Some((CONFIG, &files.config_json)),
        files.tokenizer_json.as_ref().map(|tokenizer| (TOKENIZER, tokenizer)),
        files.recipe_toml.as_ref().map(|recipe| (RECIPE, recipe)),
    ];
    let piece = |name: &str, segments| Piece { name: name.to_owned(), holds: Vec::new(), segments };
    let small = small.into_iter().flatten();
    let mut pieces: Vec<Piece> =
        small.map(|(name, bytes)| piece(name, vec![Segment::Bytes(bytes.clone())])).collect();
    let count = Bytes::copy_from_slice(&exponents::header(snapshot.exponents.len()));
    let values = Segment::Shorts(Arc::clone(&snapshot.exponents));
    pieces.push(piece(EXPONENTS, vec![Segment::Bytes(count), values]));
    pieces
}

fn files(
    snapshot: &Snapshot,
    kind: Kind,
    arrays: &[&Slices],
    names: &Names<'_>,
    file_bytes: u64,
) -> Vec<Piece> {
    let entries = entries(&snapshot.layout, arrays[0].ranges(), snapshot.share.index == 0);
    let most = usize::try_from(file_bytes).unwrap_or(usize::MAX) / (size_of::<f32>() * arrays.len());
    let groups = groups(&entries, most);
    let each = groups.iter().enumerate();
    each.map(|(n, group)| tensors(names.of(kind, n, groups.len()), kind, group, arrays)).collect()
}

fn tensors(name: String, kind: Kind, entries: &[Entry<'_>], arrays: &[&Slices]) -> Piece {
    let each = || {
        kind.suffixes().iter().zip(arrays).flat_map(|array| entries.iter().map(move |entry| (array, entry)))
    };
    let header = safetensors::header(each().map(|((suffix, _), entry)| (entry.name(suffix), entry.shape())));
    let data = each().filter_map(|((_, slices), entry)| {
        Some(Segment::Floats(Arc::clone(slices.values()), slices.place(&entry.elements)?))
    });
    let segments = std::iter::once(Segment::Bytes(header.into())).chain(data).collect();
    Piece { name, holds: holds(entries), segments }
}

/// How files of tensors are named: a writer alone names them as everybody does.
struct Names<'a> {
    share: Share,
    key: &'a str,
}

impl Names<'_> {
    fn of(&self, kind: Kind, n: usize, files: usize) -> String {
        let (stem, Share { index, of, .. }) = (kind.stem(), self.share);
        let share = format!("{stem}-{}-{:05}-of-{of:05}", self.key, u64::from(index) + 1);
        match (self.share.is_whole(), files) {
            (true, 1) => format!("{stem}.safetensors"),
            (true, _) => format!("{stem}-{:05}-of-{files:05}.safetensors", n + 1),
            (false, 1) => format!("{share}.safetensors"),
            (false, _) => format!("{share}-{:05}.safetensors", n + 1),
        }
    }
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
        let mut part = aligned(0);
        let mut before = part.len();
        while let Some((segment, rest)) = self.segments.split_first() {
            let fit = (self.part_bytes - (part.len() - before)) / segment.width();
            let end = segment.len().min(self.taken.saturating_add(fit));
            if part.len() == before {
                // Stores that write directly take it as it lies.
                part = aligned(self.part_bytes);
                before = part.len();
            }
            segment.append(self.taken..end, &mut part);
            if end < segment.len() {
                self.taken = end;
                break;
            }
            (self.segments, self.taken) = (rest, 0);
        }
        (part.len() > before).then(|| Bytes::from(part).slice(before..))
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
        Piece { name: "x".into(), holds: Vec::new(), segments }
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
        let empty =
            Piece { name: "x".into(), holds: Vec::new(), segments: vec![Segment::Bytes(Bytes::new())] };
        assert_eq!(empty.parts(8).count(), 0);
    }
}
