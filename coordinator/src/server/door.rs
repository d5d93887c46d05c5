//! Who comes in: handshakes, enrolment, and a worker's messages, each under a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use subtle::ConstantTimeEq;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::OUTBOX_MAX;
use crate::event::Event;
use crate::identity::{Authority, CONTROL_ALPN, ENROLL_ALPN, peer_name};
use crate::ids::WorkerId;
use crate::protocol::{About, Enroll, Enrolled, FromCoordinator, FromWorker};
use crate::stream::{self, StreamError};

/// Connections that may be in their handshake or enrolment at once.
const STRANGERS_MAX: usize = 64;
/// The coordinator's heartbeats within a timeout.
const HEARTBEATS: u32 = 8;

/// What arrives of a worker.
#[derive(Debug)]
pub(super) enum Inbound {
    /// It said hello; answers go there.
    Hello(About, mpsc::Sender<FromCoordinator>),
    /// A message.
    Message(FromWorker),
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
    events: mpsc::Sender<Event>,
    next_id: AtomicU64,
    strangers: Arc<Semaphore>,
}

impl Door {
    pub(super) fn new(
        authority: Authority,
        secret: [u8; 32],
        expires: u64,
        limit: Duration,
        inbox: mpsc::Sender<(WorkerId, Inbound)>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
        Self { authority, secret, expires, limit, inbox, events, next_id: AtomicU64::new(0), strangers }
    }

    /// Accepts connections until the endpoint is closed.
    pub(super) async fn accept(self: Arc<Self>, endpoint: Endpoint) {
        while let Some(incoming) = endpoint.accept().await {
            let Ok(stranger) = Arc::clone(&self.strangers).try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            let door = Arc::clone(&self);
            tokio::spawn(async move {
                let welcomed = timeout(door.limit, door.welcome(incoming)).await;
                drop(stranger);
                match welcomed {
                    Ok(Ok(Some(guest))) => guest.stay(&door).await,
                    Ok(Ok(None)) => {}
                    Ok(Err(reason)) => door.refused(reason).await,
                    Err(_) => {
                        door.refused(format!("a connection did not introduce itself in {:?}", door.limit))
                            .await
                    }
                }
            });
        }
    }

    async fn refused(&self, reason: String) {
        tracing::info!(%reason, "refused");
        // Events are for those who read them.
        let _ = self.events.send(Event::WorkerRefused { reason }).await;
    }

    /// Handshake and first message; a guest, if it is a worker with a certificate.
    async fn welcome(&self, incoming: Incoming) -> Result<Option<Guest>, String> {
        let from = incoming.remote_address();
        let refusal = |reason: String| format!("{from}: {reason}");
        let connection = incoming.await.map_err(|error| refusal(format!("the handshake failed: {error}")))?;
        let (mut send, mut receive) =
            connection.accept_bi().await.map_err(|error| refusal(error.to_string()))?;
        match alpn(&connection).as_deref() {
            Some(ENROLL_ALPN) => {
                self.enroll(&mut send, &mut receive).await.map_err(refusal)?;
                // The worker closes when it has its answer.
                let _ = timeout(self.limit, connection.closed()).await;
                Ok(None)
            }
            Some(CONTROL_ALPN) => {
                let name = peer_name(&connection);
                let worker = name.as_deref().and_then(WorkerId::from_dns_name);
                let worker = worker.ok_or_else(|| refusal("it has no worker's certificate".to_owned()))?;
                match stream::receive(&mut receive, self.limit).await {
                    Ok(FromWorker::Hello(about)) => {
                        Ok(Some(Guest { worker, about, connection, send, receive }))
                    }
                    Ok(_) => Err(refusal(format!("{worker} did not say hello"))),
                    Err(error) => Err(refusal(format!("{worker}: {error}"))),
                }
            }
            other => Err(refusal(format!("it speaks another protocol ({other:?})"))),
        }
    }

    async fn enroll(&self, send: &mut SendStream, receive: &mut RecvStream) -> Result<(), String> {
        let enroll: Enroll = stream::receive(receive, self.limit).await.map_err(|error| error.to_string())?;
        let (answer, refused) = match self.certificate(&enroll) {
            Ok((worker, certificate)) => (Enrolled::Certificate { worker, certificate }, None),
            Err(reason) => (Enrolled::Refused { reason: reason.clone() }, Some(reason)),
        };
        stream::send(send, &answer, self.limit).await.map_err(|error| error.to_string())?;
        // A stream that is gone already has delivered its answer or never will.
        let _ = send.finish();
        refused.map_or(Ok(()), Err)
    }

    fn certificate(&self, enroll: &Enroll) -> Result<(WorkerId, Vec<u8>), String> {
        let known: bool = enroll.secret.as_slice().ct_eq(&self.secret).into();
        if !known {
            return Err("the join token is not this run's".to_owned());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if now >= self.expires {
            return Err("the join token has expired: ask the coordinator for a new one".to_owned());
        }
        let worker = WorkerId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let certificate = self.authority.sign(worker, &enroll.request).map_err(|error| error.to_string())?;
        Ok((worker, certificate))
    }
}

fn alpn(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// A worker with a certificate that said hello.
struct Guest {
    worker: WorkerId,
    about: About,
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
}

impl Guest {
    /// Passes messages on until the connection is gone.
    async fn stay(self, door: &Door) {
        let Self { worker, about, connection, send, mut receive } = self;
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        if door.inbox.send((worker, Inbound::Hello(about, outbox))).await.is_err() {
            return;
        }
        let writing = tokio::spawn(write(send, messages, connection.clone(), door.limit));
        let cause = loop {
            match stream::receive(&mut receive, door.limit).await {
                Ok(message) => {
                    if door.inbox.send((worker, Inbound::Message(message))).await.is_err() {
                        return;
                    }
                }
                Err(StreamError::Wire(error)) => {
                    door.refused(format!("{worker}: {error}")).await;
                    connection.close(1u32.into(), error.to_string().as_bytes());
                    break error.to_string();
                }
                Err(error) => break error.to_string(),
            }
        };
        writing.abort();
        // The end of the run has nobody left to tell.
        let _ = door.inbox.send((worker, Inbound::Gone(cause))).await;
    }
}

/// Sends a worker its messages, and heartbeats between them; ends the connection when the last one is out.
async fn write(
    mut send: SendStream,
    mut messages: mpsc::Receiver<FromCoordinator>,
    connection: Connection,
    limit: Duration,
) {
    loop {
        let message = match timeout(limit / HEARTBEATS, messages.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(_) => FromCoordinator::Heartbeat,
        };
        if stream::send(&mut send, &message, limit).await.is_err() {
            return;
        }
    }
    if send.finish().is_ok() {
        let _ = timeout(limit, send.stopped()).await;
    }
    connection.close(0u32.into(), b"dismissed");
}
