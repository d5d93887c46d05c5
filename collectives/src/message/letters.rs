//! What a message is at either end, with its element type forgotten.

use std::sync::Arc;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::error::{CollectiveError, Payload};
use crate::reduction::Element;

/// Who is told how sending ended.
pub(crate) type Sent = Box<dyn FnOnce(Result<(), CollectiveError>) + Send>;
/// Who is given what was received.
pub(crate) type Received<E> = Box<dyn FnOnce(Result<Buffer<E>, CollectiveError>) + Send>;

/// What is to be sent.
pub(crate) struct Letter {
    pub(crate) payload: Payload,
    pub(crate) bytes: Bytes,
    /// Where the receiver may read it, in the sender's memory: as it is named there.
    pub(crate) lies_at: Option<u32>,
    pub(crate) told: Sent,
}

/// Where a message is to be put.
pub(crate) trait Intake: Send {
    /// What is expected.
    fn payload(&self) -> Payload;
    /// Puts bytes there; never beyond what is expected.
    fn write(&mut self, at: usize, bytes: &[u8]);
    /// Hands over what came, or the reason why nothing did.
    fn resolve(self: Box<Self>, outcome: Result<(), CollectiveError>);
}

/// Elements of one type, in a buffer of just the length that is expected.
pub(crate) struct Into<E> {
    pub(crate) output: Buffer<E>,
    pub(crate) given: Received<E>,
}

struct Lent<E>(Arc<Buffer<E>>);

impl<E: Element> AsRef<[u8]> for Lent<E> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Letter {
    /// Of these elements, which lie there.
    pub(crate) fn of<E: Element>(input: Arc<Buffer<E>>, lies_at: Option<u32>, told: Sent) -> Self {
        let payload = payload_of::<E>(input.len());
        Self { payload, bytes: Bytes::from_owner(Lent(input)), lies_at, told }
    }
}

impl<E: Element> Intake for Into<E> {
    fn payload(&self) -> Payload {
        payload_of::<E>(self.output.len())
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let output: &mut [u8] = bytemuck::cast_slice_mut(&mut self.output[..]);
        output[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn resolve(self: Box<Self>, outcome: Result<(), CollectiveError>) {
        let Self { output, given } = *self;
        given(outcome.map(|()| output));
    }
}

fn payload_of<E: Element>(len: usize) -> Payload {
    Payload { element: E::KIND, reduction: None, total_bytes: (len * size_of::<E>()) as u64 }
}
