//! A coordinator's hold on its run: the lease that it took, and whether somebody has taken a higher one since.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quinn::crypto::{CryptoError, HmacKey};
use quinn::{EndpointConfig, default_runtime};
use subtle::ConstantTimeEq;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::{Failover, ServerError, random};
use crate::lease::{Claim, Lease, LeaseError, LeaseStore};

/// How often within a timeout it is looked for a successor.
const LOOKS: u32 = 4;
/// Of a connection's reset token.
const RESET_BYTES: usize = 16;

/// The lease, and where it is kept.
#[derive(Debug, Clone)]
pub(super) struct Tenure {
    store: Arc<dyn LeaseStore>,
    pub(super) lease: Lease,
    every: Duration,
    /// When it was last looked for a successor, whatever came of it: where storage fails, not every decision waits for it.
    looked: Arc<Mutex<Instant>>,
}

impl Tenure {
    /// Takes the lease from whoever has it.
    pub(super) async fn take(
        failover: &Failover,
        run: &str,
        address: std::net::SocketAddr,
        authority: &[u8],
        limit: Duration,
    ) -> Result<Self, ServerError> {
        let (store, nonce) = (Arc::clone(&failover.store), hex::encode(random()?));
        let claim = Claim { run: run.to_owned(), address, authority: authority.to_vec(), nonce };
        let taking = Arc::clone(&store);
        let lease = blocking(move || Lease::take(&*taking, &claim)).await.map_err(ServerError::Lease)?;
        Ok(Self { store, lease, every: limit / LOOKS, looked: Arc::new(Mutex::new(Instant::now())) })
    }

    /// Who has taken over, if somebody has. Where the store does not say so in time, nobody is known to have: a run must
    /// not end because its storage fails for a while.
    pub(super) async fn successor(&self) -> Option<Lease> {
        let (store, incarnation) = (Arc::clone(&self.store), self.lease.incarnation);
        let look = blocking(move || Lease::above(&*store, incarnation));
        let looked = timeout(self.every, look).await;
        // Once one is known, every decision looks until this one gives way.
        if !matches!(looked, Ok(Ok(Some(_)))) {
            *self.looked.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
        match looked {
            Ok(Ok(successor)) => successor,
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot see whether another coordinator has taken over");
                None
            }
            Err(_) => {
                tracing::warn!("storage is too slow to say whether another coordinator has taken over");
                None
            }
        }
    }

    /// Whether it was not looked for a successor when it should have been: this process did not run for a while.
    pub(super) fn is_overdue(&self) -> bool {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner).elapsed() >= 2 * self.every
    }

    /// Looks for a successor now and then, and tells of the first.
    pub(super) async fn watch(self, found: mpsc::Sender<Lease>) {
        loop {
            sleep(self.every).await;
            if let Some(successor) = self.successor().await {
                // Nobody listens any more only where the run is over.
                let _ = found.send(successor).await;
                return;
            }
        }
    }
}

/// Does what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LeaseError> + Send + 'static,
) -> Result<T, LeaseError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(LeaseError::Store(error.to_string())))
}

/// Opens the coordinator's endpoint. With a key, it tells those who still speak to an earlier coordinator at this address
/// that their connection is no more: they would wait for it until it has been silent for the timeout.
pub(super) fn endpoint(
    config: quinn::ServerConfig,
    listen: std::net::SocketAddr,
    key: Option<[u8; 32]>,
) -> std::io::Result<quinn::Endpoint> {
    let Some(key) = key else { return quinn::Endpoint::server(config, listen) };
    let ids = u64::from_le_bytes(
        *blake3::keyed_hash(&key, b"connection ids").as_bytes().first_chunk().unwrap_or(&[0; 8]),
    );
    let mut ends = EndpointConfig::new(Arc::new(ResetKey(key)));
    ends.cid_generator(move || Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(ids)));
    let runtime = default_runtime().ok_or_else(|| std::io::Error::other("no async runtime"))?;
    quinn::Endpoint::new(ends, Some(config), std::net::UdpSocket::bind(listen)?, runtime)
}

/// The key of connections' reset tokens.
struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(data).finalize_xof().fill(signature_out);
    }

    fn signature_len(&self) -> usize {
        RESET_BYTES
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let mut expected = vec![0; signature.len()];
        self.sign(data, &mut expected);
        match bool::from(expected.ct_eq(signature)) {
            true => Ok(()),
            false => Err(CryptoError),
        }
    }
}
