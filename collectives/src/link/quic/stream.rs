//! The two halves of a link: streams of a connection, one after the other, written in place and read in place.
//!
//! A link's bytes are cut into streams of [`STREAM_BYTES`]. The first is the one that said hello; the one that ends without
//! a byte is the end of the link. A receiver keeps a list of what arrived behind something lost, and the transport gives
//! up a stream with more than 1,024 gaps: a queue that overflows can leave as many in a single stream of a far and fast
//! link, but never in one of this size.
//!
//! Each stream has less priority than the one before it. Otherwise the transport sends what is queued of all of them in turn, and
//! the first one ends when the last one does: nothing could travel on before everything has arrived.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};

use super::obituary::Obituaries;
use crate::error::TransportError;
use crate::link::{LinkReceiver, LinkSender};

/// The receiver has all it wants.
const FINISHED: VarInt = VarInt::from_u32(1);
/// One side broke off; the reason says why.
const BROKEN: VarInt = VarInt::from_u32(2);
/// The peer is not whom we expect; the reason says why.
const REFUSED: VarInt = VarInt::from_u32(3);
/// Less than 1,024 of the smallest datagrams.
const STREAM_BYTES: usize = 1 << 20;
/// Streams that may be open: all that windows let through, and more.
pub(crate) const STREAMS_MAX: u32 = 64;
/// How much a read may return: more than a datagram carries.
const PIECE_BYTES_MAX: usize = 1 << 20;
/// TLS alerts are reported as QUIC errors from here on.
const TLS_ALERTS: std::ops::Range<u64> = 0x100..0x200;

/// The sending half.
#[derive(Debug)]
pub(crate) struct QuicSender {
    connection: Connection,
    stream: SendStream,
    obituaries: Arc<Obituaries>,
    /// Bytes in the stream.
    filled: usize,
    /// Of the stream.
    priority: i32,
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct QuicReceiver {
    connection: Connection,
    stream: RecvStream,
    obituaries: Arc<Obituaries>,
    /// Bytes taken from the stream; none once it has ended.
    taken: Option<usize>,
    /// Nothing comes after what was received.
    ended: bool,
}

impl QuicSender {
    pub(crate) fn new(connection: Connection, stream: SendStream, obituaries: Arc<Obituaries>) -> Self {
        Self { connection, stream, obituaries, filled: 0, priority: 0 }
    }

    /// The next stream; what was sent in the last one is complete.
    async fn open(&mut self) -> Result<(), TransportError> {
        // It can fail only if the stream has ended already, and then the next one says why.
        let _ = self.stream.finish();
        let opened = async { self.connection.open_uni().await.map_err(transport_error) };
        self.stream = alive(&self.obituaries, &self.connection, opened).await?;
        self.filled = 0;
        self.priority = self.priority.saturating_sub(1);
        // As above.
        let _ = self.stream.set_priority(self.priority);
        Ok(())
    }
}

impl QuicReceiver {
    pub(crate) fn new(connection: Connection, stream: RecvStream, obituaries: Arc<Obituaries>) -> Self {
        Self { connection, stream, obituaries, taken: Some(0), ended: false }
    }
}

impl LinkSender for QuicSender {
    async fn send(&mut self, mut bytes: Bytes) -> Result<(), TransportError> {
        loop {
            let part = bytes.split_to(bytes.len().min(STREAM_BYTES - self.filled));
            self.filled += part.len();
            let written = self.stream.write_chunk(part);
            alive(&self.obituaries, &self.connection, async { written.await.map_err(write_error) }).await?;
            if bytes.is_empty() {
                return Ok(());
            }
            self.open().await?;
        }
    }

    async fn finish(&mut self) -> Result<(), TransportError> {
        // An error says that the link has ended already, and then so does `closed`.
        if self.filled == 0 || self.open().await.is_ok() {
            let _ = self.stream.finish();
        }
        match self.closed().await {
            TransportError::ClosedByPeer => Ok(()),
            broken => Err(broken),
        }
    }

    async fn closed(&mut self) -> TransportError {
        let closed = async { Ok(transport_error(self.connection.closed().await)) };
        alive(&self.obituaries, &self.connection, closed).await.unwrap_or_else(|gone| gone)
    }

    fn break_off(&mut self, reason: &str) {
        break_off(&self.connection, reason);
    }
}

impl LinkReceiver for QuicReceiver {
    async fn receive(&mut self) -> Result<Option<Bytes>, TransportError> {
        while !self.ended {
            let Some(taken) = &mut self.taken else {
                let accepted = async { self.connection.accept_uni().await.map_err(transport_error) };
                self.stream = alive(&self.obituaries, &self.connection, accepted).await?;
                self.taken = Some(0);
                continue;
            };
            let chunk = self.stream.read_chunk(PIECE_BYTES_MAX, true);
            let chunk = async { chunk.await.map_err(read_error) };
            match alive(&self.obituaries, &self.connection, chunk).await? {
                Some(chunk) => {
                    *taken += chunk.bytes.len();
                    return Ok(Some(chunk.bytes));
                }
                None if *taken == 0 => {
                    self.ended = true;
                    self.close();
                }
                None => self.taken = None,
            }
        }
        Ok(None)
    }

    fn close(&mut self) {
        self.connection.close(FINISHED, b"");
    }

    fn break_off(&mut self, reason: &str) {
        break_off(&self.connection, reason);
    }
}

impl Drop for QuicSender {
    /// A sender that goes away without a word has died; quinn alone would end the stream as if it were complete.
    fn drop(&mut self) {
        self.break_off("its sender is gone");
    }
}

impl Drop for QuicReceiver {
    /// A receiver that goes away without a word has died, unless it has closed the link.
    fn drop(&mut self) {
        self.break_off("its receiver is gone");
    }
}

/// What comes of something, unless the peer is gone.
async fn alive<T>(
    obituaries: &Obituaries,
    connection: &Connection,
    outcome: impl Future<Output = Result<T, TransportError>>,
) -> Result<T, TransportError> {
    tokio::select! {
        biased;
        outcome = outcome => outcome,
        () = async { obituaries.gone(connection.remote_address()).await } => Err(TransportError::NobodyListens),
    }
}

fn write_error(error: WriteError) -> TransportError {
    match error {
        WriteError::ConnectionLost(error) => transport_error(error),
        WriteError::Stopped(_) | WriteError::ZeroRttRejected => TransportError::Reset,
        WriteError::ClosedStream => TransportError::ClosedHere,
    }
}

fn read_error(error: ReadError) -> TransportError {
    match error {
        ReadError::ConnectionLost(error) => transport_error(error),
        ReadError::ClosedStream => TransportError::ClosedHere,
        _ => TransportError::Reset,
    }
}

fn break_off(connection: &Connection, reason: &str) {
    connection.close(BROKEN, reason.as_bytes());
}

/// Tells the peer that it is not whom we expect.
pub(crate) fn refuse(connection: &Connection, reason: &str) {
    connection.close(REFUSED, reason.as_bytes());
}

/// A connection's end in a link's words.
pub(crate) fn transport_error(error: ConnectionError) -> TransportError {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            let reason = String::from_utf8_lossy(&close.reason).into_owned();
            match close.error_code {
                FINISHED => TransportError::ClosedByPeer,
                REFUSED => TransportError::Refused { reason },
                BROKEN => TransportError::BrokenOff { reason },
                _ => TransportError::BrokenOff { reason: "it dropped the link".into() },
            }
        }
        ConnectionError::TransportError(error) if TLS_ALERTS.contains(&u64::from(error.code)) => {
            TransportError::Refused {
                reason: format!("the peer does not prove its identity: {}", error.reason),
            }
        }
        ConnectionError::ConnectionClosed(close) if TLS_ALERTS.contains(&u64::from(close.error_code)) => {
            let reason = String::from_utf8_lossy(&close.reason);
            TransportError::Refused { reason: format!("the peer does not accept our identity: {reason}") }
        }
        ConnectionError::TimedOut => TransportError::TimedOut,
        ConnectionError::Reset => TransportError::Reset,
        ConnectionError::LocallyClosed => TransportError::ClosedHere,
        other => TransportError::Failed { reason: other.to_string() },
    }
}
