//! How a rank's messages reach the others: over channels within a process, or over connections of their own between nodes.

use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, Endpoint};
use tokio::sync::mpsc;

use super::post::Post;
use crate::error::TransportError;
use crate::link::memory::{self, MemoryReceiver, MemorySender};
use crate::link::quic::directions::Directions;
use crate::link::quic::hello::Part;
use crate::link::quic::join::Join;
use crate::link::quic::lobby::Lobby;
use crate::link::quic::obituary::Obituaries;
use crate::link::quic::stream::{QuicReceiver, QuicSender};
use crate::rank::Rank;
use crate::ring::{Members, Ring};

/// The way to one other rank.
pub(crate) enum Road {
    Memory(MemoryRoad),
    Quic(Box<QuicRoad>),
}

/// Those who call this rank.
pub(crate) enum Callers {
    Memory(mpsc::UnboundedReceiver<(Rank, MemoryReceiver)>),
    Quic(Box<QuicWays>),
}

/// A link that another rank has made.
pub(crate) enum Link {
    Memory(MemoryReceiver),
    Quic(QuicReceiver),
}

impl Link {
    pub(super) async fn drive(self, post: &Post, from: Rank) {
        match self {
            Self::Memory(receiver) => post.arrive(from, receiver).await,
            Self::Quic(receiver) => post.arrive(from, receiver).await,
        }
    }
}

impl Callers {
    /// The next one; `None` where nobody can call any more.
    pub(super) async fn next(&mut self) -> Option<(Rank, Link)> {
        match self {
            Self::Memory(calls) => calls.recv().await.map(|(from, link)| (from, Link::Memory(link))),
            Self::Quic(ways) => ways.next().await.map(|(from, link)| (from, Link::Quic(link))),
        }
    }

    /// From now on nobody is let in.
    pub(super) fn close(&mut self) {
        match self {
            Self::Memory(calls) => calls.close(),
            Self::Quic(ways) => ways.lobby.shut(ways.ring.generation(), Part::Messages),
        }
    }
}

/// The way to a rank of this process.
pub(crate) struct MemoryRoad {
    own: Rank,
    /// One at most: each rank makes one link to each other.
    door: mpsc::UnboundedSender<(Rank, MemoryReceiver)>,
}

impl MemoryRoad {
    pub(super) fn call(self) -> Result<MemorySender, TransportError> {
        let (sender, receiver) = memory::link();
        self.door.send((self.own, receiver)).map_err(|_| TransportError::ClosedByPeer)?;
        Ok(sender)
    }
}

/// What each of so many ranks of a process needs.
pub(crate) fn within_process(ranks: u32) -> Vec<(Vec<Option<Road>>, Callers)> {
    let (doors, calls): (Vec<_>, Vec<_>) = (0..ranks).map(|_| mpsc::unbounded_channel()).unzip();
    let roads = |own: Rank| -> Vec<Option<Road>> {
        let road = |(to, door): (Rank, &mpsc::UnboundedSender<_>)| {
            (to != own).then(|| Road::Memory(MemoryRoad { own, door: door.clone() }))
        };
        (0..).map(Rank).zip(&doors).map(road).collect()
    };
    (0..).map(Rank).zip(calls).map(|(own, calls)| (roads(own), Callers::Memory(calls))).collect()
}

/// What a node's links are made of, and between whom.
#[derive(Clone)]
pub(crate) struct QuicWays {
    pub(crate) endpoint: Endpoint,
    pub(crate) client: ClientConfig,
    pub(crate) lobby: Arc<Lobby>,
    pub(crate) obituaries: Arc<Obituaries>,
    pub(crate) ring: Ring,
    /// By rank; `None` for who cannot be reached.
    pub(crate) directions: Arc<[Option<Directions>]>,
    pub(crate) chunk_bytes: u32,
    pub(crate) timeout: Duration,
}

/// The way to a rank of another node.
pub(crate) struct QuicRoad {
    ways: QuicWays,
    to: Rank,
}

impl QuicWays {
    /// The ways to all others.
    pub(crate) fn roads(&self) -> Vec<Option<Road>> {
        let own = self.ring.rank();
        let road = |to| (to != own).then(|| Road::Quic(Box::new(QuicRoad { ways: self.clone(), to })));
        (0..self.ring.world_size().get()).map(Rank).map(road).collect()
    }

    fn join(&self) -> Join<'_> {
        Join {
            endpoint: &self.endpoint,
            client: &self.client,
            lobby: &self.lobby,
            obituaries: &self.obituaries,
            part: Part::Messages,
            ring: self.ring,
            members: Members::default(),
            chunk_bytes: self.chunk_bytes,
            timeout: self.timeout,
        }
    }

    /// The next rank that calls.
    async fn next(&self) -> Option<(Rank, QuicReceiver)> {
        loop {
            let call = self.lobby.take_any(self.ring.generation(), Part::Messages).await.ok()?;
            let name = |rank: Rank| Some(self.directions.get(rank.0 as usize)?.as_ref()?.name.as_str());
            let caller =
                name(call.hello.from).is_some_and(|name| name == call.name).then_some(call.hello.from);
            match self.join().welcome(call, caller).await {
                Ok(taken) => return Some(taken),
                Err(error) => tracing::warn!(%error, "a caller was not let in"),
            }
        }
    }
}

impl QuicRoad {
    pub(super) async fn call(&self) -> Result<QuicSender, TransportError> {
        let Self { ways, to } = self;
        let directions = ways.directions[to.0 as usize].as_ref();
        let unknown = || TransportError::Failed { reason: format!("nobody knows the way to rank {to}") };
        let directions = directions.ok_or_else(unknown)?;
        ways.join().link_to(*to, directions).await
    }
}
