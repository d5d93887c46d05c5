//! A rank's handle on its ring: submit operations from any thread, wait for their results.
//!
//! Ranks must submit the same operations in the same order. Operations are queued and run pipelined: the next one
//! starts to travel while the last chunks of the one before are on their way.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::collective::Collective;
use crate::driver::{Shared, drive};
use crate::error::CollectiveError;
use crate::fault::Fault;
use crate::io_thread::IoThread;
use crate::link::{LinkReceiver, LinkSender};
use crate::pending::Pending;
use crate::rank::Rank;
use crate::reduction::{Element, Reduction, SaturatingSum, combine_into};
use crate::ring::Ring;
use crate::schedule::ring::Schedule;
use crate::schedule::segment;
use crate::transfer::{Buffers, Kernel, TypedTransfer};

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

/// A member's handle on one generation of a ring. Dropping it closes the group; see [`close`](Self::close).
pub struct Group {
    shared: Arc<Shared>,
    chunk_bytes: u32,
    /// Resolves when the driver has ended.
    driver: Option<Pending<(), ()>>,
    /// What must outlive the links.
    _keep: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("ring", &self.shared.ring).finish_non_exhaustive()
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
        Self::linked(thread, ring, config, sender, receiver, thread.clone())
    }

    /// As [`over_links`](Self::over_links); `keep` lives as long as the group.
    pub(crate) fn linked(
        thread: &IoThread,
        ring: Ring,
        config: GroupConfig,
        sender: impl LinkSender,
        receiver: impl LinkReceiver,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let mut group = Self::alone(ring, config, keep);
        let (ended, driver) = Pending::new(());
        let shared = group.shared.clone();
        thread.spawn(async move {
            drive(shared, sender, receiver).await;
            // Nobody listens unless the group is being closed.
            let _ = ended.send(Ok(()));
        });
        group.driver = Some(driver);
        group
    }

    /// A group without links: it is its own world.
    pub(crate) fn alone(ring: Ring, config: GroupConfig, keep: Arc<dyn Any + Send + Sync>) -> Self {
        let chunk_bytes = config.chunk_bytes();
        let shared = Shared::new(ring, chunk_bytes, config.timeout);
        Self { shared, chunk_bytes, driver: None, _keep: keep }
    }

    /// This member's place.
    pub fn ring(&self) -> Ring {
        self.shared.ring
    }

    /// Bytes sent and received so far.
    pub fn counters(&self) -> Counters {
        Counters {
            sent_bytes: self.shared.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.shared.received_bytes.load(Ordering::Relaxed),
        }
    }

    /// Reduces the inputs of all ranks, element by element; everybody receives the result.
    ///
    /// `output` is memory to write the result to, whatever its length. The input is read while the operation is
    /// pending; links may hold on to it until the neighbour has acknowledged it, so its reference count may drop
    /// to one a little later than the operation ends.
    pub fn all_reduce<R: Reduction>(
        &self,
        input: Arc<Vec<R::Element>>,
        output: Vec<R::Element>,
    ) -> Pending<Vec<R::Element>> {
        let held = 0..input.len();
        self.reduce::<R>(Collective::AllReduce, input, output, held)
    }

    /// As [`all_reduce`](Self::all_reduce), but this rank receives only its [`segment`] of the result.
    pub fn reduce_scatter<R: Reduction>(
        &self,
        input: Arc<Vec<R::Element>>,
        output: Vec<R::Element>,
    ) -> Pending<Vec<R::Element>> {
        let held = self.own_segment(input.len());
        self.reduce::<R>(Collective::ReduceScatter, input, output, held)
    }

    /// Puts the [`segment`]s of all ranks together to `len` elements; everybody receives them.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the input's length is not that of this rank's segment.
    pub fn all_gather<E: Element>(
        &self,
        input: Arc<Vec<E>>,
        len: usize,
        mut output: Vec<E>,
    ) -> Pending<Vec<E>> {
        let own = self.own_segment(len);
        if input.len() != own.len() {
            return self.invalid(format!(
                "all-gather of {len} elements takes {} of this rank, not {}",
                own.len(),
                input.len()
            ));
        }
        output.resize(len, E::zeroed());
        output[own.clone()].copy_from_slice(&input);
        let buffers = Buffers { input, input_holds: own, output, output_holds: 0..len };
        self.submit(Collective::AllGather, len, None, buffers, |output| output)
    }

    /// Sends this rank's input to everybody else, who calls [`receive_broadcast`](Self::receive_broadcast).
    pub fn broadcast<E: Element>(&self, input: Arc<Vec<E>>) -> Pending<()> {
        let len = input.len();
        let buffers = Buffers { input, input_holds: 0..len, output: Vec::new(), output_holds: 0..0 };
        self.submit(Collective::Broadcast { root: self.ring().rank() }, len, None, buffers, |_| ())
    }

    /// Receives what `root` broadcasts: exactly as many elements as `output` is long.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the root is this rank, or outside the ring.
    pub fn receive_broadcast<E: Element>(&self, root: Rank, output: Vec<E>) -> Pending<Vec<E>> {
        if root == self.ring().rank() || root.0 >= self.ring().world_size().get() {
            return self.invalid(format!(
                "rank {root} is not another rank of this ring: nothing to receive from it"
            ));
        }
        let len = output.len();
        let buffers = Buffers { input: Arc::default(), input_holds: 0..0, output, output_holds: 0..len };
        self.submit(Collective::Broadcast { root }, len, None, buffers, |output| output)
    }

    /// Completes when every rank has called it.
    pub fn barrier(&self) -> Pending<()> {
        let buffers =
            Buffers { input: Arc::new(vec![1]), input_holds: 0..1, output: vec![1], output_holds: 0..1 };
        let kernel: Kernel<u32> = combine_into::<SaturatingSum>;
        self.submit(Collective::Barrier, 1, Some((SaturatingSum::KIND, kernel)), buffers, |_| ())
    }

    /// Ends all pending and future operations at once with [`CollectiveError::Cancelled`]; neighbours are told.
    pub fn cancel(&self, cause: impl Into<String>) {
        let cause = cause.into();
        self.shared.update(|exchange| exchange.fail(Fault::Cancelled { cause }));
    }

    /// Ends the group: waits until the neighbour has all that was sent, the timeout at most. Pending operations end
    /// with [`CollectiveError::Closed`]. Dropping a group does the same in the background.
    pub fn close(mut self) {
        self.shared.close();
        if let Some(driver) = self.driver.take() {
            // Its end is all there is to know.
            let _ = driver.wait();
        }
    }

    fn reduce<R: Reduction>(
        &self,
        collective: Collective,
        input: Arc<Vec<R::Element>>,
        mut output: Vec<R::Element>,
        output_holds: std::ops::Range<usize>,
    ) -> Pending<Vec<R::Element>> {
        let len = input.len();
        output.resize(output_holds.len(), bytemuck::Zeroable::zeroed());
        if self.ring().world_size().get() == 1 {
            output.copy_from_slice(&input);
        }
        let kernel: Kernel<R::Element> = combine_into::<R>;
        let buffers = Buffers { input, input_holds: 0..len, output, output_holds };
        self.submit(collective, len, Some((R::KIND, kernel)), buffers, |output| output)
    }

    /// Queues an operation; `finish` makes its result of the output.
    fn submit<E: Element, T: Send + 'static>(
        &self,
        collective: Collective,
        len: usize,
        reduction: Option<(crate::ReductionKind, Kernel<E>)>,
        buffers: Buffers<E>,
        finish: fn(Vec<E>) -> T,
    ) -> Pending<T> {
        let schedule =
            Schedule::new(self.ring(), collective, len, self.chunk_bytes as usize / size_of::<E>());
        self.shared.update(|exchange| {
            let at = exchange.next_place(collective);
            let (resolve, pending) = Pending::new(CollectiveError::Closed { at });
            if exchange.pending() >= PENDING_MAX {
                let reason = format!("{PENDING_MAX} operations are pending: wait for one of them first");
                let _ = resolve.send(Err(CollectiveError::InvalidInput { rank: at.rank, reason }));
                return pending;
            }
            let resolve = Box::new(move |outcome: Result<Vec<E>, CollectiveError>| {
                // Who dropped its `Pending` does not want to know.
                let _ = resolve.send(outcome.map(finish));
            });
            exchange.submit(Box::new(TypedTransfer::new(schedule, reduction, buffers, resolve)));
            pending
        })
    }

    fn invalid<T>(&self, reason: String) -> Pending<T> {
        Pending::failed(CollectiveError::InvalidInput { rank: self.ring().rank(), reason })
    }

    fn own_segment(&self, len: usize) -> std::ops::Range<usize> {
        segment(len, self.ring().world_size().get(), self.ring().rank().0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.shared.close();
    }
}
