//! A worker's side of the control plane, for code that is not async.
//!
//! A thread of its own holds the connection, sends heartbeats and hands messages over. Joining has two stages, because a
//! worker's data plane needs the certificate, and the coordinator must be told where the data plane listens. With that
//! certificate it comes back to whoever takes over from a coordinator that has died.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc as tokio_mpsc, oneshot};
use tokio::time::timeout;

use crate::identity::{
    COORDINATOR_NAME, Identity, IdentityError, JoinToken, Request, client_config, enroll_config,
};
use crate::ids::WorkerId;
use crate::protocol::{About, Enroll, Enrolled, FromCoordinator, FromWorker, Return};
use crate::stream::{self, LOOKS, StreamError, lost, printable};

/// Messages that may wait in either direction.
const QUEUE_MAX: usize = 1024;
/// Heartbeats within a timeout.
const HEARTBEATS: u32 = 8;

/// It is waited for this part of a timeout until a connection has ended on which no welcome came.
const FAREWELL: u32 = 8;

/// Timeouts after which a coordinator that says nothing is gone, whoever may come: training does not need it meanwhile, a launcher
/// that supervises one gives it up sooner, and connections end for good later.
const SILENCE: u32 = 3;

/// Why a worker could not join.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// Nobody answers there, or somebody with another authority.
    #[error(
        "cannot reach the coordinator at {address}: {reason}; is the run still alive, and is this its token?"
    )]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The coordinator says no.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// The conversation broke off.
    #[error("joining broke off: {0}")]
    Stream(#[source] StreamError),
    /// No certificate could be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS could not be set up.
    #[error("the join token's authority is no certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// The system refuses a socket or thread.
    #[error("cannot open a socket or thread: {0}")]
    Io(#[from] std::io::Error),
}

impl From<StreamError> for JoinError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Refused(reason) => Self::Refused(reason),
            error => Self::Stream(error),
        }
    }
}

/// Why the control connection ended.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("the coordinator is gone: {0}")]
pub struct ClientError(String);

/// What a worker tells the coordinator.
pub type Report = FromWorker;

/// A worker with a certificate that has not joined yet.
#[derive(Debug)]
pub struct Enrollment {
    runtime: Runtime,
    endpoint: Endpoint,
    address: SocketAddr,
    timeout: Duration,
    worker: WorkerId,
    identity: Identity,
    local_ip: IpAddr,
}

/// What a worker that was let in comes back with, to a coordinator that took over.
#[derive(Debug, Clone)]
pub struct Passport {
    worker: WorkerId,
    identity: Identity,
    timeout: Duration,
}

/// Why the connection ended: who notices first, says it.
#[derive(Debug, Clone, Default)]
struct Ending(Arc<OnceLock<String>>);

impl Ending {
    fn note(&self, cause: &StreamError) {
        self.0.get_or_init(|| cause.to_string());
    }

    fn error(&self) -> ClientError {
        ClientError(self.0.get().map_or("the control connection ended", String::as_str).to_owned())
    }
}

/// A joined worker's connection.
#[derive(Debug)]
pub struct Client {
    worker: WorkerId,
    run: String,
    recipe: String,
    settings: String,
    under_way: bool,
    incarnation: u64,
    reports: tokio_mpsc::Sender<FromWorker>,
    messages: mpsc::Receiver<FromCoordinator>,
    ending: Ending,
    looks: Arc<AtomicU32>,
    closing: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Gets a certificate; see [`Enrollment::join`].
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn enroll(token: &JoinToken, limit: Duration) -> Result<Enrollment, JoinError> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let address = token.address;
        let local_ip = local_ip_towards(address)?;
        let request = Request::new()?;
        let authority = token.authority();
        let config = enroll_config(&authority, limit)?;
        let message = Enroll { secret: token.secret(), request: request.der().to_vec() };
        let (endpoint, enrolled) = runtime.block_on(async {
            let endpoint = Endpoint::client(SocketAddr::new(local_ip, 0))?;
            let connection = connect(&endpoint, config, address, limit).await?;
            let (mut send, mut receive) = open(&connection, limit).await?;
            stream::send(&mut send, &message, limit).await?;
            let enrolled: Enrolled = stream::receive(&mut receive, limit).await?;
            connection.close(0u32.into(), b"enrolled");
            Ok::<_, JoinError>((endpoint, enrolled))
        })?;
        match enrolled {
            Enrolled::Refused { reason } => Err(JoinError::Refused(printable(reason.as_bytes()))),
            Enrolled::Certificate { worker, certificate } => {
                let identity = request.into_identity(worker, certificate, authority);
                Ok(Enrollment { runtime, endpoint, address, timeout: limit, worker, identity, local_ip })
            }
        }
    }

    /// The id that this worker got.
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// The run's id.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The resolved recipe.
    pub fn recipe(&self) -> &str {
        &self.recipe
    }

    /// What the launcher wants workers to know.
    pub fn settings(&self) -> &str {
        &self.settings
    }

    /// Whether the run is under way: the state comes from the others then.
    pub fn under_way(&self) -> bool {
        self.under_way
    }

    /// The coordinator's incarnation; 0 where nobody can take over from it.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether nothing was heard of the coordinator for a timeout. It may be late, or dead: where another has taken over, it is over
    /// with this one.
    pub fn is_silent(&self) -> bool {
        self.looks.load(Ordering::Relaxed) >= LOOKS
    }

    /// A handle for reports from any thread.
    pub fn reporter(&self) -> Reporter {
        Reporter { reports: self.reports.clone(), ending: self.ending.clone() }
    }

    /// Waits for the next message, for `limit` at most.
    ///
    /// # Errors
    /// Where the coordinator is gone.
    pub fn receive(&self, limit: Duration) -> Result<Option<FromCoordinator>, ClientError> {
        match self.messages.recv_timeout(limit) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.ending.error()),
        }
    }

    /// Sends what is queued, and ends the connection; reporters that are left find it ended.
    pub fn close(mut self) {
        drop(self.closing.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

/// Sends reports.
#[derive(Debug, Clone)]
pub struct Reporter {
    reports: tokio_mpsc::Sender<FromWorker>,
    ending: Ending,
}

impl Reporter {
    /// Queues a report; waits while the queue is full.
    ///
    /// # Errors
    /// Where the coordinator is gone.
    pub fn send(&self, report: Report) -> Result<(), ClientError> {
        self.reports.blocking_send(report).map_err(|_| self.ending.error())
    }
}

impl Enrollment {
    /// The certificate, for the data plane too.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The id that this worker got.
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// The address of this host that the coordinator's network sees: where the data plane should listen.
    pub fn local_ip(&self) -> IpAddr {
        self.local_ip
    }

    /// Joins the run.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn join(self, about: About) -> Result<Client, JoinError> {
        let Self { runtime, endpoint, address, timeout: limit, worker, identity, .. } = self;
        let config = client_config(&identity, limit)?;
        let meeting = Meeting { runtime, endpoint, config, address, worker, limit };
        meeting.greet(FromWorker::Hello(about), limit)
    }

    /// Asks for so many workers, instead of joining; returns how many there are now. The run's token is all that it takes.
    ///
    /// # Errors
    /// [`JoinError::Refused`] with the reason, where the run may not have so many; see [`JoinError`].
    pub fn scale(self, workers: u32) -> Result<u32, JoinError> {
        let Self { runtime, endpoint, address, timeout: limit, identity, .. } = self;
        let config = client_config(&identity, limit)?;
        runtime.block_on(async {
            let connection = connect(&endpoint, config, address, limit).await?;
            let (mut send, mut receive) = open(&connection, limit).await?;
            stream::send(&mut send, &FromWorker::Scale { workers }, limit).await?;
            let answer: FromCoordinator = stream::receive(&mut receive, limit).await?;
            connection.close(0u32.into(), b"answered");
            match answer {
                FromCoordinator::Scaling { there } => Ok(there),
                FromCoordinator::Refused { reason } => Err(JoinError::Refused(printable(reason.as_bytes()))),
                other => Err(JoinError::Refused(format!("it answered {other:?} to a request to scale"))),
            }
        })
    }

    /// What it comes back with to another coordinator of its run.
    pub fn passport(&self) -> Passport {
        Passport { worker: self.worker, identity: self.identity.clone(), timeout: self.timeout }
    }
}

impl Passport {
    /// The authority's certificate, DER.
    pub fn authority(&self) -> &[u8] {
        &self.identity.authority
    }

    /// Who it is.
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// Comes back to the coordinator at `address`, which must answer the call within `patience`, and welcome this worker within a
    /// timeout.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn come_back(
        &self,
        address: SocketAddr,
        back: Return,
        patience: Duration,
    ) -> Result<Client, JoinError> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let local_ip = local_ip_towards(address)?;
        let endpoint = runtime.block_on(async { Endpoint::client(SocketAddr::new(local_ip, 0)) })?;
        let config = client_config(&self.identity, self.timeout)?;
        let (worker, limit) = (self.worker, self.timeout);
        let meeting = Meeting { runtime, endpoint, config, address, worker, limit };
        meeting.greet(FromWorker::Return(back), patience)
    }
}

/// A worker with a certificate, on its way to a coordinator.
struct Meeting {
    runtime: Runtime,
    endpoint: Endpoint,
    config: quinn::ClientConfig,
    address: SocketAddr,
    worker: WorkerId,
    limit: Duration,
}

impl Meeting {
    fn greet(self, greeting: FromWorker, patience: Duration) -> Result<Client, JoinError> {
        let Self { runtime, endpoint, config, address, worker, limit } = self;
        let (connection, send, receive, welcome) = runtime.block_on(async {
            let connection = connect(&endpoint, config, address, patience).await?;
            match introduce(&connection, &greeting, limit).await {
                Ok((send, receive, welcome)) => Ok((connection, send, receive, welcome)),
                Err(error) => {
                    // It must hear that this connection is gone, or it takes the next one for a second of the same worker.
                    connection.close(0u32.into(), b"no welcome came");
                    let _ = timeout(limit / FAREWELL, endpoint.wait_idle()).await;
                    Err(JoinError::from(error))
                }
            }
        })?;
        let (run, recipe, settings, under_way, incarnation) = match welcome {
            FromCoordinator::Welcome { run, recipe, settings, under_way, incarnation } => {
                (run, recipe, settings, under_way, incarnation)
            }
            FromCoordinator::Refused { reason } => {
                return Err(JoinError::Refused(printable(reason.as_bytes())));
            }
            other => return Err(JoinError::Refused(format!("it answered {other:?} instead of a welcome"))),
        };
        let (reports, queued) = tokio_mpsc::channel(QUEUE_MAX);
        let (messages, received) = mpsc::sync_channel(QUEUE_MAX);
        let (closing, close) = oneshot::channel();
        let ending = Ending::default();
        let looks = Arc::<AtomicU32>::default();
        let talk = Talk {
            connection,
            send,
            queued,
            close,
            ending: ending.clone(),
            looks: Arc::clone(&looks),
            limit,
        };
        let thread = thread::Builder::new().name("mattock-control".to_owned()).spawn(move || {
            runtime.block_on(talk.run(receive, messages));
            runtime.block_on(async { timeout(limit, endpoint.wait_idle()).await }).ok();
        })?;
        let (messages, closing, thread) = (received, Some(closing), Some(thread));
        Ok(Client {
            worker,
            run,
            recipe,
            settings,
            under_way,
            incarnation,
            reports,
            messages,
            ending,
            looks,
            closing,
            thread,
        })
    }
}

/// Says who it is, and hears what comes of it. Who has answered the call lives, however much there is to do: its welcome may take as
/// long as any message, for whoever hung up before it came would be lost to it.
async fn introduce(
    connection: &Connection,
    greeting: &FromWorker,
    limit: Duration,
) -> Result<(SendStream, RecvStream, FromCoordinator), StreamError> {
    let (mut send, mut receive) = open(connection, limit).await?;
    stream::send(&mut send, greeting, limit).await?;
    let welcome = stream::receive(&mut receive, limit).await?;
    Ok((send, receive, welcome))
}

/// The connection's thread: reports and heartbeats out, messages in.
struct Talk {
    connection: Connection,
    send: SendStream,
    queued: tokio_mpsc::Receiver<FromWorker>,
    /// Completes when the client is closed or gone.
    close: oneshot::Receiver<()>,
    ending: Ending,
    /// How often in a row it was looked for a message in vain.
    looks: Arc<AtomicU32>,
    limit: Duration,
}

impl Talk {
    async fn run(mut self, receive: RecvStream, messages: mpsc::SyncSender<FromCoordinator>) {
        let heard = (self.ending.clone(), Arc::clone(&self.looks));
        let listening = tokio::spawn(listen(receive, messages, heard, self.limit));
        if let Err(error) = self.speak().await {
            self.ending.note(&error);
        }
        listening.abort();
        self.connection.close(0u32.into(), b"done");
    }

    async fn speak(&mut self) -> Result<(), StreamError> {
        loop {
            let next = tokio::select! {
                next = timeout(self.limit / HEARTBEATS, self.queued.recv()) => next,
                _ = &mut self.close, if !self.queued.is_closed() => {
                    // What is in the queue is still sent.
                    self.queued.close();
                    continue;
                }
            };
            let report = match next {
                Ok(Some(report)) => report,
                Ok(None) => {
                    // What was sent must arrive before the connection is closed; who is silent does not say that it has.
                    let heard = self.looks.load(Ordering::Relaxed) < LOOKS;
                    if self.send.finish().is_ok() && heard {
                        let _ = timeout(self.limit, self.send.stopped()).await;
                    }
                    return Ok(());
                }
                Err(_) => FromWorker::Heartbeat,
            };
            stream::send(&mut self.send, &report, self.limit).await?;
        }
    }
}

/// Hands messages over until the coordinator is gone; dropping the sender tells so.
async fn listen(
    mut receive: RecvStream,
    messages: mpsc::SyncSender<FromCoordinator>,
    (ending, looks): (Ending, Arc<AtomicU32>),
    limit: Duration,
) {
    let looked = |look| looks.store(look, Ordering::Relaxed);
    loop {
        let message = stream::receive_patiently(&mut receive, limit, SILENCE, looked).await;
        looked(0);
        match message {
            Ok(FromCoordinator::Heartbeat) => {}
            Ok(message) => {
                if messages.try_send(message).is_err() {
                    return;
                }
            }
            Err(error) => return ending.note(&error),
        }
    }
}

pub(crate) async fn connect(
    endpoint: &Endpoint,
    config: quinn::ClientConfig,
    address: SocketAddr,
    limit: Duration,
) -> Result<Connection, JoinError> {
    let unreachable = |reason: String| JoinError::Unreachable { address, reason };
    let connecting = endpoint
        .connect_with(config, address, COORDINATOR_NAME)
        .map_err(|error| unreachable(error.to_string()))?;
    match timeout(limit, connecting).await {
        Ok(connected) => connected.map_err(|error| match lost(error) {
            StreamError::Refused(reason) => JoinError::Refused(reason),
            StreamError::Gone(reason) => unreachable(reason),
            error => JoinError::Stream(error),
        }),
        Err(_) => Err(unreachable(format!("no answer for {limit:?}"))),
    }
}

pub(crate) async fn open(
    connection: &Connection,
    limit: Duration,
) -> Result<(SendStream, RecvStream), StreamError> {
    let opened = timeout(limit, connection.open_bi()).await.map_err(|_| StreamError::Silent(limit))?;
    opened.map_err(lost)
}

/// The own address on the way there; nothing is sent.
pub(crate) fn local_ip_towards(address: SocketAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    Ok(socket.local_addr()?.ip())
}
