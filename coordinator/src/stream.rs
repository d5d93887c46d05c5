//! Whole messages over a QUIC stream, each under a deadline, and a connection's end in words.

use std::future::Future;
use std::pin::pin;
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

/// A silence is counted in so many looks for each timeout.
pub(crate) const LOOKS: u32 = 8;

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
    receive_patiently(stream, limit, 1, |_| ()).await
}

/// Receives one message within so many timeouts of `limit`; `looked` is told how often it was looked for in vain.
pub(crate) async fn receive_patiently<T>(
    stream: &mut RecvStream,
    limit: Duration,
    limits: u32,
    looked: impl FnMut(u32),
) -> Result<T, StreamError>
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
    in_looks(limit / LOOKS, limits * LOOKS, looked, read).await.ok_or(StreamError::Silent(limits * limit))?
}

/// Looks so many times, each for so long, and tells how often it was in vain: a process that was stopped itself, or starved, has not
/// looked meanwhile, and what was sent to it is still to be read. `None` where it took too long.
async fn in_looks<T>(
    each: Duration,
    looks: u32,
    mut looked: impl FnMut(u32),
    act: impl Future<Output = T>,
) -> Option<T> {
    let mut act = pin!(act);
    for look in 1..=looks {
        if let Ok(done) = timeout(each, act.as_mut()).await {
            return Some(done);
        }
        looked(look);
    }
    None
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

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::sync::oneshot;
    use tokio::time::sleep;

    use super::*;

    #[tokio::test]
    async fn a_silence_comes_to_an_end_and_each_look_is_told_of() {
        let mut told = Vec::new();
        let heard = in_looks(Duration::from_millis(1), 3, |look| told.push(look), pending::<()>()).await;
        assert_eq!((heard, told), (None, vec![1, 2, 3]));
    }

    #[tokio::test]
    async fn who_did_not_run_itself_has_heard_no_silence() {
        let (sender, message) = oneshot::channel();
        let each = Duration::from_millis(100);
        let waiting = tokio::spawn(in_looks(each, LOOKS, |_| (), message));
        tokio::task::yield_now().await;
        // As if the process had been stopped: this thread has all tasks. Then time goes on before the message is read.
        std::thread::sleep(each * (LOOKS + 1));
        sleep(Duration::from_millis(1)).await;
        sender.send(7).unwrap();
        assert_eq!(waiting.await.unwrap(), Some(Ok(7)));
    }
}
