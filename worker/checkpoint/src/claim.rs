//! Whose location it is: one run per prefix, recorded in `run.json` by a create-only put.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::blocking::block_on;
use crate::format::RUN;
use crate::listing::steps;
use crate::location::{Location, Patience};
use crate::retention::remove;
use crate::save::nonce;
use crate::store::{Created, Store};
use crate::store_error::StoreError;

/// The longest record that is read.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// In which spirit a run comes to a location.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The location must be unused.
    Fresh,
    /// The location must hold a run, which goes on.
    Resume,
    /// What is there is removed: every checkpoint, and nothing else.
    Overwrite,
}

/// Why a run may not write to a location.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another run is there.
    #[error(
        "{url} holds run {holder}{}; go on with it by --resume, or remove its checkpoints by --overwrite",
        up_to(.newest)
    )]
    Taken {
        /// The location.
        url: String,
        /// The run that is there.
        holder: String,
        /// Its newest step in storage.
        newest: Option<u64>,
    },
    /// There is nothing to go on with.
    #[error("{url} holds no run to resume; check the place, or start without --resume")]
    Nothing {
        /// The location.
        url: String,
    },
}

/// `run.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    format: u32,
    run_id: String,
    nonce: String,
}

/// Takes a location for a run. Tells the run's id, which on resuming is that of the run found there.
pub fn claim(location: &Location, run_id: &str, how: How) -> Result<String, ClaimError> {
    block_on(async || {
        let store = match how {
            How::Fresh | How::Overwrite => location.create(Patience::Medium)?,
            How::Resume => match location.open(Patience::Medium) {
                Err(error) if error.is_missing() => {
                    return Err(ClaimError::Nothing { url: location.to_string() });
                }
                opened => opened?,
            },
        };
        match how {
            How::Fresh => fresh(&store, run_id).await,
            How::Resume => resume(&store, run_id).await,
            How::Overwrite => overwrite(&store, run_id).await,
        }
    })
}

/// The run to which a location belongs, if any. A folder that is not there belongs to nobody.
///
/// # Errors
/// Where the store cannot be asked within a few seconds.
pub fn holder_of(location: &Location) -> Result<Option<String>, StoreError> {
    block_on(async || {
        let store = match location.open(Patience::Short) {
            Err(error) if error.is_missing() => return Ok(None),
            opened => opened?,
        };
        Ok(store.find(RUN, RECORD_BYTES_MAX).await?.map(|record| holder(&record)))
    })
}

async fn fresh(store: &Store, run_id: &str) -> Result<String, ClaimError> {
    let steps = steps(store).await?;
    let newest = steps.last_key_value().map(|(&step, _)| step);
    let taken = |holder: String| ClaimError::Taken { url: store.location().to_string(), holder, newest };
    match store.find(RUN, RECORD_BYTES_MAX).await? {
        Some(record) => return Err(taken(holder(&record))),
        None if !steps.is_empty() => return Err(taken("unknown (there is no run.json)".into())),
        None => {}
    }
    match store.create_only(RUN, record(run_id)).await? {
        Created::Ours => Ok(run_id.to_owned()),
        Created::Theirs(record) => Err(taken(holder(&record))),
    }
}

async fn resume(store: &Store, run_id: &str) -> Result<String, ClaimError> {
    if let Some(record) = store.find(RUN, RECORD_BYTES_MAX).await? {
        return Ok(holder(&record));
    }
    if steps(store).await?.is_empty() {
        return Err(ClaimError::Nothing { url: store.location().to_string() });
    }
    store.put(RUN, record(run_id)).await?;
    Ok(run_id.to_owned())
}

async fn overwrite(store: &Store, run_id: &str) -> Result<String, ClaimError> {
    for step in steps(store).await?.into_keys().rev() {
        remove(store, step).await?;
    }
    store.put(RUN, record(run_id)).await?;
    Ok(run_id.to_owned())
}

fn record(run_id: &str) -> Bytes {
    let record = Record { format: 1, run_id: run_id.to_owned(), nonce: nonce() };
    let mut json = serde_json::to_vec_pretty(&record).expect("two strings and a number");
    json.push(b'\n');
    json.into()
}

fn holder(record: &[u8]) -> String {
    serde_json::from_slice(record)
        .map_or("unknown (run.json cannot be read)".into(), |record: Record| record.run_id)
}

fn up_to(step: &Option<u64>) -> String {
    step.map_or(String::new(), |step| format!(" up to step {step}"))
}
