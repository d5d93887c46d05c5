//! Moves bytes between a [`Mailbox`] and its links, makes those links when they are needed, and watches the clock.
//!
//! For each other rank there is one task that sends, from the first message on; one that receives for each link that was made
//! from there; and one watch over all. The first that finds a fault ends all of them, and with them the whole group.
//!
//! # Invariants
//! 1. Between two ranks of which one waits for the other, something moves within a timeout, or the group ends.
//! 2. In an orderly end, what was said to a rank is there before this rank stops to listen to it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::letters::{Intake, Letter};
use super::mailbox::Mailbox;
use super::neighbours::Neighbours;
use super::peer::Copying;
use super::roads::{Callers, Road};
use crate::alarm::{Alarm, Part};
use crate::buffer::Buffer;
use crate::collective::Collective;
use crate::error::{Disagreement, Place, TransportError};
use crate::fault::Fault;
use crate::group::PENDING_MAX;
use crate::io_thread::IoThread;
use crate::link::{LinkReceiver, LinkSender};
use crate::meter::Meter;
use crate::pending::Pending;
use crate::rank::Rank;
use crate::reduction::Element;
use crate::ring::Ring;
use crate::shm::arena::ALIGNMENT;

/// A rank that lets nobody in has ended, perhaps for a reason that another part of the group is about to tell: it has this long.
const REASON_MAX: Duration = Duration::from_millis(200);

/// A rank's messages.
pub(crate) struct Post {
    ring: Ring,
    timeout: Duration,
    alarm: Arc<Alarm>,
    /// Where messages are copied.
    runtime: Handle,
    itself: Weak<Self>,
    neighbours: Option<Neighbours>,
    state: Mutex<State>,
    /// By rank: there may be something to be sent.
    departures: Vec<Notify>,
    /// By rank: all was sent, and nothing follows.
    flushed: Vec<watch::Sender<bool>>,
    /// The watch must look again.
    watch: Notify,
    end: watch::Sender<End>,
    pub(crate) meter: Meter,
}

struct State {
    mailbox: Mailbox,
    /// By rank: when something was last asked of an idle rank, sent there or received from there.
    moved: Vec<Instant>,
}

/// Whether it goes on.
#[derive(Clone, Debug)]
enum End {
    NotYet,
    Orderly,
    Broken(Fault),
}

impl Post {
    /// Messages between the ranks of a ring, which end with everything that this alarm ends. The second resolves when all that
    /// was sent is where it belongs, or when that has ended otherwise.
    pub(crate) fn start(
        thread: &IoThread,
        (ring, chunk_bytes, timeout): (Ring, u32, Duration),
        alarm: &Arc<Alarm>,
        (roads, callers): (Vec<Option<Road>>, Callers),
        neighbours: Option<Neighbours>,
    ) -> (Arc<Self>, Pending<(), ()>) {
        let ranks = || 0..ring.world_size().get();
        let mailbox = Mailbox::new(ring, chunk_bytes);
        let post = Arc::new_cyclic(|itself| Self {
            ring,
            timeout,
            alarm: alarm.clone(),
            runtime: thread.handle().clone(),
            itself: itself.clone(),
            neighbours,
            state: Mutex::new(State { mailbox, moved: ranks().map(|_| Instant::now()).collect() }),
            departures: ranks().map(|_| Notify::new()).collect(),
            flushed: ranks().map(|_| watch::Sender::new(false)).collect(),
            watch: Notify::new(),
            end: watch::Sender::new(End::NotYet),
            meter: Meter::default(),
        });
        alarm.add(&post);
        let (ended, pending) = Pending::new(());
        let sending = post.clone();
        thread.spawn(async move {
            let mut ways = JoinSet::new();
            for (to, road) in (0..).map(Rank).zip(roads) {
                let Some(road) = road else { continue };
                let post = sending.clone();
                ways.spawn(async move {
                    post.carry(to, road).await;
                    post.flushed[to.0 as usize].send_replace(true);
                });
            }
            while ways.join_next().await.is_some() {}
            // Nobody listens unless the group is being closed.
            let _ = ended.send(Ok(()));
        });
        let (receiving, watching) = (post.clone(), post.clone());
        thread.spawn_background(async move { receiving.answer(callers).await });
        thread.spawn_background(async move { watching.keep_watch().await });
        (post, pending)
    }

    /// Queues a message for another rank; `begin` is told where it is, and makes it.
    ///
    /// # Errors
    /// Where it would be, if too many are under way.
    pub(crate) fn send<T>(
        &self,
        to: Rank,
        tag: u32,
        begin: impl FnOnce(Place) -> (Letter, T),
    ) -> Result<T, Place> {
        self.update(to, |mailbox| {
            let at = mailbox.next_send(to, tag);
            if mailbox.pending() >= PENDING_MAX {
                return Err(at);
            }
            let (letter, result) = begin(at);
            if letter.lies_at.is_some() {
                self.meter.sent(at.op.collective, letter.payload.total_bytes);
            }
            mailbox.send(to, tag, letter);
            Ok(result)
        })
    }

    /// Asks for a message of another rank, as [`send`](Self::send).
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub(crate) fn receive<T>(
        &self,
        from: Rank,
        tag: u32,
        begin: impl FnOnce(Place) -> (Box<dyn Intake>, T),
    ) -> Result<T, Place> {
        self.update(from, |mailbox| {
            let at = mailbox.next_receive(from, tag);
            if mailbox.pending() >= PENDING_MAX {
                return Err(at);
            }
            let (intake, result) = begin(at);
            mailbox.receive(from, tag, intake);
            Ok(result)
        })
    }

    /// The owner wants nothing more.
    pub(crate) fn close(&self) {
        if self.lock().mailbox.pending() > 0 {
            return self.raise(&Fault::Closed);
        }
        self.end_with(End::Orderly);
    }

    /// Ends the group.
    fn raise(&self, fault: &Fault) {
        self.alarm.raise(fault);
        // The alarm may have been raised before this part has joined.
        self.end(fault.clone());
    }

    fn end_with(&self, end: End) {
        self.end.send_if_modified(|now| {
            let changes = matches!((&*now, &end), (End::NotYet, _) | (End::Orderly, End::Broken(_)));
            if changes {
                *now = end;
            }
            changes
        });
        self.departures.iter().chain([&self.watch]).for_each(Notify::notify_one);
    }

    /// Lets `change` work on what there is with that rank, and tells whom it may concern.
    fn update<T>(&self, peer: Rank, change: impl FnOnce(&mut Mailbox) -> T) -> T {
        let (result, fault) = {
            let mut state = self.lock();
            if !state.mailbox.needs(peer) {
                state.moved[peer.0 as usize] = Instant::now();
            }
            let was_whole = state.mailbox.fault().is_none();
            let result = change(&mut state.mailbox);
            (result, state.mailbox.fault().filter(|_| was_whole).cloned())
        };
        if let Some(fault) = fault {
            self.raise(&fault);
        }
        self.departures[peer.0 as usize].notify_one();
        self.watch.notify_one();
        self.copy_all();
        result
    }

    /// Where that rank may read what is to be sent, if it may.
    pub(crate) fn place<E: Element>(&self, to: Rank, input: Arc<Buffer<E>>) -> (Arc<Buffer<E>>, Option<u32>) {
        match &self.neighbours {
            Some(neighbours) => neighbours.place(to, input),
            None => (input, None),
        }
    }

    /// Has everything copied that is to be, by threads that may take their time.
    fn copy_all(&self) {
        let copies = self.lock().mailbox.take_copies();
        for copying in copies {
            // Whoever waits for it is told if nobody is left to do it.
            let Some(post) = self.itself.upgrade() else { continue };
            drop(self.runtime.spawn_blocking(move || post.copy(copying)));
        }
    }

    /// Copies a message from its sender's memory.
    fn copy(&self, mut copying: Copying) {
        let (from, length) = (copying.from, copying.bytes());
        let neighbours = self.neighbours.as_ref();
        match neighbours.and_then(|neighbours| neighbours.read(from, copying.lies_at, length)) {
            Some(bytes) => copying.write(bytes),
            None => {
                let (offset, length) = (u64::from(copying.lies_at) * ALIGNMENT as u64, length as u64);
                let disagreement = Disagreement::Outside { offset, length };
                self.raise(&Fault::Disagreed { peer: from, disagreement });
            }
        }
        self.meter.received(length as u64);
        self.lock().moved[from.0 as usize] = Instant::now();
        self.update(from, |mailbox| mailbox.copied(copying));
    }

    /// One rank's messages, from the first to the last.
    async fn carry(&self, to: Rank, road: Road) {
        loop {
            let (begins, end) = {
                let state = self.lock();
                let begins = state.mailbox.needs(to) || state.mailbox.has_outgoing(to);
                (begins, self.end.borrow().clone())
            };
            match end {
                End::Broken(_) => return,
                _ if begins => break,
                End::Orderly => return,
                End::NotYet => self.departures[to.0 as usize].notified().await,
            }
        }
        let source = match road {
            Road::Memory(road) => match road.call() {
                Ok(sender) => return self.depart(to, sender).await,
                Err(source) => source,
            },
            Road::Quic(road) => {
                let called = tokio::select! {
                    called = road.call() => called,
                    _ = self.broken() => return,
                };
                match called {
                    Ok(sender) => return self.depart(to, sender).await,
                    Err(source) => source,
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(REASON_MAX) => self.raise(&Fault::Lost { peer: to, source }),
            _ = self.broken() => {}
        }
    }

    /// Sends what is to be sent to a rank.
    async fn depart(&self, to: Rank, mut sender: impl LinkSender) {
        let broken = match self.send_all(to, &mut sender).await {
            Ok(()) => {
                let finished = async { tokio::time::timeout(self.timeout, sender.finish()).await };
                // The peer may have vanished just now, and then does not need the last bytes.
                tokio::select! { _ = finished => None, fault = self.broken() => Some(fault) }
            }
            Err(Some(source)) => {
                let fault = Fault::Lost { peer: to, source };
                self.raise(&fault);
                Some(fault)
            }
            // It has left, and nobody needs it.
            Err(None) => None,
        };
        if let Some(fault) = broken {
            let fault = if let End::Broken(first) = &*self.end.borrow() { first.clone() } else { fault };
            sender.break_off(&fault.told_by(self.ring.rank()));
        }
    }

    /// Sends until the owner wants nothing more, or the peer.
    async fn send_all(&self, to: Rank, sender: &mut impl LinkSender) -> Result<(), Option<TransportError>> {
        loop {
            let next = self.lock().mailbox.next_outgoing(to);
            let Some(pieces) = next else {
                match &*self.end.borrow() {
                    End::NotYet => {}
                    End::Orderly => return Ok(()),
                    End::Broken(_) => return Err(Some(TransportError::ClosedHere)),
                }
                tokio::select! {
                    () = self.departures[to.0 as usize].notified() => continue,
                    source = sender.closed() => return Err(self.judge(to, source)),
                }
            };
            for piece in pieces {
                let bytes = piece.len() as u64;
                tokio::select! {
                    sent = sender.send(piece) => sent.map_err(|source| self.judge(to, source))?,
                    _ = self.broken() => return Err(Some(TransportError::ClosedHere)),
                }
                self.meter.sent(Collective::Message { tag: 0 }, bytes);
                self.lock().moved[to.0 as usize] = Instant::now();
            }
        }
    }

    /// What is wrong with a link that has ended, if anything is.
    fn judge(&self, peer: Rank, source: TransportError) -> Option<TransportError> {
        if source != TransportError::ClosedByPeer {
            return Some(source);
        }
        self.lock().mailbox.depart(peer).err()
    }

    /// Takes in links from other ranks, one of each.
    async fn answer(self: Arc<Self>, mut callers: Callers) {
        let mut links = JoinSet::new();
        let mut known = BTreeSet::new();
        let mut end = self.end.subscribe();
        loop {
            let over = end.wait_for(|end| !matches!(end, End::NotYet));
            let link = tokio::select! {
                link = callers.next() => link,
                _ = over => break,
            };
            let Some((from, link)) = link else { break };
            if !known.insert(from) {
                tracing::warn!(%from, "a rank called twice");
                continue;
            }
            let post = self.clone();
            links.spawn(async move { link.drive(&post, from).await });
        }
        callers.close();
        while links.join_next().await.is_some() {}
    }

    /// Takes what a rank sends.
    pub(super) async fn arrive(&self, from: Rank, mut receiver: impl LinkReceiver) {
        let mut flushed = self.flushed[from.0 as usize].subscribe();
        loop {
            let source = tokio::select! {
                biased;
                fault = self.broken() => {
                    return receiver.break_off(&fault.told_by(self.ring.rank()));
                }
                piece = receiver.receive() => match piece {
                    Ok(Some(piece)) => {
                        if let Err(fault) = self.take(from, piece) {
                            self.raise(&fault);
                        }
                        continue;
                    }
                    Ok(None) => TransportError::ClosedByPeer,
                    Err(source) => source,
                },
                // All that the peer may wait for is there.
                _ = flushed.wait_for(|flushed| *flushed) => return receiver.close(),
            };
            match self.judge(from, source) {
                Some(source) => self.raise(&Fault::Lost { peer: from, source }),
                None => return,
            }
        }
    }

    fn take(&self, from: Rank, mut piece: Bytes) -> Result<(), Fault> {
        self.meter.received(piece.len() as u64);
        let taken = {
            let mut state = self.lock();
            if state.mailbox.fault().is_some() {
                return Ok(());
            }
            state.moved[from.0 as usize] = Instant::now();
            state.mailbox.absorb(from, &mut piece)
        };
        self.departures[from.0 as usize].notify_one();
        self.copy_all();
        taken.map_err(|disagreement| Fault::Disagreed { peer: from, disagreement })
    }

    /// Sees when nothing moves between this rank and one that it waits for.
    async fn keep_watch(&self) {
        loop {
            let earliest = {
                let state = self.lock();
                let needed = (0..).map(Rank).zip(&state.moved).filter(|(peer, _)| state.mailbox.needs(*peer));
                needed.map(|(peer, moved)| (*moved + self.timeout, peer)).min()
            };
            if !matches!(*self.end.borrow(), End::NotYet) {
                return;
            }
            match earliest {
                None => self.watch.notified().await,
                Some((deadline, peer)) if deadline <= Instant::now() => {
                    return self.raise(&Fault::Stuck { peer, timeout: self.timeout });
                }
                Some((deadline, _)) => tokio::select! {
                    () = self.watch.notified() => {}
                    () = tokio::time::sleep_until(deadline) => {}
                },
            }
        }
    }

    /// Waits until it has ended for a reason.
    async fn broken(&self) -> Fault {
        let mut end = self.end.subscribe();
        let end = end.wait_for(|end| matches!(end, End::Broken(_))).await;
        match end.as_deref() {
            Ok(End::Broken(fault)) => fault.clone(),
            _ => Fault::Closed,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held has ended a task or the caller; the state is for reporting only then.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part for Post {
    fn end(&self, fault: Fault) {
        self.lock().mailbox.fail(fault.clone());
        self.end_with(End::Broken(fault));
    }
}

/// A post, and when it has ended.
pub(crate) struct Posted {
    pub(crate) post: Arc<Post>,
    ended: Option<Pending<(), ()>>,
}

impl Posted {
    pub(crate) fn new((post, ended): (Arc<Post>, Pending<(), ()>)) -> Self {
        Self { post, ended: Some(ended) }
    }

    /// Waits until all that was sent is there.
    pub(crate) fn wait(&mut self) {
        // How it ends is all the same.
        let _ = self.ended.take().map(Pending::wait);
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        self.post.close();
    }
}
