//! All-reduce along a line, where the link that would close the ring is slow: ranks reduce towards the last one, and the result
//! goes back the same way. Nothing crosses the closing link.
//!
//! ```text
//! rank 0 ---- 0's ----> rank 1 ---- 0 + 1 ----> rank 2        a ring of all ranks, which ends here
//! rank 0 <--- sum ----- rank 1 <---- sum ------ rank 2        a ring in the reverse order, which begins here
//! ```
//!
//! Both are beside the ring that carries everything else: pieces wait for their turn here, and what goes round must not overtake
//! them on one rank and follow them on another.
//!
//! Each link carries the whole payload once each way, where a ring carries `2 (n - 1) / n` of it one way; chunks travel on as they
//! arrive, so both directions are busy at once. See [`topology`](crate::topology) for when that is faster.
//!
//! # Invariants
//! 1. Elements are added along ranks `0, 1, ..`, whatever the length and the size of chunks.
//! 2. At most [`WINDOW`] pieces of an operation are on their way, so memory has a bound.
//!
//! Deliberately absent: shared memory. A line of hosts, of which some have several ranks, goes by links between all ranks.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::order::{Combine, Order, too_many};
use super::{Linked, PENDING_MAX};
use crate::alarm::Alarm;
use crate::buffer::Buffer;
use crate::driver::Shared;
use crate::error::{CollectiveError, Phase, Place};
use crate::fault::Fault;
use crate::io_thread::IoThread;
use crate::pending::Pending;
use crate::recorder::Recorder;
use crate::reduction::Element;
use crate::schedule::Parts;
use crate::schedule::ring::Schedule;
use crate::transfer::{Buffers, TypedTransfer};

/// Pieces on their way at most. Each is a chunk, so that what is complete waits for nothing before it goes back.
const WINDOW: usize = 64;

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a ring has beside it where it is used as a line.
pub(crate) struct Line {
    pub(super) alarm: Arc<Alarm>,
    pub(super) there: Linked,
    /// In the reverse order.
    pub(super) back: Linked,
    /// One operation after the other.
    jobs: mpsc::Sender<Job>,
}

impl Line {
    /// Operations are run by `thread`.
    pub(crate) fn new(thread: &IoThread, there: Linked, back: Linked) -> Self {
        let (jobs, mut queue) = mpsc::channel::<Job>(PENDING_MAX);
        thread.spawn(async move {
            while let Some(job) = queue.recv().await {
                job.await;
            }
        });
        Self { alarm: Arc::default(), there, back, jobs }
    }

    /// From now on all rings end together.
    pub(super) fn join(&self, whole: &Arc<Shared>) {
        for ring in [whole, &self.there.shared, &self.back.shared] {
            ring.join(&self.alarm);
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
        let (alarm, chunk_bytes) = (self.alarm.clone(), self.there.chunk_bytes);
        let (there, back) = (self.there.shared.clone(), self.back.shared.clone());
        whole.update(|exchange| {
            let at = exchange.next_place(collective);
            if let Some(fault) = exchange.fault() {
                return Pending::failed(fault.at(at));
            }
            let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
            let told = recorder.clone();
            let job = Box::pin(async move {
                let outcome = Run::new(&there, &back, &alarm, chunk_bytes, at, &order).run(order).await;
                told.end(at.op, &outcome);
                // Who dropped its `Pending` does not want to know.
                let _ = resolve.send(outcome.map(finish));
            });
            if self.jobs.try_send(job).is_err() {
                return Pending::failed(too_many(at));
            }
            recorder.begin(at.op, bytes);
            exchange.pass_over(collective);
            pending
        })
    }
}

/// One operation on its way.
struct Run<'a, E> {
    there: &'a Shared,
    back: &'a Shared,
    alarm: &'a Alarm,
    at: Place,
    combine: Combine<E>,
    len: usize,
    chunk_len: usize,
}

impl<'a, E: Element> Run<'a, E> {
    fn new(
        there: &'a Shared,
        back: &'a Shared,
        alarm: &'a Alarm,
        chunk_bytes: u32,
        at: Place,
        order: &Order<E>,
    ) -> Self {
        let combine = order.reduction.expect("what goes along a line is reduced");
        let chunk_len = chunk_bytes as usize / size_of::<E>();
        Self { there, back, alarm, at, combine, len: order.parts.len(), chunk_len }
    }

    async fn run(mut self, order: Order<E>) -> Result<Buffer<E>, CollectiveError> {
        let Buffers { input, mut output, .. } = order.buffers;
        match self.pieces(input.as_ref(), &mut output).await {
            Ok(()) => Ok(output),
            // Where no alarm was raised, the group was closed in an orderly way.
            Err(_) => Err(self.alarm.fault().unwrap_or(&Fault::Closed).at(self.at)),
        }
    }

    /// Sends pieces there as long as the window allows, and takes their results in turn.
    async fn pieces(
        &mut self,
        input: Option<&Arc<Buffer<E>>>,
        output: &mut Buffer<E>,
    ) -> Result<(), CollectiveError> {
        let pieces = self.len.div_ceil(self.chunk_len).max(1);
        let window = pieces.min(WINDOW);
        let (mut results, mut owed) = (VecDeque::new(), VecDeque::new());
        for step in 0..pieces + window {
            if step < pieces {
                self.at.phase = Phase::Reducing { pass: step as u32 };
                let sum = self.reduce(self.piece(step), input, output);
                if self.is_last() {
                    results.push_back(sum);
                } else {
                    owed.push_back(sum);
                    results.push_back(self.spread(self.piece(step), None));
                }
            }
            let Some(step) = step.checked_sub(window) else { continue };
            self.at.phase = Phase::Copying { pass: step as u32 };
            let (piece, Some(result)) = (self.piece(step), results.pop_front()) else { continue };
            let result = result.await?;
            self.at.bytes_done += size_of_val(&result[..]) as u64;
            output[piece.clone()].copy_from_slice(&result);
            if self.is_last() {
                owed.push_back(self.spread(piece, Some(result)));
            }
            if owed.len() > window {
                // It left before its result came.
                owed.pop_front().expect("it is not empty").await?;
            }
        }
        for owed in owed {
            owed.await?;
        }
        Ok(())
    }

    fn piece(&self, index: usize) -> Range<usize> {
        let start = index * self.chunk_len;
        start..self.len.min(start + self.chunk_len)
    }

    /// A piece on its way there. The last rank receives the sum.
    fn reduce(
        &self,
        piece: Range<usize>,
        input: Option<&Arc<Buffer<E>>>,
        output: &Buffer<E>,
    ) -> Pending<Buffer<E>> {
        let (input, input_holds) = match input {
            Some(input) => (input.clone(), 0..self.len),
            // In place: results are to be written where it lies.
            None => (Arc::new(output[piece.clone()].to_vec().into()), piece.clone()),
        };
        let output_holds = if self.is_last() { piece.clone() } else { 0..0 };
        let output = Buffer::zeroed(output_holds.len());
        let buffers = Buffers { input: Some(input), input_holds, output, output_holds };
        let schedule = Schedule::towards_the_last(
            self.there.ring,
            self.at.op.collective,
            self.parts(piece),
            self.chunk_len,
        );
        self.submit(self.there, schedule, buffers)
    }

    /// A result on its way back. All but the last rank, which has it, receive it.
    fn spread(&self, piece: Range<usize>, result: Option<Buffer<E>>) -> Pending<Buffer<E>> {
        let held = |held: bool| if held { piece.clone() } else { 0..0 };
        let (input_holds, output_holds) = (held(result.is_some()), held(result.is_none()));
        let (input, output) = (result.unwrap_or_default(), Buffer::zeroed(output_holds.len()));
        let buffers = Buffers { input: Some(Arc::new(input)), input_holds, output, output_holds };
        let schedule = Schedule::from_the_first(
            self.back.ring,
            self.at.op.collective,
            self.parts(piece),
            self.chunk_len,
        );
        self.submit(self.back, schedule, buffers)
    }

    fn parts(&self, elements: Range<usize>) -> Parts {
        let ranks = self.there.ring.world_size();
        Parts::Piece { len: self.len, elements, members: ranks, ranks }
    }

    fn submit(&self, ring: &Shared, schedule: Schedule, buffers: Buffers<E>) -> Pending<Buffer<E>> {
        let (resolve, pending) = Pending::new(CollectiveError::Closed { at: self.at });
        let resolve = Box::new(move |outcome| drop(resolve.send(outcome)));
        let transfer = TypedTransfer::new(schedule, Some(self.combine.kernel()), buffers, resolve);
        ring.update(|exchange| exchange.submit_as(self.at.op, Box::new(transfer)));
        pending
    }

    fn is_last(&self) -> bool {
        self.there.ring.rank().0 + 1 == self.there.ring.world_size().get()
    }
}
