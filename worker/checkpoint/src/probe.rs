//! Before a run: does this location take what a run will bring? Better told at once than at the first checkpoint.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::blocking::block_on;
use crate::location::{Location, Patience};
use crate::save::nonce;
use crate::store::{Created, Store};
use crate::store_error::StoreError;

/// The longest that a probe takes.
const PROBE_TIMEOUT: Duration = Duration::from_secs(12);

/// Why a location is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The store refused, or cannot be reached.
    #[error("checkpoints cannot be kept there: {0}")]
    Store(#[from] StoreError),
    /// It does not give back what it took.
    #[error("checkpoints cannot be kept at {url}: what was written there does not read back")]
    Forgetful {
        /// The location.
        url: String,
    },
    /// It does not answer.
    #[error(
        "checkpoints cannot be kept at {url}: no answer within {} s; check the address, the network and the \
         credentials (without AWS_ACCESS_KEY_ID the instance's role is tried)",
        PROBE_TIMEOUT.as_secs()
    )]
    Silent {
        /// The location.
        url: String,
    },
}

/// Writes, reads back and deletes a tiny object; takes some seconds at most.
pub fn probe(location: &Location) -> Result<(), ProbeError> {
    let url = location.to_string();
    block_on(async || {
        let store = location.create(Patience::Short)?;
        match tokio::time::timeout(PROBE_TIMEOUT, round_trip(&store)).await {
            Ok(done) => done,
            Err(_) => Err(ProbeError::Silent { url }),
        }
    })
}

/// What a location does, and how fast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Examination {
    /// Whether a second object of one name is refused, as it must be where two runs come to one place.
    pub conditional: bool,
    /// Of a small object: the time to create it.
    pub create: Duration,
    /// The time to read it.
    pub read: Duration,
    /// How far this host's clock is ahead of the store's, in milliseconds; a store may tell whole seconds only.
    pub clock_ahead_ms: i64,
}

/// Looks more closely than [`probe`]: writes a tiny object twice, reads it, and deletes it.
///
/// # Errors
/// See [`ProbeError`].
pub fn examine(location: &Location) -> Result<Examination, ProbeError> {
    let url = location.to_string();
    block_on(async || {
        let store = location.create(Patience::Short)?;
        match tokio::time::timeout(PROBE_TIMEOUT, look(&store)).await {
            Ok(done) => done,
            Err(_) => Err(ProbeError::Silent { url }),
        }
    })
}

async fn look(store: &Store) -> Result<Examination, ProbeError> {
    let (ours, other) = (nonce(), nonce());
    let name = format!("probe-{ours}");
    let (began, now) = (Instant::now(), SystemTime::now());
    let created = store.create_only(&name, ours.clone().into()).await?;
    let create = began.elapsed();
    let began = Instant::now();
    let found = store.find(&name, ours.len() as u64).await?;
    let read = began.elapsed();
    let again = store.create_only(&name, other.into()).await;
    let written = store.written_ms(&name).await;
    store.delete(&name).await?;
    if created != Created::Ours || found.is_none_or(|found| found != ours) {
        return Err(ProbeError::Forgetful { url: store.location().to_string() });
    }
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    Ok(Examination {
        conditional: matches!(again?, Created::Theirs(_)),
        create,
        read,
        clock_ahead_ms: i64::try_from(now).unwrap_or(i64::MAX) - written?,
    })
}

async fn round_trip(store: &Store) -> Result<(), ProbeError> {
    let nonce = nonce();
    let name = format!("probe-{nonce}");
    let created = store.create_only(&name, nonce.clone().into()).await?;
    let found = store.find(&name, nonce.len() as u64).await?;
    store.delete(&name).await?;
    match created == Created::Ours && found.is_some_and(|found| found == nonce) {
        true => Ok(()),
        false => Err(ProbeError::Forgetful { url: store.location().to_string() }),
    }
}
