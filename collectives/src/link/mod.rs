//! The contract of a link: an ordered, reliable, bounded stream of bytes to one neighbour.
//!
//! A link has two halves on two ranks: bytes given to the [`LinkSender`] come out of the [`LinkReceiver`] in order,
//! cut into pieces anywhere. Every implementation passes the suite in `contract.rs`:
//!
//! 1. What was sent before [`finish`](LinkSender::finish) arrives whole, then the stream ends.
//! 2. A sender whose receiver does not read waits, after a bounded number of bytes.
//! 3. Either half learns of the other's end at once: an orderly one as the end of the stream or
//!    [`TransportError::ClosedByPeer`], a broken one as [`TransportError::BrokenOff`] with the reason.
//! 4. After the first error or the end of the stream, every further call says the same and none of them waits.

#[cfg(test)]
mod contract;
pub mod faulty;
pub mod memory;
pub mod quic;

use std::future::Future;

use bytes::Bytes;

use crate::error::TransportError;

/// The half that sends to the next rank.
pub trait LinkSender: Send + 'static {
    /// Hands bytes to the link; waits while it is full.
    ///
    /// # Errors
    /// If the link has ended. Bytes accepted earlier may then not have arrived.
    fn send(&mut self, bytes: Bytes) -> impl Future<Output = Result<(), TransportError>> + Send;

    /// Ends the stream after what was sent; waits until the neighbour has it all.
    ///
    /// # Errors
    /// If the link broke before.
    fn finish(&mut self) -> impl Future<Output = Result<(), TransportError>> + Send;

    /// Waits until the neighbour ends the link.
    fn closed(&mut self) -> impl Future<Output = TransportError> + Send;

    /// Breaks off at once; the neighbour is told the reason.
    fn break_off(&mut self, reason: &str);
}

/// The half that receives from the previous rank.
pub trait LinkReceiver: Send + 'static {
    /// The next piece, never empty; `None` at the end of the stream. May be dropped and called again without loss.
    ///
    /// # Errors
    /// If the link has broken.
    fn receive(&mut self) -> impl Future<Output = Result<Option<Bytes>, TransportError>> + Send;

    /// Ends the link in an orderly way: nothing more is wanted.
    fn close(&mut self);

    /// Breaks off at once; the neighbour is told the reason.
    fn break_off(&mut self, reason: &str);
}
