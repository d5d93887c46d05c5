//! Writing one checkpoint: its pieces, then a look at what arrived, then the manifest.
//!
//! # Invariants
//! 1. The manifest is created last, and only after every piece was acknowledged and has its size.
//! 2. A checkpoint of this step that is there already is kept if it is whole and the same state; otherwise its
//!    manifest is removed before a piece of it is touched.
//! 3. What fails or is stopped leaves nothing behind, as far as the store lets itself be told.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use bytes::Bytes;

use crate::format::manifest::{FORMAT, MANIFEST_BYTES_MAX, Manifest, PieceInfo};
use crate::format::{MANIFEST, piece, step_folder};
use crate::read::Checkpoint;
use crate::retention::remove;
use crate::snapshot::Snapshot;
use crate::store::{Created, Store};
use crate::store_error::StoreError;
use crate::upload::{Control, Tuning, put_piece};
use crate::verify::flaws;

/// How long removing the remains of a failed checkpoint may take.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The store failed, and trying again did not help or makes no sense.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It was told to stop.
    #[error(transparent)]
    Stopped(#[from] Stop),
    /// The store acknowledged a piece that it does not hold in full.
    #[error("the store acknowledged {bytes} bytes of {url} and holds {}", held(.got))]
    Lost {
        /// The object.
        url: String,
        /// Bytes sent.
        bytes: u64,
        /// Bytes there; none if there is no object.
        got: Option<u64>,
    },
    /// Another writer created the manifest meanwhile.
    #[error("another writer created {url} at the same time; let only one run write to a location")]
    Taken {
        /// The manifest.
        url: String,
    },
}

/// Why a checkpoint under way was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Stop {
    /// The store had stopped answering, and a newer one waited.
    #[error("given up for the newer one of step {by}: the store had not acknowledged anything for a while")]
    Newer {
        /// The newer one's step.
        by: u64,
    },
    /// It took longer than it may.
    #[error("not written within {} s", .0.as_secs())]
    Deadline(Duration),
    /// The writer was told to end.
    #[error("not written before the program had to end")]
    Closing,
}

/// Writes a checkpoint; tells its size in bytes.
pub(crate) async fn save(
    store: &Store,
    snapshot: &Snapshot,
    tuning: &Tuning,
    control: &Control,
) -> Result<u64, SaveError> {
    if let Some(there) = control.retry(tuning, async || already_there(store, snapshot, control).await).await?
    {
        return Ok(there.bytes());
    }
    let written = write(store, snapshot, tuning, control).await;
    match &written {
        Ok(_) => {}
        Err(SaveError::Taken { .. }) => {
            // By a worker of the same run, perhaps, whose place this one took while it wrote the same state.
            if let Ok(Found::Same(there)) = look(store, snapshot, control).await {
                return Ok(there.bytes());
            }
        }
        Err(_) => clean_up(store, snapshot.step).await,
    }
    written
}

/// The same state, whole, under the same step: a run that went back comes by its own checkpoints again.
async fn already_there(
    store: &Store,
    snapshot: &Snapshot,
    control: &Control,
) -> Result<Option<Manifest>, SaveError> {
    match look(store, snapshot, control).await? {
        Found::Same(manifest) => return Ok(Some(manifest)),
        Found::Other => control.race(store.delete(&manifest_of(snapshot.step))).await??,
        Found::Nothing => {}
    }
    Ok(None)
}

/// What lies under the step of a snapshot.
enum Found {
    Nothing,
    /// The same state, whole.
    Same(Manifest),
    /// Another, or one with a flaw.
    Other,
}

async fn look(store: &Store, snapshot: &Snapshot, control: &Control) -> Result<Found, SaveError> {
    let name = manifest_of(snapshot.step);
    let Some(bytes) = control.race(store.find(&name, MANIFEST_BYTES_MAX)).await?? else {
        return Ok(Found::Nothing);
    };
    if let Ok(manifest) = Manifest::decode(&bytes) {
        let checkpoint = Checkpoint { store, manifest: &manifest };
        if is_of(&manifest, snapshot) && control.race(flaws(&checkpoint)).await??.is_empty() {
            return Ok(Found::Same(manifest));
        }
    }
    Ok(Found::Other)
}

fn manifest_of(step: u64) -> String {
    format!("{}/{MANIFEST}", step_folder(step))
}

fn is_of(manifest: &Manifest, snapshot: &Snapshot) -> bool {
    manifest.step == snapshot.step
        && manifest.state_hash == snapshot.state_hash
        && manifest.run_id == snapshot.run.run_id
        && manifest.model == snapshot.layout.fingerprint()
}

async fn write(
    store: &Store,
    snapshot: &Snapshot,
    tuning: &Tuning,
    control: &Control,
) -> Result<u64, SaveError> {
    let folder = step_folder(snapshot.step);
    let mut infos = Vec::new();
    for piece in piece::pieces(snapshot) {
        infos.push(put_piece(store, &folder, &piece, tuning, control).await?);
    }
    for info in &infos {
        control.retry(tuning, async || arrived(store, &folder, info, control).await).await?;
    }
    let manifest = manifest(snapshot, infos);
    control.retry(tuning, async || publish(store, &folder, &manifest, control).await).await?;
    Ok(manifest.bytes())
}

/// A store may acknowledge what it did not keep: the cheapest proof is the object's size.
async fn arrived(store: &Store, folder: &str, info: &PieceInfo, control: &Control) -> Result<(), SaveError> {
    let name = format!("{folder}/{}", info.name);
    match control.race(store.size(&name)).await?? {
        Some(bytes) if bytes == info.bytes => Ok(()),
        got => Err(SaveError::Lost { url: store.url(&name), bytes: info.bytes, got }),
    }
}

/// The moment at which the checkpoint begins to exist. What was acknowledged is read back: all hangs on it.
async fn publish(
    store: &Store,
    folder: &str,
    manifest: &Manifest,
    control: &Control,
) -> Result<(), SaveError> {
    let (name, bytes) = (format!("{folder}/{MANIFEST}"), Bytes::from(manifest.encode()));
    match control.race(store.create_only(&name, bytes.clone())).await?? {
        Created::Ours => {}
        Created::Theirs(_) => return Err(SaveError::Taken { url: store.url(&name) }),
    }
    match control.race(store.find(&name, MANIFEST_BYTES_MAX)).await?? {
        Some(found) if found == bytes => Ok(()),
        found => {
            let got = found.map(|found| found.len() as u64);
            Err(SaveError::Lost { url: store.url(&name), bytes: bytes.len() as u64, got })
        }
    }
}

fn manifest(snapshot: &Snapshot, pieces: Vec<PieceInfo>) -> Manifest {
    let run = &*snapshot.run;
    Manifest {
        format: FORMAT,
        program: run.program.clone(),
        run_id: run.run_id.clone(),
        nonce: nonce(),
        step: snapshot.step,
        total_steps: run.total_steps,
        seed: run.seed,
        state_hash: snapshot.state_hash,
        model: snapshot.layout.fingerprint(),
        dataset: run.dataset.clone(),
        pieces,
    }
}

async fn clean_up(store: &Store, step: u64) {
    match tokio::time::timeout(CLEANUP_TIMEOUT, remove(store, step)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, step, "checkpoint: remains were left behind"),
        Err(_) => tracing::warn!(step, "checkpoint: remains were left behind: the store did not answer"),
    }
}

/// A number that no other writer draws: the standard library seeds its hash maps from the system's randomness.
pub(crate) fn nonce() -> String {
    let draw = || RandomState::new().hash_one((std::process::id(), std::time::SystemTime::now()));
    format!("{:016x}{:016x}", draw(), draw())
}

fn held(got: &Option<u64>) -> String {
    got.map_or("nothing".to_owned(), |bytes| format!("{bytes}"))
}
