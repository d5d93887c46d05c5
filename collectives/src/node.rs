//! A process's place on the network: one UDP port and one identity, from which rings are joined one after the other.

mod form;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, Endpoint, ServerConfig, TokioRuntime};

use crate::error::JoinError;
use crate::group::{Group, GroupConfig, Transport};
use crate::io_thread::IoThread;
use crate::link::quic::directions::Directions;
use crate::link::quic::hello::Part;
use crate::link::quic::join::{Join, receive_calls};
use crate::link::quic::lobby::Lobby;
use crate::link::quic::obituary::Obituaries;
use crate::link::quic::stream::{QuicReceiver, QuicSender};
use crate::link::quic::tuning::{Congestion, Path, endpoint_config, transport_config};
use crate::link::quic::{Identity, IdentityError, socket};
use crate::pending::Pending;
use crate::ring::{Members, Ring};
use crate::shm::arena::Arena;

/// How long the end of a node waits for its last packets to leave.
const DRAIN_MAX: Duration = Duration::from_millis(500);

/// What a node needs.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Who it is, and which authority it believes.
    pub identity: Identity,
    /// Where to listen; port 0 takes a free one. A loopback address says that all peers are on this host.
    pub bind: SocketAddr,
    /// The timeout for everything, and the size of chunks; the same on all ranks.
    pub group: GroupConfig,
    /// How fast to send between hosts.
    pub congestion: Congestion,
    /// What is to carry the bytes.
    pub transport: TransportChoice,
    /// Bytes that this process may share with others of its host: the limit of [`Node::arena`].
    pub arena_bytes: usize,
    /// Which host this is, where the system cannot tell: processes share memory only with those that say the same. Zero unless
    /// one machine is to play several hosts.
    pub host: u64,
}

impl std::str::FromStr for TransportChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "quic" => Ok(Self::Quic),
            "shm" => Ok(Self::SharedMemory),
            _ => Err(format!("'{text}' is no transport: auto, quic and shm are")),
        }
    }
}

impl std::fmt::Display for TransportChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Quic => "quic",
            Self::SharedMemory => "shm",
        })
    }
}

impl NodeConfig {
    /// Shared memory, as much as the machine has, where it can be; QUIC elsewhere.
    pub fn new(identity: Identity, bind: SocketAddr) -> Self {
        let arena_bytes = usize::try_from(rustix::system::sysinfo().totalram).unwrap_or(usize::MAX);
        let (group, congestion) = (GroupConfig::default(), Congestion::default());
        Self { identity, bind, group, congestion, transport: TransportChoice::Auto, arena_bytes, host: 0 }
    }
}

/// What a node's groups may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// Shared memory where all ranks are on one host; shared memory within hosts and QUIC between where some are; else QUIC.
    #[default]
    Auto,
    /// QUIC even between processes of one host; one rank that wants it is enough.
    Quic,
    /// Shared memory between all ranks, or an error.
    SharedMemory,
}

/// A ring to be joined.
#[derive(Clone, Debug)]
pub struct RingSpec {
    /// This node's place in it.
    pub ring: Ring,
    /// Where the next rank listens, and the DNS name in its certificate.
    pub next: (SocketAddr, String),
    /// The DNS name in the previous rank's certificate.
    pub prev: String,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The certificates cannot be used.
    #[error("the node has no usable identity: {0}")]
    Identity(#[from] IdentityError),
    /// The port cannot be had.
    #[error("cannot listen on {address}: {source}; is the port taken?")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// In the system's words.
        source: io::Error,
    },
    /// The system gives us no thread.
    #[error("cannot start the node's thread: {0}")]
    Thread(io::Error),
}

/// A listening endpoint with its own thread. Groups keep it alive; the last to go closes it.
#[derive(Debug)]
pub struct Node {
    core: Arc<Core>,
}

#[derive(Debug)]
struct Core {
    endpoint: Endpoint,
    client: ClientConfig,
    lobby: Arc<Lobby>,
    obituaries: Arc<Obituaries>,
    local_addr: SocketAddr,
    group: GroupConfig,
    thread: Arc<IoThread>,
    transport: TransportChoice,
    host: u64,
    /// None where the system has no such memory, or nobody wants it.
    arena: Option<Arena>,
}

impl Node {
    /// Binds and listens.
    ///
    /// # Errors
    /// [`NodeError`] says what is wrong with identity, port or system.
    pub fn start(config: NodeConfig) -> Result<Self, NodeError> {
        let NodeConfig { identity, bind, group, congestion, transport: choice, arena_bytes, host } = config;
        identity.name()?;
        let path = Path::of(bind);
        let (paces, obituaries) = (Arc::default(), Arc::<Obituaries>::default());
        let transport = transport_config(path, congestion, &paces, group.timeout);
        let mut client = ClientConfig::new(Arc::new(identity.client_config()?));
        client.transport_config(transport.clone());
        let mut server = ServerConfig::with_crypto(Arc::new(identity.server_config()?));
        server.transport_config(transport);

        let thread = Arc::new(IoThread::start("mattock-links").map_err(NodeError::Thread)?);
        let failed = |source| NodeError::Bind { address: bind, source };
        let endpoint = {
            let _runtime = thread.handle().enter();
            let socket = socket::bind(bind, path, paces, obituaries.clone()).map_err(failed)?;
            let runtime = Arc::new(TokioRuntime);
            Endpoint::new_with_abstract_socket(endpoint_config(path), Some(server), socket, runtime)
                .map_err(failed)?
        };
        let local_addr = endpoint.local_addr().map_err(failed)?;
        let lobby = Arc::new(Lobby::default());
        thread.spawn_background(receive_calls(endpoint.clone(), lobby.clone(), group.timeout));
        let arena = arena(choice, arena_bytes);
        let core = Core {
            endpoint,
            client,
            lobby,
            obituaries,
            local_addr,
            group,
            thread,
            transport: choice,
            host,
            arena,
        };
        Ok(Self { core: Arc::new(core) })
    }

    /// Where the node listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.core.local_addr
    }

    /// Where to take buffers from that peers on this host read without a copy; `None` where there is no shared memory.
    pub fn arena(&self) -> Option<&Arena> {
        self.core.arena.as_ref()
    }

    /// Joins a ring: links to both neighbours, who must join the same ring within the timeout. Blocks the thread.
    ///
    /// Calls of older generations are refused from now on. A ring of one needs no neighbours: `next` and `prev` are
    /// then ignored.
    ///
    /// # Errors
    /// [`JoinError`] names the neighbour and what went wrong with it.
    pub fn join_ring(&self, spec: RingSpec) -> Result<Group, JoinError> {
        self.begin_join(spec).wait()
    }

    /// As [`join_ring`](Self::join_ring), without blocking. Dropping the result gives the attempt up, as does asking
    /// for a newer generation.
    pub fn begin_join(&self, spec: RingSpec) -> Pending<Group, JoinError> {
        let (mut joined, pending) = Pending::new(JoinError::NodeEnded);
        let core = self.core.clone();
        self.core.thread.spawn(async move {
            let group = tokio::select! {
                group = join(&core, &spec) => group,
                () = joined.closed() => return,
            };
            // The group has a hold of its own; the last one must not be let go of on this thread.
            drop(core);
            // A group that nobody waits for is closed again.
            let _ = joined.send(group);
        });
        pending
    }
}

impl Core {
    /// Links to both neighbours in the ring of all ranks.
    async fn links(&self, spec: &RingSpec) -> Result<(QuicSender, QuicReceiver), JoinError> {
        let place = (spec.ring, Members::default());
        let next = Directions { address: spec.next.0, name: spec.next.1.clone() };
        self.join(Part::Whole, place, &next, &spec.prev, self.group.timeout).await
    }

    /// Links to both neighbours in one of a generation's rings.
    async fn join(
        &self,
        part: Part,
        (ring, members): (Ring, Members),
        next: &Directions,
        prev: &str,
        timeout: Duration,
    ) -> Result<(QuicSender, QuicReceiver), JoinError> {
        let join = Join {
            endpoint: &self.endpoint,
            client: &self.client,
            lobby: &self.lobby,
            obituaries: &self.obituaries,
            part,
            ring,
            members,
            chunk_bytes: self.group.chunk_bytes(),
            timeout,
        };
        join.links((next.address, &next.name), prev).await
    }
}

async fn join(core: &Arc<Core>, spec: &RingSpec) -> Result<Group, JoinError> {
    let (ring, keep) = (spec.ring, core.clone());
    let (rank, generation) = (ring.rank(), ring.generation());
    if ring.world_size().get() == 1 {
        let stale = |newest| JoinError::Stale { rank, generation, newest };
        core.lobby.ask(generation, Part::Whole, None).map_err(stale)?;
        return Ok(Group::alone(ring, core.group, keep));
    }
    let links = core.links(spec).await?;
    let linked = Group::linked(&core.thread, ring, core.group, links, Transport::Quic, keep);
    let (group, reason) = form::best(core, linked, spec).await.map_err(|source| JoinError::Undecided {
        rank,
        generation,
        source: Box::new(source),
    })?;
    if core.transport == TransportChoice::SharedMemory && group.transport() != Transport::SharedMemory {
        return Err(JoinError::NotShared { rank, generation, reason });
    }
    tracing::debug!(transport = %group.transport(), reason, "joined");
    Ok(group)
}

fn arena(choice: TransportChoice, bytes: usize) -> Option<Arena> {
    if choice == TransportChoice::Quic {
        return None;
    }
    let arena = Arena::new(bytes);
    arena.inspect_err(|error| tracing::debug!(%error, "no shared memory")).ok()
}

/// For tests of links: those of a ring, without a group over them.
#[cfg(test)]
pub(crate) async fn links(node: &Node, spec: RingSpec) -> (QuicSender, QuicReceiver) {
    let core = node.core.clone();
    // On the node's own thread, which is to drive the connections.
    let links = node.core.thread.handle().spawn(async move { core.links(&spec).await });
    links.await.unwrap().unwrap()
}

impl Drop for Core {
    fn drop(&mut self) {
        let endpoint = self.endpoint.clone();
        self.thread.end_with(async move {
            endpoint.close(0u32.into(), b"");
            // What is left after that is the neighbours' timeout.
            let _ = tokio::time::timeout(DRAIN_MAX, endpoint.wait_idle()).await;
        });
    }
}
