//! Operations where some ranks share a host. All-reduce: the ranks of a host reduce to its leader over shared memory, the leaders
//! all-reduce round a ring of theirs, and each spreads the result within its host. Reduce-scatter and all-gather go the same way
//! ([`scattered`]).
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
//! 1. All ranks of a host run the same rounds in the same order: they depend on how the payload is divided, and on nothing else.
//! 2. The leaders' ring is told of the whole operation: a piece is taken only as this piece of this operation.
//! 3. At most [`WINDOW`] pieces are under way, so memory has a bound.
//! 4. The order of additions is a function of the layout of ranks on hosts, of how the payload is divided, and of the size of
//!    chunks; all ranks receive the same bits.
//!
//! Deliberately absent: overlap of one operation's last pieces with the next one's first. Ranks of a host would have to agree
//! on who has submitted what.

mod scattered;
mod shares;
mod within;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use self::scattered::Scattered;
use self::within::{Within, piece_len};
use super::order::{Combine, Order};
use super::{Linked, PENDING_MAX};
use crate::alarm::Alarm;
use crate::buffer::Buffer;
use crate::collective::{Collective, OpId};
use crate::driver::Shared;
use crate::error::{CollectiveError, Phase};
use crate::fault::Fault;
use crate::layout::Layout;
use crate::message::neighbours::Neighbours;
use crate::pending::Pending;
use crate::rank::Rank;
use crate::recorder::Recorder;
use crate::reduction::Element;
use crate::ring::Ring;
use crate::schedule::Parts;
use crate::shm::calls::Call;
use crate::shm::engine::{Engine, Job, Turn};
use crate::transfer::Buffers;

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
    layout: Arc<Layout>,
}

impl Hierarchy {
    pub(crate) fn new(
        (engine, thread): (Arc<Engine>, JoinHandle<()>),
        leaders: Option<Linked>,
        layout: Layout,
    ) -> Self {
        Self { alarm: Arc::default(), engine, thread: Some(thread), leaders, layout: Arc::new(layout) }
    }

    /// Those who share a host with this rank.
    pub(super) fn neighbours(&self, rank: Rank) -> Neighbours {
        Neighbours::new(self.engine.clone(), self.layout.ranks_of(self.layout.host_of(rank)).to_vec())
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
        let between = Between {
            alarm: self.alarm.clone(),
            whole: whole.ring,
            host: self.layout.host_of(whole.ring.rank()),
            layout: self.layout.clone(),
            leaders: self.leaders(),
        };
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
    layout: Arc<Layout>,
    /// Of this rank, among those of the layout.
    host: usize,
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
        if is_scattered(op.collective) {
            let mut rounds = Scattered::new(self, engine, op, &order);
            let outcome = rounds.run(turn, order.buffers);
            return outcome.map_err(|Ended| self.error(&rounds.within));
        }
        let mut rounds = Rounds::new(self, engine, op, &order);
        let Buffers { input, mut output, .. } = order.buffers;
        let outcome = rounds.run(turn, input.as_ref(), &mut output);
        outcome.map(|()| output).map_err(|Ended| self.error(&rounds.within))
    }

    fn error(&self, within: &Within<'_>) -> CollectiveError {
        // Where no alarm was raised, the parts were closed in an orderly way.
        let fault = self.alarm.fault().or(within.engine.fault()).unwrap_or(&Fault::Closed);
        fault.at(within.place())
    }
}

/// Whether ranks have segments of their own, before or after it.
pub(super) fn is_scattered(collective: Collective) -> bool {
    use Collective::{AllGather, AllGatherUneven, ReduceScatter, ReduceScatterUneven};
    matches!(collective, ReduceScatter | ReduceScatterUneven { .. } | AllGather | AllGatherUneven { .. })
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
    within: Within<'a>,
    combine: Combine<E>,
    len: usize,
    piece_len: usize,
    /// Pieces between hosts, the oldest first; leaders have them.
    under_way: VecDeque<Pending<Buffer<E>>>,
}

impl<'a, E: Element> Rounds<'a, E> {
    fn new(between: &'a Between, engine: &'a Engine, op: OpId, order: &Order<E>) -> Self {
        let payload = order.payload();
        Self {
            within: Within { between, engine, op, payload, phase: Phase::Queued, bytes_done: 0 },
            combine: order.reduction.expect("what is carried here is reduced"),
            len: order.parts.len(),
            piece_len: piece_len::<E>(engine, 1),
            under_way: VecDeque::new(),
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
                self.within.phase = Phase::Reducing { pass: step as u32 };
                let piece = self.piece(step);
                let sum = self.reduce(turn, piece.clone(), input, output)?;
                if let Some(sum) = sum {
                    self.under_way.push_back(self.send(piece, sum));
                }
            }
            if let Some(step) = step.checked_sub(window) {
                self.within.phase = Phase::Copying { pass: step as u32 };
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
        let Within { engine, .. } = self.within;
        if self.within.is_alone() {
            return Ok(Some(match input {
                Some(input) => Held { buffer: input.clone(), holds: 0..self.len },
                None => {
                    let mut copy = engine.scratch(piece.len());
                    copy.copy_from_slice(&all[piece.clone()]);
                    Held { buffer: Arc::new(copy), holds: piece }
                }
            }));
        }
        let is_leader = self.within.is_leader();
        let mut sum = engine.scratch::<E>(if is_leader { piece.len() } else { 0 });
        let call = Call {
            fold: Some(self.combine.partial()),
            input: Some(bytemuck::cast_slice(&all[piece.clone()])),
            input_at: self.within.offset_of(all, &piece),
            output: bytemuck::cast_slice_mut(&mut sum),
            ..self.within.call::<E>(turn, Collective::Reduce { root: LEADER }, piece.len())
        };
        self.within.run(turn, call)?;
        Ok(is_leader.then(|| Held { buffer: Arc::new(sum), holds: piece }))
    }

    /// Sends a piece round the ring of leaders.
    fn send(&self, piece: Range<usize>, sum: Held<E>) -> Pending<Buffer<E>> {
        let Between { whole, layout, .. } = self.within.between;
        let (members, ranks) = (layout.members(), whole.world_size());
        let parts = Parts::Piece { len: self.len, elements: piece.clone(), members, ranks };
        let output = self.within.engine.scratch(piece.len());
        self.within.send(parts, Some(self.combine.kernel()), (sum.buffer, sum.holds), (output, piece))
    }

    /// Spreads a piece within the host, as soon as the leader has it.
    fn spread(&mut self, turn: &mut Turn, piece: Range<usize>, output: &mut Buffer<E>) -> Result<(), Ended> {
        let result = match self.under_way.pop_front() {
            Some(pending) => pending.wait()?,
            None => Buffer::default(),
        };
        if self.within.is_leader() {
            output[piece.clone()].copy_from_slice(&result);
            self.within.bytes_done += size_of_val(&result[..]) as u64;
        }
        if self.within.is_alone() {
            return Ok(());
        }
        let call = self.within.call::<E>(turn, Collective::Broadcast { root: LEADER }, piece.len());
        let call = match self.within.is_leader() {
            true => Call {
                input: Some(bytemuck::cast_slice(&result)),
                input_at: self.within.offset_of(&result, &(0..0)),
                ..call
            },
            false => Call { output: bytemuck::cast_slice_mut(&mut output[piece]), ..call },
        };
        self.within.run_after_network(turn, call)
    }
}
