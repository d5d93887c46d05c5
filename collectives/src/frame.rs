//! The data plane's wire format: a fixed header before each chunk.
//!
//! ```text
//!  0  3  magic "MTK"            8  8  generation          32  8  offset, bytes into the payload
//!  3  1  version                16 8  sequence            40  4  length, bytes that follow
//!  4  1  collective             24 4  pass                44  4  root, digest of lengths or tag, else all ones
//!  5  1  element                28 4  index               48  8  total, bytes of the payload
//!  6  1  reduction, 0 for none
//!  7  1  zero
//! ```
//!
//! All numbers are little-endian. The header repeats what both sides should know already: a peer that runs something
//! else is found out by its first chunk, before anything is allocated or added. Where lengths are uneven, an empty segment has
//! one chunk too, without bytes: so each rank hears of the lengths that the others know. Messages between two ranks have the same
//! header; their `pass` says what it announces: see `message::mailbox`.
//!
//! Deliberately absent: a checksum. Links are authenticated and reliable.

use bytes::Bytes;

use crate::collective::{Collective, OpId};
use crate::error::Payload;
use crate::{ElementKind, Generation, Rank, ReductionKind};

/// The size of a header on the wire.
pub const HEADER_BYTES: usize = 56;
/// The version of the format: headers of another are refused.
pub const VERSION: u8 = 1;

const MAGIC: [u8; 3] = *b"MTK";
const NO_ROOT: u32 = u32::MAX;

/// What precedes each chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The sender's incarnation of the ring.
    pub generation: Generation,
    /// The operation the chunk belongs to.
    pub op: OpId,
    /// The operation's payload, the same on all ranks.
    pub payload: Payload,
    /// Hops that the chunk has behind it.
    pub pass: u32,
    /// The chunk's number within its segment.
    pub index: u32,
    /// Bytes into the payload.
    pub offset: u64,
    /// Bytes that follow the header.
    pub length: u32,
}

/// Why bytes are not a header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Something else entirely.
    #[error("it sent bytes that are no chunk header")]
    Magic,
    /// Another version of this format.
    #[error(
        "it speaks version {got} of the chunk format, this rank version {VERSION}: run the same program everywhere"
    )]
    Version {
        /// The peer's.
        got: u8,
    },
    /// A field with a value that means nothing.
    #[error("its chunk header has no meaning for {value} in `{field}`")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A chunk longer than the bound, or outside its payload.
    #[error(
        "its chunk of {length} bytes at {offset} exceeds the bound of {length_max}, or its payload of {total}"
    )]
    Bounds {
        /// Bytes into the payload.
        offset: u64,
        /// Bytes of the chunk.
        length: u32,
        /// The longest chunk taken.
        length_max: u32,
        /// Bytes of the payload.
        total: u64,
    },
}

impl Header {
    /// As on the wire.
    pub fn encode(&self) -> Bytes {
        let (collective, root) = code_of(self.op.collective);
        let reduction = self.payload.reduction.map_or(0, |reduction| reduction as u8);
        let mut wire = Vec::with_capacity(HEADER_BYTES);
        wire.extend_from_slice(&MAGIC);
        wire.extend_from_slice(&[VERSION, collective, self.payload.element as u8, reduction, 0]);
        wire.extend_from_slice(&self.generation.0.to_le_bytes());
        wire.extend_from_slice(&self.op.sequence.to_le_bytes());
        wire.extend_from_slice(&self.pass.to_le_bytes());
        wire.extend_from_slice(&self.index.to_le_bytes());
        wire.extend_from_slice(&self.offset.to_le_bytes());
        wire.extend_from_slice(&self.length.to_le_bytes());
        wire.extend_from_slice(&root.to_le_bytes());
        wire.extend_from_slice(&self.payload.total_bytes.to_le_bytes());
        debug_assert_eq!(wire.len(), HEADER_BYTES);
        wire.into()
    }

    /// Checks and reads a header; chunks above `length_max` bytes are refused.
    ///
    /// # Errors
    /// [`FrameError`] names the first field that is wrong.
    pub fn parse(wire: &[u8; HEADER_BYTES], length_max: u32) -> Result<Self, FrameError> {
        if wire[..3] != MAGIC {
            return Err(FrameError::Magic);
        }
        if wire[3] != VERSION {
            return Err(FrameError::Version { got: wire[3] });
        }
        if wire[7] != 0 {
            return Err(unknown("reserved", wire[7].into()));
        }
        let header = Self {
            generation: Generation(u64_at(wire, 8)),
            op: OpId { sequence: u64_at(wire, 16), collective: collective(wire[4], u32_at(wire, 44))? },
            payload: Payload {
                element: element(wire[5])?,
                reduction: reduction(wire[6])?,
                total_bytes: u64_at(wire, 48),
            },
            pass: u32_at(wire, 24),
            index: u32_at(wire, 28),
            offset: u64_at(wire, 32),
            length: u32_at(wire, 40),
        };
        header.check_bounds(length_max)?;
        Ok(header)
    }

    fn check_bounds(&self, length_max: u32) -> Result<(), FrameError> {
        let Self { offset, length, payload: Payload { element, total_bytes, .. }, .. } = *self;
        let end = offset.checked_add(length.into());
        let inside = end.is_some_and(|end| end <= total_bytes);
        let whole = (length as usize).is_multiple_of(element.bytes());
        let is_message = matches!(self.op.collective, Collective::Message { .. });
        let may_be_empty = is_message || self.op.collective.is_uneven();
        if (length == 0 && !may_be_empty) || length > length_max || !inside || !whole {
            return Err(FrameError::Bounds { offset, length, length_max, total: total_bytes });
        }
        Ok(())
    }
}

/// What names an operation and its payload, without its length, in one word.
pub(crate) fn pack(collective: Collective, payload: &Payload) -> u64 {
    let (collective, root) = code_of(collective);
    let reduction = payload.reduction.map_or(0, |reduction| reduction as u8);
    let [a, b, c, d] = root.to_le_bytes();
    u64::from_le_bytes([collective, payload.element as u8, reduction, 0, a, b, c, d])
}

/// The reverse of [`pack`].
pub(crate) fn unpack(word: u64) -> Result<(Collective, ElementKind, Option<ReductionKind>), FrameError> {
    let [code, kind, how, zero, a, b, c, d] = word.to_le_bytes();
    if zero != 0 {
        return Err(unknown("reserved", zero.into()));
    }
    Ok((collective(code, u32::from_le_bytes([a, b, c, d]))?, element(kind)?, reduction(how)?))
}

/// The code of an operation, and its root.
fn code_of(collective: Collective) -> (u8, u32) {
    match collective {
        Collective::AllReduce => (1, NO_ROOT),
        Collective::ReduceScatter => (2, NO_ROOT),
        Collective::AllGather => (3, NO_ROOT),
        Collective::Broadcast { root } => (4, root.0),
        Collective::Barrier => (5, NO_ROOT),
        Collective::Reduce { root } => (6, root.0),
        Collective::Gather { root } => (7, root.0),
        Collective::Scatter { root } => (8, root.0),
        Collective::AllToAll => (9, NO_ROOT),
        Collective::AllGatherUneven { lengths } => (10, lengths),
        Collective::AllReduceBatch { lengths } => (11, lengths),
        Collective::ReduceScatterUneven { lengths } => (12, lengths),
        Collective::Shift { lengths } => (13, lengths),
        Collective::Message { tag } => (14, tag),
    }
}

fn collective(code: u8, root: u32) -> Result<Collective, FrameError> {
    match (code, root) {
        (1, NO_ROOT) => Ok(Collective::AllReduce),
        (2, NO_ROOT) => Ok(Collective::ReduceScatter),
        (3, NO_ROOT) => Ok(Collective::AllGather),
        (4, root) => Ok(Collective::Broadcast { root: Rank(root) }),
        (5, NO_ROOT) => Ok(Collective::Barrier),
        (6, root) => Ok(Collective::Reduce { root: Rank(root) }),
        (7, root) => Ok(Collective::Gather { root: Rank(root) }),
        (8, root) => Ok(Collective::Scatter { root: Rank(root) }),
        (9, NO_ROOT) => Ok(Collective::AllToAll),
        (10, lengths) => Ok(Collective::AllGatherUneven { lengths }),
        (11, lengths) => Ok(Collective::AllReduceBatch { lengths }),
        (12, lengths) => Ok(Collective::ReduceScatterUneven { lengths }),
        (13, lengths) => Ok(Collective::Shift { lengths }),
        (14, tag) => Ok(Collective::Message { tag }),
        (1..=9, root) => Err(unknown("root", root.into())),
        (code, _) => Err(unknown("collective", code.into())),
    }
}

fn element(code: u8) -> Result<ElementKind, FrameError> {
    let known = ElementKind::ALL.into_iter().find(|kind| *kind as u8 == code);
    known.ok_or_else(|| unknown("element", code.into()))
}

fn reduction(code: u8) -> Result<Option<ReductionKind>, FrameError> {
    if code == 0 {
        return Ok(None);
    }
    let known = ReductionKind::ALL.into_iter().find(|kind| *kind as u8 == code);
    known.map(Some).ok_or_else(|| unknown("reduction", code.into()))
}

fn unknown(field: &'static str, value: u64) -> FrameError {
    FrameError::Unknown { field, value }
}

fn u32_at(wire: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| wire[at + i]))
}

fn u64_at(wire: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| wire[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LENGTH_MAX: u32 = 1 << 20;

    fn parse(wire: &[u8]) -> Result<Header, FrameError> {
        Header::parse(wire.try_into().unwrap(), LENGTH_MAX)
    }

    fn example() -> Header {
        Header {
            generation: Generation(7),
            op: OpId { sequence: 258, collective: Collective::AllReduce },
            payload: Payload {
                element: ElementKind::I32,
                reduction: Some(ReductionKind::Sum),
                total_bytes: 4096,
            },
            pass: 3,
            index: 2,
            offset: 1024,
            length: 512,
        }
    }

    #[test]
    fn bytes_are_pinned() {
        let wire: String = example().encode().iter().map(|byte| format!("{byte:02x}")).collect();
        let golden = concat!(
            "4d544b01",
            "01030100", // magic, version; collective, element, reduction, zero
            "0700000000000000",
            "0201000000000000", // generation, sequence
            "03000000",
            "02000000", // pass, index
            "0004000000000000",
            "00020000", // offset, length
            "ffffffff",
            "0010000000000000", // root, total
        );
        assert_eq!(wire, golden);
        assert_eq!(parse(&example().encode()), Ok(example()));
    }

    #[test]
    fn a_chunk_above_the_bound_is_refused() {
        let header = Header { length: LENGTH_MAX + 4, ..example() };
        assert!(matches!(parse(&header.encode()), Err(FrameError::Bounds { .. })));
    }

    #[test]
    fn a_chunk_outside_its_payload_is_refused() {
        let header = Header { offset: u64::MAX - 3, ..example() };
        assert!(matches!(parse(&header.encode()), Err(FrameError::Bounds { .. })));
    }

    #[test]
    fn only_uneven_parts_and_messages_may_be_empty() {
        let empty = |collective| {
            let op = OpId { sequence: 0, collective };
            parse(&Header { op, length: 0, ..example() }.encode())
        };
        assert!(matches!(empty(Collective::AllGather), Err(FrameError::Bounds { length: 0, .. })));
        assert_eq!(empty(Collective::AllGatherUneven { lengths: 7 }).unwrap().length, 0);
        assert_eq!(empty(Collective::ReduceScatterUneven { lengths: 7 }).unwrap().length, 0);
        assert_eq!(empty(Collective::Shift { lengths: 7 }).unwrap().length, 0);
        assert_eq!(empty(Collective::Message { tag: 7 }).unwrap().length, 0);
    }

    #[test]
    fn another_version_is_named() {
        let mut wire = example().encode().to_vec();
        wire[3] = 9;
        assert_eq!(parse(&wire), Err(FrameError::Version { got: 9 }));
    }

    fn headers() -> impl Strategy<Value = Header> {
        let collectives = prop_oneof![
            Just(Collective::AllReduce),
            Just(Collective::ReduceScatter),
            Just(Collective::AllGather),
            Just(Collective::Barrier),
            Just(Collective::AllToAll),
            any::<u32>().prop_map(|root| Collective::Broadcast { root: Rank(root) }),
            any::<u32>().prop_map(|root| Collective::Reduce { root: Rank(root) }),
            any::<u32>().prop_map(|root| Collective::Gather { root: Rank(root) }),
            any::<u32>().prop_map(|root| Collective::Scatter { root: Rank(root) }),
            any::<u32>().prop_map(|lengths| Collective::AllGatherUneven { lengths }),
            any::<u32>().prop_map(|lengths| Collective::AllReduceBatch { lengths }),
            any::<u32>().prop_map(|lengths| Collective::ReduceScatterUneven { lengths }),
            any::<u32>().prop_map(|lengths| Collective::Shift { lengths }),
            any::<u32>().prop_map(|tag| Collective::Message { tag }),
        ];
        let elements = proptest::sample::select(ElementKind::ALL.to_vec());
        let reductions = proptest::option::of(proptest::sample::select(ReductionKind::ALL.to_vec()));
        let numbers = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>());
        let bounds = (0u64..1 << 40, 1u32..1000, 0u64..1 << 40);
        (collectives, elements, reductions, numbers, bounds).prop_map(
            |(collective, element, reduction, (generation, sequence, pass, index), (offset, units, rest))| {
                let length = units * element.bytes() as u32;
                let total_bytes = offset + u64::from(length) + rest;
                Header {
                    generation: Generation(generation),
                    op: OpId { sequence, collective },
                    payload: Payload { element, reduction, total_bytes },
                    pass,
                    index,
                    offset,
                    length,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn headers_round_trip(header in headers()) {
            prop_assert_eq!(parse(&header.encode()), Ok(header));
        }

        #[test]
        fn names_round_trip(header in headers()) {
            let Header { op, payload, .. } = header;
            let unpacked = unpack(pack(op.collective, &payload));
            prop_assert_eq!(unpacked, Ok((op.collective, payload.element, payload.reduction)));
        }

        #[test]
        fn parsing_never_panics(mut wire in proptest::collection::vec(any::<u8>(), HEADER_BYTES), valid in 0usize..9) {
            // A valid beginning, so that later fields are reached as well.
            wire[..valid].copy_from_slice(&example().encode()[..valid]);
            if let Ok(header) = parse(&wire) {
                prop_assert_eq!(&header.encode()[..], &wire[..]);
            }
        }
    }
}
