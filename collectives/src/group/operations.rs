//! The operations, as their callers see them: what goes in, what comes out, and what makes no sense.

use std::ops::Range;
use std::sync::Arc;

use super::order::{Combine, Order};
use super::shortcut::Shortcut;
use super::{Group, Way};
use crate::buffer::Buffer;
use crate::collective::Collective;
use crate::error::CollectiveError;
use crate::pending::Pending;
use crate::rank::Rank;
use crate::reduction::{Element, Reduction, SaturatingSum};
use crate::schedule::{Parts, digest, segment};
use crate::transfer::Buffers;

impl Group {
    /// `len` zeros, in the memory that suits this group best: over shared memory, where peers can read them.
    pub fn buffer<E: Element>(&self, len: usize) -> Buffer<E> {
        match &self.way {
            Way::Host { engine, .. } => engine.buffer(len),
            Way::Ring { shortcut, .. } => {
                let engine = shortcut.as_ref().and_then(Shortcut::engine);
                engine.map_or_else(|| Buffer::zeroed(len), |engine| engine.buffer(len))
            }
        }
    }

    /// A copy of these elements, in that memory.
    pub fn buffer_of<E: Element>(&self, elements: &[E]) -> Buffer<E> {
        let engine = match &self.way {
            Way::Host { engine, .. } => Some(engine),
            Way::Ring { shortcut, .. } => shortcut.as_ref().and_then(Shortcut::engine),
        };
        let Some(engine) = engine else { return elements.to_vec().into() };
        let mut buffer = engine.scratch(elements.len());
        buffer.copy_from_slice(elements);
        buffer
    }

    /// Reduces the inputs of all ranks, element by element; everybody receives the result, the same bits.
    ///
    /// Integers come to the same whatever carries the group. Floats are added in an order that depends on how many ranks there
    /// are, and, where some but not all of them share a host, on who does, on the length and on the size of chunks.
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
        self.begin_reduction::<R>(Collective::AllReduce, input, output, held)
    }

    /// As [`all_reduce`](Self::all_reduce), but this rank receives only its [`segment`] of the result. Floats are added in an order
    /// that depends on how many ranks there are, on whose segment they are in, and, where some but not all ranks share a host, on
    /// who does.
    pub fn reduce_scatter<R: Reduction>(
        &self,
        input: Arc<Buffer<R::Element>>,
        output: Buffer<R::Element>,
    ) -> Pending<Buffer<R::Element>> {
        let held = self.own_segment(input.len());
        self.begin_reduction::<R>(Collective::ReduceScatter, input, output, held)
    }

    /// As [`reduce_scatter`](Self::reduce_scatter), into segments of any lengths: rank `r` receives `lens[r]` elements, which all
    /// ranks know.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the lengths are not one for each rank, or do not add up to the input's;
    /// [`CollectiveError::Mismatch`] where ranks know different lengths.
    pub fn reduce_scatter_uneven<R: Reduction>(
        &self,
        input: Arc<Buffer<R::Element>>,
        lens: &[usize],
        output: Buffer<R::Element>,
    ) -> Pending<Buffer<R::Element>> {
        let parts = match self.uneven(lens) {
            Ok(parts) if parts.len() == input.len() => parts,
            Ok(parts) => {
                let (got, want) = (input.len(), parts.len());
                return self.invalid(format!("reduce-scatter into {want} elements of an input of {got}"));
            }
            Err(refused) => return Pending::failed(refused),
        };
        let collective = Collective::ReduceScatterUneven { lengths: digest(lens) };
        let held = parts.segment(self.ring.rank().0);
        let order = self.reduction::<R>(collective, input, output, held);
        self.submit(Order { parts, ..order }, |output| output)
    }

    /// Gives this rank's input to the next rank, and receives that of the rank before it: rank `r` has `lens[r]` elements, which
    /// all ranks know. A rank that is alone receives its own.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the lengths are not one for each rank, or the input is not as long as this rank's;
    /// [`CollectiveError::Mismatch`] where ranks know different lengths.
    pub fn shift<E: Element>(
        &self,
        input: Arc<Buffer<E>>,
        lens: &[usize],
        mut output: Buffer<E>,
    ) -> Pending<Buffer<E>> {
        let parts = match self.uneven(lens) {
            Ok(parts) => parts,
            Err(refused) => return Pending::failed(refused),
        };
        let (own, from) = (parts.segment(self.ring.rank().0), parts.segment(self.ring.prev().0));
        if input.len() != own.len() {
            return self.invalid(format!("shift takes {} of this rank, not {}", own.len(), input.len()));
        }
        output.resize(from.len());
        if self.ranks() == 1 {
            output.copy_from_slice(&input);
        }
        let buffers = Buffers { input: Some(input), input_holds: own, output, output_holds: from };
        let collective = Collective::Shift { lengths: digest(lens) };
        self.submit(Order { collective, parts, reduction: None, buffers }, |output| output)
    }

    /// Puts the [`segment`]s of all ranks together to `len` elements; everybody receives them.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the input's length is not that of this rank's segment.
    pub fn all_gather<E: Element>(
        &self,
        input: Arc<Buffer<E>>,
        len: usize,
        output: Buffer<E>,
    ) -> Pending<Buffer<E>> {
        self.gather_parts(Collective::AllGather, self.even(len), input, output)
    }

    /// As [`all_gather`](Self::all_gather), of parts of any lengths: rank `r` has `lens[r]` elements, which all ranks know.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the lengths are not one for each rank, or the input is not as long as this rank's;
    /// [`CollectiveError::Mismatch`] where ranks know different lengths.
    pub fn all_gather_uneven<E: Element>(
        &self,
        input: Arc<Buffer<E>>,
        lens: &[usize],
        output: Buffer<E>,
    ) -> Pending<Buffer<E>> {
        let parts = match self.uneven(lens) {
            Ok(parts) => parts,
            Err(refused) => return Pending::failed(refused),
        };
        self.gather_parts(Collective::AllGatherUneven { lengths: digest(lens) }, parts, input, output)
    }

    /// Sends this rank's input to everybody else, who calls [`receive_broadcast`](Self::receive_broadcast).
    pub fn broadcast<E: Element>(&self, input: Arc<Buffer<E>>) -> Pending<()> {
        let len = input.len();
        let buffers = Buffers {
            input: Some(input),
            input_holds: 0..len,
            output: Buffer::default(),
            output_holds: 0..0,
        };
        let collective = Collective::Broadcast { root: self.ring.rank() };
        self.submit(Order { collective, parts: self.even(len), reduction: None, buffers }, |_| ())
    }

    /// Receives what `root` broadcasts: exactly as many elements as `output` is long.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the root is this rank, or outside the ring.
    pub fn receive_broadcast<E: Element>(&self, root: Rank, output: Buffer<E>) -> Pending<Buffer<E>> {
        if let Some(refused) = self.refuse_sender(root) {
            return refused;
        }
        let len = output.len();
        let buffers =
            Buffers { input: Some(Arc::default()), input_holds: 0..0, output, output_holds: 0..len };
        self.submit(
            Order {
                collective: Collective::Broadcast { root },
                parts: self.even(len),
                reduction: None,
                buffers,
            },
            |output| output,
        )
    }

    /// As [`all_reduce`](Self::all_reduce), but only the root receives the result; the others' outputs come back empty.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the root is outside the group.
    pub fn reduce<R: Reduction>(
        &self,
        root: Rank,
        input: Arc<Buffer<R::Element>>,
        output: Buffer<R::Element>,
    ) -> Pending<Buffer<R::Element>> {
        if let Some(refused) = self.refuse_root(root) {
            return refused;
        }
        let held = 0..self.held_by(root, input.len());
        let order = self.reduction::<R>(Collective::Reduce { root }, input, output, held);
        self.submit(order, self.only_for(root))
    }

    /// Brings everybody's input, of one length, to the root in the order of ranks; the others' outputs come back empty.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the root is outside the group.
    pub fn gather<E: Element>(
        &self,
        root: Rank,
        input: Arc<Buffer<E>>,
        mut output: Buffer<E>,
    ) -> Pending<Buffer<E>> {
        if let Some(refused) = self.refuse_root(root) {
            return refused;
        }
        let len = input.len() * self.ranks();
        let own = self.own_segment(len);
        let held = 0..self.held_by(root, len);
        output.resize(held.len());
        if !held.is_empty() {
            output[own.clone()].copy_from_slice(&input);
        }
        let buffers = Buffers { input: Some(input), input_holds: own, output, output_holds: held };
        let order = Order {
            collective: Collective::Gather { root },
            parts: self.even(len),
            reduction: None,
            buffers,
        };
        self.submit(order, self.only_for(root))
    }

    /// Divides this rank's input, whose length the number of ranks divides, among all; the others call
    /// [`receive_scatter`](Self::receive_scatter). Comes back with this rank's part.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the length cannot be divided.
    pub fn scatter<E: Element>(&self, input: Arc<Buffer<E>>) -> Pending<Buffer<E>> {
        let len = input.len();
        if !len.is_multiple_of(self.ranks()) {
            return self.invalid(format!("{len} elements cannot be divided among {} ranks", self.ranks()));
        }
        let own = self.own_segment(len);
        let mut output = Buffer::zeroed(own.len());
        output.copy_from_slice(&input[own.clone()]);
        let buffers = Buffers { input: Some(input), input_holds: 0..len, output, output_holds: own };
        let collective = Collective::Scatter { root: self.ring.rank() };
        self.submit(Order { collective, parts: self.even(len), reduction: None, buffers }, |output| output)
    }

    /// Receives this rank's part of what `root` scatters: exactly as many elements as `output` is long.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the root is this rank, or outside the group.
    pub fn receive_scatter<E: Element>(&self, root: Rank, mut output: Buffer<E>) -> Pending<Buffer<E>> {
        if let Some(refused) = self.refuse_sender(root) {
            return refused;
        }
        let len = output.len() * self.ranks();
        let own = self.own_segment(len);
        // Round a ring, all parts come by.
        let held = if self.is_ring() { 0..len } else { own.clone() };
        let part = own.start - held.start..own.end - held.start;
        output.resize(held.len());
        let buffers = Buffers { input: Some(Arc::default()), input_holds: 0..0, output, output_holds: held };
        let order = Order {
            collective: Collective::Scatter { root },
            parts: self.even(len),
            reduction: None,
            buffers,
        };
        self.submit(order, move |output| output.keep(part))
    }

    /// Sends part `r` of this rank's input to rank `r`, for every `r`, and receives everybody's part for this rank, in the
    /// order of ranks. Inputs are of one length, which the number of ranks divides.
    ///
    /// # Errors
    /// [`CollectiveError::InvalidInput`] where the length cannot be divided.
    pub fn all_to_all<E: Element>(&self, input: Arc<Buffer<E>>, mut output: Buffer<E>) -> Pending<Buffer<E>> {
        let (ranks, parts) = (self.ranks(), input.len());
        if !parts.is_multiple_of(ranks) {
            return self.invalid(format!("{parts} elements cannot be divided among {ranks} ranks"));
        }
        let len = parts * ranks;
        let (own, is_ring) = (self.own_segment(len), self.is_ring());
        // Round a ring, everything comes by.
        let held = 0..if is_ring { len } else { parts };
        output.resize(held.len());
        if is_ring {
            output[own.clone()].copy_from_slice(&input);
        }
        let buffers = Buffers { input: Some(input), input_holds: own, output, output_holds: held };
        let order =
            Order { collective: Collective::AllToAll, parts: self.even(len), reduction: None, buffers };
        let (part, rank) = (parts / ranks, self.ring.rank().0 as usize);
        self.submit(order, move |mut output| {
            if is_ring {
                for from in 0..ranks {
                    let start = from * parts + rank * part;
                    output.copy_within(start..start + part, from * part);
                }
            }
            output.keep(0..parts)
        })
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

    /// As [`all_reduce`](Self::all_reduce), with the result in the input's place: for who gives its input up, and has no second
    /// buffer. Where it fails, what was in the buffer is lost, so it cannot be submitted again.
    ///
    /// Round a ring, a rank copies one segment of the buffer as it sends it; over shared memory nothing is copied that is not
    /// out of place as well.
    pub fn all_reduce_in_place<R: Reduction>(
        &self,
        buffer: Buffer<R::Element>,
    ) -> Pending<Buffer<R::Element>> {
        self.submit(self.in_place::<R>(Collective::AllReduce, buffer), |output| output)
    }

    /// As [`all_reduce_in_place`](Self::all_reduce_in_place), and waits for the result, as
    /// [`all_reduce_now`](Self::all_reduce_now) does.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_reduce_in_place_now<R: Reduction>(
        &self,
        buffer: Buffer<R::Element>,
    ) -> Result<Buffer<R::Element>, CollectiveError> {
        self.run(self.in_place::<R>(Collective::AllReduce, buffer))
    }

    /// As [`all_reduce_in_place`](Self::all_reduce_in_place), but only this rank's [`segment`] of the buffer, which keeps its
    /// length, holds the result; what is beside it means nothing.
    pub fn reduce_scatter_in_place<R: Reduction>(
        &self,
        buffer: Buffer<R::Element>,
    ) -> Pending<Buffer<R::Element>> {
        self.submit(self.in_place::<R>(Collective::ReduceScatter, buffer), |output| output)
    }

    /// Completes when every rank has called it.
    pub fn barrier(&self) -> Pending<()> {
        self.submit(self.barrier_order(), |_| ())
    }

    /// As [`barrier`](Self::barrier), and waits for it.
    ///
    /// # Errors
    /// As [`barrier`](Self::barrier).
    pub fn barrier_now(&self) -> Result<(), CollectiveError> {
        self.run(self.barrier_order()).map(|_| ())
    }
}

/// What the operations have in common.
impl Group {
    fn begin_reduction<R: Reduction>(
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
        let buffers = Buffers { input: Some(input), input_holds: 0..len, output, output_holds };
        Order { collective, parts: self.even(len), reduction: Some(Combine::by::<R>()), buffers }
    }

    fn gather_parts<E: Element>(
        &self,
        collective: Collective,
        parts: Parts,
        input: Arc<Buffer<E>>,
        mut output: Buffer<E>,
    ) -> Pending<Buffer<E>> {
        let (len, own) = (parts.len(), parts.segment(self.ring.rank().0));
        if input.len() != own.len() {
            return self.invalid(format!(
                "all-gather of {len} elements takes {} of this rank, not {}",
                own.len(),
                input.len()
            ));
        }
        output.resize(len);
        output[own.clone()].copy_from_slice(&input);
        let buffers = Buffers { input: Some(input), input_holds: own, output, output_holds: 0..len };
        self.submit(Order { collective, parts, reduction: None, buffers }, |output| output)
    }

    /// So many elements, divided evenly.
    fn even(&self, len: usize) -> Parts {
        Parts::Even { len, ranks: self.ring.world_size() }
    }

    /// Elements divided like this.
    fn uneven(&self, lens: &[usize]) -> Result<Parts, CollectiveError> {
        Parts::uneven(lens).filter(|_| lens.len() == self.ranks()).ok_or_else(|| {
            let reason = format!("{lens:?} are no lengths of the parts of {} ranks", self.ranks());
            CollectiveError::InvalidInput { rank: self.ring.rank(), reason }
        })
    }

    fn ranks(&self) -> usize {
        self.ring.world_size().get() as usize
    }

    fn is_ring(&self) -> bool {
        matches!(self.way, Way::Ring { .. })
    }

    fn refuse_root<T>(&self, root: Rank) -> Option<Pending<T>> {
        let outside = root.0 >= self.ring.world_size().get();
        outside.then(|| self.invalid(format!("rank {root} is outside this group of {} ranks", self.ranks())))
    }

    fn refuse_sender<T>(&self, root: Rank) -> Option<Pending<T>> {
        let other = root != self.ring.rank() && root.0 < self.ring.world_size().get();
        let refuse = || {
            self.invalid(format!("rank {root} is not another rank of this ring: nothing to receive from it"))
        };
        (!other).then(refuse)
    }

    /// How much of a result that only the root needs this rank holds: round a ring, it comes by everybody.
    fn held_by(&self, root: Rank, len: usize) -> usize {
        if self.is_ring() || root == self.ring.rank() { len } else { 0 }
    }

    /// Throws away what comes by.
    fn only_for<E: Element>(&self, root: Rank) -> fn(Buffer<E>) -> Buffer<E> {
        if root == self.ring.rank() { |output| output } else { |_| Buffer::default() }
    }

    fn invalid<T>(&self, reason: String) -> Pending<T> {
        Pending::failed(CollectiveError::InvalidInput { rank: self.ring.rank(), reason })
    }

    fn own_segment(&self, len: usize) -> Range<usize> {
        segment(len, self.ring.world_size().get(), self.ring.rank().0)
    }

    pub(super) fn in_place<R: Reduction>(
        &self,
        collective: Collective,
        output: Buffer<R::Element>,
    ) -> Order<R::Element> {
        let len = output.len();
        let buffers = Buffers { input: None, input_holds: 0..len, output, output_holds: 0..len };
        Order { collective, parts: self.even(len), reduction: Some(Combine::by::<R>()), buffers }
    }

    fn barrier_order(&self) -> Order<u32> {
        self.in_place::<SaturatingSum>(Collective::Barrier, vec![1].into())
    }
}
