//! Many all-reduces at once: the small ones of a batch travel as one.
//!
//! An exchange costs a latency, whatever it carries: a few microseconds over shared memory, `2 (N - 1)` hops round a ring. Fused,
//! buffers pay it once, and in return are copied into one and back. That is worth it for as long as copying a buffer takes less
//! time than an exchange, which holds for those of [`FUSED_BYTES_MAX`] over every transport; larger ones travel by themselves,
//! pipelined.
//!
//! # Invariants
//! 1. Which buffers are fused depends on their lengths alone, which are the same on all ranks.
//! 2. The fused operation carries a digest of its buffers' lengths: ranks that divide it otherwise find out.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::Group;
use super::order::Order;
use crate::buffer::Buffer;
use crate::collective::Collective;
use crate::error::CollectiveError;
use crate::pending::Pending;
use crate::reduction::{Element, Reduction};
use crate::schedule::digest;

/// Buffers of a batch up to this size travel together.
pub const FUSED_BYTES_MAX: usize = 32 << 10;

/// The results of a batch that are on their way: wait for them in a thread, or await them in a task.
#[must_use = "an operation's outcome is known only to those who wait for it"]
pub struct Batch<E> {
    /// The last one first.
    parts: Vec<Begun<E>>,
    /// Results that are there.
    done: Vec<Buffer<E>>,
}

/// An operation under way, and where in the batch its results belong.
struct Begun<E> {
    places: Vec<usize>,
    results: Pending<Vec<Buffer<E>>>,
}

/// The buffers of one operation, and where in the batch they were.
struct Part<E> {
    places: Vec<usize>,
    buffers: Vec<Buffer<E>>,
}

impl Group {
    /// As [`all_reduce_in_place`](Self::all_reduce_in_place) of every buffer, as if they were submitted one after the other, but
    /// small ones (32 KiB at most) are fused into one exchange: they pay one latency for all, two copies each, and memory for
    /// one more of each.
    ///
    /// Sums of floats that were fused may differ in their last bits from those of an operation by itself, since segments are
    /// those of the fused payload; all ranks have the same.
    ///
    /// # Errors
    /// When waited for: as [`all_reduce`](Self::all_reduce), and [`CollectiveError::Mismatch`] where ranks submit buffers of
    /// different lengths. All of the batch is lost then.
    pub fn all_reduce_many<R: Reduction>(&self, buffers: Vec<Buffer<R::Element>>) -> Batch<R::Element> {
        let done = buffers.iter().map(|_| Buffer::default()).collect();
        let mut parts: Vec<_> = divided(buffers).into_iter().map(|part| self.begin::<R>(part)).collect();
        parts.reverse();
        Batch { parts, done }
    }

    /// As [`all_reduce_many`](Self::all_reduce_many), and waits for the results. Over shared memory this thread does the work, as
    /// in [`all_reduce_now`](Self::all_reduce_now).
    ///
    /// # Errors
    /// As [`all_reduce_many`](Self::all_reduce_many).
    pub fn all_reduce_many_now<R: Reduction>(
        &self,
        buffers: Vec<Buffer<R::Element>>,
    ) -> Result<Vec<Buffer<R::Element>>, CollectiveError> {
        let mut done: Vec<_> = buffers.iter().map(|_| Buffer::default()).collect();
        for mut part in divided(buffers) {
            let results = match part.alone() {
                Some(buffer) => vec![self.all_reduce_in_place_now::<R>(buffer)?],
                None => unfused(&self.run(self.fused::<R>(&part.buffers))?, part.buffers),
            };
            put(&mut done, part.places, results);
        }
        Ok(done)
    }

    fn begin<R: Reduction>(&self, mut part: Part<R::Element>) -> Begun<R::Element> {
        let results = match part.alone() {
            Some(buffer) => {
                let order = self.in_place::<R>(Collective::AllReduce, buffer);
                self.submit(order, |result| vec![result])
            }
            None => {
                let order = self.fused::<R>(&part.buffers);
                self.submit(order, |result| unfused(&result, part.buffers))
            }
        };
        Begun { places: part.places, results }
    }

    /// One operation on all elements of the buffers.
    fn fused<R: Reduction>(&self, buffers: &[Buffer<R::Element>]) -> Order<R::Element> {
        let lens: Vec<usize> = buffers.iter().map(|buffer| buffer.len()).collect();
        let mut fused = self.buffer(lens.iter().sum());
        let mut rest = &mut fused[..];
        for buffer in buffers {
            let (own, behind) = rest.split_at_mut(buffer.len());
            own.copy_from_slice(buffer);
            rest = behind;
        }
        self.in_place::<R>(Collective::AllReduceBatch { lengths: digest(&lens) }, fused)
    }
}

impl<E> Part<E> {
    /// The buffer, if it is the only one.
    fn alone(&mut self) -> Option<Buffer<E>> {
        if self.buffers.len() == 1 { self.buffers.pop() } else { None }
    }
}

/// The small ones first, together; then the others, one by one.
fn divided<E: Element>(buffers: Vec<Buffer<E>>) -> Vec<Part<E>> {
    let is_small = |buffer: &Buffer<E>| buffer.len() * size_of::<E>() <= FUSED_BYTES_MAX;
    let (small, large): (Vec<_>, Vec<_>) =
        buffers.into_iter().enumerate().partition(|(_, buffer)| is_small(buffer));
    let (places, buffers) = small.into_iter().unzip();
    let small = Part { places, buffers };
    let large = large.into_iter().map(|(place, buffer)| Part { places: vec![place], buffers: vec![buffer] });
    Some(small).filter(|small| !small.places.is_empty()).into_iter().chain(large).collect()
}

/// The buffers, with their parts of the result.
fn unfused<E: Element>(mut result: &[E], mut buffers: Vec<Buffer<E>>) -> Vec<Buffer<E>> {
    for buffer in &mut buffers {
        let (own, behind) = result.split_at(buffer.len());
        buffer.copy_from_slice(own);
        result = behind;
    }
    buffers
}

fn put<E>(done: &mut [Buffer<E>], places: Vec<usize>, results: Vec<Buffer<E>>) {
    for (place, result) in places.into_iter().zip(results) {
        done[place] = result;
    }
}

impl<E: Element> Batch<E> {
    /// Blocks the thread until all results are there, in the order of the batch. Not for async code: await it there.
    ///
    /// # Errors
    /// What went wrong with the first operation of the batch that failed.
    pub fn wait(mut self) -> Result<Vec<Buffer<E>>, CollectiveError> {
        while let Some(Begun { places, results }) = self.parts.pop() {
            put(&mut self.done, places, results.wait()?);
        }
        Ok(self.done)
    }
}

impl<E> std::fmt::Debug for Batch<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").field("pending", &self.parts.len()).finish_non_exhaustive()
    }
}

/// Nothing in it is pinned.
impl<E> Unpin for Batch<E> {}

impl<E> Future for Batch<E> {
    type Output = Result<Vec<Buffer<E>>, CollectiveError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { parts, done } = &mut *self;
        while let Some(Begun { places, results }) = parts.last_mut() {
            let results = ready!(Pin::new(results).poll(context))?;
            put(done, std::mem::take(places), results);
            parts.pop();
        }
        Poll::Ready(Ok(std::mem::take(done)))
    }
}
