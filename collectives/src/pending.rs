//! The result of something that goes on elsewhere: wait for it in a thread, or await it in a task.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::error::CollectiveError;

/// A result that is on its way. It always comes: who owes it works against a deadline.
#[derive(Debug)]
#[must_use = "an operation's outcome is known only to those who wait for it"]
pub struct Pending<T, E = CollectiveError> {
    outcome: oneshot::Receiver<Result<T, E>>,
    /// The outcome if whoever owes it has vanished.
    orphaned: Option<E>,
}

impl<T, E> Pending<T, E> {
    pub(crate) fn new(orphaned: E) -> (oneshot::Sender<Result<T, E>>, Self) {
        let (sender, outcome) = oneshot::channel();
        (sender, Self { outcome, orphaned: Some(orphaned) })
    }

    /// A result that is there already: it went wrong.
    pub(crate) fn failed(error: E) -> Self {
        let (sender, outcome) = oneshot::channel();
        drop(sender);
        Self { outcome, orphaned: Some(error) }
    }

    /// Blocks the thread until the result is there. Not for async code: await it there.
    ///
    /// # Errors
    /// What went wrong with the operation.
    pub fn wait(self) -> Result<T, E>
    where
        E: Unpin,
    {
        let mut this = pin!(self);
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            match this.as_mut().poll(&mut context) {
                Poll::Ready(outcome) => return outcome,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

impl<T, E: Unpin> Future for Pending<T, E> {
    type Output = Result<T, E>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome).poll(context).map(|outcome| {
            outcome
                .unwrap_or_else(|_| Err(self.orphaned.take().expect("a future is not polled after its end")))
        })
    }
}

impl<T, E: Unpin> Pending<T, E> {
    /// As [`wait`](Self::wait), for `limit` at most; then the result comes back as it is, on its way.
    ///
    /// # Errors
    /// The pending result, where it is not there yet.
    pub fn wait_for(mut self, limit: Duration) -> Result<Result<T, E>, Self> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        let until = Instant::now() + limit;
        loop {
            if let Poll::Ready(outcome) = Pin::new(&mut self).poll(&mut context) {
                return Ok(outcome);
            }
            match until.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => std::thread::park_timeout(left),
                _ => return Err(self),
            }
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
