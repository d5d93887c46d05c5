//! Why a link, a collective or a node failed, said so that the reader knows who, where and what next.

use std::fmt;
use std::time::Duration;

use crate::collective::OpId;
use crate::frame::FrameError;
use crate::{Generation, Rank};

/// Why bytes did not get through to, or from, a neighbour.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The neighbour ended the link in an orderly way.
    #[error("the peer closed the link")]
    ClosedByPeer,
    /// The neighbour broke the link off and said why.
    #[error("the peer broke off: {reason}")]
    BrokenOff {
        /// In the peer's words.
        reason: String,
    },
    /// The neighbour, or this side, would not talk to the other's identity.
    #[error("refused: {reason}")]
    Refused {
        /// Which check failed.
        reason: String,
    },
    /// Nothing was heard for as long as the transport waits.
    #[error("the peer fell silent")]
    TimedOut,
    /// The neighbour does not know this connection (any more).
    #[error("the link was reset")]
    Reset,
    /// Its host says, again and again, that nobody listens where it was.
    #[error("the peer's process has ended: its host answers that nobody listens there")]
    NobodyListens,
    /// Its process has ended without a word.
    #[error("the peer's process has ended")]
    ProcessEnded,
    /// This side ended the link.
    #[error("the link was closed on this side")]
    ClosedHere,
    /// The transport itself failed.
    #[error("the transport failed: {reason}")]
    Failed {
        /// In the transport's words.
        reason: String,
    },
}

/// Where in its work a rank was when something went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The rank that reports.
    pub rank: Rank,
    /// In which incarnation of the ring.
    pub generation: Generation,
    /// The operation that was broken off.
    pub op: OpId,
    /// How far it had come.
    pub phase: Phase,
    /// Payload bytes that had arrived for it.
    pub bytes_done: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, generation, op, phase, bytes_done } = self;
        write!(f, "rank {rank}, generation {generation}, {op}, {phase} ({bytes_done} bytes arrived)")
    }
}

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It waits behind earlier operations.
    Queued,
    /// Partial sums travel: this pass was the last in which something arrived.
    Reducing {
        /// Hops around the ring; over shared memory, chunks; where hosts are mixed, pieces.
        pass: u32,
    },
    /// Results travel: this pass was the last in which something arrived.
    Copying {
        /// As above.
        pass: u32,
    },
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Queued => f.write_str("before anything arrived"),
            Self::Reducing { pass } => write!(f, "reducing in pass {pass}"),
            Self::Copying { pass } => write!(f, "copying in pass {pass}"),
        }
    }
}

/// Why a collective did not complete. Inputs are never modified, except by operations in place: keep them, form a new ring,
/// submit them again.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// A neighbour's link broke: form a new ring from those who are left.
    #[error("{at}: lost rank {peer}: {source}")]
    PeerLost {
        /// Where this rank was.
        at: Place,
        /// The neighbour behind the broken link (the first to die may be further away: see the source).
        peer: Rank,
        /// What the link says.
        source: TransportError,
    },
    /// Ranks do not do the same: a bug or a wrong configuration, so a new ring will not help.
    #[error("{at}: rank {peer} does something else: {disagreement}")]
    Mismatch {
        /// Where this rank was.
        at: Place,
        /// The neighbour that sent it.
        peer: Rank,
        /// What differs.
        disagreement: Disagreement,
    },
    /// Nothing moved for the whole timeout, though the link stands: somebody in the ring is stuck.
    #[error("{at}: nothing moved for {timeout:?}; rank {peer} or one before it is stuck")]
    TimedOut {
        /// Where this rank was.
        at: Place,
        /// The neighbour from which data was due.
        peer: Rank,
        /// How long was waited.
        timeout: Duration,
    },
    /// Ended on this side, by [`Group::cancel`](crate::Group::cancel).
    #[error("{at}: cancelled: {cause}")]
    Cancelled {
        /// Where this rank was.
        at: Place,
        /// As given to `cancel`.
        cause: String,
    },
    /// The group was closed, or its driver has ended, before the operation was done.
    #[error("{at}: the group is closed")]
    Closed {
        /// Where this rank was.
        at: Place,
    },
    /// The call itself makes no sense; nothing was sent.
    #[error("rank {rank}: {reason}")]
    InvalidInput {
        /// The rank that was asked.
        rank: Rank,
        /// What is wrong with the arguments.
        reason: String,
    },
}

/// Why a ring was not joined.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// A neighbour's identity, or ours in its eyes, is not the expected one.
    #[error(
        "rank {rank} and {name}, generation {generation}: {reason}; check that both hold certificates of this run"
    )]
    Refused {
        /// The rank that joins.
        rank: Rank,
        /// The neighbour's name.
        name: String,
        /// The generation to be joined.
        generation: Generation,
        /// Which check failed.
        reason: String,
    },
    /// A neighbour's link did not come up.
    #[error("rank {rank} could not link to {name} in generation {generation}: {source}")]
    Unreachable {
        /// The rank that joins.
        rank: Rank,
        /// The neighbour's name.
        name: String,
        /// The generation to be joined.
        generation: Generation,
        /// What the link says.
        source: TransportError,
    },
    /// A neighbour did not appear within the timeout.
    #[error("rank {rank} waited {timeout:?} for {name} in generation {generation}")]
    TimedOut {
        /// The rank that joins.
        rank: Rank,
        /// The neighbour's name.
        name: String,
        /// The generation to be joined.
        generation: Generation,
        /// How long was waited.
        timeout: Duration,
    },
    /// The node was asked to join a newer generation, or has done so already.
    #[error("rank {rank}: generation {generation} is over, generation {newest} was asked for")]
    Stale {
        /// The rank that joins.
        rank: Rank,
        /// The generation to be joined.
        generation: Generation,
        /// The newest one this node was asked to join.
        newest: Generation,
    },
    /// The ring broke while its ranks decided on a transport.
    #[error("rank {rank}, generation {generation}, could not decide on a transport: {source}")]
    Undecided {
        /// The rank that joins.
        rank: Rank,
        /// The generation to be joined.
        generation: Generation,
        /// What happened.
        source: Box<CollectiveError>,
    },
    /// Shared memory was asked for, and cannot be had.
    #[error("rank {rank} cannot share memory in generation {generation}: {reason}; allow QUIC")]
    NotShared {
        /// The rank that joins.
        rank: Rank,
        /// The generation to be joined.
        generation: Generation,
        /// Why not.
        reason: String,
    },
    /// The node has ended.
    #[error("the node has ended; start another")]
    NodeEnded,
}

/// What two ranks do differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Disagreement {
    /// The bytes are no frame of this version.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// A frame of another incarnation of the ring.
    #[error("it is in generation {got}, this rank in {want}")]
    Generation {
        /// The peer's.
        got: Generation,
        /// Ours.
        want: Generation,
    },
    /// Another operation, or the same in another order.
    #[error("it runs {got}, this rank {want}")]
    Operation {
        /// The peer's.
        got: OpId,
        /// Ours.
        want: OpId,
    },
    /// Other elements, another reduction, or another length.
    #[error("its payload is {got}, this rank's {want}")]
    Payload {
        /// The peer's.
        got: Payload,
        /// Ours.
        want: Payload,
    },
    /// Memory that it does not share.
    #[error("it announces {length} bytes at {offset} of its memory, which it does not share")]
    Outside {
        /// The first byte.
        offset: u64,
        /// How many were to be read.
        length: u64,
    },
    /// Another distance between what is reduced and what is copied: it counts this host's processors otherwise.
    #[error("it copies {got} chunks behind what it reduces, this rank {want}")]
    Pace {
        /// The peer's.
        got: u64,
        /// Ours.
        want: u64,
    },
    /// More messages, or bytes of them, than may lie here before they are asked for.
    #[error("it sends more than {messages} messages, or {bytes} bytes with them, that nobody asked for")]
    Unasked {
        /// The most messages.
        messages: usize,
        /// The most bytes that come with them.
        bytes: usize,
    },
    /// A chunk that is not the next one due.
    #[error("chunk {index} of pass {pass} at byte {offset} with {length} bytes is not what is due")]
    Chunk {
        /// Hops of the chunk.
        pass: u32,
        /// Its number in the segment.
        index: u32,
        /// Its first byte in the payload.
        offset: u64,
        /// Its bytes.
        length: u32,
    },
}

/// What is sent: elements, how they are combined, and how many bytes they are in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The type of the elements.
    pub element: crate::ElementKind,
    /// How they are combined, if they are.
    pub reduction: Option<crate::ReductionKind>,
    /// All bytes of the payload, over all segments.
    pub total_bytes: u64,
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of {:?}", self.total_bytes, self.element)?;
        self.reduction.map_or(Ok(()), |reduction| write!(f, " under {reduction:?}"))
    }
}
