//! The operations between the ranks of a host.
//!
//! Everybody announces what it does and looks at what all others announced; then small payloads are read from the boards, in
//! that one round:
//!
//! ```text
//! announce, with the payload -> all have announced -> read all payloads, reduce
//! ```
//!
//! Large payloads lie in arenas. Each rank reduces its own segment straight from everybody's input into its own output,
//! and copies the other segments from where they were reduced; a tick tells that a chunk is there:
//!
//! ```text
//! announce -> all have announced -> own chunk, tick, others' chunks, .. -> tick -> all have done so
//! ```
//!
//! In place, a segment is reduced onto its rank's own input, which nobody else reads. What others reduced overwrites the input
//! there, as it would an output: a tick that says that a chunk is reduced says that all inputs of it were read.
//!
//! The last round is what lets everybody use its buffers again. Segment `s` is reduced along ranks `s + 1, s + 2, .., s`, as
//! a ring does it: sums of floats have the same bits over shared memory and over a network.

use std::ops::Range;

use super::arena::{ALIGNMENT, Region};
use super::board::{INLINE_BYTES, NOTICE_WORDS};
use super::engine::{Engine, Peer, Turn};
use crate::collective::{Collective, OpId};
use crate::error::{CollectiveError, Disagreement, Payload, Phase};
use crate::fault::Fault;
use crate::frame;
use crate::rank::Rank;
use crate::reduction::Fold;
use crate::schedule::Parts;

/// Reduced at once from all ranks; fits into a first-level cache.
const BLOCK_BYTES: usize = 8 << 10;

/// What is reduced at once.
#[repr(align(64))]
struct Block([u8; BLOCK_BYTES]);

/// Words of a notice, beside what names the operation.
const INPUT: usize = 3;
const RESULT: usize = 4;
const SLOTS: usize = 5;
const LAG: usize = 6;

/// One rank's part of an operation.
pub(crate) struct Call<'a> {
    pub(crate) op: OpId,
    /// The operation of a larger group that this is a part of: what all announce, and errors name.
    pub(crate) part_of: Option<(OpId, Payload)>,
    pub(crate) payload: Payload,
    pub(crate) parts: Parts,
    /// How elements are combined, if they are.
    pub(crate) fold: Option<Fold>,
    /// `None` where it lies in the output, and is given up.
    pub(crate) input: Option<&'a [u8]>,
    /// Where the input lies in the arena, if it does.
    pub(crate) input_at: Option<usize>,
    pub(crate) output: &'a mut [u8],
    /// Where the output lies in the arena, if it does.
    pub(crate) output_at: Option<usize>,
}

impl Call<'_> {
    fn input(&self) -> &[u8] {
        self.input.unwrap_or(self.output)
    }

    /// By what the ranks tell that they do the same.
    fn announced(&self) -> (OpId, Payload) {
        self.part_of.unwrap_or((self.op, self.payload))
    }
}

/// What a rank announces: where the others find its input, and what it reduced.
#[derive(Clone, Copy, Default)]
struct Places {
    input: usize,
    result: usize,
    /// Chunks of the result are found in so many slots, used in turns; 0 where they are found in a row.
    slots: usize,
    /// So many chunks are reduced before the first one is copied; the same on all ranks.
    lag: usize,
}

impl Engine {
    /// Runs an operation; the turn is ours.
    pub(crate) fn run(&self, turn: &mut Turn, mut call: Call<'_>) -> Result<(), CollectiveError> {
        (turn.phase, turn.bytes_done) = (None, 0);
        let outcome = match self.fault() {
            Some(fault) => Err(fault.clone()),
            None if self.shared_bytes(&call) <= INLINE_BYTES => self.run_small(turn, &mut call),
            None => self.run_large(turn, &mut call),
        };
        outcome.map_err(|fault| {
            self.fail(fault.clone());
            // Of several faults, all operations report the first.
            self.error(call.announced().0, turn, self.fault().unwrap_or(&fault))
        })
    }

    /// What a rank has to share at most.
    fn shared_bytes(&self, call: &Call<'_>) -> usize {
        match call.op.collective {
            Collective::AllGather
            | Collective::AllGatherUneven { .. }
            | Collective::Gather { .. }
            | Collective::Shift { .. }
            | Collective::AllToAll => call.parts.longest() * call.payload.element.bytes(),
            _ => call.payload.total_bytes as usize,
        }
    }

    fn ranks(&self) -> u32 {
        self.ring.world_size().get()
    }

    /// The bytes of a rank's segment.
    fn bytes_of(&self, call: &Call<'_>, rank: u32) -> Range<usize> {
        let size = call.payload.element.bytes();
        let range = call.parts.segment(rank);
        range.start * size..range.end * size
    }

    /// Announces the call and waits until all others have announced the same.
    fn announce(&self, turn: &mut Turn, call: &Call<'_>, places: Places) -> Result<(), Fault> {
        let slot = slot(call.op);
        let mut words = [0; NOTICE_WORDS];
        let (op, payload) = call.announced();
        let name = frame::pack(op.collective, &payload);
        words[..INPUT].copy_from_slice(&[op.sequence, name, payload.total_bytes]);
        (words[INPUT], words[RESULT]) = (places.input as u64, places.result as u64);
        (words[SLOTS], words[LAG]) = (places.slots as u64, places.lag as u64);
        self.board.write_notice(slot, words);
        self.tick(turn);
        self.wait_for_all(turn.ticks)?;
        for (rank, peer) in self.others() {
            let theirs = peer.view.notice(slot);
            if theirs[..INPUT] != words[..INPUT] {
                let disagreement = disagreement(&theirs, call);
                return Err(Fault::Disagreed { peer: self.name(rank), disagreement });
            }
            if theirs[LAG] != words[LAG] {
                let disagreement = Disagreement::Pace { got: theirs[LAG], want: words[LAG] };
                return Err(Fault::Disagreed { peer: self.name(rank), disagreement });
            }
        }
        Ok(())
    }

    fn others(&self) -> impl Iterator<Item = (u32, &Peer)> {
        (0..self.ranks()).filter_map(|rank| Some((rank, self.peer(rank)?)))
    }

    /// Reduces a segment's bytes, from the next rank's to the segment's own. `source` gives a rank's bytes of the range.
    fn fold<'a>(
        &self,
        fold: Fold,
        segment: u32,
        range: Range<usize>,
        out: &mut [u8],
        source: impl Fn(u32, Range<usize>) -> Result<&'a [u8], Fault>,
    ) -> Result<(), Fault> {
        let rank = |hop: u32| (segment + hop) % self.ranks();
        let last = |hop: u32| (hop == self.ranks() && !fold.is_partial).then_some(self.ring.world_size());
        let bytes = whole_elements(BLOCK_BYTES, fold.element_bytes);
        for start in range.clone().step_by(bytes) {
            let block = start..range.end.min(start + bytes);
            let out = &mut out[block.start - range.start..block.end - range.start];
            (fold.pair)(source(rank(1), block.clone())?, source(rank(2), block.clone())?, out, last(2));
            for hop in 3..=self.ranks() {
                (fold.add)(out, source(rank(hop), block.clone())?, last(hop));
            }
        }
        Ok(())
    }

    /// Reduces bytes of the own segment into their place in the output block by block: as it must be in place, and as it is best
    /// where the results go past the caches. They are left in `slot` as well, where there is one, which stays in the caches.
    fn fold_by_blocks(
        &self,
        fold: Fold,
        call: &mut Call<'_>,
        range: Range<usize>,
        mut slot: Option<&mut [u8]>,
    ) -> Result<(), Fault> {
        let (own, total) = (self.ring.rank().0, call.payload.total_bytes as usize);
        let mut scratch = Block([0; BLOCK_BYTES]);
        let bytes = whole_elements(BLOCK_BYTES, fold.element_bytes);
        for start in range.clone().step_by(bytes) {
            let block = start..range.end.min(start + bytes);
            let reduced = match &mut slot {
                Some(slot) => &mut slot[block.start - range.start..block.end - range.start],
                None => &mut scratch.0[..block.len()],
            };
            let source = |rank, range| self.input(call.op, call.input(), rank, range);
            self.fold(fold, own, block.clone(), reduced, source)?;
            self.copy(total, reduced, &mut call.output[block]);
        }
        Ok(())
    }

    fn run_small(&self, turn: &mut Turn, call: &mut Call<'_>) -> Result<(), Fault> {
        let slot = slot(call.op);
        self.board.write_payload(slot, call.input());
        self.announce(turn, call, Places::default())?;
        self.deliver(turn, call, |rank: u32, range: Range<usize>| match self.peer(rank) {
            Some(peer) => Ok(&peer.view.payload(slot, range.end)[range]),
            None => Ok(&self.board.payload(slot, range.end)[range]),
        })
    }

    fn run_large(&self, turn: &mut Turn, call: &mut Call<'_>) -> Result<(), Fault> {
        let [mut staged_input, mut staged_output] = std::mem::take(&mut turn.staged);
        let done = self.stage_input(call, &mut staged_input).and_then(|places| {
            match (call.op.collective, call.fold) {
                (Collective::AllReduce | Collective::AllReduceBatch { .. }, Some(fold)) => {
                    self.all_reduce(turn, call, fold, places, &mut staged_output)
                }
                (Collective::ReduceScatter, Some(fold)) if call.input.is_none() => {
                    self.announce(turn, call, places)?;
                    self.fold_by_blocks(fold, call, self.bytes_of(call, self.ring.rank().0), None)?;
                    let (sent, received) = self.exchanged(call);
                    self.count(turn, call, sent, received);
                    self.leave(turn)
                }
                _ => {
                    self.announce(turn, call, places)?;
                    let (op, input) = (call.op, call.input.unwrap_or_default());
                    self.deliver(turn, call, |rank, range| self.input(op, input, rank, range))?;
                    self.leave(turn)
                }
            }
        });
        turn.staged = [staged_input, staged_output];
        done
    }

    /// Makes this rank's output of everybody's inputs, of which `source` gives a rank's bytes.
    fn deliver<'a>(
        &self,
        turn: &mut Turn,
        call: &mut Call<'_>,
        source: impl Fn(u32, Range<usize>) -> Result<&'a [u8], Fault>,
    ) -> Result<(), Fault> {
        let (own, ranks) = (self.ring.rank().0, self.ranks());
        match (call.op.collective, call.fold) {
            (Collective::AllReduce | Collective::AllReduceBatch { .. }, Some(fold)) => {
                self.reduce_all(call, fold, source)?
            }
            (Collective::Reduce { root }, Some(fold)) if root.0 == own => {
                self.reduce_all(call, fold, source)?
            }
            (Collective::ReduceScatter | Collective::ReduceScatterUneven { .. }, Some(fold)) => {
                let segment = self.bytes_of(call, own);
                let in_place = call.input.is_none();
                let out = if in_place { &mut call.output[segment.clone()] } else { &mut *call.output };
                self.fold(fold, own, segment, out, source)?;
            }
            (Collective::AllGather | Collective::AllGatherUneven { .. }, _) => self.collect(call, source)?,
            (Collective::Gather { root }, _) if root.0 == own => self.collect(call, source)?,
            (Collective::Broadcast { root }, _) if root.0 != own => {
                call.output.copy_from_slice(source(root.0, 0..call.output.len())?);
            }
            (Collective::Scatter { root }, _) => {
                call.output.copy_from_slice(source(root.0, self.bytes_of(call, own))?);
            }
            (Collective::Shift { .. }, _) => {
                call.output.copy_from_slice(source((own + ranks - 1) % ranks, 0..call.output.len())?);
            }
            (Collective::AllToAll, _) => {
                let block = call.output.len() / ranks as usize;
                let wanted = own as usize * block..(own as usize + 1) * block;
                for (rank, out) in (0..ranks).zip(call.output.chunks_exact_mut(block.max(1))) {
                    out.copy_from_slice(source(rank, wanted.clone())?);
                }
            }
            _ => {}
        }
        let (sent, received) = self.exchanged(call);
        self.count(turn, call, sent, received);
        Ok(())
    }

    /// Reduces all segments into the output.
    fn reduce_all<'a>(
        &self,
        call: &mut Call<'_>,
        fold: Fold,
        source: impl Fn(u32, Range<usize>) -> Result<&'a [u8], Fault>,
    ) -> Result<(), Fault> {
        (0..self.ranks()).try_for_each(|rank| {
            let range = self.bytes_of(call, rank);
            self.fold(fold, rank, range.clone(), &mut call.output[range], &source)
        })
    }

    /// Puts everybody's segments together in the output.
    fn collect<'a>(
        &self,
        call: &mut Call<'_>,
        source: impl Fn(u32, Range<usize>) -> Result<&'a [u8], Fault>,
    ) -> Result<(), Fault> {
        (0..self.ranks()).try_for_each(|rank| {
            let range = self.bytes_of(call, rank);
            call.output[range.clone()].copy_from_slice(source(rank, 0..range.len())?);
            Ok(())
        })
    }

    /// Bytes that others read of this rank, and it of them, where everybody reads what it needs from the inputs.
    fn exchanged(&self, call: &Call<'_>) -> (usize, usize) {
        let (rank, others) = (self.ring.rank(), self.ranks() as usize - 1);
        let total = call.payload.total_bytes as usize;
        let (input, own) = (call.input().len(), self.bytes_of(call, rank.0).len());
        let at = |root: Rank, there: (usize, usize), elsewhere: (usize, usize)| {
            if root == rank { there } else { elsewhere }
        };
        match call.op.collective {
            Collective::AllReduce | Collective::AllReduceBatch { .. } => (total * others, total * others),
            Collective::ReduceScatter | Collective::ReduceScatterUneven { .. } => (total - own, own * others),
            Collective::Shift { .. } => (input, call.output.len()),
            Collective::AllGather | Collective::AllGatherUneven { .. } => (own * others, total - own),
            Collective::Broadcast { root } => at(root, (total * others, 0), (0, total)),
            Collective::Barrier | Collective::Message { .. } => (0, 0),
            Collective::Reduce { root } => at(root, (0, total * others), (total, 0)),
            Collective::Gather { root } => at(root, (0, total - own), (own, 0)),
            Collective::Scatter { root } => at(root, (total - own, 0), (0, own)),
            Collective::AllToAll => (input / (others + 1) * others, input / (others + 1) * others),
        }
    }

    /// Puts the input into the arena if it is not there.
    fn stage_input(&self, call: &Call<'_>, staged: &mut Option<Region>) -> Result<Places, Fault> {
        let input = match call.input_at {
            Some(offset) => offset,
            None if call.input().is_empty() => 0,
            None => {
                let region = self.stage(staged, call.input().len())?;
                region.as_mut_slice()[..call.input().len()].copy_from_slice(call.input());
                region.offset()
            }
        };
        Ok(Places { input, ..Places::default() })
    }

    /// A region of that size at least, kept from call to call.
    fn stage<'r>(&self, staged: &'r mut Option<Region>, bytes: usize) -> Result<&'r mut Region, Fault> {
        if staged.as_ref().is_none_or(|region| region.bytes() < bytes) {
            // First this: both may not fit.
            *staged = None;
            let region =
                self.arena.region(bytes).map_err(|error| Fault::Cancelled { cause: error.to_string() })?;
            *staged = Some(region);
        }
        Ok(staged.as_mut().expect("it was put there"))
    }

    /// Reduces the own segment chunk by chunk, and copies everybody else's a little later. The others find a chunk in one of a
    /// few slots, which stay in the caches; or in the output, if that lies in the arena, where it may stay there, too, or where so
    /// many slots are wanted that they would not.
    fn all_reduce(
        &self,
        turn: &mut Turn,
        call: &mut Call<'_>,
        fold: Fold,
        mut places: Places,
        staged: &mut Option<Region>,
    ) -> Result<(), Fault> {
        let (own, total) = (self.ring.rank().0, call.payload.total_bytes as usize);
        let segment = self.bytes_of(call, own);
        let lag = self.lag();
        let slots = 2 * lag + 2;
        let mut slots = match call.output_at {
            Some(offset) if !self.is_in_slots(total) => {
                places.result = offset + segment.start;
                None
            }
            _ => {
                let region = self.stage(staged, slots * self.chunk_bytes)?;
                (places.result, places.slots) = (region.offset(), slots);
                Some(region)
            }
        };
        places.lag = lag;
        self.announce(turn, call, places)?;
        let announced = turn.ticks;
        let chunk_bytes = whole_elements(self.chunk_bytes, call.payload.element.bytes());
        let chunks = self.bytes_of(call, 0).len().div_ceil(chunk_bytes);
        for step in 0..chunks + lag {
            turn.phase = Some(Phase::Reducing { pass: step as u32 });
            let chunk = chunk(&segment, step, chunk_bytes);
            match (&mut slots, call.input) {
                (None, Some(input)) if !self.is_past_caches(total) => {
                    let source = |rank, range| self.input(call.op, input, rank, range);
                    self.fold(fold, own, chunk.clone(), &mut call.output[chunk], source)?;
                }
                // Whoever has come as far as this step has done with what the slot held before.
                (slots, _) => {
                    let start = step % places.slots.max(1) * self.chunk_bytes;
                    let slot =
                        slots.as_mut().map(|region| &mut region.as_mut_slice()[start..start + chunk.len()]);
                    self.fold_by_blocks(fold, call, chunk, slot)?;
                }
            }
            if let Some(step) = step.checked_sub(lag) {
                turn.phase = Some(Phase::Copying { pass: step as u32 });
                self.copy_chunks(call, step, announced.wrapping_add(step as u32 + 1))?;
            }
            self.tick(turn);
        }
        let bytes = total - segment.len() + segment.len() * (self.ranks() as usize - 1);
        self.count(turn, call, bytes, bytes);
        self.leave(turn)
    }

    /// Copies a chunk of every other rank's segment, as soon as that rank has come as far as `ticks`.
    fn copy_chunks(&self, call: &mut Call<'_>, step: usize, ticks: u32) -> Result<(), Fault> {
        let own = self.ring.rank().0;
        let chunk_bytes = whole_elements(self.chunk_bytes, call.payload.element.bytes());
        for hop in 1..self.ranks() {
            let rank = (own + hop) % self.ranks();
            let theirs = self.bytes_of(call, rank);
            let chunk = chunk(&theirs, step, chunk_bytes);
            self.wait_for(rank, ticks)?;
            let slots = self.peer(rank).map_or(0, |peer| peer.view.notice(slot(call.op))[SLOTS]);
            let start = match slots {
                0 => chunk.start - theirs.start,
                slots => (step as u64 % slots) as usize * self.chunk_bytes,
            };
            let from = self.peer_bytes(call.op, rank, RESULT, start..start.saturating_add(chunk.len()))?;
            self.copy(call.payload.total_bytes as usize, from, &mut call.output[chunk]);
        }
        Ok(())
    }

    /// Waits until everybody has done with everybody's memory.
    fn leave(&self, turn: &mut Turn) -> Result<(), Fault> {
        self.tick(turn);
        self.wait_for_all(turn.ticks)
    }

    /// Bytes of a rank's input.
    fn input<'a>(
        &'a self,
        op: OpId,
        own: &'a [u8],
        rank: u32,
        range: Range<usize>,
    ) -> Result<&'a [u8], Fault> {
        match self.peer(rank) {
            Some(_) => self.peer_bytes(op, rank, INPUT, range),
            None => Ok(&own[range]),
        }
    }

    /// Bytes of a peer's arena, from where its notice says in that word: checked here, whatever it says.
    fn peer_bytes(&self, op: OpId, rank: u32, word: usize, range: Range<usize>) -> Result<&[u8], Fault> {
        let outside = |offset: u64| {
            let disagreement = Disagreement::Outside { offset, length: range.len() as u64 };
            Fault::Disagreed { peer: self.name(rank), disagreement }
        };
        let Some(peer) = self.peer(rank) else { return Err(outside(0)) };
        let base = peer.view.notice(slot(op))[word];
        let start = usize::try_from(base).ok().and_then(|base| base.checked_add(range.start));
        let aligned = word != INPUT || base.is_multiple_of(ALIGNMENT as u64);
        match start {
            Some(start) if aligned => peer.bytes(start, range.len()).ok_or_else(|| outside(base)),
            _ => Err(outside(base)),
        }
    }

    fn count(&self, turn: &mut Turn, call: &Call<'_>, sent: usize, received: usize) {
        turn.bytes_done += received as u64;
        self.meter.sent(call.announced().0.collective, sent as u64);
        self.meter.received(received as u64);
    }
}

/// How a peer's notice differs from our call.
fn disagreement(theirs: &[u64; NOTICE_WORDS], call: &Call<'_>) -> Disagreement {
    let (collective, element, reduction) = match frame::unpack(theirs[1]) {
        Ok(unpacked) => unpacked,
        Err(error) => return error.into(),
    };
    let got = OpId { sequence: theirs[0], collective };
    let (op, want) = call.announced();
    if got != op {
        return Disagreement::Operation { got, want: op };
    }
    Disagreement::Payload { got: Payload { element, reduction, total_bytes: theirs[2] }, want }
}

fn slot(op: OpId) -> usize {
    (op.sequence % 2) as usize
}

/// The most bytes of whole elements: those of three bytes do not fill powers of two.
fn whole_elements(bytes: usize, element_bytes: usize) -> usize {
    bytes - bytes % element_bytes
}

/// Chunk `index` of a range; beyond its end, an empty one at its end.
fn chunk(range: &Range<usize>, index: usize, bytes: usize) -> Range<usize> {
    let start = range.end.min(range.start + index * bytes);
    start..range.end.min(start + bytes)
}
