//! A link within one process: a bounded channel of pieces, which travel without a copy.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::{LinkReceiver, LinkSender};
use crate::error::TransportError;

/// How many pieces wait in a link at most.
pub const PIECES_MAX: usize = 8;

/// Who has ended the link, and how.
#[derive(Clone, Debug, PartialEq)]
enum State {
    Open,
    /// The receiver wants nothing more.
    Closed,
    /// One side broke off: the sender, if true.
    Broken {
        by_sender: bool,
        reason: String,
    },
}

/// The sending half.
#[derive(Debug)]
pub struct MemorySender {
    /// `None` once finished.
    pieces: Option<mpsc::Sender<Bytes>>,
    state: Arc<watch::Sender<State>>,
}

/// The receiving half.
#[derive(Debug)]
pub struct MemoryReceiver {
    pieces: mpsc::Receiver<Bytes>,
    state: Arc<watch::Sender<State>>,
}

/// A link that holds at most [`PIECES_MAX`] pieces.
pub fn link() -> (MemorySender, MemoryReceiver) {
    let (sender, receiver) = mpsc::channel(PIECES_MAX);
    let state = Arc::new(watch::Sender::new(State::Open));
    let sender = MemorySender { pieces: Some(sender), state: state.clone() };
    (sender, MemoryReceiver { pieces: receiver, state })
}

impl State {
    /// The end of the link as one side sees it.
    fn seen_by(&self, sender: bool) -> Option<TransportError> {
        match self {
            Self::Open => None,
            Self::Closed if sender => Some(TransportError::ClosedByPeer),
            Self::Closed => Some(TransportError::ClosedHere),
            Self::Broken { by_sender, .. } if *by_sender == sender => Some(TransportError::ClosedHere),
            Self::Broken { reason, .. } => Some(TransportError::BrokenOff { reason: reason.clone() }),
        }
    }
}

fn end(state: &watch::Sender<State>, with: State) {
    state.send_if_modified(|state| {
        let first = *state == State::Open;
        if first {
            *state = with;
        }
        first
    });
}

async fn ended(state: &watch::Sender<State>, sender: bool) -> TransportError {
    let mut changes = state.subscribe();
    let last = changes.wait_for(|state| *state != State::Open).await;
    last.ok().and_then(|state| state.seen_by(sender)).unwrap_or(TransportError::Reset)
}

impl LinkSender for MemorySender {
    async fn send(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let Some(pieces) = &self.pieces else { return Err(TransportError::ClosedHere) };
        tokio::select! {
            biased;
            ended = ended(&self.state, true) => Err(ended),
            sent = pieces.send(bytes) => sent.map_err(|_| TransportError::ClosedByPeer),
        }
    }

    async fn finish(&mut self) -> Result<(), TransportError> {
        let Some(pieces) = self.pieces.take() else { return Ok(()) };
        tokio::select! {
            biased;
            ended = ended(&self.state, true) => match ended {
                TransportError::ClosedByPeer => Ok(()),
                broken => Err(broken),
            },
            // All slots are free again: the receiver has taken every piece.
            _ = pieces.reserve_many(PIECES_MAX) => Ok(()),
        }
    }

    async fn closed(&mut self) -> TransportError {
        ended(&self.state, true).await
    }

    fn break_off(&mut self, reason: &str) {
        end(&self.state, State::Broken { by_sender: true, reason: reason.into() });
    }
}

impl Drop for MemorySender {
    /// A sender that goes away without a word has died.
    fn drop(&mut self) {
        if self.pieces.is_some() {
            self.break_off("its sender is gone");
        }
    }
}

impl LinkReceiver for MemoryReceiver {
    async fn receive(&mut self) -> Result<Option<Bytes>, TransportError> {
        tokio::select! {
            biased;
            ended = ended(&self.state, false) => Err(ended),
            piece = self.pieces.recv() => Ok(piece),
        }
    }

    fn close(&mut self) {
        end(&self.state, State::Closed);
    }

    fn break_off(&mut self, reason: &str) {
        end(&self.state, State::Broken { by_sender: false, reason: reason.into() });
    }
}

impl Drop for MemoryReceiver {
    /// A receiver that goes away without a word has died, unless the stream had come to its end.
    fn drop(&mut self) {
        if self.pieces.is_closed() && self.pieces.is_empty() {
            return self.close();
        }
        self.break_off("its receiver is gone");
    }
}
