//! The coordinator's driver: QUIC connections and timers around the pure [`Registry`] and [`Ledger`].
//!
//! One task owns all decisions; a task per connection reads messages into its bounded queue, another writes. Whoever
//! misbehaves loses his connection and an event says why; the run goes on.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quinn::Endpoint;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep_until, timeout};

use crate::event::Event;
use crate::identity::{Authority, IdentityError, JoinToken, server_config};
use crate::ids::WorkerId;
use crate::ledger::Ledger;
use crate::membership::{self, Action, Candidate, Outcome, Phase, Registry};
use crate::protocol::{About, Failure, Formation, FromCoordinator, FromWorker, StepReport};
use crate::status::{self, Status};
use crate::wire::{self, WireError};

use self::door::{Door, Inbound};

mod crowd;
mod door;

/// Messages that may wait for the deciding task, over all workers; each may have a megabyte.
const INBOX_MAX: usize = 64;
/// Messages that may wait for one worker.
const OUTBOX_MAX: usize = 256;
/// Phases of a step whose times a worker may report.
const PHASES_MAX: usize = 64;
/// Of a phase's name.
const PHASE_BYTES_MAX: usize = 64;

/// What a server must know.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where workers reach it, if that is another address.
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
    fn welcome(&self) -> FromCoordinator {
        let Self { run, recipe, settings, .. } = self.clone();
        FromCoordinator::Welcome { run, recipe, settings }
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
        /// Which.
        pid: u32,
        /// How it ended.
        status: String,
        /// Whether it said that the user's input is at fault.
        bad_input: bool,
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
        wire::encode(&config.welcome())?;
        let authority = Authority::new(&config.run)?;
        let tls = server_config(&authority.coordinator()?, config.membership.timeout)?;
        let endpoint = Endpoint::server(tls, config.listen).map_err(listen)?;
        let address = config.advertise.unwrap_or(endpoint.local_addr().map_err(listen)?);
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
        let mut core = Core {
            config: self.config,
            registry,
            ledger: None,
            links: BTreeMap::new(),
            events,
            status: self.status,
            step: 0,
            stalled: Duration::ZERO,
        };
        core.emit(Event::Listening {
            address: self.token.address.to_string(),
            status: self.status_address.to_string(),
        })
        .await;
        let mut commanded = true;
        let end = loop {
            let due = core.registry.deadline().unwrap_or_else(|| core.now() + limit) + core.stalled;
            let event = tokio::select! {
                Some((worker, message)) = inbound.recv() => core.absorb(worker, message).await,
                command = commands.recv(), if commanded => match command {
                    Some(command) => core.command(command),
                    None => { commanded = false; None }
                },
                () = sleep_until(due.into()) => Some(membership::Event::Tick),
            };
            if let Some(event) = event
                && let Some(end) = core.decide(event).await
            {
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

/// A connected worker.
#[derive(Debug)]
struct Link {
    outbox: mpsc::Sender<FromCoordinator>,
    about: About,
}

/// The one task that decides.
struct Core {
    config: ServerConfig,
    registry: Registry,
    ledger: Option<Ledger>,
    links: BTreeMap<WorkerId, Link>,
    events: mpsc::Sender<Event>,
    status: watch::Sender<Status>,
    step: u64,
    /// How long it has waited for those who read events, all in all.
    stalled: Duration,
}

impl Core {
    /// The registry's time: it stands still while nobody reads the events, for then nobody listens to workers either,
    /// and what was not heard is no silence.
    fn now(&self) -> Instant {
        Instant::now() - self.stalled
    }

    async fn emit(&mut self, event: Event) {
        let asked = Instant::now();
        // Who does not read events does not want them.
        let _ = self.events.send(event).await;
        self.stalled += asked.elapsed();
    }

    /// From a message to what it means for membership.
    async fn absorb(&mut self, worker: WorkerId, message: Inbound) -> Option<membership::Event> {
        use membership::Event as Meaning;
        let message = match message {
            Inbound::Hello(about, outbox) => {
                let candidate =
                    Candidate { address: about.address.clone(), fingerprint: about.fingerprint.clone() };
                self.links.insert(worker, Link { outbox, about });
                return Some(Meaning::Joined(worker, candidate));
            }
            Inbound::Gone(cause) => {
                self.links.remove(&worker);
                return Some(Meaning::Lost(worker, cause));
            }
            // What is left in the queue of a worker that was sent away.
            Inbound::Message(_) if !self.links.contains_key(&worker) => return None,
            Inbound::Message(message) => message,
        };
        match message {
            FromWorker::Ready { step } => Some(Meaning::Ready(worker, step)),
            FromWorker::Linked { generation } => Some(Meaning::Linked(worker, generation)),
            FromWorker::Finished(finish) => Some(Meaning::Finished(worker, finish)),
            FromWorker::Failed(failure) => Some(Meaning::Failed(worker, failure)),
            FromWorker::Step(report) => self.record(worker, report).await,
            FromWorker::Checkpoint { step, url, bytes, seconds } => {
                self.emit(Event::Checkpoint { step, url, bytes, seconds }).await;
                Some(Meaning::Heard(worker))
            }
            FromWorker::Notice { text } => {
                self.emit(Event::Notice { message: text }).await;
                Some(Meaning::Heard(worker))
            }
            FromWorker::Hello(_) | FromWorker::Heartbeat => Some(Meaning::Heard(worker)),
        }
    }

    async fn record(&mut self, worker: WorkerId, report: StepReport) -> Option<membership::Event> {
        let ring = self.registry.formation().filter(|ring| ring.generation == report.generation);
        let Some(ring) = ring else { return Some(membership::Event::Heard(worker)) };
        if let Some(text) = misreport(ring, worker, &report, self.config.membership.micro_batches) {
            let failure = Failure { text, bad_input: false, lost_rank: None };
            return Some(membership::Event::Failed(worker, failure));
        }
        let recorded = self.ledger.as_mut().map_or(Ok(None), |ledger| ledger.report(worker, report));
        match recorded {
            Ok(Some(record)) => {
                self.step = record.step;
                self.emit(Event::Step(record)).await;
                Some(membership::Event::Heard(worker))
            }
            Ok(None) => Some(membership::Event::Heard(worker)),
            Err(disagreement) => {
                let failure = Failure { text: disagreement.to_string(), bad_input: false, lost_rank: None };
                Some(membership::Event::Failed(worker, failure))
            }
        }
    }

    fn command(&self, command: Command) -> Option<membership::Event> {
        match command {
            Command::Stop => Some(membership::Event::StopRequested),
            Command::ProcessExited { pid, status, bad_input } => {
                let link = self.links.iter().find(|(_, link)| link.about.pid == pid);
                Some(match link {
                    Some((worker, _)) => {
                        membership::Event::Lost(*worker, format!("its process {pid} ended: {status}"))
                    }
                    None => {
                        membership::Event::Abandoned { cause: format!("process {pid}: {status}"), bad_input }
                    }
                })
            }
        }
    }

    /// Decides, and does what was decided; returns the run's end if this was it.
    async fn decide(&mut self, event: membership::Event) -> Option<RunEnd> {
        let mut actions = Vec::new();
        self.registry.step(self.now(), event, &mut actions);
        let mut end = None;
        for action in actions {
            match action {
                Action::Admit(worker) => self.admit(worker).await,
                Action::Refuse(worker, reason) => self.refuse(worker, reason).await,
                Action::Form(formation) => self.form(formation).await,
                Action::Start(formation) => {
                    let generation = formation.generation;
                    self.tell_all(&FromCoordinator::Start { generation });
                }
                Action::Stop => self.tell_all(&FromCoordinator::Stop),
                Action::End(outcome, reason) => end = Some(RunEnd { outcome, reason }),
            }
        }
        self.show();
        end
    }

    async fn admit(&mut self, worker: WorkerId) {
        self.tell(worker, self.config.welcome());
        if let Some(link) = self.links.get(&worker) {
            let (host, pid) = (link.about.host.clone(), link.about.pid);
            self.emit(Event::WorkerJoined { worker: worker.0, host, pid }).await;
        }
    }

    async fn refuse(&mut self, worker: WorkerId, reason: String) {
        self.tell(worker, FromCoordinator::Refused { reason: reason.clone() });
        self.links.remove(&worker);
        self.emit(Event::WorkerRefused { reason }).await;
    }

    async fn form(&mut self, formation: Formation) {
        let (generation, world_size) = (formation.generation, formation.places.len() as u32);
        if self.ledger.is_none() {
            self.step = formation.step;
            self.emit(Event::RunStarted { steps: self.config.steps, resumed_from: formation.step }).await;
        }
        self.ledger = Some(Ledger::new(self.config.membership.micro_batches, formation.clone()));
        self.emit(Event::RingFormed { generation, world_size }).await;
        self.tell_all(&FromCoordinator::Form(formation));
    }

    /// A worker that does not take its messages is as good as silent, and will be noticed so.
    fn tell(&self, worker: WorkerId, message: FromCoordinator) {
        if let Some(link) = self.links.get(&worker)
            && link.outbox.try_send(message).is_err()
        {
            tracing::warn!(%worker, "does not take its messages");
        }
    }

    fn tell_all(&self, message: &FromCoordinator) {
        self.links.keys().for_each(|worker| self.tell(*worker, message.clone()));
    }

    fn show(&self) {
        let workers =
            self.registry.workers().map(|(worker, silent)| (worker.0, silent.as_secs_f64())).collect();
        let formation = self.registry.formation();
        self.status.send_modify(|status| {
            status.phase = match self.registry.phase() {
                Phase::Gathering => "gathering",
                Phase::Forming => "forming",
                Phase::Running => "running",
                Phase::Ended => "ended",
            };
            status.generation = formation.map_or(0, |formation| formation.generation);
            status.world_size = formation.map_or(0, |formation| formation.places.len());
            status.step = self.step;
            status.steps = self.config.steps;
            status.workers = workers;
        });
    }

    /// Says how the run ended, to the events and to all workers, and waits for them to leave.
    async fn farewell(
        &mut self,
        end: &RunEnd,
        inbound: &mut mpsc::Receiver<(WorkerId, Inbound)>,
        limit: Duration,
    ) {
        if let Outcome::WorkerLost(worker) = end.outcome {
            self.emit(Event::WorkerLost { worker: worker.0, reason: end.reason.clone() }).await;
        }
        self.tell_all(&FromCoordinator::End { reason: end.reason.clone() });
        let leave = async {
            while !self.links.is_empty() {
                match inbound.recv().await {
                    Some((worker, Inbound::Gone(_))) => drop(self.links.remove(&worker)),
                    Some((_, Inbound::Hello(..) | Inbound::Message(_))) => {}
                    None => return,
                }
            }
        };
        // Who does not leave in time is left behind.
        let _ = timeout(limit.min(Duration::from_secs(2)), leave).await;
        let (outcome, finish) = match &end.outcome {
            Outcome::Completed(finish) => ("done", Some(finish)),
            Outcome::Stopped(finish) => ("interrupted", Some(finish)),
            Outcome::BadInput | Outcome::WorkerLost(_) | Outcome::Failed => ("failed", None),
        };
        let event = Event::RunEnded {
            outcome,
            error: finish.is_none().then(|| end.reason.clone()),
            unigram_loss: finish.and_then(|finish| finish.unigram_loss),
            held_out_loss: finish.and_then(|finish| finish.held_out_loss),
            parameters: finish.map(|finish| finish.parameters),
            state_hash: finish.map(|finish| format!("{:016x}", finish.state_hash)),
        };
        self.emit(event).await;
    }
}

/// What is wrong with a report of this ring: in another's name, or larger than any that is true. Reports wait for each
/// other, so each must be small.
fn misreport(ring: &Formation, worker: WorkerId, report: &StepReport, micro_batches: u32) -> Option<String> {
    if ring.places.get(report.rank as usize).is_none_or(|place| place.worker != worker) {
        return Some(format!("it reported a step as rank {}, which it is not", report.rank));
    }
    let computed = report.micro_batches.len();
    if computed > micro_batches as usize {
        return Some(format!("it reported {computed} micro-batches in a step of {micro_batches}"));
    }
    let wordy = report.seconds.iter().any(|(phase, _)| phase.len() > PHASE_BYTES_MAX);
    (wordy || report.seconds.len() > PHASES_MAX)
        .then(|| format!("it reported more than {PHASES_MAX} phases of a step, or longer names than any has"))
}
