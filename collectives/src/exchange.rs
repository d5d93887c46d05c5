//! A group's operations in flight, as a state machine: bytes of the previous rank in, bytes for the next rank out.
//!
//! ```text
//!           submit            next_outgoing -> link -> sent
//! caller ------------> queue -----------------------------> next rank
//!           resolve      ^
//!        <-----------    +---- absorb <- link <- previous rank
//! ```
//!
//! Operations are sent strictly one after the other, so a rank that has not submitted the next one yet can leave its
//! chunks in the link: nothing of an earlier operation is behind them. Within an operation what arrived goes before
//! own chunks: it is still in the cache, and the memory in use stays small. The next operation's chunks leave while
//! the last ones of this operation are on their way here, so the link does not idle between operations.
//!
//! # Invariants
//! 1. An operation resolves once, when all its chunks have arrived and left, or with the reason why they have not.
//! 2. Arrivals are at most [`AHEAD_MAX`] operations ahead of departures, so at most so many payloads are in memory.
//!
//! Deliberately absent: time. The driver watches the clock.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::collective::{Collective, OpId};
use crate::error::{Disagreement, Phase, Place};
use crate::fault::Fault;
use crate::frame::Header;
use crate::frame_reader::{FrameReader, Part};
use crate::pool::ChunkPool;
use crate::ring::Ring;
use crate::transfer::{Arrived, Outgoing, Transfer};

/// How many operations arrivals may be ahead of departures.
const AHEAD_MAX: usize = 2;

/// The operations of one rank that are not done.
pub(crate) struct Exchange {
    ring: Ring,
    next_sequence: u64,
    /// The last operation that was numbered here and runs elsewhere.
    elsewhere: Option<OpId>,
    active: VecDeque<Active>,
    reader: FrameReader,
    /// A chunk that is announced but cannot be taken yet.
    announced: Option<Header>,
    pool: ChunkPool,
    fault: Option<Fault>,
}

struct Active {
    id: OpId,
    transfer: Box<dyn Transfer>,
    /// What arrived and travels on.
    forwards: VecDeque<Outgoing>,
    sends_left: u64,
    arrivals_left: u64,
    bytes_done: u64,
}

/// How far a piece was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absorbed {
    /// To its end.
    Whole,
    /// Up to a chunk whose turn has not come: offer the rest again after a submission or a departure.
    NotYet,
}

impl Exchange {
    /// Chunks above `chunk_bytes` are refused.
    pub(crate) fn new(ring: Ring, chunk_bytes: u32) -> Self {
        Self {
            ring,
            next_sequence: 0,
            elsewhere: None,
            active: VecDeque::new(),
            reader: FrameReader::new(chunk_bytes),
            announced: None,
            pool: ChunkPool::default(),
            fault: None,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.active.is_empty()
    }

    /// How many operations are not done.
    pub(crate) fn pending(&self) -> usize {
        self.active.len()
    }

    /// Why nothing works any more, if so.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// Where the next operation to be submitted begins.
    pub(crate) fn next_place(&self, collective: Collective) -> Place {
        let (rank, generation) = (self.ring.rank(), self.ring.generation());
        let op = OpId { sequence: self.next_sequence, collective };
        Place { rank, generation, op, phase: Phase::Queued, bytes_done: 0 }
    }

    /// Whether an operation still has something to send.
    pub(crate) fn must_send(&self) -> bool {
        self.active.iter().any(|active| active.sends_left > 0)
    }

    /// Whether an operation still waits for something to arrive.
    pub(crate) fn must_receive(&self) -> bool {
        self.active.iter().any(|active| active.arrivals_left > 0)
    }

    /// Numbers an operation that runs elsewhere.
    pub(crate) fn pass_over(&mut self, collective: Collective) {
        self.elsewhere = Some(OpId { sequence: self.next_sequence, collective });
        self.next_sequence += 1;
    }

    /// Queues an operation behind those before it.
    pub(crate) fn submit(&mut self, transfer: Box<dyn Transfer>) {
        let id = OpId { sequence: self.next_sequence, collective: transfer.collective() };
        self.submit_as(id, transfer);
    }

    /// As [`submit`](Self::submit), for a part of an operation that was numbered elsewhere.
    pub(crate) fn submit_as(&mut self, id: OpId, transfer: Box<dyn Transfer>) {
        self.next_sequence = id.sequence + 1;
        let (sends_left, arrivals_left) = (transfer.sends(), transfer.arrivals());
        let active =
            Active { id, transfer, forwards: VecDeque::new(), sends_left, arrivals_left, bytes_done: 0 };
        match &self.fault {
            Some(fault) => active.fail(&self.ring, fault),
            None => self.active.push_back(active),
        }
        self.resolve_completed();
    }

    /// What to send next, and for what, header first; acknowledge it with [`sent`](Self::sent) before asking again.
    pub(crate) fn next_outgoing(&mut self) -> Option<(Collective, Vec<Bytes>)> {
        let active = self.active.iter_mut().find(|active| active.sends_left > 0)?;
        let outgoing = active.forwards.pop_front().or_else(|| active.transfer.next_own(&self.pool))?;
        let header = active.header(&self.ring, &outgoing);
        let mut pieces = outgoing.pieces;
        pieces.insert(0, header.encode());
        Some((header.op.collective, pieces))
    }

    /// The link has taken the last outgoing chunk.
    pub(crate) fn sent(&mut self) {
        if let Some(active) = self.active.iter_mut().find(|active| active.sends_left > 0) {
            active.sends_left -= 1;
        }
        self.resolve_completed();
    }

    /// Takes bytes from the previous rank off the front of `piece`.
    pub(crate) fn absorb(&mut self, piece: &mut Bytes) -> Result<Absorbed, Disagreement> {
        loop {
            if !self.begin_announced()? {
                return Ok(Absorbed::NotYet);
            }
            match self.reader.next(piece)? {
                None => return Ok(Absorbed::Whole),
                Some(Part::Header(header)) => self.announced = Some(header),
                Some(Part::Payload(payload)) => self.absorb_payload(payload),
            }
        }
    }

    /// Ends all operations, now and in future, for one reason; the first one counts.
    pub(crate) fn fail(&mut self, fault: Fault) {
        let fault = self.fault.get_or_insert(fault);
        for active in self.active.drain(..) {
            active.fail(&self.ring, fault);
        }
    }

    /// False if the announced chunk's turn has not come.
    fn begin_announced(&mut self) -> Result<bool, Disagreement> {
        let Some(header) = self.announced.take() else { return Ok(true) };
        let (Some(arriving), departing) = (self.arriving(), self.departing()) else {
            if let Some(want) = self.elsewhere.filter(|op| header.op.sequence <= op.sequence) {
                return Err(Disagreement::Operation { got: header.op, want });
            }
            self.announced = Some(header);
            return Ok(false);
        };
        if arriving > departing + AHEAD_MAX {
            self.announced = Some(header);
            return Ok(false);
        }
        let active = &mut self.active[arriving];
        active.check(&header, &self.ring)?;
        active.transfer.begin(&header, &self.pool)?;
        if header.length == 0 {
            self.absorb_payload(Bytes::new());
        }
        Ok(true)
    }

    fn absorb_payload(&mut self, payload: Bytes) {
        let Some(arriving) = self.arriving() else { return };
        let active = &mut self.active[arriving];
        active.bytes_done += payload.len() as u64;
        if active.absorb(payload) {
            active.arrivals_left -= 1;
            self.resolve_completed();
        }
    }

    /// The operation whose chunks arrive.
    fn arriving(&self) -> Option<usize> {
        self.active.iter().position(|active| active.arrivals_left > 0)
    }

    /// The operation whose chunks leave.
    fn departing(&self) -> usize {
        self.active.iter().position(|active| active.sends_left > 0).unwrap_or(self.active.len())
    }

    fn resolve_completed(&mut self) {
        while self.active.front().is_some_and(Active::is_complete) {
            if let Some(active) = self.active.pop_front() {
                active.transfer.resolve(Ok(()));
            }
        }
    }
}

impl Active {
    fn is_complete(&self) -> bool {
        self.sends_left == 0 && self.arrivals_left == 0
    }

    fn header(&self, ring: &Ring, outgoing: &Outgoing) -> Header {
        let payload = self.transfer.payload();
        let chunk = &outgoing.chunk;
        Header {
            generation: ring.generation(),
            op: self.id,
            payload,
            pass: chunk.pass,
            index: chunk.index,
            offset: (chunk.elements.start * payload.element.bytes()) as u64,
            length: (chunk.elements.len() * payload.element.bytes()) as u32,
        }
    }

    fn check(&self, header: &Header, ring: &Ring) -> Result<(), Disagreement> {
        if header.generation != ring.generation() {
            return Err(Disagreement::Generation { got: header.generation, want: ring.generation() });
        }
        if header.op != self.id {
            return Err(Disagreement::Operation { got: header.op, want: self.id });
        }
        let want = self.transfer.payload();
        if header.payload != want {
            return Err(Disagreement::Payload { got: header.payload, want });
        }
        Ok(())
    }

    /// True when the current chunk is whole.
    fn absorb(&mut self, payload: Bytes) -> bool {
        match self.transfer.absorb(payload) {
            Arrived::Partly => false,
            Arrived::Whole(forward) => {
                self.forwards.extend(forward);
                true
            }
        }
    }

    fn fail(self, ring: &Ring, fault: &Fault) {
        let (rank, generation, phase) = (ring.rank(), ring.generation(), self.transfer.phase());
        let at = Place { rank, generation, op: self.id, phase, bytes_done: self.bytes_done };
        self.transfer.resolve(Err(fault.at(at)));
    }
}
