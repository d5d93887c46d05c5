//! Whole messages over a QUIC stream, each under a deadline, and a connection's end in words.

use std::time::Duration;

use quinn::{ConnectionError, ReadError, ReadExactError, RecvStream, SendStream, VarInt, WriteError};
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};
use tokio::time::timeout;

use crate::wire::{self, HEADER_BYTES, WireError};

/// Closes a connection whose peer is not wanted; the reason says why.
pub(crate) const REFUSED: VarInt = VarInt::from_u32(1);
/// TLS alerts are reported as QUIC errors from here on.
const TLS_ALERTS: std::ops::Range<u64> = 0x100..0x200;
/// The alert of a peer with which no protocol, or version of one, is shared.
const NO_APPLICATION_PROTOCOL: u64 = 0x178;

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The bytes are no message.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The stream ended in the middle of a message.
    #[error("a control message was cut off: {got} of {want} bytes came")]
    Truncated {
        /// Bytes of the header, or of what the header announced.
        got: usize,
        /// Bytes that should have come.
        want: usize,
    },
    /// The peer has turned this side away.
    #[error("turned away: {0}")]
    Refused(String),
    /// The connection is gone.
    #[error("the connection is gone: {0}")]
    Gone(String),
    /// Nothing came, or nothing could be sent.
    #[error("no message for {0:?}")]
    Silent(Duration),
}

/// Sends one message.
pub(crate) async fn send<T>(stream: &mut SendStream, message: &T, limit: Duration) -> Result<(), StreamError>
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
{
    send_encoded(stream, &wire::encode(message)?, limit).await
}

/// Sends one message that has been encoded: one that all get is encoded once.
pub(crate) async fn send_encoded(
    stream: &mut SendStream,
    bytes: &[u8],
    limit: Duration,
) -> Result<(), StreamError> {
    let sent = timeout(limit, stream.write_all(bytes)).await.map_err(|_| StreamError::Silent(limit))?;
    sent.map_err(|error| match error {
        WriteError::ConnectionLost(error) => lost(error),
        error => StreamError::Gone(error.to_string()),
    })
}

/// Receives one message.
pub(crate) async fn receive<T>(stream: &mut RecvStream, limit: Duration) -> Result<T, StreamError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    let read = async {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header).await.map_err(|error| match error {
            ReadExactError::FinishedEarly(0) => StreamError::Gone("the peer has said goodbye".to_owned()),
            error => unread(error, HEADER_BYTES),
        })?;
        let mut archive = vec![0; wire::decode_header(header)?];
        let want = archive.len();
        stream.read_exact(&mut archive).await.map_err(|error| unread(error, want))?;
        Ok(wire::decode(&archive)?)
    };
    timeout(limit, read).await.map_err(|_| StreamError::Silent(limit))?
}

fn unread(error: ReadExactError, want: usize) -> StreamError {
    match error {
        ReadExactError::FinishedEarly(got) => StreamError::Truncated { got, want },
        ReadExactError::ReadError(ReadError::ConnectionLost(error)) => lost(error),
        ReadExactError::ReadError(error) => StreamError::Gone(error.to_string()),
    }
}

/// What the end of a connection means for those who talk over it.
pub(crate) fn lost(error: ConnectionError) -> StreamError {
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code == REFUSED => {
            StreamError::Refused(printable(&close.reason))
        }
        error => StreamError::Gone(explain(&error)),
    }
}

/// A connection's end in words that say what to do, where something can be done.
pub(crate) fn explain(error: &ConnectionError) -> String {
    let alert = |code: u64| TLS_ALERTS.contains(&code);
    match error {
        ConnectionError::TransportError(error) => match u64::from(error.code) {
            NO_APPLICATION_PROTOCOL => another_protocol(),
            code if alert(code) => {
                format!("the peer's certificate is not of this run ({})", printable(error.reason.as_bytes()))
            }
            _ => printable(error.to_string().as_bytes()),
        },
        ConnectionError::ConnectionClosed(close) => match u64::from(close.error_code) {
            NO_APPLICATION_PROTOCOL => another_protocol(),
            code if alert(code) => {
                format!("the peer does not take our certificate for its run's ({})", printable(&close.reason))
            }
            _ => printable(error.to_string().as_bytes()),
        },
        ConnectionError::ApplicationClosed(close) if close.reason.is_empty() => {
            "the peer closed it without a reason".to_owned()
        }
        ConnectionError::ApplicationClosed(close) => printable(&close.reason),
        ConnectionError::TimedOut => "the peer fell silent".to_owned(),
        other => other.to_string(),
    }
}

fn another_protocol() -> String {
    "the peer speaks another version of the control protocol, or none: use one binary".to_owned()
}

/// A peer's words without what a terminal would obey.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}
