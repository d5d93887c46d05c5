//! One rank's part in one operation, without IO: chunks out, byte pieces in.
//!
//! Out of place and without superfluous copies: own chunks are sent straight from the input; a partial sum is formed
//! from the arrived bytes and the input into a pooled buffer, and that buffer is what travels on; results are written
//! once into the output, and what arrived travels on as it came.
//!
//! In place, the input lies in the output. Own chunks are then copied as they are sent, for a link may send them again when
//! their place holds the result already; that is one segment. Nothing else is copied: a sum is formed in the buffer that
//! travels on, and stored where the own input was, which nobody needs any more.
//!
//! # Invariants
//! 1. The input is never written, except in place.
//! 2. A chunk is taken only if the schedule says that it is the next of its pass; so no element is added twice.
//! 3. Pieces may cut a chunk anywhere, also within an element.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::collective::Collective;
use crate::error::{CollectiveError, Disagreement, Payload, Phase};
use crate::frame::Header;
use crate::pool::{ChunkBuffer, ChunkPool};
use crate::reduction::{Element, Last, ReductionKind};
use crate::schedule::ring::{Chunk, Role, Schedule};

/// How whole elements that arrived are combined with own ones, into a third place.
pub(crate) type Kernel<E> = fn(own: &[E], arrived: &[u8], out: &mut [E], last: Last);

/// A chunk to be sent: where it belongs, and its bytes in one or more pieces.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) chunk: Chunk,
    pub(crate) pieces: Vec<Bytes>,
}

/// How much of a chunk has arrived.
#[derive(Debug)]
pub(crate) enum Arrived {
    /// More of its bytes must come.
    Partly,
    /// All of it: this travels on, if anything does.
    Whole(Option<Outgoing>),
}

/// An operation with its element type forgotten.
pub(crate) trait Transfer: Send {
    fn collective(&self) -> Collective;
    fn payload(&self) -> Payload;
    fn phase(&self) -> Phase;
    /// How many chunks it sends in all.
    fn sends(&self) -> u64;
    /// How many chunks arrive in all.
    fn arrivals(&self) -> u64;
    /// The next chunk that this rank sends unasked.
    fn next_own(&mut self, pool: &ChunkPool) -> Option<Outgoing>;
    /// Announces a chunk.
    fn begin(&mut self, header: &Header, pool: &ChunkPool) -> Result<(), Disagreement>;
    /// Takes bytes of the announced chunk, never more than are missing.
    fn absorb(&mut self, piece: Bytes) -> Arrived;
    /// Hands over the output, or the reason why there is none.
    fn resolve(self: Box<Self>, outcome: Result<(), CollectiveError>);
}

/// Who receives the output.
pub(crate) type Resolve<E> = Box<dyn FnOnce(Result<Buffer<E>, CollectiveError>) + Send>;

/// What an operation works on: ranges are elements within the payload.
pub(crate) struct Buffers<E> {
    /// `None` where it lies in the output, and is given up.
    pub(crate) input: Option<Arc<Buffer<E>>>,
    /// Which elements of the payload the input holds.
    pub(crate) input_holds: Range<usize>,
    pub(crate) output: Buffer<E>,
    /// Which elements of the payload the output holds.
    pub(crate) output_holds: Range<usize>,
}

/// One operation over elements of type `E`.
pub(crate) struct TypedTransfer<E: Element> {
    schedule: Schedule,
    reduction: Option<(ReductionKind, Kernel<E>)>,
    buffers: Buffers<E>,
    /// `None` in place.
    input_bytes: Option<Bytes>,
    own_sent: u32,
    /// By pass: the index of the chunk that is due.
    due: Vec<u32>,
    current: Option<Incoming<E>>,
    phase: Phase,
    resolve: Resolve<E>,
}

/// A chunk that is arriving.
struct Incoming<E> {
    chunk: Chunk,
    role: Role,
    forward: bool,
    /// Bytes that have arrived, without those in `carry`.
    filled: usize,
    /// The beginning of an element that a piece's end cut through.
    carry: Vec<u8>,
    /// Where the sum is formed, if it travels on or would overwrite the input.
    partial: Option<ChunkBuffer>,
    /// What arrived, if that is what travels on.
    pieces: Vec<Bytes>,
    element: std::marker::PhantomData<E>,
}

struct SharedInput<E>(Arc<Buffer<E>>);

impl<E: Element> AsRef<[u8]> for SharedInput<E> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl<E: Element> TypedTransfer<E> {
    pub(crate) fn new(
        schedule: Schedule,
        reduction: Option<(ReductionKind, Kernel<E>)>,
        buffers: Buffers<E>,
        resolve: Resolve<E>,
    ) -> Self {
        let input = buffers.input.as_deref().unwrap_or(&buffers.output);
        debug_assert_eq!(input.len(), buffers.input_holds.len());
        debug_assert_eq!(buffers.output.len(), buffers.output_holds.len());
        let input_bytes = buffers.input.clone().map(|input| Bytes::from_owner(SharedInput(input)));
        let due = vec![0; schedule.arriving_passes().end as usize];
        Self {
            schedule,
            reduction,
            buffers,
            input_bytes,
            own_sent: 0,
            due,
            current: None,
            phase: Phase::Queued,
            resolve,
        }
    }

    /// The next chunk due in the header's pass, if it is the one that the header announces.
    fn due_chunk(&self, header: &Header) -> Option<Chunk> {
        let due = *self.due.get(header.pass as usize)?;
        let chunk = self.schedule.arriving(header.pass, due)?;
        let size = size_of::<E>();
        let announced = (header.index, header.offset, header.length as usize);
        let expected = (due, (chunk.elements.start * size) as u64, chunk.elements.len() * size);
        (announced == expected).then_some(chunk)
    }

    /// Combines whole elements, the first of which is `at` bytes into the chunk.
    fn combine(&mut self, incoming: &mut Incoming<E>, at: usize, arrived: &[u8]) {
        let Some((_, kernel)) = self.reduction else { return };
        let (first, count) = (at / size_of::<E>(), arrived.len() / size_of::<E>());
        let start = incoming.chunk.elements.start + first;
        let last = (incoming.role == Role::Complete).then(|| self.schedule.ranks());
        let Buffers { input, input_holds, output, output_holds } = &mut self.buffers;
        let own = start - input_holds.start..start - input_holds.start + count;
        let Some(partial) = &mut incoming.partial else {
            let input = input.as_ref().expect("in place, a sum is formed elsewhere");
            return kernel(&input[own], arrived, &mut output[start - output_holds.start..][..count], last);
        };
        let partial = &mut partial.elements_mut::<E>()[first..][..count];
        kernel(&input.as_deref().unwrap_or(output)[own], arrived, partial, last);
        if last.is_some() {
            output[start - output_holds.start..][..count].copy_from_slice(partial);
        }
    }

    /// Splits a piece into what completes a cut element, whole elements, and what begins the next one.
    fn reduce(&mut self, incoming: &mut Incoming<E>, piece: &[u8]) {
        let size = size_of::<E>();
        let mut rest = piece;
        if !incoming.carry.is_empty() {
            let missing = (size - incoming.carry.len()).min(rest.len());
            incoming.carry.extend_from_slice(&rest[..missing]);
            rest = &rest[missing..];
            if incoming.carry.len() < size {
                return;
            }
            let element = std::mem::take(&mut incoming.carry);
            self.combine(incoming, incoming.filled, &element);
            incoming.filled += size;
        }
        let (whole, cut) = rest.split_at(rest.len() - rest.len() % size);
        self.combine(incoming, incoming.filled, whole);
        incoming.filled += whole.len();
        incoming.carry.extend_from_slice(cut);
    }

    fn store(&mut self, incoming: &mut Incoming<E>, piece: Bytes) {
        let start = (incoming.chunk.elements.start - self.buffers.output_holds.start) * size_of::<E>();
        let output: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffers.output[..]);
        output[start + incoming.filled..][..piece.len()].copy_from_slice(&piece);
        incoming.filled += piece.len();
        if incoming.forward && !piece.is_empty() {
            incoming.pieces.push(piece);
        }
    }
}

impl<E: Element> Transfer for TypedTransfer<E> {
    fn collective(&self) -> Collective {
        self.schedule.collective()
    }

    fn payload(&self) -> Payload {
        let total_bytes = (self.schedule.len() * size_of::<E>()) as u64;
        Payload { element: E::KIND, reduction: self.reduction.map(|(kind, _)| kind), total_bytes }
    }

    fn phase(&self) -> Phase {
        self.phase
    }

    fn sends(&self) -> u64 {
        self.schedule.sends()
    }

    fn arrivals(&self) -> u64 {
        self.schedule.arrivals()
    }

    fn next_own(&mut self, pool: &ChunkPool) -> Option<Outgoing> {
        let chunk = self.schedule.own_chunk(self.own_sent)?;
        self.own_sent += 1;
        let offset = self.buffers.input_holds.start;
        let elements = chunk.elements.start - offset..chunk.elements.end - offset;
        let bytes = elements.start * size_of::<E>()..elements.end * size_of::<E>();
        if elements.is_empty() {
            return Some(Outgoing { chunk, pieces: Vec::new() });
        }
        let payload = match &self.input_bytes {
            Some(input) => input.slice(bytes),
            None => {
                let mut copy = pool.lend(bytes.len());
                copy.elements_mut().copy_from_slice(&self.buffers.output[elements]);
                copy.into_bytes()
            }
        };
        Some(Outgoing { chunk, pieces: vec![payload] })
    }

    fn begin(&mut self, header: &Header, pool: &ChunkPool) -> Result<(), Disagreement> {
        let Header { pass, index, offset, length, .. } = *header;
        let wrong = Disagreement::Chunk { pass, index, offset, length };
        let chunk = self.due_chunk(header).ok_or(wrong)?;
        self.due[pass as usize] += 1;
        let (role, forward) = (self.schedule.role(pass), self.schedule.forwards(pass));
        self.phase = match role {
            Role::Reduce | Role::Complete => Phase::Reducing { pass },
            Role::Store => Phase::Copying { pass },
        };
        let elsewhere = forward || self.buffers.input.is_none();
        let partial = (elsewhere && role != Role::Store).then(|| pool.lend(length as usize));
        self.current = Some(Incoming {
            chunk,
            role,
            forward,
            filled: 0,
            carry: Vec::new(),
            partial,
            pieces: Vec::new(),
            element: std::marker::PhantomData,
        });
        Ok(())
    }

    fn absorb(&mut self, piece: Bytes) -> Arrived {
        let Some(mut incoming) = self.current.take() else { return Arrived::Partly };
        match incoming.role {
            Role::Reduce | Role::Complete => self.reduce(&mut incoming, &piece),
            Role::Store => self.store(&mut incoming, piece),
        }
        if incoming.filled < incoming.chunk.elements.len() * size_of::<E>() {
            self.current = Some(incoming);
            return Arrived::Partly;
        }
        let Incoming { mut chunk, forward, partial, mut pieces, .. } = incoming;
        chunk.pass += 1;
        pieces.extend(partial.map(ChunkBuffer::into_bytes).filter(|sum| !sum.is_empty()));
        Arrived::Whole(forward.then_some(Outgoing { chunk, pieces }))
    }

    fn resolve(self: Box<Self>, outcome: Result<(), CollectiveError>) {
        let Self { buffers, input_bytes, resolve, .. } = *self;
        // The caller may reuse its input as soon as it sees the outcome.
        drop(input_bytes);
        drop(buffers.input);
        resolve(outcome.map(|()| buffers.output));
    }
}
