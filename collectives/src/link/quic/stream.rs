//! The two halves of a link: one stream of a connection, written in place and read in place.

use bytes::Bytes;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};

use crate::error::TransportError;
use crate::link::{LinkReceiver, LinkSender};

/// The receiver has all it wants.
const FINISHED: VarInt = VarInt::from_u32(1);
/// One side broke off; the reason says why.
const BROKEN: VarInt = VarInt::from_u32(2);
/// The peer is not whom we expect; the reason says why.
const REFUSED: VarInt = VarInt::from_u32(3);
/// How much a read may return: more than a datagram carries.
const PIECE_BYTES_MAX: usize = 1 << 20;
/// TLS alerts are reported as QUIC errors from here on.
const TLS_ALERTS: std::ops::Range<u64> = 0x100..0x200;

/// The sending half.
#[derive(Debug)]
pub(crate) struct QuicSender {
    connection: Connection,
    stream: SendStream,
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct QuicReceiver {
    connection: Connection,
    stream: RecvStream,
}

impl QuicSender {
    pub(crate) fn new(connection: Connection, stream: SendStream) -> Self {
        Self { connection, stream }
    }
}

impl QuicReceiver {
    pub(crate) fn new(connection: Connection, stream: RecvStream) -> Self {
        Self { connection, stream }
    }
}

impl LinkSender for QuicSender {
    async fn send(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        self.stream.write_chunk(bytes).await.map_err(|error| match error {
            WriteError::ConnectionLost(error) => transport_error(error),
            WriteError::Stopped(_) | WriteError::ZeroRttRejected => TransportError::Reset,
            WriteError::ClosedStream => TransportError::ClosedHere,
        })
    }

    async fn finish(&mut self) -> Result<(), TransportError> {
        // An error says that the stream has ended already, and then so does `closed`.
        let _ = self.stream.finish();
        match self.closed().await {
            TransportError::ClosedByPeer => Ok(()),
            broken => Err(broken),
        }
    }

    async fn closed(&mut self) -> TransportError {
        transport_error(self.connection.closed().await)
    }

    fn break_off(&mut self, reason: &str) {
        break_off(&self.connection, reason);
    }
}

impl LinkReceiver for QuicReceiver {
    async fn receive(&mut self) -> Result<Option<Bytes>, TransportError> {
        match self.stream.read_chunk(PIECE_BYTES_MAX, true).await {
            Ok(Some(chunk)) => Ok(Some(chunk.bytes)),
            Ok(None) => {
                self.close();
                Ok(None)
            }
            Err(ReadError::ConnectionLost(error)) => Err(transport_error(error)),
            Err(ReadError::ClosedStream) => Err(TransportError::ClosedHere),
            Err(_) => Err(TransportError::Reset),
        }
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
