//! The coordinator's driver: QUIC connections and timers around the pure [`Registry`] and [`Ledger`].
//!
//! One task owns all decisions; a task per connection reads messages into its bounded queue, another writes. Whoever
//! misbehaves loses his connection and an event says why; the run goes on. Where the run has a lease, the server ends as
//! soon as it learns that another has taken a higher one, and tells the workers nothing: they are the other's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quinn::Endpoint;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep_until, timeout};

use crate::event::Event;
use crate::identity::{Authority, IdentityError, JoinToken, RunSecret, server_config};
use crate::ids::WorkerId;
use crate::lease::{Lease, LeaseError, LeaseStore};
use crate::membership::{self, Outcome};
use crate::protocol::FromCoordinator;
use crate::status::{self, Status};
use crate::wire::{self, WireError};

use self::core::Core;
use self::door::{Door, Inbound};
use self::tenure::Tenure;

mod core;
mod crowd;
mod door;
mod past;
mod scale;
mod tenure;

/// Messages that may wait for the deciding task, over all workers; each may have a megabyte.
const INBOX_MAX: usize = 64;
/// The server looks at its clock this often in a timeout, and so notices that it did not run.
const TURN: u32 = 8;
/// Messages that may wait for one worker.
const OUTBOX_MAX: usize = 256;
/// What a server must know.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where workers reach it, if that is another address; port 0 stands for the one that was taken.
    pub advertise: Option<SocketAddr>,
    /// The run's id.
    pub run: String,
    /// Steps of the whole run.
    pub steps: u64,
    /// The resolved recipe, for workers.
    pub recipe: String,
    /// What else workers must know.
    pub settings: String,
    /// How long the join token is worth something.
    pub token_lifetime: Duration,
    /// Whether somebody reads the events who starts workers where the run is to have more.
    pub launcher: bool,
    /// Of the registry.
    pub membership: membership::Config,
    /// What another needs to take over, and this one to have done so; without it the run ends with its coordinator.
    pub failover: Option<Failover>,
}

/// What coordinators of one run have in common.
#[derive(Debug, Clone)]
pub struct Failover {
    /// The run's.
    pub secret: RunSecret,
    /// Equal for those alone that may go on with each other's work: same recipe, same start.
    pub attempt: String,
    /// Where leases are kept.
    pub store: Arc<dyn LeaseStore>,
    /// The newest step that is on record, where somebody knows: none up to it is told of again.
    pub recorded: Option<u64>,
}

impl ServerConfig {
    fn welcome(&self, under_way: bool, incarnation: u64) -> FromCoordinator {
        let Self { run, recipe, settings, .. } = self.clone();
        FromCoordinator::Welcome { run, recipe, settings, under_way, incarnation }
    }
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// No certificate could be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS could not be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// What every worker must be told does not fit into a message.
    #[error("recipe and settings cannot be sent to workers: {0}")]
    Recipe(#[from] WireError),
    /// Nobody can tell whose the run is.
    #[error("cannot take the run's lease: {0}")]
    Lease(#[source] LeaseError),
}

/// What the launcher tells a running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Say that this coordinator lives.
    Ping,
    /// Stop after the next step, with a checkpoint.
    Stop,
    /// The launcher has heard that the run is to have so many workers, and starts those that lack: the newest beyond them leave.
    Shrink(u32),
    /// A local process has ended: its worker, if it was one, is lost.
    ProcessExited {
        /// The host's name, as its workers tell it: other hosts may have a process of this number too.
        host: String,
        /// Which.
        pid: u32,
        /// How it ended.
        status: String,
        /// Whether it said that the user's input is at fault.
        bad_input: bool,
        /// Whether another is started in its place.
        replaced: bool,
        /// How many of the launcher's processes are left, that one included.
        left: usize,
    },
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct RunEnd {
    /// In one word.
    pub outcome: Outcome,
    /// In words.
    pub reason: String,
}

/// What the server does something about.
enum Turn {
    Message(WorkerId, Inbound),
    Command(Option<Command>),
    Superseded(Lease),
    Tick,
}

/// How a server ends.
enum Ending {
    /// With its run.
    Over(RunEnd),
    /// Another has the run.
    Superseded(Lease),
}

/// A coordinator that listens.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    endpoint: Endpoint,
    authority: Authority,
    secret: [u8; 32],
    token: JoinToken,
    status: watch::Sender<Status>,
    status_address: SocketAddr,
    tenure: Option<Tenure>,
}

impl Server {
    /// Starts to listen, and takes the lease where there is one. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn bind(config: ServerConfig) -> Result<Self, ServerError> {
        let listen = |source| ServerError::Listen { address: config.listen, source };
        wire::encode(&config.welcome(false, 0))?;
        let Keys { authority, join, reset } = Keys::of(&config)?;
        let limit = config.membership.timeout;
        let tls = server_config(&authority.coordinator()?, limit)?;
        let endpoint = tenure::endpoint(tls, config.listen, reset).map_err(listen)?;
        let bound = endpoint.local_addr().map_err(listen)?;
        let mut address = config.advertise.unwrap_or(bound);
        if address.port() == 0 {
            address.set_port(bound.port());
        }
        let tenure = match &config.failover {
            Some(failover) => {
                Some(Tenure::take(failover, &config.run, address, authority.certificate(), limit).await?)
            }
            None => None,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let expires = (now + config.token_lifetime).as_secs();
        let token = JoinToken::new(&config.run, address, authority.certificate(), join, expires, limit);
        let (status, shown) = watch::channel(Status::new(&config.run));
        let status_address = status::serve(shown).await.map_err(listen)?;
        Ok(Self { config, endpoint, authority, secret: join, token, status, status_address, tenure })
    }

    /// What lets workers in.
    pub fn token(&self) -> &JoinToken {
        &self.token
    }

    /// Where the status page is.
    pub fn status_address(&self) -> SocketAddr {
        self.status_address
    }

    /// Runs the run to its end.
    pub async fn run(self, events: mpsc::Sender<Event>, mut commands: mpsc::Receiver<Command>) -> RunEnd {
        let (inbox, mut inbound) = mpsc::channel(INBOX_MAX);
        let limit = self.config.membership.timeout;
        let first_id = self.tenure.as_ref().map_or(0, |tenure| tenure.lease.first_number());
        let keys = (self.authority, self.secret);
        let places = (first_id, self.config.membership.max_workers);
        let door = Arc::new(Door::new(keys, self.token.expires, limit, inbox, events.clone(), places));
        let accepting = tokio::spawn(Arc::clone(&door).accept(self.endpoint.clone()));
        let (found, mut successors) = mpsc::channel(1);
        let watching = self.tenure.clone().map(|tenure| tokio::spawn(tenure.watch(found)));
        let mut core = Core::new(self.config, self.tenure, events, self.status);
        core.emit(Event::Listening {
            address: self.token.address.to_string(),
            status: self.status_address.to_string(),
            pid: std::process::id(),
        })
        .await;
        let mut commanded = true;
        let ending = loop {
            let soon = Instant::now() + limit / TURN;
            let due = core.registry.deadline().map_or(soon, |due| soon.min(due + core.stalled()));
            let turn = tokio::select! {
                Some((worker, message)) = inbound.recv() => Turn::Message(worker, message),
                command = commands.recv(), if commanded => Turn::Command(command),
                Some(successor) = successors.recv() => Turn::Superseded(successor),
                () = sleep_until(due.into()) => Turn::Tick,
            };
            // Whatever has come first: where this process did not run, the rest of what workers sent comes after it.
            core.came_late(Instant::now().saturating_duration_since(due), limit / TURN);
            let meant = match turn {
                Turn::Message(worker, message) => core.absorb(worker, message).await,
                Turn::Command(Some(command)) => core.command(command).await,
                Turn::Command(None) => {
                    commanded = false;
                    Vec::new()
                }
                Turn::Superseded(successor) => break Ending::Superseded(successor),
                Turn::Tick => vec![membership::Event::Tick],
            };
            if let Some(ending) = core.decide(meant).await {
                break ending;
            }
        };
        watching.inspect(|watching| watching.abort());
        let end = match ending {
            Ending::Over(end) => {
                core.farewell(&end, &mut inbound, limit).await;
                end
            }
            Ending::Superseded(successor) => core.give_way(&successor).await,
        };
        accepting.abort();
        self.endpoint.close(0u32.into(), b"this coordinator ends");
        // Who does not hear it will notice the silence.
        let _ = timeout(limit, self.endpoint.wait_idle()).await;
        end
    }
}

/// What a server's identity and doors are made of.
struct Keys {
    authority: Authority,
    join: [u8; 32],
    reset: Option<[u8; 32]>,
}

impl Keys {
    /// Those of the run's secret; where it has none, new ones.
    fn of(config: &ServerConfig) -> Result<Self, ServerError> {
        let run = &config.run;
        Ok(match &config.failover {
            Some(Failover { secret, attempt, .. }) => Self {
                authority: secret.authority(run, attempt)?,
                join: secret.join_secret(run, attempt),
                reset: Some(secret.reset_key(run, attempt)),
            },
            None => Self { authority: Authority::new(run)?, join: random()?, reset: None },
        })
    }
}

/// 256 random bits, from the source that TLS uses.
fn random() -> Result<[u8; 32], rustls::Error> {
    let mut bytes = [0; 32];
    let provider = rustls::crypto::ring::default_provider();
    provider.secure_random.fill(&mut bytes).map_err(|_| rustls::Error::FailedToGetRandomBytes)?;
    Ok(bytes)
}
