//! When a connection's next datagrams may leave.
//!
//! quinn has a pacer of its own, which forgets what it could have sent when its timer is late by more than two
//! milliseconds: on busy hosts that halves the rate. [`Pace`] is a schedule instead: who is late catches up. The controller
//! writes it, and the connection's [`UdpPoller`] waits for it.
//!
//! The two are built by quinn one after the other, first the controller and then the poller, for each connection and by one
//! thread at a time: [`Paces`] hands what the first has made to the second. A poller that gets nothing does not wait.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::UdpPoller;
use tokio::time::Sleep;

/// Timers are no finer than that, so what is due within it leaves at once.
const AHEAD: Duration = Duration::from_millis(1);
/// Who is late by more does not catch up with all of it: a burst would not fit short queues.
const CATCH_UP_MAX: Duration = Duration::from_millis(8);
/// However slow the path: acknowledgements and the end of a connection wait with what is before them.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// The schedule of a connection.
#[derive(Debug)]
pub(super) struct Pace {
    start: Instant,
    /// Nanoseconds since the start.
    due: AtomicU64,
}

impl Pace {
    pub(super) fn new(start: Instant) -> Self {
        Self { start, due: AtomicU64::new(0) }
    }

    /// So many bytes are about to leave, at so many a second; `free` is when the path has taken those before them.
    pub(super) fn schedule(&self, now: Duration, free: &mut Duration, bytes: u64, rate: f64) {
        let due = (*free).clamp(now.saturating_sub(CATCH_UP_MAX), now + WAIT_MAX);
        *free = due + Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(WAIT_MAX).min(WAIT_MAX);
        self.due.store(due.as_nanos() as u64, Ordering::Relaxed);
    }

    /// When to send, if not at once.
    fn wait(&self, now: Instant) -> Option<Instant> {
        let due = self.start + Duration::from_nanos(self.due.load(Ordering::Relaxed));
        (due > now + AHEAD).then_some(due)
    }
}

/// From a controller to its connection's poller.
#[derive(Debug, Default)]
pub(crate) struct Paces(Mutex<Option<Arc<Pace>>>);

impl Paces {
    pub(super) fn put(&self, pace: Arc<Pace>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(pace);
    }

    /// A poller that waits as the last controller says, if one was built.
    pub(crate) fn poller(&self, inner: Pin<Box<dyn UdpPoller>>) -> Pin<Box<dyn UdpPoller>> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(pace) => Box::pin(PacedPoller { inner, pace, sleep: None }),
            None => inner,
        }
    }
}

struct PacedPoller {
    inner: Pin<Box<dyn UdpPoller>>,
    pace: Arc<Pace>,
    /// Made by the runtime that polls, when first needed.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl fmt::Debug for PacedPoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacedPoller").field("pace", &self.pace).finish_non_exhaustive()
    }
}

impl UdpPoller for PacedPoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        if let Some(due) = self.pace.wait(Instant::now()) {
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due.into())));
            if sleep.deadline() != due.into() {
                sleep.as_mut().reset(due.into());
            }
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        self.inner.as_mut().poll_writable(cx)
    }
}
