//! One operation's rounds within a host: what they have in common, whatever the operation.

use std::ops::Range;
use std::sync::Arc;

use super::{Between, Ended, LEADER, PATIENCE, PIECE_ALIGNMENT, PIECE_CHUNKS};
use crate::buffer::Buffer;
use crate::collective::{Collective, OpId};
use crate::error::{Payload, Phase, Place};
use crate::pending::Pending;
use crate::reduction::Element;
use crate::schedule::Parts;
use crate::schedule::ring::Schedule;
use crate::shm::calls::Call;
use crate::shm::engine::{Engine, Turn};
use crate::transfer::{Buffers, Kernel, TypedTransfer};
use crate::{CollectiveError, ReductionKind};

/// An operation on its way, as its rank in its host sees it.
pub(super) struct Within<'a> {
    pub(super) between: &'a Between,
    pub(super) engine: &'a Engine,
    pub(super) op: OpId,
    pub(super) payload: Payload,
    pub(super) phase: Phase,
    pub(super) bytes_done: u64,
}

impl Within<'_> {
    /// Where it is.
    pub(super) fn place(&self) -> Place {
        let whole = self.between.whole;
        let (rank, generation) = (whole.rank(), whole.generation());
        Place { rank, generation, op: self.op, phase: self.phase, bytes_done: self.bytes_done }
    }

    /// A round over so many elements, without buffers.
    pub(super) fn call<'c, E: Element>(
        &self,
        turn: &mut Turn,
        collective: Collective,
        len: usize,
    ) -> Call<'c> {
        let op = OpId { sequence: turn.rounds, collective };
        turn.rounds += 1;
        let total_bytes = (len * size_of::<E>()) as u64;
        Call {
            op,
            part_of: Some((self.op, self.payload)),
            payload: Payload { total_bytes, ..self.payload },
            parts: Parts::Even { len, ranks: self.engine.ring().world_size() },
            fold: None,
            input: Some(&[]),
            input_at: None,
            output: &mut [],
            output_at: None,
        }
    }

    /// Runs a round.
    pub(super) fn run(&mut self, turn: &mut Turn, call: Call<'_>) -> Result<(), Ended> {
        let outcome = self.engine.run(turn, call);
        self.bytes_done += turn.bytes_done;
        Ok(outcome?)
    }

    /// Runs a round that begins when the leader has heard of other hosts.
    pub(super) fn run_after_network(&mut self, turn: &mut Turn, call: Call<'_>) -> Result<(), Ended> {
        self.engine.set_patience(if self.is_leader() { 1 } else { PATIENCE });
        let outcome = self.run(turn, call);
        self.engine.set_patience(1);
        outcome
    }

    /// Where elements of a buffer lie in the arena, if peers may read them there.
    pub(super) fn offset_of<E: Element>(&self, buffer: &Buffer<E>, elements: &Range<usize>) -> Option<usize> {
        let offset = self.engine.offset_of(buffer)? + elements.start * size_of::<E>();
        offset.is_multiple_of(PIECE_ALIGNMENT).then_some(offset)
    }

    /// Sends round the ring of leaders what is this host's.
    pub(super) fn send<E: Element>(
        &self,
        parts: Parts,
        reduction: Option<(ReductionKind, Kernel<E>)>,
        (input, input_holds): (Arc<Buffer<E>>, Range<usize>),
        (output, output_holds): (Buffer<E>, Range<usize>),
    ) -> Pending<Buffer<E>> {
        let at = self.place();
        let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
        let Some((leaders, chunk_bytes)) = &self.between.leaders else { return pending };
        let buffers = Buffers { input: Some(input), input_holds, output, output_holds };
        let chunk_len = *chunk_bytes as usize / size_of::<E>();
        let schedule = Schedule::new(leaders.ring, self.op.collective, parts, chunk_len);
        let resolve = Box::new(move |outcome| drop(resolve.send(outcome)));
        let transfer = TypedTransfer::new(schedule, reduction, buffers, resolve);
        leaders.update(|exchange| exchange.submit_as(self.op, Box::new(transfer)));
        pending
    }

    /// Whether nobody else is on this host.
    pub(super) fn is_alone(&self) -> bool {
        self.engine.ring().world_size().get() == 1
    }

    pub(super) fn is_leader(&self) -> bool {
        self.engine.ring().rank() == LEADER
    }
}

/// Elements of a piece: as many as begin and end where regions of arenas do, so that peers may read a piece where it lies.
pub(super) fn piece_len<E: Element>(engine: &Engine, shares: usize) -> usize {
    let bytes = PIECE_CHUNKS * engine.chunk_bytes() / shares.max(1);
    let len = bytes.next_multiple_of(PIECE_ALIGNMENT) / size_of::<E>();
    // Elements of three bytes fill what is aligned only so many at a time.
    let whole = if PIECE_ALIGNMENT.is_multiple_of(size_of::<E>()) { 1 } else { PIECE_ALIGNMENT };
    (len - len % whole).max(whole)
}
