//! A bucket on its way: the input, kept as it is until the step is committed, and the result to come.

use std::sync::Arc;

use mattock_collectives::{Buffer, CollectiveError, Group, Pending, Reduction, Transport};

/// Buffers of one bucket's exchange, reused from step to step.
pub(super) struct Flight<R: Reduction> {
    input: Arc<Buffer<R::Element>>,
    output: Buffer<R::Element>,
    pending: Option<Pending<Buffer<R::Element>>>,
}

impl<R: Reduction> Flight<R> {
    /// `length` zeros.
    pub(super) fn new(length: usize) -> Self {
        Self { input: Arc::new(Buffer::zeroed(length)), output: Buffer::default(), pending: None }
    }

    /// The input as it is.
    pub(super) fn input(&self) -> &[R::Element] {
        &self.input
    }

    /// Whether nobody else holds on to the input, as links do until its last bytes are known to have arrived.
    pub(super) fn is_free(&self) -> bool {
        Arc::strong_count(&self.input) == 1
    }

    /// The input, to be added to. A link may still hold on to that of a broken exchange; it is copied then.
    pub(super) fn input_mut(&mut self) -> &mut [R::Element] {
        self.pending = None;
        let input: &mut Buffer<_> = Arc::make_mut(&mut self.input);
        input
    }

    /// Sends the input on its way; where `lens` say how long each rank's part is, a rank receives its own only.
    pub(super) fn send(&mut self, group: &Group, lens: Option<&[usize]>) {
        if matches!(group.transport(), Transport::SharedMemory | Transport::Hierarchical) {
            self.share(group, lens.is_none());
        }
        let (input, output) = (Arc::clone(&self.input), std::mem::take(&mut self.output));
        self.pending = Some(match lens {
            None => group.all_reduce::<R>(input, output),
            Some(lens) => group.reduce_scatter_uneven::<R>(input, lens, output),
        });
    }

    /// Moves the buffers, once, to where peers on this host read them without a copy.
    fn share(&mut self, group: &Group, output: bool) {
        if !self.input.is_shared() {
            self.input = Arc::new(group.buffer_of(&self.input));
        }
        if output && !self.output.is_shared() {
            self.output = group.buffer(self.input.len());
        }
    }

    /// Waits for the sum over all ranks, or this rank's part of it.
    pub(super) fn wait(&mut self) -> Result<&[R::Element], CollectiveError> {
        if let Some(pending) = self.pending.take() {
            self.output = pending.wait()?;
        }
        Ok(&self.output)
    }
}

/// Sums a small vector over all ranks.
pub(super) fn all_reduce<R: Reduction>(
    group: &Group,
    input: Vec<R::Element>,
) -> Result<Vec<R::Element>, CollectiveError> {
    group.all_reduce_now::<R>(Arc::new(input.into()), Buffer::default()).map(Buffer::into_vec)
}
