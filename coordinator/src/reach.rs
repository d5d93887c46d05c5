//! Whether a coordinator can be reached from here, before a worker depends on it.
//!
//! Asks for a certificate as a worker does, and throws it away: what answers is the coordinator, it takes this token, and
//! the path between carries datagrams both ways. Nobody joins, and the run does not notice.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use quinn::Endpoint;
use tokio::runtime::Builder;
use tokio::time::{Instant, sleep};

use crate::client::{JoinError, connect, local_ip_towards, open};
use crate::identity::{JoinToken, Request, enroll_config};
use crate::protocol::{Enroll, Enrolled};
use crate::stream::{self, printable};

/// How long the search for the largest datagram may take, beyond some round trips.
const MTU_SEARCH: Duration = Duration::from_millis(500);
/// Each datagram of the search takes one round trip.
const MTU_ROUND_TRIPS: u32 = 16;

/// What was found on the way to a coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// This host's address on the way.
    pub local_ip: IpAddr,
    /// Round-trip time.
    pub round_trip: Duration,
    /// The largest datagram that came through, in bytes.
    pub datagram_bytes: u16,
}

/// Reaches the coordinator of a token, and is let in.
///
/// # Errors
/// See [`JoinError`].
pub fn reach(token: &JoinToken, limit: Duration) -> Result<Reach, JoinError> {
    let local_ip = local_ip_towards(token.address)?;
    let config = enroll_config(&token.authority(), limit)?;
    let message = Enroll { secret: token.secret(), request: Request::new()?.der().to_vec() };
    Builder::new_current_thread().enable_all().build()?.block_on(async {
        let endpoint = Endpoint::client(SocketAddr::new(local_ip, 0))?;
        let connection = connect(&endpoint, config, token.address, limit).await?;
        let round_trip = connection.rtt();
        // Before the answer: the coordinator closes the connection soon after it.
        let until = Instant::now() + MTU_SEARCH.max(round_trip * MTU_ROUND_TRIPS).min(limit / 4);
        while Instant::now() < until && connection.close_reason().is_none() {
            sleep(Duration::from_millis(10)).await;
        }
        let datagram_bytes = connection.stats().path.current_mtu;
        let (mut send, mut receive) = open(&connection, limit).await?;
        stream::send(&mut send, &message, limit).await?;
        let enrolled: Enrolled = stream::receive(&mut receive, limit).await?;
        connection.close(0u32.into(), b"looked");
        endpoint.wait_idle().await;
        match enrolled {
            Enrolled::Refused { reason } => Err(JoinError::Refused(printable(reason.as_bytes()))),
            Enrolled::Certificate { .. } => Ok(Reach { local_ip, round_trip, datagram_bytes }),
        }
    })
}
