//! Moves bytes between an [`Exchange`] and its links, and watches the clock: the only place where a group waits.
//!
//! Three loops run side by side in one task: departures, arrivals, and the watch over both. The first that finds a
//! fault ends all three; pending operations get the fault, neighbours are told.
//!
//! Nothing here polls: a loop with nothing to do sleeps until a link, a submission or the deadline wakes it.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::alarm::{Alarm, Part};
use crate::error::TransportError;
use crate::exchange::{Absorbed, Exchange};
use crate::fault::Fault;
use crate::link::{LinkReceiver, LinkSender};
use crate::meter::Meter;
use crate::rank::Rank;
use crate::ring::{Members, Ring};

/// What a group's owner and its driver share.
pub(crate) struct Shared {
    pub(crate) ring: Ring,
    members: Members,
    pub(crate) timeout: Duration,
    /// Where the ring is one of several parts of a group.
    alarm: OnceLock<Arc<Alarm>>,
    state: Mutex<State>,
    /// Something may have to be sent.
    departures: Notify,
    /// What had to wait may be taken now.
    arrivals: Notify,
    /// The watch must look again.
    watch: Notify,
    pub(crate) meter: Meter,
}

struct State {
    exchange: Exchange,
    /// The owner has let go of the group.
    closing: bool,
    /// When something was last submitted to an idle group, sent or received.
    moved: Instant,
}

impl Shared {
    pub(crate) fn new(ring: Ring, members: Members, chunk_bytes: u32, timeout: Duration) -> Arc<Self> {
        let exchange = Exchange::new(ring, chunk_bytes);
        Arc::new(Self {
            ring,
            members,
            timeout,
            alarm: OnceLock::new(),
            state: Mutex::new(State { exchange, closing: false, moved: Instant::now() }),
            departures: Notify::new(),
            arrivals: Notify::new(),
            watch: Notify::new(),
            meter: Meter::default(),
        })
    }

    /// Lets `change` work on the exchange, then wakes the driver.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut Exchange) -> T) -> T {
        let result = {
            let mut state = self.lock();
            if state.exchange.is_idle() {
                state.moved = Instant::now();
            }
            change(&mut state.exchange)
        };
        self.wake();
        result
    }

    /// From now on, the ring ends with the other parts of its group, and they with it.
    pub(crate) fn join(self: &Arc<Self>, alarm: &Arc<Alarm>) {
        if self.alarm.set(alarm.clone()).is_ok() {
            alarm.add(self);
        }
        // One that has ended before has told nobody.
        let fault = self.lock().exchange.fault().cloned();
        if let Some(fault) = fault {
            alarm.raise(&fault);
        }
    }

    /// The owner wants nothing more.
    pub(crate) fn close(&self) {
        self.lock().closing = true;
        self.wake();
    }

    /// As the group calls it.
    fn prev(&self) -> Rank {
        self.members.name(self.ring.prev())
    }

    /// As the group calls it.
    fn next(&self) -> Rank {
        self.members.name(self.ring.next())
    }

    fn wake(&self) {
        self.departures.notify_one();
        self.arrivals.notify_one();
        self.watch.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held has ended the driver or the caller; the state is for reporting only then.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part for Shared {
    fn end(&self, fault: Fault) {
        self.update(|exchange| exchange.fail(fault));
    }
}

/// Drives a group until it is closed or broken; resolves every operation.
pub(crate) async fn drive(shared: Arc<Shared>, mut sender: impl LinkSender, mut receiver: impl LinkReceiver) {
    let fault = tokio::select! {
        fault = departures(&shared, &mut sender) => fault,
        fault = arrivals(&shared, &mut receiver) => fault,
        fault = watch(&shared) => fault,
    };
    let orderly = shared.lock().exchange.is_idle() && matches!(fault, Fault::Closed);
    let raise = || {
        if let (false, Some(alarm)) = (orderly, shared.alarm.get()) {
            alarm.raise(&fault);
        }
    };
    raise();
    shared.lock().exchange.fail(fault.clone());
    // The alarm may have come just now, and not have seen the fault.
    raise();
    if orderly {
        // First this: the previous rank ends as well, and may be waiting for it.
        receiver.close();
        // The next rank may have vanished just now, and then does not need the last bytes.
        let _ = tokio::time::timeout(shared.timeout, sender.finish()).await;
    } else {
        let reason = fault.told_by(shared.members.name(shared.ring.rank()));
        tracing::debug!(reason, "group ends");
        sender.break_off(&reason);
        receiver.break_off(&reason);
    }
}

/// Sends what is to be sent.
async fn departures(shared: &Shared, sender: &mut impl LinkSender) -> Fault {
    let lost = |source| Fault::Lost { peer: shared.next(), source };
    loop {
        let next = shared.lock().exchange.next_outgoing();
        let Some((collective, pieces)) = next else {
            tokio::select! {
                () = shared.departures.notified() => continue,
                source = sender.closed() => return lost(fatal(shared, &shared.departures, source, Exchange::must_send).await),
            }
        };
        for piece in pieces {
            let bytes = piece.len() as u64;
            if let Err(source) = sender.send(piece).await {
                return lost(source);
            }
            shared.meter.sent(collective, bytes);
            shared.lock().moved = Instant::now();
        }
        shared.lock().exchange.sent();
        shared.arrivals.notify_one();
    }
}

/// Takes what arrives.
async fn arrivals(shared: &Shared, receiver: &mut impl LinkReceiver) -> Fault {
    let peer = shared.prev();
    loop {
        let mut piece = match receiver.receive().await {
            Ok(Some(piece)) => piece,
            end => {
                let source = end.err().unwrap_or(TransportError::ClosedByPeer);
                let source = fatal(shared, &shared.arrivals, source, Exchange::must_receive).await;
                return Fault::Lost { peer, source };
            }
        };
        shared.meter.received(piece.len() as u64);
        loop {
            let absorbed = {
                let mut state = shared.lock();
                state.moved = Instant::now();
                state.exchange.absorb(&mut piece)
            };
            match absorbed {
                Ok(Absorbed::Whole) => break,
                Ok(Absorbed::NotYet) => {
                    // The chunks before it in the same piece may travel on, and its turn may depend on that.
                    shared.departures.notify_one();
                    shared.arrivals.notified().await;
                }
                Err(disagreement) => return Fault::Disagreed { peer, disagreement },
            }
        }
        shared.departures.notify_one();
    }
}

/// Waits until a link's end matters: one that broke does at once, an orderly end when somebody needs the link again.
async fn fatal(
    shared: &Shared,
    wake: &Notify,
    source: TransportError,
    needed: impl Fn(&Exchange) -> bool,
) -> TransportError {
    while source == TransportError::ClosedByPeer && !needed(&shared.lock().exchange) {
        wake.notified().await;
    }
    source
}

/// Sees when the owner ends the group, and when nothing moves though something should.
async fn watch(shared: &Shared) -> Fault {
    loop {
        let deadline = {
            let state = shared.lock();
            if let Some(fault) = state.exchange.fault() {
                return fault.clone();
            }
            if state.closing {
                return Fault::Closed;
            }
            let deadline = state.moved + shared.timeout;
            if !state.exchange.is_idle() && deadline <= Instant::now() {
                return stuck(shared, &state.exchange);
            }
            (!state.exchange.is_idle()).then_some(deadline)
        };
        match deadline {
            None => shared.watch.notified().await,
            Some(deadline) => tokio::select! {
                () = shared.watch.notified() => {}
                () = tokio::time::sleep_until(deadline) => {}
            },
        }
    }
}

fn stuck(shared: &Shared, exchange: &Exchange) -> Fault {
    let peer = if exchange.must_receive() { shared.prev() } else { shared.next() };
    Fault::Stuck { peer, timeout: shared.timeout }
}
