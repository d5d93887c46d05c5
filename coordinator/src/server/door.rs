//! Who comes in: handshakes, enrolment, and a worker's messages, each under a deadline.
//!
//! Whoever is turned away is told why where the protocol allows an answer, and an event says it too.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use rkyv::Serialize;
use rkyv::api::high::HighSerializer;
use rkyv::rancor::Error;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use subtle::ConstantTimeEq;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::OUTBOX_MAX;
use super::crowd::{Inside, Refusals, Seat, Stranger, Strangers};
use crate::event::Event;
use crate::identity::{Authority, CONTROL_ALPN, ENROLL_ALPN, peer_name};
use crate::ids::WorkerId;
use crate::protocol::{About, Enroll, Enrolled, FromCoordinator, FromWorker, Return};
use crate::stream::{self, REFUSED, StreamError, explain};
use crate::wire;

/// Connections that may be in their handshake or enrolment at once.
const STRANGERS_MAX: usize = 64;
/// Workers that may be connected at once, those included that are about to be sent away: where the recipe allows more, as
/// many and some,
const WORKERS_MAX: usize = 1024;
/// but never more.
const WORKERS_LIMIT: usize = 1 << 14;
/// Of each text in which a worker tells of itself.
const ABOUT_BYTES_MAX: usize = 1024;
/// The coordinator's heartbeats within a timeout.
const HEARTBEATS: u32 = 8;

/// Timeouts that a connection may say nothing: who is silent is lost after one, but it is the registry that decides it.
const SILENCE: u32 = 2;

/// What arrives of a worker.
#[derive(Debug)]
pub(super) enum Inbound {
    /// It said hello; answers go there.
    Hello(About, mpsc::Sender<Bytes>),
    /// It was let in by a coordinator before this one, and is back.
    Return(Return, mpsc::Sender<Bytes>),
    /// A message.
    Message(FromWorker),
    /// Somebody wants the run to have so many workers; the answer goes there.
    Scale(u32, oneshot::Sender<FromCoordinator>),
    /// Its connection is gone.
    Gone(String),
}

/// Lets workers in.
#[derive(Debug)]
pub(super) struct Door {
    authority: Authority,
    secret: [u8; 32],
    /// Seconds since 1970.
    expires: u64,
    limit: Duration,
    inbox: mpsc::Sender<(WorkerId, Inbound)>,
    next_id: AtomicU64,
    refusals: Refusals,
    strangers: Arc<Strangers>,
    inside: Arc<Inside>,
}

impl Door {
    /// With the authority, and the secret that lets workers in; their ids count from `first_id`; so many may take part.
    pub(super) fn new(
        (authority, secret): (Authority, [u8; 32]),
        expires: u64,
        limit: Duration,
        inbox: mpsc::Sender<(WorkerId, Inbound)>,
        events: mpsc::Sender<Event>,
        (first_id, workers_max): (u64, u32),
    ) -> Self {
        Self {
            authority,
            secret,
            expires,
            limit,
            inbox,
            next_id: AtomicU64::new(first_id),
            refusals: Refusals::new(events, limit),
            strangers: Strangers::new(STRANGERS_MAX),
            inside: Inside::new(
                (workers_max as usize).saturating_add(STRANGERS_MAX).clamp(WORKERS_MAX, WORKERS_LIMIT),
            ),
        }
    }

    /// Accepts connections until the endpoint is closed.
    pub(super) async fn accept(self: Arc<Self>, endpoint: Endpoint) {
        while let Some(incoming) = endpoint.accept().await {
            if self.strangers.crowded() && !incoming.remote_address_validated() {
                // It calls again with the proof, or its address was not its own. This cannot fail: without a proof
                // one may always be asked for.
                let _ = incoming.retry();
                continue;
            }
            let stranger = self.strangers.enter();
            tokio::spawn(Arc::clone(&self).meet(incoming, stranger));
        }
    }

    async fn meet(self: Arc<Self>, incoming: Incoming, mut stranger: Stranger) {
        let from = incoming.remote_address();
        let met = self.welcome(incoming, &mut stranger).await;
        drop(stranger);
        match met {
            Ok(Some(guest)) => guest.stay(&self, from).await,
            Ok(None) => {}
            Err(reason) => self.refusals.tell(format!("{from}: {reason}")),
        }
    }

    /// Handshake and first message; a guest, if it is a worker with a certificate.
    async fn welcome(&self, incoming: Incoming, stranger: &mut Stranger) -> Result<Option<Guest>, String> {
        let deadline = Instant::now() + self.limit;
        let handshake =
            async { incoming.await.map_err(|error| format!("the handshake failed: {}", explain(&error))) };
        let connection = self.in_time(deadline, stranger, handshake).await?;
        let introduced = self.in_time(deadline, stranger, self.introduce(&connection)).await;
        if let Err(reason) = &introduced {
            connection.close(REFUSED, reason.as_bytes());
        }
        introduced
    }

    /// What a stranger does, unless that takes too long or he must give way.
    async fn in_time<T>(
        &self,
        deadline: Instant,
        stranger: &mut Stranger,
        act: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        tokio::select! {
            done = timeout_at(deadline, act) => {
                done.unwrap_or_else(|_| Err(format!("it did not introduce itself within {:?}", self.limit)))
            }
            () = stranger.displaced() => {
                Err("it had not introduced itself when too many others wanted to: try again".to_owned())
            }
        }
    }

    async fn introduce(&self, connection: &Connection) -> Result<Option<Guest>, String> {
        let (mut send, mut receive) = connection.accept_bi().await.map_err(|error| explain(&error))?;
        match alpn(connection).as_deref() {
            Some(ENROLL_ALPN) => {
                self.enroll(&mut send, &mut receive).await?;
                Ok(None)
            }
            Some(CONTROL_ALPN) => self.admit(connection, send, receive).await,
            other => Err(format!("it speaks another protocol ({other:?})")),
        }
    }

    async fn admit(
        &self,
        connection: &Connection,
        mut send: SendStream,
        mut receive: RecvStream,
    ) -> Result<Option<Guest>, String> {
        let name = peer_name(connection);
        let worker = name.as_deref().and_then(WorkerId::from_dns_name);
        let worker = worker
            .ok_or_else(|| "it has no worker's certificate: enrol with the join token first".to_owned())?;
        let greeting = match stream::receive(&mut receive, self.limit).await {
            Ok(FromWorker::Hello(about)) => Greeting::Hello(about),
            Ok(FromWorker::Return(back)) => Greeting::Return(back),
            Ok(FromWorker::Scale { workers }) => {
                return self.scale(worker, workers, &mut send).await.map(|()| None);
            }
            Ok(_) => return Err(format!("{worker} did not say hello")),
            Err(error) => return Err(format!("{worker}: {error}")),
        };
        if let Some(objection) = objection(greeting.about()) {
            return Err(format!("{worker}: {objection}"));
        }
        let seat = match &greeting {
            Greeting::Hello(_) => self.inside.enter(worker),
            // It has hung up before, and that may not have been noticed here.
            Greeting::Return(_) => self.inside.enter_again(worker, self.limit / 2).await,
        }?;
        Ok(Some(Guest { worker, greeting, connection: connection.clone(), send, receive, _seat: seat }))
    }

    /// Passes a wish for so many workers on, and the answer back.
    async fn scale(&self, worker: WorkerId, workers: u32, send: &mut SendStream) -> Result<(), String> {
        let over = || "the run is over".to_owned();
        let (answer, answered) = oneshot::channel();
        self.inbox.send((worker, Inbound::Scale(workers, answer))).await.map_err(|_| over())?;
        let answer = answered.await.map_err(|_| over())?;
        self.answer(send, &answer).await
    }

    /// Sends the last message of a conversation, and waits until it has arrived: when the connection is closed, what has not
    /// never will. A stream that is gone already has delivered it, or cannot.
    async fn answer<T>(&self, send: &mut SendStream, answer: &T) -> Result<(), String>
    where
        T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
    {
        stream::send(send, answer, self.limit).await.map_err(|error| error.to_string())?;
        if send.finish().is_ok() {
            let _ = timeout(self.limit / 2, send.stopped()).await;
        }
        Ok(())
    }

    async fn enroll(&self, send: &mut SendStream, receive: &mut RecvStream) -> Result<(), String> {
        let enroll: Enroll = stream::receive(receive, self.limit).await.map_err(|error| error.to_string())?;
        let (answer, refused) = match self.certificate(&enroll) {
            Ok((worker, certificate)) => (Enrolled::Certificate { worker, certificate }, None),
            Err(reason) => (Enrolled::Refused { reason: reason.clone() }, Some(reason)),
        };
        self.answer(send, &answer).await?;
        refused.map_or(Ok(()), Err)
    }

    fn certificate(&self, enroll: &Enroll) -> Result<(WorkerId, Vec<u8>), String> {
        let known: bool = enroll.secret.as_slice().ct_eq(&self.secret).into();
        if !known {
            return Err(
                "the join token is not this run's: copy the file that its coordinator wrote".to_owned()
            );
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if now >= self.expires {
            return Err(
                "the join token has expired: start the coordinator again with --resume for a new one"
                    .to_owned(),
            );
        }
        let worker = WorkerId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let certificate = self.authority.sign(worker, &enroll.request).map_err(|error| error.to_string())?;
        Ok((worker, certificate))
    }
}

fn alpn(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// What is wrong with what a worker tells of itself; the others and the user's terminal are shown it.
fn objection(about: &About) -> Option<String> {
    let texts = [("host", &about.host), ("address", &about.address), ("fingerprint", &about.fingerprint)];
    for (name, text) in texts {
        if text.len() > ABOUT_BYTES_MAX {
            return Some(format!("its {name} has {} bytes, {ABOUT_BYTES_MAX} are allowed", text.len()));
        }
        if text.chars().any(char::is_control) {
            return Some(format!("its {name} {text:?} has characters that cannot be printed"));
        }
    }
    let address = about.address.parse::<SocketAddr>();
    address.is_err().then(|| format!("its address {:?} is none: give IP:PORT", about.address))
}

/// A worker's first message.
enum Greeting {
    Hello(About),
    Return(Return),
}

impl Greeting {
    fn about(&self) -> &About {
        match self {
            Self::Hello(about) | Self::Return(Return { about, .. }) => about,
        }
    }
}

/// A worker with a certificate that said hello.
struct Guest {
    worker: WorkerId,
    greeting: Greeting,
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    _seat: Seat,
}

impl Guest {
    /// Passes messages on until the connection is gone.
    async fn stay(self, door: &Door, from: SocketAddr) {
        let Self { worker, greeting, connection, send, mut receive, _seat } = self;
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let hello = match greeting {
            Greeting::Hello(about) => Inbound::Hello(about, outbox),
            Greeting::Return(back) => Inbound::Return(back, outbox),
        };
        if door.inbox.send((worker, hello)).await.is_err() {
            return;
        }
        let mut writing = tokio::spawn(write(send, messages, connection.clone(), door.limit));
        let error = tokio::select! {
            error = read(worker, &mut receive, door) => error,
            // Who does not take messages must not stay as if he did.
            Ok(Err(error)) = &mut writing => Some(error),
        };
        let Some(error) = error else { return };
        writing.abort();
        if matches!(error, StreamError::Wire(_) | StreamError::Truncated { .. }) {
            door.refusals.tell(format!("{from}: {worker}: {error}"));
        }
        let cause = error.to_string();
        connection.close(REFUSED, cause.as_bytes());
        // The end of the run has nobody left to tell.
        let _ = door.inbox.send((worker, Inbound::Gone(cause))).await;
    }
}

/// Passes a worker's messages on; returns what ended that, or nothing where nobody takes them any more.
async fn read(worker: WorkerId, receive: &mut RecvStream, door: &Door) -> Option<StreamError> {
    loop {
        match stream::receive(receive, SILENCE * door.limit).await {
            Ok(message) => door.inbox.send((worker, Inbound::Message(message))).await.ok()?,
            Err(error) => return Some(error),
        }
    }
}

/// Sends a worker its messages, and heartbeats between them; ends the connection when the last one was read.
async fn write(
    mut send: SendStream,
    mut messages: mpsc::Receiver<Bytes>,
    connection: Connection,
    limit: Duration,
) -> Result<(), StreamError> {
    let heartbeat = Bytes::from(wire::encode(&FromCoordinator::Heartbeat)?);
    loop {
        let message = match timeout(limit / HEARTBEATS, messages.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(_) => heartbeat.clone(),
        };
        stream::send_encoded(&mut send, &message, limit).await?;
    }
    // What has arrived, but was not read when the connection is closed, never will be: the worker closes it when it has.
    if send.finish().is_ok() {
        let _ = timeout(limit, connection.closed()).await;
    }
    connection.close(0u32.into(), b"dismissed");
    Ok(())
}
