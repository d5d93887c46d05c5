//! A rank's handle on its ring: submit operations from any thread, wait for their results.
//!
//! Ranks must submit the same operations in the same order. Operations are queued and run pipelined: the next one
//! starts to travel while the last chunks of the one before are on their way. Messages between two ranks are no part of that order.

mod batch;
pub(crate) mod hierarchy;
pub(crate) mod line;
mod messages;
mod operations;
pub(crate) mod order;
pub(crate) mod shortcut;

pub use batch::{Batch, FUSED_BYTES_MAX};

use std::any::Any;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use self::shortcut::Shortcut;
use crate::alarm::{Alarm, Part};
use crate::driver::{Shared, drive};
use crate::fault::Fault;
use crate::io_thread::IoThread;
use crate::link::{LinkReceiver, LinkSender};
use crate::message::neighbours::Neighbours;
use crate::message::post::{Post, Posted};
use crate::message::roads::{Callers, Road};
use crate::meter::Counters;
use crate::pending::Pending;
use crate::rank::Rank;
use crate::recorder::{Record, Recorder};
use crate::ring::{Members, Ring};
use crate::shm::board::INLINE_BYTES;
use crate::shm::engine::Engine;

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

/// What carries a group's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One rank needs nothing.
    Alone,
    /// Channels within a process.
    InMemory,
    /// QUIC, encrypted and authenticated.
    Quic,
    /// Memory that the processes of one host share.
    SharedMemory,
    /// Some ranks share a host: what is reduced or gathered by all, and barriers, go over shared memory within hosts and by links
    /// between one rank of each host; everything else goes round the ring of all ranks.
    Hierarchical,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Alone => "nothing",
            Self::InMemory => "memory",
            Self::Quic => "QUIC",
            Self::SharedMemory => "shared memory",
            Self::Hierarchical => "shared memory within hosts, QUIC between",
        })
    }
}

/// A member's handle on one generation of a group. Dropping it closes the group; see [`close`](Self::close).
pub struct Group {
    ring: Ring,
    transport: Transport,
    way: Way,
    /// Between any two ranks; none where nobody else is there, or nobody knows the way.
    posted: Option<Posted>,
    recorder: Arc<Recorder>,
    /// What must outlive the links.
    keep: Arc<dyn Any + Send + Sync>,
}

/// How operations are run.
enum Way {
    /// Round the ring; what the shortcut carries, faster.
    Ring { links: Linked, shortcut: Option<Shortcut> },
    /// Over the memory of this host, by a thread.
    Host { engine: Arc<Engine>, thread: Option<JoinHandle<()>> },
}

/// A ring's operations, and who drives them.
pub(crate) struct Linked {
    shared: Arc<Shared>,
    chunk_bytes: u32,
    /// Resolves when the driver has ended; without one where nobody else is there.
    driver: Option<Pending<(), ()>>,
}

impl Linked {
    /// A ring whose neighbours are reached through these links, driven by `thread`.
    pub(crate) fn start(
        thread: &IoThread,
        (ring, members): (Ring, Members),
        config: GroupConfig,
        (sender, receiver): (impl LinkSender, impl LinkReceiver),
    ) -> Self {
        let chunk_bytes = config.chunk_bytes();
        let shared = Shared::new(ring, members, chunk_bytes, config.timeout);
        let (ended, driver) = Pending::new(());
        let driven = shared.clone();
        thread.spawn(async move {
            drive(driven, sender, receiver).await;
            // Nobody listens unless the group is being closed.
            let _ = ended.send(Ok(()));
        });
        Self { shared, chunk_bytes, driver: Some(driver) }
    }

    /// Waits until the driver has ended.
    fn wait(&mut self) {
        // How it ends is all the same.
        let _ = self.driver.take().map(Pending::wait);
    }
}

impl Drop for Linked {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ring, transport, .. } = self;
        f.debug_struct("Group").field("ring", ring).field("transport", transport).finish_non_exhaustive()
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
        Self::linked(thread, ring, config, (sender, receiver), Transport::InMemory, thread.clone())
    }

    /// As [`over_links`](Self::over_links); `keep` lives as long as the group.
    pub(crate) fn linked(
        thread: &IoThread,
        ring: Ring,
        config: GroupConfig,
        links: (impl LinkSender, impl LinkReceiver),
        transport: Transport,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let links = Linked::start(thread, (ring, Members::default()), config, links);
        let way = Way::Ring { links, shortcut: None };
        Self { ring, transport, way, posted: None, recorder: Arc::default(), keep }
    }

    /// A group without links: it is its own world.
    pub(crate) fn alone(ring: Ring, config: GroupConfig, keep: Arc<dyn Any + Send + Sync>) -> Self {
        let chunk_bytes = config.chunk_bytes();
        let shared = Shared::new(ring, Members::default(), chunk_bytes, config.timeout);
        let way = Way::Ring { links: Linked { shared, chunk_bytes, driver: None }, shortcut: None };
        Self { ring, transport: Transport::Alone, way, posted: None, recorder: Arc::default(), keep }
    }

    /// A group of the processes of one host.
    pub(crate) fn on_host(
        (engine, thread): (Arc<Engine>, JoinHandle<()>),
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let (ring, transport) = (engine.ring(), Transport::SharedMemory);
        let way = Way::Host { engine, thread: Some(thread) };
        Self { ring, transport, way, posted: None, recorder: Arc::default(), keep }
    }

    /// The group with a faster way for what its ranks do most. All ranks must do this before the next operation.
    pub(crate) fn with(mut self, faster: Shortcut) -> Self {
        if let Way::Ring { links, shortcut } = &mut self.way {
            faster.join(&links.shared);
            if let Shortcut::Hosts(_) = faster {
                self.transport = Transport::Hierarchical;
            }
            *shortcut = Some(faster);
        }
        self
    }

    /// The group with ways for messages between any two ranks. What all ranks do together is arranged before.
    pub(crate) fn with_messages(
        mut self,
        thread: &IoThread,
        config: GroupConfig,
        ways: (Vec<Option<Road>>, Callers),
    ) -> Self {
        let alarm = match &self.way {
            Way::Ring { shortcut: Some(shortcut), .. } => shortcut.alarm().clone(),
            Way::Ring { .. } | Way::Host { .. } => Arc::<Alarm>::default(),
        };
        let place = (self.ring, config.chunk_bytes(), config.timeout);
        let neighbours = match &self.way {
            Way::Ring { shortcut, .. } => {
                shortcut.as_ref().and_then(|shortcut| shortcut.neighbours(self.ring.rank()))
            }
            Way::Host { engine, .. } => {
                let all = (0..self.ring.world_size().get()).map(Rank).collect();
                Some(Neighbours::new(engine.clone(), all))
            }
        };
        self.posted = Some(Posted::new(Post::start(thread, place, &alarm, ways, neighbours)));
        match &self.way {
            Way::Ring { shortcut: Some(_), .. } => {}
            Way::Ring { links, .. } => links.shared.join(&alarm),
            Way::Host { engine, .. } => engine.join(&alarm),
        }
        self
    }

    /// What must outlive the links.
    pub(crate) fn keep(&self) -> Arc<dyn Any + Send + Sync> {
        self.keep.clone()
    }

    /// This member's place.
    pub fn ring(&self) -> Ring {
        self.ring
    }

    /// What carries its bytes.
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// How an all-reduce of so many bytes is done: `ring` round the links; over shared memory `board` in one round of small
    /// messages, or `direct` from everybody's input; `hierarchical` within hosts, between leaders, within hosts;
    /// `line` to the last rank and back.
    pub fn algorithm(&self, bytes: usize) -> &'static str {
        match &self.way {
            Way::Ring { shortcut: Some(shortcut), .. } => shortcut.algorithm(),
            Way::Ring { .. } => "ring",
            Way::Host { .. } if bytes <= INLINE_BYTES => "board",
            Way::Host { .. } => "direct",
        }
    }

    /// The last operations, the oldest first: what to look at when one has failed.
    pub fn history(&self) -> Vec<Record> {
        self.recorder.records()
    }

    /// Bytes sent and received so far, over links and shared memory together. Over shared memory: what others read of this rank,
    /// and it of them.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        match &self.way {
            Way::Ring { links, shortcut } => {
                let beside = shortcut.iter().flat_map(Shortcut::links);
                for Linked { shared, .. } in beside.chain([links]) {
                    shared.meter.add_to(&mut sum);
                }
                if let Some(engine) = shortcut.as_ref().and_then(Shortcut::engine) {
                    engine.meter.add_to(&mut sum);
                }
            }
            Way::Host { engine, .. } => engine.meter.add_to(&mut sum),
        }
        if let Some(Posted { post, .. }) = &self.posted {
            post.meter.add_to(&mut sum);
        }
        sum
    }

    /// Ends all pending and future operations at once with [`CollectiveError::Cancelled`](crate::CollectiveError::Cancelled); neighbours are told.
    pub fn cancel(&self, cause: impl Into<String>) {
        let fault = Fault::Cancelled { cause: cause.into() };
        match &self.way {
            Way::Ring { shortcut: Some(shortcut), .. } => shortcut.raise(&fault),
            Way::Ring { links, .. } => links.shared.end(fault),
            Way::Host { engine, .. } => engine.fail(fault),
        }
    }

    /// Ends the group: waits until others have all that was sent, the timeout at most. Pending operations end
    /// with [`CollectiveError::Closed`](crate::CollectiveError::Closed). Dropping a group does the same in the background.
    pub fn close(mut self) {
        self.end();
        self.posted.iter_mut().for_each(Posted::wait);
        // How a thread ends is all the same.
        match &mut self.way {
            Way::Ring { links, shortcut } => {
                links.wait();
                shortcut.iter_mut().for_each(Shortcut::wait);
            }
            Way::Host { thread, .. } => drop(thread.take().map(JoinHandle::join)),
        }
    }

    fn end(&self) {
        self.posted.iter().for_each(|posted| posted.post.close());
        match &self.way {
            Way::Ring { links, shortcut } => {
                links.shared.close();
                shortcut.iter().for_each(Shortcut::end);
            }
            Way::Host { engine, .. } => engine.close(),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end();
    }
}
