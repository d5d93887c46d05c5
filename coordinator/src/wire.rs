//! Framing of control messages: magic, version, length, archive.
//!
//! ```text
//! 'M' 'K' | version u16 | length u32 | archive, `length` bytes        all little endian
//! ```
//! The header is judged before anything is allocated, the archive is checked before it is read.

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

/// Of the messages and their meaning. Equal versions only: a run is one binary.
pub const VERSION: u16 = 3;
/// Of a message's archive.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Of the header.
pub const HEADER_BYTES: usize = 8;

const MAGIC: [u8; 2] = *b"MK";

/// Why bytes are no message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// Something else talks here.
    #[error("the peer does not speak Mattock's control protocol (first bytes {0:02x?})")]
    Magic([u8; 2]),
    /// Another version of this program.
    #[error(
        "the peer speaks version {theirs} of the control protocol, this program version {VERSION}: use one binary"
    )]
    Version {
        /// What the peer speaks.
        theirs: u16,
    },
    /// Longer than any message.
    #[error("a control message of {0} bytes is over the limit of {MESSAGE_BYTES_MAX}")]
    TooLong(usize),
    /// The archive does not hold together.
    #[error("a control message of {bytes} bytes is damaged: {reason}")]
    Damaged {
        /// Its size.
        bytes: usize,
        /// What the check found.
        reason: String,
    },
}

/// A message with its header.
///
/// # Errors
/// [`WireError::TooLong`].
pub fn encode<T>(message: &T) -> Result<Vec<u8>, WireError>
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
{
    let damaged = |error: Error| WireError::Damaged { bytes: 0, reason: error.to_string() };
    let archive = rkyv::to_bytes::<Error>(message).map_err(damaged)?;
    if archive.len() > MESSAGE_BYTES_MAX {
        return Err(WireError::TooLong(archive.len()));
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + archive.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(archive.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&archive);
    Ok(bytes)
}

/// The length of the archive that follows this header.
///
/// # Errors
/// All but [`WireError::Damaged`].
pub fn decode_header(header: [u8; HEADER_BYTES]) -> Result<usize, WireError> {
    let [m, k, v0, v1, l0, l1, l2, l3] = header;
    if [m, k] != MAGIC {
        return Err(WireError::Magic([m, k]));
    }
    let theirs = u16::from_le_bytes([v0, v1]);
    if theirs != VERSION {
        return Err(WireError::Version { theirs });
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > MESSAGE_BYTES_MAX { Err(WireError::TooLong(length)) } else { Ok(length) }
}

/// A message from its archive.
///
/// # Errors
/// [`WireError::Damaged`].
pub fn decode<T>(archive: &[u8]) -> Result<T, WireError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    let mut aligned = AlignedVec::<16>::with_capacity(archive.len());
    aligned.extend_from_slice(archive);
    rkyv::from_bytes::<T, Error>(&aligned)
        .map_err(|error| WireError::Damaged { bytes: archive.len(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::WorkerId;
    use crate::protocol::{
        About, Blame, Break, Failure, Formation, FromCoordinator, FromWorker, Holding, Place, Pulse, Return,
        StepReport,
    };

    fn form() -> FromCoordinator {
        let place = |worker, micro_batches, first| Place {
            worker: WorkerId(worker),
            address: format!("127.0.0.1:{worker}"),
            micro_batches,
            first,
        };
        FromCoordinator::Form(Formation {
            generation: 3,
            step: 9,
            source: Some(1),
            places: vec![place(0, vec![0, 1], vec![1]), place(4, vec![2], vec![0, 2])],
        })
    }

    fn report() -> FromWorker {
        FromWorker::Step(StepReport {
            generation: 1,
            step: 2,
            rank: 3,
            loss: 0.5,
            grad_norm: 1.5,
            lr: 0.25,
            hash_before: 76,
            state_hash: Some(77),
            tokens: 4096,
            wide_blocks: 1,
            micro_batches: vec![1, 2],
            counts: vec![3, 2],
            tx_bytes: 10,
            rx_bytes: 11,
            held: vec![("moments".to_owned(), 12)],
            sent: vec![("all-gather".to_owned(), 13)],
            seconds: vec![("compute".to_owned(), 0.125)],
        })
    }

    fn golden(bytes: &[u8]) -> String {
        blake3::hash(bytes).to_hex()[..16].to_owned()
    }

    #[test]
    fn the_bytes_of_messages_are_pinned() {
        assert_eq!(golden(&encode(&form()).unwrap()), "b15a7d60a369a04a");
        assert_eq!(golden(&encode(&report()).unwrap()), "0e41ef2298bf5d7f");
        let reason = || "a reason".to_owned();
        let holding = Holding {
            step: Some(8),
            done: vec![3, 5],
            running: Some(6),
            state_hash: Some(7),
            basis: None,
            audit: None,
        };
        let FromCoordinator::Form(ring) = form() else { panic!("it is a ring") };
        let about = About { pid: 7, host: reason(), address: reason(), fingerprint: reason() };
        let broken = Break { generation: 4, lost_rank: Some(2), text: reason() };
        let from_worker = [
            (FromWorker::Ready { step: None }, "57ca8ceba5460255"),
            (FromWorker::Ready { step: Some(7) }, "c8df65ac8e0f3c1e"),
            (FromWorker::Held { generation: 4, holding }, "959aac6ee67b35df"),
            (FromWorker::Broken(broken), "602201c5235670bd"),
            (FromWorker::Leaving { reason: reason() }, "f210519603f8b3f9"),
            (FromWorker::Pulse(Pulse { progress: 9, busy: true, slowest_ms: 80 }), "84ca016642573eea"),
            (FromWorker::Failed(Failure { text: reason(), blame: Blame::Worker }), "5354a5049323ca70"),
            (FromWorker::Return(Return { about, incarnation: 3 }), "77e0b8bb896e9451"),
            (FromWorker::Past(ring), "682703560553cdad"),
            (FromWorker::Returned(Holding::at(8)), "bcb8ed516837a721"),
            (FromWorker::Scale { workers: 4 }, "af038d5e0f81b678"),
        ];
        let sent = from_worker.iter().map(|(message, bytes)| (golden(&encode(message).unwrap()), *bytes));
        let sent: Vec<(String, &str)> = sent.collect();
        let welcome = FromCoordinator::Welcome {
            run: reason(),
            recipe: reason(),
            settings: reason(),
            under_way: true,
            incarnation: 3,
        };
        let from_coordinator = [
            (FromCoordinator::Recall { generation: 4, reason: reason() }, "fda65025fc245679"),
            (FromCoordinator::Restore { up_to: 6 }, "abb1a8b7ed33b16a"),
            (FromCoordinator::Released { reason: reason() }, "2b430cfd3fa7a048"),
            (welcome, "29e4a809bb0f5d6f"),
            (FromCoordinator::Scaling { there: 2 }, "f7318634f0dee7ef"),
        ];
        let told =
            from_coordinator.iter().map(|(message, bytes)| (golden(&encode(message).unwrap()), *bytes));
        let others: Vec<_> = sent.into_iter().chain(told).filter(|(now, pinned)| now != pinned).collect();
        assert!(others.is_empty(), "not the bytes that they were: {others:?}");
    }

    #[test]
    fn messages_come_back() {
        let bytes = encode(&report()).unwrap();
        let header = bytes[..HEADER_BYTES].try_into().unwrap();
        assert_eq!(decode_header(header), Ok(bytes.len() - HEADER_BYTES));
        assert_eq!(decode::<FromWorker>(&bytes[HEADER_BYTES..]), Ok(report()));
    }

    #[test]
    fn another_version_is_named() {
        let error = decode_header([b'M', b'K', 9, 0, 1, 0, 0, 0]).unwrap_err();
        assert_eq!(error, WireError::Version { theirs: 9 });
        assert!(error.to_string().contains("version 9") && error.to_string().contains("version 3"));
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_read() {
        assert_eq!(
            decode_header([b'M', b'K', 3, 0, 1, 0, 16, 0]),
            Err(WireError::TooLong(MESSAGE_BYTES_MAX + 1))
        );
        assert_eq!(decode_header(*b"GET / HT"), Err(WireError::Magic(*b"GE")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<FromWorker>(&bytes);
            let _ = decode::<FromCoordinator>(&bytes);
        }

        #[test]
        fn a_truncated_or_flipped_message_never_panics(cut in 0usize..400, flip in 0usize..400, bit in 0u8..8) {
            let mut bytes = encode(&form()).unwrap().split_off(HEADER_BYTES);
            let at = flip % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = decode::<FromCoordinator>(&bytes);
            let _ = decode::<FromCoordinator>(&bytes[..cut.min(bytes.len())]);
        }
    }
}
