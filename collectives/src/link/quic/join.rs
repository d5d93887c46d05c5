//! The way into a ring: call the next rank and await the previous one's call, both at once, within the timeout.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::directions::Directions;
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
            self.in_time(next, async {
                let called = self.call(self.hello(), next_address, next).await;
                called.map_err(|source| self.error(next, source))
            }),
            self.in_time(prev, self.answer(prev)),
        )
    }

    /// Links to another rank by itself.
    pub(crate) async fn link_to(
        &self,
        to: Rank,
        Directions { address, name }: &Directions,
    ) -> Result<QuicSender, TransportError> {
        let hello = Hello { to, ..self.hello() };
        timeout(self.timeout, self.call(hello, *address, name)).await.unwrap_or(Err(TransportError::TimedOut))
    }

    /// Takes in another rank by itself; `caller` is who it has proved to be, if it is one of these ranks.
    pub(crate) async fn welcome(
        &self,
        call: Call,
        caller: Option<Rank>,
    ) -> Result<(Rank, QuicReceiver), TransportError> {
        let Some(from) = caller else {
            let reason = format!("{} is not rank {} of this ring", call.name, call.hello.from);
            refuse(&call.connection, &reason);
            return Err(TransportError::Refused { reason });
        };
        let receiver = self.let_in(call, Hello { from, to: self.ring.rank(), ..self.hello() }).await?;
        Ok((from, receiver))
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

    /// Connects to another rank.
    async fn call(
        &self,
        hello: Hello,
        address: SocketAddr,
        name: &str,
    ) -> Result<QuicSender, TransportError> {
        let failed = |reason: String| TransportError::Failed { reason };
        let connecting = self.endpoint.connect_with(self.client.clone(), address, name);
        let connection =
            connecting.map_err(|error| failed(error.to_string()))?.await.map_err(transport_error)?;
        check_name(&connection, name)?;
        let (mut data, mut answer) = connection.open_bi().await.map_err(transport_error)?;
        data.write_all(&hello.encode()).await.map_err(|_| close_reason(&connection))?;
        let mut welcome = [0; WELCOME.len()];
        answer.read_exact(&mut welcome).await.map_err(|_| close_reason(&connection))?;
        if welcome != WELCOME {
            return Err(failed("its answer is not that of this version".into()));
        }
        Ok(QuicSender::new(connection, data, self.obituaries.clone()))
    }

    /// Awaits the previous rank's call and welcomes it.
    async fn answer(&self, name: &str) -> Result<QuicReceiver, JoinError> {
        let call = self.lobby.take(self.ring.generation(), self.part, name).await;
        let call = call.map_err(|newest| self.stale(newest))?;
        let want = Hello { from: self.ring.prev(), to: self.ring.rank(), ..self.hello() };
        self.let_in(call, want).await.map_err(|source| self.error(name, source))
    }

    /// Welcomes a caller that says what it should.
    async fn let_in(&self, call: Call, want: Hello) -> Result<QuicReceiver, TransportError> {
        let Call { hello: got, connection, mut answer, data, .. } = call;
        if got != want {
            let reason = format!("the ring looks different from there: got {got:?}, expected {want:?}");
            refuse(&connection, &reason);
            return Err(TransportError::Refused { reason });
        }
        answer.write_all(&WELCOME).await.map_err(|_| close_reason(&connection))?;
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

fn check_name(connection: &Connection, name: &str) -> Result<(), TransportError> {
    let reason = match peer_name(connection) {
        Ok(proved) if proved == name => return Ok(()),
        Ok(proved) => format!("expected {name}, but it proves to be {proved}"),
        Err(error) => error.to_string(),
    };
    refuse(connection, &reason);
    Err(TransportError::Refused { reason })
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
