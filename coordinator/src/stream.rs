//! Whole messages over a QUIC stream, each under a deadline.

use std::time::Duration;

use quinn::{RecvStream, SendStream};
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};
use tokio::time::timeout;

use crate::wire::{self, HEADER_BYTES, WireError};

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The bytes are no message.
    #[error(transparent)]
    Wire(#[from] WireError),
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
    let bytes = wire::encode(message)?;
    let sent = timeout(limit, stream.write_all(&bytes)).await.map_err(|_| StreamError::Silent(limit))?;
    sent.map_err(|error| StreamError::Gone(error.to_string()))
}

/// Receives one message.
pub(crate) async fn receive<T>(stream: &mut RecvStream, limit: Duration) -> Result<T, StreamError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    let gone = |error: quinn::ReadExactError| StreamError::Gone(error.to_string());
    let read = async {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header).await.map_err(gone)?;
        let mut archive = vec![0; wire::decode_header(header)?];
        stream.read_exact(&mut archive).await.map_err(gone)?;
        Ok(wire::decode(&archive)?)
    };
    timeout(limit, read).await.map_err(|_| StreamError::Silent(limit))?
}
