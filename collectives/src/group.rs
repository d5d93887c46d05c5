//! A rank's handle on its ring: submit operations from any thread, wait for their results.
//!
//! Ranks must submit the same operations in the same order. Operations are queued and run pipelined: the next one
//! starts to travel while the last chunks of the one before are on their way.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::buffer::Buffer;
use crate::collective::{Collective, OpId};
use crate::driver::{Shared, drive};
use crate::error::{CollectiveError, Payload, Place};
use crate::fault::Fault;
use crate::io_thread::IoThread;
use crate::link::{LinkReceiver, LinkSender};
use crate::pending::Pending;
use crate::rank::Rank;
use crate::reduction::{Element, Fold, Reduction, ReductionKind, SaturatingSum, combine_into};
use crate::ring::Ring;
use crate::schedule::ring::Schedule;
use crate::schedule::segment;
use crate::shm::board::INLINE_BYTES;
use crate::shm::calls::Call;
use crate::shm::engine::{Engine, Job, Turn};
use crate::transfer::{Buffers, Kernel, Resolve, TypedTransfer};

/// How many operations may be pending in a group.
pub const PENDING_MAX: usize = 4096;

/// What the members of a group must have in common.
#[derive(Clone, Copy, Debug)]
pub struct GroupConfig {
    /// How long an operation may stand still before it fails.
    pub timeout: Duration,
    /// Bytes of a chunk, the same on all ranks; rounded down to a multiple of 8, and 8 at least.
    pub chunk_bytes: u32,
}

impl Default for GroupConfig {
    /// 10 seconds, 256 KiB.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10), chunk_bytes: 256 << 10 }
    }
}

impl GroupConfig {
    pub(crate) fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes.max(8) & !7
    }
}

/// Bytes on the links so far: payload and headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Handed to the link to the next rank.
    pub sent_bytes: u64,
    /// Taken from the link of the previous rank.
    pub received_bytes: u64,
}

/// What carries a group's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One rank needs nothing.
    Alone,
    /// Channels within a process.
    InMemory,
    /// QUIC, encrypted and authenticated.
    Quic,
    /// Memory that the processes of one host share.
    SharedMemory,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Alone => "nothing",
            Self::InMemory => "memory",
            Self::Quic => "QUIC",
            Self::SharedMemory => "shared memory",
        })
    }
}

/// A member's handle on one generation of a group. Dropping it closes the group; see [`close`](Self::close).
pub struct Group {
    ring: Ring,
    transport: Transport,
    way: Way,
    /// What must outlive the links.
    keep: Arc<dyn Any + Send + Sync>,
}

/// How operations are run.
enum Way {
    /// Round the ring, by a driver; without one where nobody else is there.
    Ring {
        shared: Arc<Shared>,
        chunk_bytes: u32,
        /// Resolves when the driver has ended.
        driver: Option<Pending<(), ()>>,
    },
    /// Over the memory of this host, by a thread.
    Host { engine: Arc<Engine>, thread: Option<JoinHandle<()>> },
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ring, transport, .. } = self;
        f.debug_struct("Group").field("ring", ring).field("transport", transport).finish_non_exhaustive()
    }
}

impl Group {
    /// A group whose neighbours are reached through these links, driven by `thread`.
    pub fn over_links(
        thread: &Arc<IoThread>,
        ring: Ring,
        config: GroupConfig,
        sender: impl LinkSender,
        receiver: impl LinkReceiver,
    ) -> Self {
        Self::linked(thread, ring, config, (sender, receiver), Transport::InMemory, thread.clone())
    }

    /// As [`over_links`](Self::over_links); `keep` lives as long as the group.
    pub(crate) fn linked(
        thread: &IoThread,
        ring: Ring,
        config: GroupConfig,
        (sender, receiver): (impl LinkSender, impl LinkReceiver),
        transport: Transport,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let chunk_bytes = config.chunk_bytes();
        let shared = Shared::new(ring, chunk_bytes, config.timeout);
        let (ended, driver) = Pending::new(());
        let driven = shared.clone();
        thread.spawn(async move {
            drive(driven, sender, receiver).await;
            // Nobody listens unless the group is being closed.
            let _ = ended.send(Ok(()));
        });
        Self { ring, transport, way: Way::Ring { shared, chunk_bytes, driver: Some(driver) }, keep }
    }

    /// A group without links: it is its own world.
    pub(crate) fn alone(ring: Ring, config: GroupConfig, keep: Arc<dyn Any + Send + Sync>) -> Self {
        let chunk_bytes = config.chunk_bytes();
        let shared = Shared::new(ring, chunk_bytes, config.timeout);
        Self { ring, transport: Transport::Alone, way: Way::Ring { shared, chunk_bytes, driver: None }, keep }
    }

    /// A group of the processes of one host.
    pub(crate) fn on_host(
        (engine, thread): (Arc<Engine>, JoinHandle<()>),
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let (ring, transport) = (engine.ring(), Transport::SharedMemory);
        Self { ring, transport, way: Way::Host { engine, thread: Some(thread) }, keep }
    }

    /// What must outlive the links.
    pub(crate) fn keep(&self) -> Arc<dyn Any + Send + Sync> {
        self.keep.clone()
    }

    /// This member's place.
    pub fn ring(&self) -> Ring {
        self.ring
    }

    /// What carries its bytes.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// How an all-reduce of so many bytes is done: `ring` round the links; over shared memory `board` in one round of small
    /// messages, or `direct` from everybody's input.
    pub fn algorithm(&self, bytes: usize) -> &'static str {
        match &self.way {
            Way::Ring { .. } => "ring",
            Way::Host { .. } if bytes <= INLINE_BYTES => "board",
            Way::Host { .. } => "direct",
        }
    }

    /// Bytes sent and received so far. Over shared memory: what others read of this rank, and it of them.
    pub fn counters(&self) -> Counters {
        let (sent, received) = match &self.way {
            Way::Ring { shared, .. } => (&shared.sent_bytes, &shared.received_bytes),
            Way::Host { engine, .. } => (&engine.sent_bytes, &engine.received_bytes),
        };
        Counters {
            sent_bytes: sent.load(Ordering::Relaxed),
            received_bytes: received.load(Ordering::Relaxed),
        }
    }

    /// `len` zeros, in the memory that suits this group best: over shared memory, where peers can read them.
    pub fn buffer<E: Element>(&self, len: usize) -> Buffer<E> {
        match &self.way {
            Way::Host { engine, .. } => engine.buffer(len),
            Way::Ring { .. } => Buffer::zeroed(len),
        }
    }

    /// Reduces the inputs of all ranks, element by element; everybody receives the result.
    ///
    /// `output` is memory to write the result to, whatever its length. The input is read while the operation is
    /// pending; links may hold on to it until the neighbour has acknowledged it, so its reference count may drop
    /// to one a little later than the operation ends.
    pub fn all_reduce<R: Reduction>(
        &self,
        input: Arc<Buffer<R::Element>>,
        output: Buffer<R::Element>,
    ) -> Pending<Buffer<R::Element>> {
        let held = 0..input.len();
        self.reduce::<R>(Collective::AllReduce, input, output, held)
    }

    /// As [`all_reduce`](Self::all_reduce), but this rank receives only its [`segment`] of the result.
    pub fn reduce_scatter<R: Reduction>(
        &self,
        input: Arc<Buffer<R::Element>>,
        output: Buffer<R::Element>,
    ) -> Pending<Buffer<R::Element>> {
        let held = self.own_segment(input.len());
        self.reduce::<R>(Collective::ReduceScatter, input, output, held)
    }

    /// Puts the [`segment`]s of all ranks together to `len` elements; everybody receives them.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the input's length is not that of this rank's segment.
    pub fn all_gather<E: Element>(
        &self,
        input: Arc<Buffer<E>>,
        len: usize,
        mut output: Buffer<E>,
    ) -> Pending<Buffer<E>> {
        let own = self.own_segment(len);
        if input.len() != own.len() {
            return self.invalid(format!(
                "all-gather of {len} elements takes {} of this rank, not {}",
                own.len(),
                input.len()
            ));
        }
        output.resize(len);
        output[own.clone()].copy_from_slice(&input);
        let buffers = Buffers { input, input_holds: own, output, output_holds: 0..len };
        self.submit(Order { collective: Collective::AllGather, len, reduction: None, buffers }, |output| {
            output
        })
    }

    /// Sends this rank's input to everybody else, who calls [`receive_broadcast`](Self::receive_broadcast).
    pub fn broadcast<E: Element>(&self, input: Arc<Buffer<E>>) -> Pending<()> {
        let len = input.len();
        let buffers = Buffers { input, input_holds: 0..len, output: Buffer::default(), output_holds: 0..0 };
        let collective = Collective::Broadcast { root: self.ring.rank() };
        self.submit(Order { collective, len, reduction: None, buffers }, |_| ())
    }

    /// Receives what `root` broadcasts: exactly as many elements as `output` is long.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the root is this rank, or outside the ring.
    pub fn receive_broadcast<E: Element>(&self, root: Rank, output: Buffer<E>) -> Pending<Buffer<E>> {
        if root == self.ring.rank() || root.0 >= self.ring.world_size().get() {
            return self.invalid(format!(
                "rank {root} is not another rank of this ring: nothing to receive from it"
            ));
        }
        let len = output.len();
        let buffers = Buffers { input: Arc::default(), input_holds: 0..0, output, output_holds: 0..len };
        self.submit(
            Order { collective: Collective::Broadcast { root }, len, reduction: None, buffers },
            |output| output,
        )
    }

    /// As [`all_reduce`](Self::all_reduce), and waits for the result. Over shared memory this thread does the work, where
    /// nothing is queued before it: the fastest way for what the caller needs at once.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_reduce_now<R: Reduction>(
        &self,
        input: Arc<Buffer<R::Element>>,
        output: Buffer<R::Element>,
    ) -> Result<Buffer<R::Element>, CollectiveError> {
        let held = 0..input.len();
        self.run(self.reduction::<R>(Collective::AllReduce, input, output, held))
    }

    /// Completes when every rank has called it.
    pub fn barrier(&self) -> Pending<()> {
        self.submit(barrier(), |_| ())
    }

    /// As [`barrier`](Self::barrier), and waits for it.
    ///
    /// # Errors
    /// As [`barrier`](Self::barrier).
    pub fn barrier_now(&self) -> Result<(), CollectiveError> {
        self.run(barrier()).map(|_| ())
    }

    /// Ends all pending and future operations at once with [`CollectiveError::Cancelled`]; neighbours are told.
    pub fn cancel(&self, cause: impl Into<String>) {
        let fault = Fault::Cancelled { cause: cause.into() };
        match &self.way {
            Way::Ring { shared, .. } => shared.update(|exchange| exchange.fail(fault)),
            Way::Host { engine, .. } => engine.fail(fault),
        }
    }

    /// Ends the group: waits until the neighbour has all that was sent, the timeout at most. Pending operations end
    /// with [`CollectiveError::Closed`]. Dropping a group does the same in the background.
    pub fn close(mut self) {
        self.end();
        // How driver or thread end is all the same.
        match &mut self.way {
            Way::Ring { driver, .. } => drop(driver.take().map(Pending::wait)),
            Way::Host { thread, .. } => drop(thread.take().map(JoinHandle::join)),
        }
    }

    fn end(&self) {
        match &self.way {
            Way::Ring { shared, .. } => shared.close(),
            Way::Host { engine, .. } => engine.close(),
        }
    }

    fn reduce<R: Reduction>(
        &self,
        collective: Collective,
        input: Arc<Buffer<R::Element>>,
        output: Buffer<R::Element>,
        output_holds: Range<usize>,
    ) -> Pending<Buffer<R::Element>> {
        self.submit(self.reduction::<R>(collective, input, output, output_holds), |output| output)
    }

    fn reduction<R: Reduction>(
        &self,
        collective: Collective,
        input: Arc<Buffer<R::Element>>,
        mut output: Buffer<R::Element>,
        output_holds: Range<usize>,
    ) -> Order<R::Element> {
        let len = input.len();
        output.resize(output_holds.len());
        if self.ring.world_size().get() == 1 {
            output.copy_from_slice(&input);
        }
        let buffers = Buffers { input, input_holds: 0..len, output, output_holds };
        Order { collective, len, reduction: Some(Combine::by::<R>()), buffers }
    }

    /// Runs an operation now, and waits for it.
    fn run<E: Element>(&self, order: Order<E>) -> Result<Buffer<E>, CollectiveError> {
        let Way::Host { engine, .. } = &self.way else {
            return self.submit(order, |output| output).wait();
        };
        let collective = order.collective;
        let mut order = Some(order);
        let outcome =
            engine.run_now(collective, |engine, turn, op| Some(order.take()?.run(engine, turn, op)));
        match (outcome.flatten(), order) {
            (None, Some(order)) => self.submit(order, |output| output).wait(),
            (outcome, _) => outcome.expect("an order that was taken was run"),
        }
    }

    /// Queues an operation; `finish` makes its result of the output.
    fn submit<E: Element, T: Send + 'static>(
        &self,
        order: Order<E>,
        finish: fn(Buffer<E>) -> T,
    ) -> Pending<T> {
        match &self.way {
            Way::Ring { shared, chunk_bytes, .. } => {
                let collective = order.collective;
                let transfer = |resolve| order.transfer(self.ring, *chunk_bytes, resolve);
                submit_to_ring(shared, collective, transfer, finish)
            }
            Way::Host { engine, .. } => {
                let queued = engine.submit(order.collective, PENDING_MAX, |at| {
                    let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
                    let job: Job = Box::new(move |engine, turn| {
                        // Who dropped its `Pending` does not want to know.
                        let _ = resolve.send(order.run(engine, turn, at.op).map(finish));
                    });
                    (job, pending)
                });
                queued.unwrap_or_else(|at| Pending::failed(too_many(at)))
            }
        }
    }

    fn invalid<T>(&self, reason: String) -> Pending<T> {
        Pending::failed(CollectiveError::InvalidInput { rank: self.ring.rank(), reason })
    }

    fn own_segment(&self, len: usize) -> Range<usize> {
        segment(len, self.ring.world_size().get(), self.ring.rank().0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end();
    }
}

fn too_many(at: Place) -> CollectiveError {
    let reason = format!("{PENDING_MAX} operations are pending: wait for one of them first");
    CollectiveError::InvalidInput { rank: at.rank, reason }
}

fn barrier() -> Order<u32> {
    let (input, output) = (Arc::new(vec![1].into()), vec![1].into());
    let buffers = Buffers { input, input_holds: 0..1, output, output_holds: 0..1 };
    Order {
        collective: Collective::Barrier,
        len: 1,
        reduction: Some(Combine::by::<SaturatingSum>()),
        buffers,
    }
}

fn submit_to_ring<E: Element, T: Send + 'static>(
    shared: &Shared,
    collective: Collective,
    transfer: impl FnOnce(Resolve<E>) -> TypedTransfer<E>,
    finish: fn(Buffer<E>) -> T,
) -> Pending<T> {
    shared.update(|exchange| {
        let at = exchange.next_place(collective);
        let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
        if exchange.pending() >= PENDING_MAX {
            let _ = resolve.send(Err(too_many(at)));
            return pending;
        }
        exchange.submit(Box::new(transfer(Box::new(move |outcome| {
            // Who dropped its `Pending` does not want to know.
            let _ = resolve.send(outcome.map(finish));
        }))));
        pending
    })
}

/// How elements are combined, in the two ways of running an operation.
#[derive(Clone, Copy)]
struct Combine<E> {
    kind: ReductionKind,
    kernel: Kernel<E>,
    fold: Fold,
}

impl<E: Element> Combine<E> {
    fn by<R: Reduction<Element = E>>() -> Self {
        Self { kind: R::KIND, kernel: combine_into::<R>, fold: Fold::of::<R>() }
    }
}

/// An operation to be run.
struct Order<E> {
    collective: Collective,
    /// Elements of the whole payload.
    len: usize,
    reduction: Option<Combine<E>>,
    buffers: Buffers<E>,
}

impl<E: Element> Order<E> {
    /// As the ring's driver runs it.
    fn transfer(self, ring: Ring, chunk_bytes: u32, resolve: Resolve<E>) -> TypedTransfer<E> {
        let schedule = Schedule::new(ring, self.collective, self.len, chunk_bytes as usize / size_of::<E>());
        let reduction = self.reduction.map(|combine| (combine.kind, combine.kernel));
        TypedTransfer::new(schedule, reduction, self.buffers, resolve)
    }

    /// Over the memory of this host.
    fn run(self, engine: &Engine, turn: &mut Turn, op: OpId) -> Result<Buffer<E>, CollectiveError> {
        let Buffers { input, mut output, .. } = self.buffers;
        let total_bytes = (self.len * size_of::<E>()) as u64;
        let reduction = self.reduction.map(|combine| combine.kind);
        engine.run(
            turn,
            Call {
                op,
                payload: Payload { element: E::KIND, reduction, total_bytes },
                fold: self.reduction.map(|combine| combine.fold),
                input: bytemuck::cast_slice(&input[..]),
                input_at: engine.offset_of(&input),
                output_at: engine.offset_of(&output),
                output: bytemuck::cast_slice_mut(&mut output[..]),
            },
        )?;
        Ok(output)
    }
}
