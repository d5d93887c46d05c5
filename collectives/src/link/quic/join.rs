//! The way into a ring: call the next rank and await the previous one's call, both at once, within the timeout.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::hello::{HELLO_BYTES, Hello, Part, WELCOME};
use super::identity::peer_name;
use super::lobby::{Call, Lobby};
use super::obituary::Obituaries;
use super::stream::{QuicReceiver, QuicSender, refuse, transport_error};
use crate::error::{JoinError, TransportError};
use crate::rank::Rank;
use crate::ring::{Members, Ring};

/// How many callers may prove themselves at the same time; further ones are turned away.
const GREETINGS_MAX: usize = 64;

/// A rank's way into its ring, with what it tells and expects of its neighbours.
pub(crate) struct Join<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) client: &'a quinn::ClientConfig,
    pub(crate) lobby: &'a Lobby,
    pub(crate) part: Part,
    pub(crate) obituaries: &'a Arc<Obituaries>,
    pub(crate) ring: Ring,
    pub(crate) members: Members,
    pub(crate) chunk_bytes: u32,
    pub(crate) timeout: Duration,
}

impl Join<'_> {
    /// Links to both neighbours.
    pub(crate) async fn links(
        &self,
        (next_address, next): (SocketAddr, &str),
        prev: &str,
    ) -> Result<(QuicSender, QuicReceiver), JoinError> {
        let asked = self.lobby.ask(self.ring.generation(), self.part, Some(prev));
        asked.map_err(|newest| self.stale(newest))?;
        tokio::try_join!(
            self.in_time(next, self.call(next_address, next)),
            self.in_time(prev, self.answer(prev)),
        )
    }

    async fn in_time<T>(
        &self,
        name: &str,
        leg: impl Future<Output = Result<T, JoinError>>,
    ) -> Result<T, JoinError> {
        timeout(self.timeout, leg).await.unwrap_or_else(|_| {
            let (rank, generation) = (self.rank(), self.ring.generation());
            Err(JoinError::TimedOut { rank, name: name.into(), generation, timeout: self.timeout })
        })
    }

    /// Connects to the next rank.
    async fn call(&self, address: SocketAddr, name: &str) -> Result<QuicSender, JoinError> {
        let failed = |reason: String| self.error(name, TransportError::Failed { reason });
        let lost = |error| self.error(name, transport_error(error));
        let connecting = self.endpoint.connect_with(self.client.clone(), address, name);
        let connection = connecting.map_err(|error| failed(error.to_string()))?.await.map_err(lost)?;
        self.check_name(&connection, name)?;
        let (mut data, mut answer) = connection.open_bi().await.map_err(lost)?;
        let broken = |_| self.error(name, close_reason(&connection));
        data.write_all(&self.hello().encode())
            .await
            .map_err(|_| self.error(name, close_reason(&connection)))?;
        let mut welcome = [0; WELCOME.len()];
        answer.read_exact(&mut welcome).await.map_err(broken)?;
        if welcome != WELCOME {
            return Err(failed("its answer is not that of this version".into()));
        }
        Ok(QuicSender::new(connection, data, self.obituaries.clone()))
    }

    /// Awaits the previous rank's call and welcomes it.
    async fn answer(&self, name: &str) -> Result<QuicReceiver, JoinError> {
        let call = self.lobby.take(self.ring.generation(), self.part, name).await;
        let call = call.map_err(|newest| self.stale(newest))?;
        let Call { hello, connection, mut answer, data, .. } = call;
        if let Some(reason) = self.objection(&hello) {
            refuse(&connection, &reason);
            return Err(self.error(name, TransportError::Refused { reason }));
        }
        let welcomed = answer.write_all(&WELCOME).await;
        welcomed.map_err(|_| self.error(name, close_reason(&connection)))?;
        // The answer is complete; whether the stream ends in an orderly way matters to nobody.
        let _ = answer.finish();
        Ok(QuicReceiver::new(connection, data, self.obituaries.clone()))
    }

    /// This rank, as its group calls it.
    fn rank(&self) -> Rank {
        self.members.name(self.ring.rank())
    }

    fn hello(&self) -> Hello {
        Hello {
            part: self.part,
            shape: self.ring.shape(),
            generation: self.ring.generation(),
            from: self.ring.rank(),
            to: self.ring.next(),
            world_size: self.ring.world_size().get(),
            chunk_bytes: self.chunk_bytes,
        }
    }

    /// What differs from the hello that the previous rank should send.
    fn objection(&self, got: &Hello) -> Option<String> {
        let want = Hello { from: self.ring.prev(), to: self.ring.rank(), ..self.hello() };
        (*got != want).then(|| format!("the ring looks different from there: got {got:?}, expected {want:?}"))
    }

    fn check_name(&self, connection: &Connection, name: &str) -> Result<(), JoinError> {
        let reason = match peer_name(connection) {
            Ok(proved) if proved == name => return Ok(()),
            Ok(proved) => format!("expected {name}, but it proves to be {proved}"),
            Err(error) => error.to_string(),
        };
        refuse(connection, &reason);
        Err(self.error(name, TransportError::Refused { reason }))
    }

    fn error(&self, name: &str, source: TransportError) -> JoinError {
        let (rank, generation, name) = (self.rank(), self.ring.generation(), name.to_owned());
        match source {
            TransportError::Refused { reason } => JoinError::Refused { rank, name, generation, reason },
            source => JoinError::Unreachable { rank, name, generation, source },
        }
    }

    fn stale(&self, newest: crate::Generation) -> JoinError {
        JoinError::Stale { rank: self.rank(), generation: self.ring.generation(), newest }
    }
}

/// Why a stream of this connection failed.
fn close_reason(connection: &Connection) -> TransportError {
    connection.close_reason().map_or(TransportError::Reset, transport_error)
}

/// Leads callers to the lobby, for as long as the endpoint lives.
pub(crate) async fn receive_calls(endpoint: Endpoint, lobby: Arc<Lobby>, patience: Duration) {
    let greetings = Arc::new(Semaphore::new(GREETINGS_MAX));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = greetings.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let lobby = lobby.clone();
        tokio::spawn(async move {
            let from = incoming.remote_address();
            match timeout(patience, greet(incoming)).await {
                Ok(Ok(call)) => lobby.arrive(call),
                Ok(Err(error)) => tracing::warn!(%from, %error, "a caller was not let in"),
                Err(_) => tracing::warn!(%from, "a caller took too long to say who it is"),
            }
            drop(permit);
        });
    }
}

/// Lets a caller prove its name and say hello.
async fn greet(incoming: Incoming) -> Result<Call, TransportError> {
    let connection = incoming.await.map_err(transport_error)?;
    let reject = |reason: String| {
        refuse(&connection, &reason);
        TransportError::Refused { reason }
    };
    let name = peer_name(&connection).map_err(|error| reject(error.to_string()))?;
    let (answer, mut data) = connection.accept_bi().await.map_err(transport_error)?;
    let mut wire = [0; HELLO_BYTES];
    data.read_exact(&mut wire).await.map_err(|_| close_reason(&connection))?;
    let hello = Hello::parse(&wire);
    let hello =
        hello.ok_or_else(|| reject("no hello of this version: run the same program everywhere".into()))?;
    Ok(Call { name, hello, connection, answer, data })
}
