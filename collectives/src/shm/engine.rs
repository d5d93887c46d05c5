//! One rank of a host's group: whose turn it is, waiting for peers, and what ends it all.
//!
//! Operations run one after the other, in the order in which they were submitted: on the caller's thread where the caller
//! waits and nothing is queued, else on the engine's own.
//!
//! # Invariants
//! 1. Who holds the turn runs the oldest operation that has not run.
//! 2. A peer's ticks are looked at before its end is: what it has done counts, even if it is gone since.
//! 3. Whoever waits is woken by ticks, by a fault, or by the deadline.

use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use tokio::io::AsyncReadExt;

use super::arena::{Arena, Region};
use super::board::{Board, View, map_sealed};
use super::copy::{cache_bytes, copy_past_caches};
use super::meet::Met;
use super::signal::{self, Signals};
use crate::alarm::{Alarm, Part};
use crate::buffer::Buffer;
use crate::collective::{Collective, OpId};
use crate::error::{CollectiveError, Phase, Place, TransportError};
use crate::fault::Fault;
use crate::group::GroupConfig;
use crate::io_thread::IoThread;
use crate::meter::Meter;
use crate::rank::Rank;
use crate::reduction::Element;
use crate::ring::{Members, Ring};

/// How often a peer's ticks are looked at before the processor is offered to others.
const SPINS: u32 = 2000;
/// As above, where ranks are more than processors.
const SPINS_CROWDED: u32 = 20;
/// Chunks between what is reduced and what is copied.
const LAG: usize = 1;
/// As above, where ranks are more than processors.
const LAG_CROWDED: usize = 15;
/// How long the processor is offered to others before the thread sleeps: long enough for other ranks, and short enough not
/// to wait for turns of programs that have nothing to do with it, as a sleeper does not.
const YIELDING_MAX: Duration = Duration::from_micros(50);
/// No sleep is longer: a fault or the deadline wakes nobody who falls asleep just then.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// A peer's last words: nothing is amiss, or why it breaks off.
const BYE: u8 = b'.';
const BROKEN: u8 = b'!';
const LAST_WORDS_MAX: u64 = 4096;

/// An operation that waits for its turn; what it returns is called when the turn is over, and tells whoever waits for it. Not
/// before: who has been told may close the group, which must not look busy then.
pub(crate) type Job = Box<dyn FnOnce(&Engine, &mut Turn) -> Told + Send>;
pub(crate) type Told = Box<dyn FnOnce()>;

/// What only the running operation touches.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    /// Ticks that this rank has given.
    pub(super) ticks: u32,
    pub(super) phase: Option<Phase>,
    pub(crate) bytes_done: u64,
    /// Rounds that were run as parts of operations of a larger group.
    pub(crate) rounds: u64,
    /// Where inputs, and outputs, are put that are not in the arena.
    pub(super) staged: [Option<Region>; 2],
}

/// One rank's half of a host's group.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(super) ring: Ring,
    members: Members,
    pub(super) board: Board,
    pub(super) arena: Arena,
    /// By rank; `None` for this one.
    peers: Vec<Option<Peer>>,
    timeout: Duration,
    /// So many timeouts a peer is waited for.
    patience: AtomicU32,
    /// Between two ticks.
    pub(super) chunk_bytes: usize,
    /// There are more ranks than processors.
    crowded: bool,
    /// Of this host's last level.
    cache_bytes: usize,
    turn: Mutex<Turn>,
    queue: Mutex<Queue>,
    submitted: Condvar,
    fault: OnceLock<Fault>,
    /// Where the host is one of several parts of a group.
    alarm: OnceLock<Arc<Alarm>>,
    pub(crate) meter: Meter,
}

#[derive(Default)]
struct Queue {
    next_sequence: u64,
    jobs: VecDeque<Job>,
    closing: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("jobs", &self.jobs.len()).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) view: View,
    /// Its arena, for reading.
    pub(super) arena: MmapRaw,
    line: UnixStream,
    /// It has left in an orderly way.
    departed: AtomicBool,
}

impl Peer {
    fn new(met: Met) -> std::io::Result<Self> {
        let (view, arena) = (View::of(&met.board)?, map_sealed(&met.arena)?);
        met.line.set_nonblocking(true)?;
        Ok(Self { view, arena, line: met.line, departed: AtomicBool::new(false) })
    }
}

impl Engine {
    /// An engine over peers that were met, and its thread.
    ///
    /// # Errors
    /// Where a peer's memory cannot be mapped, or the system gives no thread.
    pub(crate) fn start(
        (ring, members): (Ring, Members),
        config: GroupConfig,
        board: Board,
        arena: Arena,
        met: Vec<Option<Met>>,
        io: &IoThread,
    ) -> std::io::Result<(Arc<Self>, JoinHandle<()>)> {
        let peers =
            met.into_iter().map(|met| met.map(Peer::new).transpose()).collect::<Result<Vec<_>, _>>()?;
        let engine = Arc::new(Self {
            ring,
            members,
            board,
            arena,
            crowded: is_crowded(peers.len()),
            cache_bytes: cache_bytes(),
            peers,
            timeout: config.timeout,
            patience: AtomicU32::new(1),
            chunk_bytes: config.chunk_bytes() as usize,
            turn: Mutex::default(),
            queue: Mutex::default(),
            submitted: Condvar::new(),
            fault: OnceLock::new(),
            alarm: OnceLock::new(),
            meter: Meter::default(),
        });
        for rank in 0..ring.world_size().get() {
            let Some(peer) = engine.peer(rank) else { continue };
            let line = peer.line.try_clone()?;
            let watching = engine.clone();
            io.spawn_background(async move { watching.watch(rank, line).await });
        }
        let working = engine.clone();
        let thread = std::thread::Builder::new().name("mattock-shm".into()).spawn(move || working.work())?;
        Ok((engine, thread))
    }

    /// Where the next operation to be submitted begins, and the lock that keeps it next.
    fn next(&self, collective: Collective) -> (Place, MutexGuard<'_, Queue>) {
        let queue = lock(&self.queue);
        let op = OpId { sequence: queue.next_sequence, collective };
        (self.place(op, &Turn::default()), queue)
    }

    /// Where an operation is.
    pub(super) fn place(&self, op: OpId, turn: &Turn) -> Place {
        let (rank, generation) = (self.name(self.ring.rank().0), self.ring.generation());
        Place {
            rank,
            generation,
            op,
            phase: turn.phase.unwrap_or(Phase::Queued),
            bytes_done: turn.bytes_done,
        }
    }

    /// Queues an operation. `None` where too many are pending.
    pub(crate) fn submit<T>(
        &self,
        collective: Collective,
        pending_max: usize,
        job: impl FnOnce(Place) -> (Job, T),
    ) -> Result<T, Place> {
        let (at, mut queue) = self.next(collective);
        if queue.jobs.len() >= pending_max {
            return Err(at);
        }
        let (job, result) = job(at);
        queue.next_sequence += 1;
        queue.jobs.push_back(job);
        drop(queue);
        self.submitted.notify_one();
        Ok(result)
    }

    /// Runs an operation on this thread, at once. `None` where others are before it: submit it then.
    pub(crate) fn run_now<T>(
        &self,
        collective: Collective,
        run: impl FnOnce(&Self, &mut Turn, OpId) -> T,
    ) -> Option<T> {
        let (at, mut queue) = self.next(collective);
        if !queue.jobs.is_empty() {
            return None;
        }
        let mut turn = self.turn.try_lock().ok()?;
        queue.next_sequence += 1;
        drop(queue);
        Some(run(self, &mut turn, at.op))
    }

    /// From now on, the host's part ends with the other parts of its group, and they with it.
    pub(crate) fn join(self: &Arc<Self>, alarm: &Arc<Alarm>) {
        if self.alarm.set(alarm.clone()).is_ok() {
            alarm.add(self);
        }
        // One that has ended before has told nobody.
        if let Some(fault) = self.fault() {
            alarm.raise(fault);
        }
    }

    /// How many timeouts a peer is waited for from now on.
    pub(crate) fn set_patience(&self, timeouts: u32) {
        self.patience.store(timeouts, Ordering::Relaxed);
    }

    /// Ends everything for one reason; the first one counts.
    pub(crate) fn fail(&self, fault: Fault) {
        if self.fault().is_some() {
            return;
        }
        let raise = || self.alarm.get().into_iter().for_each(|alarm| alarm.raise(&fault));
        raise();
        self.end_alone(fault.clone());
        // The alarm may have come just now, and not have seen the fault.
        raise();
    }

    fn end_alone(&self, fault: Fault) {
        if self.fault.set(fault.clone()).is_err() {
            return;
        }
        let reason = fault.told_by(self.name(self.ring.rank().0));
        tracing::debug!(reason, "the host's group ends");
        for peer in self.peers() {
            let mut words = vec![BROKEN];
            words.extend_from_slice(&reason.as_bytes()[..reason.len().min(LAST_WORDS_MAX as usize - 1)]);
            leave(&peer.line, &words);
            peer.view.wake();
        }
        self.submitted.notify_one();
    }

    /// The owner wants nothing more: what is pending ends, the thread as well.
    pub(crate) fn close(&self) {
        let idle = {
            let mut queue = lock(&self.queue);
            queue.closing = true;
            queue.jobs.is_empty() && self.turn.try_lock().is_ok()
        };
        if idle && self.fault.set(Fault::Closed).is_ok() {
            self.peers().for_each(|peer| leave(&peer.line, &[BYE]));
        } else {
            self.fail(Fault::Closed);
        }
        self.submitted.notify_one();
    }

    /// Between two ticks.
    pub(crate) fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// This member's place.
    pub(crate) fn ring(&self) -> Ring {
        self.ring
    }

    /// In ordinary memory where the arena is full.
    pub(crate) fn buffer<E: Element>(&self, len: usize) -> Buffer<E> {
        self.arena.buffer(len).unwrap_or_else(|_| Buffer::zeroed(len))
    }

    /// As [`buffer`](Self::buffer), with whatever was in the memory.
    pub(crate) fn scratch<E: Element>(&self, len: usize) -> Buffer<E> {
        let region = self.arena.region(len * size_of::<E>());
        region.map_or_else(|_| Buffer::zeroed(len), |region| Buffer::shared(region, len))
    }

    /// Where a buffer lies in the arena, if it does.
    pub(crate) fn offset_of<E: Element>(&self, buffer: &Buffer<E>) -> Option<usize> {
        buffer.region().filter(|region| self.arena.holds(region)).map(Region::offset)
    }

    /// Why nothing works any more, if so.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.get()
    }

    fn peers(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter().flatten()
    }

    /// Whether everybody's input and result of that size are more than the caches hold.
    pub(super) fn is_past_caches(&self, total: usize) -> bool {
        2 * total * self.peers.len() > self.cache_bytes
    }

    /// Whether others read results of that size out of slots, also where they could read them from the output: so these are
    /// never read from memory.
    pub(super) fn is_in_slots(&self, total: usize) -> bool {
        self.is_past_caches(total) && !self.crowded
    }

    /// Copies a part of a result of `total` bytes.
    pub(super) fn copy(&self, total: usize, from: &[u8], to: &mut [u8]) {
        if self.is_past_caches(total) { copy_past_caches(from, to) } else { to.copy_from_slice(from) }
    }

    /// How many chunks are reduced before the first one is copied. Where ranks outnumber processors, waiting for a chunk
    /// means giving the processor away.
    pub(super) fn lag(&self) -> usize {
        lag_of(self.peers.len())
    }

    /// The group's name for a rank.
    pub(super) fn name(&self, rank: u32) -> Rank {
        self.members.name(Rank(rank))
    }

    /// Bytes of another rank's arena; `None` where it has no such bytes. They mean something while their owner keeps them.
    pub(crate) fn memory_of(&self, rank: u32, start: usize, length: usize) -> Option<&[u8]> {
        self.peer(rank)?.bytes(start, length)
    }

    /// Another rank's.
    pub(super) fn peer(&self, rank: u32) -> Option<&Peer> {
        self.peers.get(rank as usize)?.as_ref()
    }

    /// Tells everybody that this rank has come further.
    pub(super) fn tick(&self, turn: &mut Turn) {
        turn.ticks = turn.ticks.wrapping_add(1);
        signal::tick(&self);
    }

    /// Waits until all others have come as far as `ticks`.
    pub(super) fn wait_for_all(&self, ticks: u32) -> Result<(), Fault> {
        (0..self.ring.world_size().get()).try_for_each(|rank| self.wait_for(rank, ticks))
    }

    /// Waits until a rank has come as far as `ticks`.
    pub(super) fn wait_for(&self, rank: u32, ticks: u32) -> Result<(), Fault> {
        let Some(peer) = self.peer(rank) else { return Ok(()) };
        for _ in 0..if self.crowded { SPINS_CROWDED } else { SPINS } {
            if peer.has_reached(ticks) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let yielding = Instant::now();
        while yielding.elapsed() < YIELDING_MAX {
            std::thread::yield_now();
            if peer.has_reached(ticks) {
                return Ok(());
            }
        }
        self.sleep_until(self.name(rank), peer, ticks)
    }

    fn sleep_until(&self, rank: Rank, peer: &Peer, ticks: u32) -> Result<(), Fault> {
        let timeout = self.timeout.saturating_mul(self.patience.load(Ordering::Relaxed));
        let deadline = Instant::now() + timeout;
        // The end of a peer is looked at first and judged last: it may have come this far before.
        let look = || (peer.departed.load(Ordering::Acquire), self.fault.get());
        signal::sleep_until(&self, peer, look, |seen, (departed, fault)| {
            if reaches(seen, ticks) {
                Some(Ok(()))
            } else if let Some(fault) = fault {
                Some(Err(fault.clone()))
            } else if departed {
                Some(Err(Fault::Lost { peer: rank, source: TransportError::ClosedByPeer }))
            } else if Instant::now() >= deadline {
                Some(Err(Fault::Stuck { peer: rank, timeout }))
            } else {
                None
            }
        })
    }

    /// Runs what is queued, until the group is closed.
    fn work(&self) {
        loop {
            {
                let mut queue = lock(&self.queue);
                while queue.jobs.is_empty() && !queue.closing {
                    queue = self.submitted.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                if queue.jobs.is_empty() {
                    return;
                }
            }
            let mut turn = lock(&self.turn);
            let job = lock(&self.queue).jobs.pop_front();
            let told = job.map(|job| job(self, &mut turn));
            drop(turn);
            if let Some(told) = told {
                told();
            }
        }
    }

    /// Waits for a peer's last words.
    async fn watch(&self, rank: u32, line: UnixStream) {
        let words = last_words(line).await;
        let Some(state) = self.peer(rank) else { return };
        let source = match words.split_first() {
            Some((&BYE, _)) => {
                state.departed.store(true, Ordering::Release);
                state.view.wake();
                return;
            }
            Some((_, reason)) => {
                TransportError::BrokenOff { reason: String::from_utf8_lossy(reason).into_owned() }
            }
            None => TransportError::ProcessEnded,
        };
        self.fail(Fault::Lost { peer: self.name(rank), source });
    }

    /// What a fault means for an operation.
    pub(super) fn error(&self, op: OpId, turn: &Turn, fault: &Fault) -> CollectiveError {
        fault.at(self.place(op, turn))
    }
}

impl Part for Engine {
    fn end(&self, fault: Fault) {
        self.end_alone(fault);
    }
}

impl Peer {
    /// Bytes of its arena; `None` where it has no such bytes.
    pub(super) fn bytes(&self, start: usize, length: usize) -> Option<&[u8]> {
        let end = start.checked_add(length)?;
        // SAFETY: within the map, which the owner can neither shrink nor unmap. It may write while we read, if it breaks
        // the rules: then the numbers are wrong, and nothing else.
        (end <= self.arena.len())
            .then(|| unsafe { std::slice::from_raw_parts(self.arena.as_ptr().add(start), length) })
    }

    fn has_reached(&self, ticks: u32) -> bool {
        reaches(self.view.ticks().load(Ordering::Acquire), ticks)
    }
}

/// Whether somebody at `seen` has come as far as `ticks`, however often both have wrapped.
fn reaches(seen: u32, ticks: u32) -> bool {
    seen.wrapping_sub(ticks).cast_signed() >= 0
}

impl<'a> Signals for &'a Engine {
    type Peer = &'a Peer;

    fn add_tick(&self) {
        self.board.add_tick();
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn anybody_sleeps(&self) -> bool {
        self.peers().any(|peer| peer.view.is_sleeping())
    }

    fn wake(&self) {
        self.board.wake();
    }

    fn set_sleeping(&self, sleeping: bool) {
        self.board.set_sleeping(sleeping);
    }

    fn ticks_of(&self, peer: &Peer) -> u32 {
        peer.view.ticks().load(Ordering::Acquire)
    }

    fn sleep(&self, peer: &Peer, seen: u32) {
        peer.view.sleep(seen, SLEEP_MAX);
    }
}

/// Says something and hangs up.
fn leave(mut line: &UnixStream, words: &[u8]) {
    // Who is gone needs no words, and the end of the line says the rest.
    let _ = line.write(words);
    let _ = line.shutdown(Shutdown::Write);
}

async fn last_words(line: UnixStream) -> Vec<u8> {
    let mut words = Vec::new();
    if let Ok(line) = tokio::net::UnixStream::from_std(line) {
        // An error ends the line as well.
        let _ = line.take(LAST_WORDS_MAX).read_to_end(&mut words).await;
    }
    words
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic has ended the operation that held it; what is left is in order.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See [`Engine::lag`].
pub(super) fn lag_of(ranks: usize) -> usize {
    if is_crowded(ranks) { LAG_CROWDED } else { LAG }
}

/// Whether ranks are more than the processors of the host, not only of this process: all ranks must come to the same.
fn is_crowded(ranks: usize) -> bool {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    ranks > *PROCESSORS.get_or_init(processors)
}

/// Processors of this host, or a guess.
fn processors() -> usize {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    };
    online.trim().split(',').map(count).sum::<Option<usize>>().unwrap_or(1).max(1)
}
