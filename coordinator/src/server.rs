//! The coordinator's driver: QUIC connections and timers around the pure [`Registry`] and [`Ledger`].
//!
//! One task owns all decisions; a task per connection reads messages into its bounded queue, another writes. Whoever
//! misbehaves loses his connection and an event says why; the run goes on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quinn::Endpoint;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep_until, timeout};

use crate::event::Event;
use crate::identity::{Authority, IdentityError, JoinToken, server_config};
use crate::membership::{self, Outcome, Registry};
use crate::protocol::FromCoordinator;
use crate::status::{self, Status};
use crate::wire::{self, WireError};

use self::core::Core;
use self::door::Door;

mod core;
mod crowd;
mod door;

/// Messages that may wait for the deciding task, over all workers; each may have a megabyte.
const INBOX_MAX: usize = 64;
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
    /// Of the registry.
    pub membership: membership::Config,
}

impl ServerConfig {
    fn welcome(&self, under_way: bool) -> FromCoordinator {
        let Self { run, recipe, settings, .. } = self.clone();
        FromCoordinator::Welcome { run, recipe, settings, under_way }
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
}

/// What the launcher tells a running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Stop after the next step, with a checkpoint.
    Stop,
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
}

impl Server {
    /// Starts to listen, with a new authority. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn bind(config: ServerConfig) -> Result<Self, ServerError> {
        let listen = |source| ServerError::Listen { address: config.listen, source };
        wire::encode(&config.welcome(false))?;
        let authority = Authority::new(&config.run)?;
        let tls = server_config(&authority.coordinator()?, config.membership.timeout)?;
        let endpoint = Endpoint::server(tls, config.listen).map_err(listen)?;
        let bound = endpoint.local_addr().map_err(listen)?;
        let mut address = config.advertise.unwrap_or(bound);
        if address.port() == 0 {
            address.set_port(bound.port());
        }
        let secret = random()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let expires = (now + config.token_lifetime).as_secs();
        let token = JoinToken::new(
            &config.run,
            address,
            authority.certificate(),
            secret,
            expires,
            config.membership.timeout,
        );
        let (status, shown) = watch::channel(Status::new(&config.run));
        let status_address = status::serve(shown).await.map_err(listen)?;
        Ok(Self { config, endpoint, authority, secret, token, status, status_address })
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
        let door = Arc::new(Door::new(
            self.authority,
            self.secret,
            self.token.expires,
            limit,
            inbox,
            events.clone(),
        ));
        let accepting = tokio::spawn(Arc::clone(&door).accept(self.endpoint.clone()));
        let registry = Registry::new(self.config.membership.clone(), Instant::now());
        let mut core = Core::new(self.config, registry, events, self.status);
        core.emit(Event::Listening {
            address: self.token.address.to_string(),
            status: self.status_address.to_string(),
        })
        .await;
        let mut commanded = true;
        let end = loop {
            let due = core.registry.deadline().unwrap_or_else(|| core.now() + limit) + core.stalled();
            let meant = tokio::select! {
                Some((worker, message)) = inbound.recv() => core.absorb(worker, message).await,
                command = commands.recv(), if commanded => match command {
                    Some(command) => core.command(command),
                    None => { commanded = false; Vec::new() }
                },
                () = sleep_until(due.into()) => vec![membership::Event::Tick],
            };
            if let Some(end) = core.decide(meant).await {
                break end;
            }
        };
        core.farewell(&end, &mut inbound, limit).await;
        accepting.abort();
        self.endpoint.close(0u32.into(), b"the run is over");
        // Who does not hear it will notice the silence.
        let _ = timeout(limit, self.endpoint.wait_idle()).await;
        end
    }
}

/// 256 random bits, from the source that TLS uses.
fn random() -> Result<[u8; 32], rustls::Error> {
    let mut bytes = [0; 32];
    let provider = rustls::crypto::ring::default_provider();
    provider.secure_random.fill(&mut bytes).map_err(|_| rustls::Error::FailedToGetRandomBytes)?;
    Ok(bytes)
}
