//! A link with faults, for tests: wraps another link's sender, or receiver.

use std::time::Duration;

use bytes::Bytes;

use super::{LinkReceiver, LinkSender};
use crate::error::TransportError;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Break off after so many bytes.
    pub cut_after_bytes: Option<u64>,
    /// Cut what is sent into pieces of at most so many bytes.
    pub piece_bytes_max: Option<usize>,
    /// Wait before each piece.
    pub delay: Option<Duration>,
    /// Flip the lowest bit of this byte of the stream.
    pub flip_bit_at: Option<u64>,
    /// Hold back so many pieces, then hand them over as one.
    pub glue_pieces: Option<usize>,
}

/// A sender with [`Faults`].
#[derive(Debug)]
pub struct Faulty<S> {
    inner: S,
    faults: Faults,
    sent_bytes: u64,
    held_back: Vec<Bytes>,
}

impl<S: LinkSender> Faulty<S> {
    /// `inner` with `faults`.
    pub fn new(inner: S, faults: Faults) -> Self {
        Self { inner, faults, sent_bytes: 0, held_back: Vec::new() }
    }

    async fn send_piece(&mut self, mut piece: Bytes) -> Result<(), TransportError> {
        if let Some(delay) = self.faults.delay {
            tokio::time::sleep(delay).await;
        }
        if let Some(cut) = self.faults.cut_after_bytes {
            let left = usize::try_from(cut.saturating_sub(self.sent_bytes)).unwrap_or(usize::MAX);
            if left < piece.len() {
                self.inner.send(piece.split_to(left)).await?;
                self.inner.break_off("cut by a fault");
                return Err(TransportError::Reset);
            }
        }
        if let Some(at) = self.faults.flip_bit_at.and_then(|at| at.checked_sub(self.sent_bytes))
            && (at as usize) < piece.len()
        {
            let mut bytes = piece.to_vec();
            bytes[at as usize] ^= 1;
            piece = bytes.into();
        }
        self.sent_bytes += piece.len() as u64;
        if self.faults.glue_pieces.is_none_or(|count| count <= self.held_back.len() + 1) {
            return self.let_go(piece).await;
        }
        self.held_back.push(piece);
        Ok(())
    }

    /// Sends `last` behind all that was held back.
    async fn let_go(&mut self, last: Bytes) -> Result<(), TransportError> {
        if self.held_back.is_empty() {
            return self.inner.send(last).await;
        }
        self.held_back.push(last);
        self.inner.send(std::mem::take(&mut self.held_back).concat().into()).await
    }
}

impl<S: LinkSender> LinkSender for Faulty<S> {
    async fn send(&mut self, mut bytes: Bytes) -> Result<(), TransportError> {
        while !bytes.is_empty() {
            let length = self.faults.piece_bytes_max.unwrap_or(usize::MAX).clamp(1, bytes.len());
            self.send_piece(bytes.split_to(length)).await?;
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), TransportError> {
        self.inner.finish().await
    }

    async fn closed(&mut self) -> TransportError {
        self.inner.closed().await
    }

    fn break_off(&mut self, reason: &str) {
        self.inner.break_off(reason);
    }
}

/// Pieces that a [`Gluing`] receiver hands over as one, at most.
const GLUED_MAX: usize = 4;

/// A receiver that hands over as one what is there at once: one piece, then two, then more, and again one. Networks do that
/// all the time, and what comes with something else must not wait for it.
#[derive(Debug)]
pub struct Gluing<R> {
    inner: R,
    pieces: usize,
}

impl<R: LinkReceiver> Gluing<R> {
    /// Wraps a receiver.
    pub fn new(inner: R) -> Self {
        Self { inner, pieces: 0 }
    }
}

impl<R: LinkReceiver> LinkReceiver for Gluing<R> {
    async fn receive(&mut self) -> Result<Option<Bytes>, TransportError> {
        let Some(first) = self.inner.receive().await? else { return Ok(None) };
        self.pieces = self.pieces % GLUED_MAX + 1;
        let mut glued = vec![first];
        while glued.len() < self.pieces {
            tokio::select! {
                biased;
                // An end, or an error, will be said again.
                next = self.inner.receive() => match next {
                    Ok(Some(next)) => glued.push(next),
                    _ => break,
                },
                () = std::future::ready(()) => break,
            }
        }
        Ok(Some(glued.concat().into()))
    }

    fn close(&mut self) {
        self.inner.close();
    }

    fn break_off(&mut self, reason: &str) {
        self.inner.break_off(reason);
    }
}
