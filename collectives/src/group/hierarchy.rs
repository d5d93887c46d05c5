//! All-reduce where some ranks share a host: the ranks of a host reduce to its leader over shared memory, the leaders
//! all-reduce round a ring of theirs, and each spreads the result within its host.
//!
//! The payload goes through this in pieces. While one is under way between the hosts, later ones are reduced within:
//!
//! ```text
//! within a host      r0 r1 r2 r3          s0 r4    s1 r5    s2 ..       r: reduce to the leader   s: spread from it
//! between leaders       0------> 1------> 2------> 3------> 4-------
//! ```
//!
//! The slow links between hosts so carry `2 (h - 1) / h` of the payload for `h` hosts, once for each host, and not once for
//! each rank; and a small message takes `2 (h - 1)` hops of the network.
//!
//! # Invariants
//! 1. All ranks of a host run the same rounds in the same order: they depend on the payload's length, and on nothing else.
//! 2. The leaders' ring is told of the whole operation: a piece is taken only as this piece of this operation.
//! 3. At most [`WINDOW`] pieces are under way, so memory has a bound.
//! 4. The order of additions is a function of the layout of ranks on hosts, of the length, and of the size of chunks; all ranks
//!    receive the same bits.
//!
//! Deliberately absent: overlap of one operation's last pieces with the next one's first. Ranks of a host would have to agree
//! on who has submitted what.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::order::{Combine, Order};
use super::{Linked, PENDING_MAX};
use crate::alarm::Alarm;
use crate::buffer::Buffer;
use crate::collective::{Collective, OpId};
use crate::driver::Shared;
use crate::error::{CollectiveError, Payload, Phase, Place};
use crate::fault::Fault;
use crate::pending::Pending;
use crate::rank::{Rank, WorldSize};
use crate::recorder::Recorder;
use crate::reduction::Element;
use crate::ring::Ring;
use crate::schedule::Parts;
use crate::schedule::ring::Schedule;
use crate::shm::calls::Call;
use crate::shm::engine::{Engine, Job, Turn};
use crate::transfer::{Buffers, TypedTransfer};

/// Pieces under way between hosts at most.
const WINDOW: usize = 16;
/// Chunks of a ring in a piece.
const PIECE_CHUNKS: usize = 4;
/// Where pieces begin: as regions of arenas do, so that peers may read a piece of an input where it lies.
const PIECE_ALIGNMENT: usize = 64;
/// A leader whose piece crosses a slow network says itself when it stands still: the others give it so many timeouts.
const PATIENCE: u32 = 20;
/// Leaders have this rank among those of their host.
const LEADER: Rank = Rank(0);

/// What a ring has beside it where some of its ranks share a host.
pub(crate) struct Hierarchy {
    pub(super) alarm: Arc<Alarm>,
    /// Of this host: perhaps with this rank alone.
    pub(super) engine: Arc<Engine>,
    pub(super) thread: Option<JoinHandle<()>>,
    /// The leaders' ring, where this rank is one.
    pub(super) leaders: Option<Linked>,
}

impl Hierarchy {
    pub(crate) fn new((engine, thread): (Arc<Engine>, JoinHandle<()>), leaders: Option<Linked>) -> Self {
        Self { alarm: Arc::default(), engine, thread: Some(thread), leaders }
    }

    /// From now on the ring of all ranks and these parts end together.
    pub(super) fn join(&self, whole: &Arc<Shared>) {
        whole.join(&self.alarm);
        self.engine.join(&self.alarm);
        if let Some(leaders) = &self.leaders {
            leaders.shared.join(&self.alarm);
        }
    }

    /// Ends everything at once.
    pub(super) fn raise(&self, fault: &Fault) {
        self.alarm.raise(fault);
    }

    /// Queues an operation that the ring of all ranks numbers.
    pub(super) fn submit<E: Element, T: Send + 'static>(
        &self,
        whole: &Shared,
        order: Order<E>,
        recorder: Arc<Recorder>,
        finish: impl FnOnce(Buffer<E>) -> T + Send + 'static,
    ) -> Pending<T> {
        let (collective, bytes) = (order.collective, order.bytes());
        let between = Between { alarm: self.alarm.clone(), whole: whole.ring, leaders: self.leaders() };
        whole.update(|exchange| {
            let at = exchange.next_place(collective);
            if let Some(fault) = exchange.fault() {
                return Pending::failed(fault.at(at));
            }
            let queued = self.engine.submit(collective, PENDING_MAX, |_| {
                let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
                recorder.begin(at.op, bytes);
                let job: Job = Box::new(move |engine, turn| {
                    let outcome = between.run(engine, turn, at.op, order);
                    recorder.end(at.op, &outcome);
                    // Who dropped its `Pending` does not want to know.
                    Box::new(move || drop(resolve.send(outcome.map(finish))))
                });
                (job, pending)
            });
            match queued {
                Ok(pending) => {
                    exchange.pass_over(collective);
                    pending
                }
                Err(_) => Pending::failed(super::order::too_many(at)),
            }
        })
    }

    fn leaders(&self) -> Option<(Arc<Shared>, u32)> {
        self.leaders.as_ref().map(|leaders| (leaders.shared.clone(), leaders.chunk_bytes))
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        self.engine.close();
    }
}

/// What an operation needs beside its host.
struct Between {
    alarm: Arc<Alarm>,
    whole: Ring,
    /// With the size of chunks, where this rank is a leader.
    leaders: Option<(Arc<Shared>, u32)>,
}

impl Between {
    /// Runs an operation; the turn is ours.
    fn run<E: Element>(
        &self,
        engine: &Engine,
        turn: &mut Turn,
        op: OpId,
        order: Order<E>,
    ) -> Result<Buffer<E>, CollectiveError> {
        let mut rounds = Rounds::new(self, engine, op, &order);
        let Buffers { input, mut output, .. } = order.buffers;
        let outcome = rounds.run(turn, input.as_ref(), &mut output);
        let Rounds { phase, bytes_done, .. } = rounds;
        outcome.map(|()| output).map_err(|Ended| {
            // Where no alarm was raised, the parts were closed in an orderly way.
            let fault = self.alarm.fault().or(engine.fault()).unwrap_or(&Fault::Closed);
            fault.at(self.place(op, phase, bytes_done))
        })
    }

    fn place(&self, op: OpId, phase: Phase, bytes_done: u64) -> Place {
        Place { rank: self.whole.rank(), generation: self.whole.generation(), op, phase, bytes_done }
    }
}

/// What a leader sends round its ring.
struct Held<E> {
    buffer: Arc<Buffer<E>>,
    /// The elements of the payload that are in it.
    holds: Range<usize>,
}

/// A part has ended, and with it all: the alarm knows why.
struct Ended;

impl From<CollectiveError> for Ended {
    fn from(_: CollectiveError) -> Self {
        Self
    }
}

/// One operation on its way through its rounds.
struct Rounds<'a, E> {
    between: &'a Between,
    engine: &'a Engine,
    op: OpId,
    payload: Payload,
    combine: Combine<E>,
    len: usize,
    piece_len: usize,
    /// Pieces between hosts, the oldest first; leaders have them.
    under_way: VecDeque<Pending<Buffer<E>>>,
    phase: Phase,
    bytes_done: u64,
}

impl<'a, E: Element> Rounds<'a, E> {
    fn new(between: &'a Between, engine: &'a Engine, op: OpId, order: &Order<E>) -> Self {
        let combine = order.reduction.expect("what is carried here is reduced");
        let piece_bytes = (PIECE_CHUNKS * engine.chunk_bytes()).next_multiple_of(PIECE_ALIGNMENT);
        Self {
            between,
            engine,
            op,
            payload: order.payload(),
            combine,
            len: order.parts.len(),
            piece_len: piece_bytes / size_of::<E>(),
            under_way: VecDeque::new(),
            phase: Phase::Queued,
            bytes_done: 0,
        }
    }

    /// All rounds, in the order that depends on nothing but the payload's length.
    fn run(
        &mut self,
        turn: &mut Turn,
        input: Option<&Arc<Buffer<E>>>,
        output: &mut Buffer<E>,
    ) -> Result<(), Ended> {
        // One at least: what differs between ranks is to be found out.
        let pieces = self.len.div_ceil(self.piece_len).max(1);
        let window = pieces.min(WINDOW);
        for step in 0..pieces + window {
            if step < pieces {
                self.phase = Phase::Reducing { pass: step as u32 };
                let piece = self.piece(step);
                let sum = self.reduce(turn, piece.clone(), input, output)?;
                if let (Some(leaders), Some(sum)) = (&self.between.leaders, sum) {
                    self.under_way.push_back(self.send(leaders, piece, sum));
                }
            }
            if let Some(step) = step.checked_sub(window) {
                self.phase = Phase::Copying { pass: step as u32 };
                self.spread(turn, self.piece(step), output)?;
            }
        }
        Ok(())
    }

    fn piece(&self, index: usize) -> Range<usize> {
        let start = index * self.piece_len;
        start..self.len.min(start + self.piece_len)
    }

    /// Reduces a piece within the host; the leader receives the sum.
    fn reduce(
        &mut self,
        turn: &mut Turn,
        piece: Range<usize>,
        input: Option<&Arc<Buffer<E>>>,
        output: &Buffer<E>,
    ) -> Result<Option<Held<E>>, Ended> {
        let all = input.map_or(output, |input| input);
        if self.is_alone() {
            return Ok(Some(match input {
                Some(input) => Held { buffer: input.clone(), holds: 0..self.len },
                None => {
                    let mut copy = self.engine.scratch(piece.len());
                    copy.copy_from_slice(&all[piece.clone()]);
                    Held { buffer: Arc::new(copy), holds: piece }
                }
            }));
        }
        let mut sum = self.engine.scratch::<E>(if self.is_leader() { piece.len() } else { 0 });
        let call = Call {
            fold: Some(self.combine.partial()),
            input: Some(bytemuck::cast_slice(&all[piece.clone()])),
            input_at: self.engine.offset_of(all).map(|offset| offset + piece.start * size_of::<E>()),
            output: bytemuck::cast_slice_mut(&mut sum),
            ..self.call(turn, Collective::Reduce { root: LEADER }, piece.len())
        };
        self.within(turn, call)?;
        Ok(self.is_leader().then(|| Held { buffer: Arc::new(sum), holds: piece }))
    }

    /// Sends a piece round the ring of leaders.
    fn send(
        &self,
        (leaders, chunk_bytes): &(Arc<Shared>, u32),
        piece: Range<usize>,
        sum: Held<E>,
    ) -> Pending<Buffer<E>> {
        let at = self.between.place(self.op, self.phase, self.bytes_done);
        let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
        let output = self.engine.scratch(piece.len());
        let Held { buffer, holds } = sum;
        let buffers =
            Buffers { input: Some(buffer), input_holds: holds, output, output_holds: piece.clone() };
        let (ring, ranks) = (leaders.ring, self.between.whole.world_size());
        let parts = Parts::Piece { len: self.len, elements: piece, members: ring.world_size(), ranks };
        let chunk_len = *chunk_bytes as usize / size_of::<E>();
        let schedule = Schedule::new(ring, self.op.collective, parts, chunk_len);
        let resolve = Box::new(move |outcome| drop(resolve.send(outcome)));
        let transfer = TypedTransfer::new(schedule, Some(self.combine.kernel()), buffers, resolve);
        leaders.update(|exchange| exchange.submit_as(self.op, Box::new(transfer)));
        pending
    }

    /// Spreads a piece within the host, as soon as the leader has it.
    fn spread(&mut self, turn: &mut Turn, piece: Range<usize>, output: &mut Buffer<E>) -> Result<(), Ended> {
        let result = match self.under_way.pop_front() {
            Some(pending) => pending.wait()?,
            None => Buffer::default(),
        };
        let collective = Collective::Broadcast { root: LEADER };
        if self.is_leader() {
            output[piece.clone()].copy_from_slice(&result);
            self.bytes_done += size_of_val(&result[..]) as u64;
        }
        if self.is_alone() {
            return Ok(());
        }
        let call = self.call(turn, collective, piece.len());
        let call = match self.is_leader() {
            true => Call {
                input: Some(bytemuck::cast_slice(&result)),
                input_at: self.engine.offset_of(&result),
                ..call
            },
            false => Call { output: bytemuck::cast_slice_mut(&mut output[piece]), ..call },
        };
        self.engine.set_patience(if self.is_leader() { 1 } else { PATIENCE });
        let spread = self.within(turn, call);
        self.engine.set_patience(1);
        spread
    }

    /// A round of the host over so many elements, without buffers.
    fn call<'c>(&self, turn: &mut Turn, collective: Collective, len: usize) -> Call<'c> {
        let op = OpId { sequence: turn.rounds, collective };
        turn.rounds += 1;
        let total_bytes = (len * size_of::<E>()) as u64;
        Call {
            op,
            part_of: Some((self.op, self.payload)),
            payload: Payload { total_bytes, ..self.payload },
            parts: Parts::Even { len, ranks: self.host() },
            fold: None,
            input: Some(&[]),
            input_at: None,
            output: &mut [],
            output_at: None,
        }
    }

    fn within(&mut self, turn: &mut Turn, call: Call<'_>) -> Result<(), Ended> {
        let outcome = self.engine.run(turn, call);
        self.bytes_done += turn.bytes_done;
        Ok(outcome?)
    }

    fn host(&self) -> WorldSize {
        self.engine.ring().world_size()
    }

    fn is_alone(&self) -> bool {
        self.host().get() == 1
    }

    fn is_leader(&self) -> bool {
        self.between.leaders.is_some()
    }
}
