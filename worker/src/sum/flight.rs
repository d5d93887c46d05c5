//! A bucket on its way: the input, kept as it is until the step is committed, and the result to come.

use std::sync::Arc;

use mattock_collectives::{CollectiveError, Group, Pending, Reduction};

/// Buffers of one bucket's exchange, reused from step to step.
pub(super) struct Flight<R: Reduction> {
    input: Arc<Vec<R::Element>>,
    output: Vec<R::Element>,
    pending: Option<Pending<Vec<R::Element>>>,
}

impl<R: Reduction<Element: Default>> Flight<R> {
    /// `length` zeros.
    pub(super) fn new(length: usize) -> Self {
        Self { input: Arc::new(vec![R::Element::default(); length]), output: Vec::new(), pending: None }
    }

    /// The input as it is.
    pub(super) fn input(&self) -> &[R::Element] {
        &self.input
    }

    /// The input, to be added to. A link may still hold on to that of a broken exchange; it is copied then.
    pub(super) fn input_mut(&mut self) -> &mut [R::Element] {
        self.pending = None;
        Arc::make_mut(&mut self.input).as_mut_slice()
    }

    /// Sends the input round the ring.
    pub(super) fn send(&mut self, group: &Group) {
        let output = std::mem::take(&mut self.output);
        self.pending = Some(group.all_reduce::<R>(Arc::clone(&self.input), output));
    }

    /// Waits for the sum over all ranks.
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
    group.all_reduce::<R>(Arc::new(input), Vec::new()).wait()
}
