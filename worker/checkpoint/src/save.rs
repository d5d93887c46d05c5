//! Writing one checkpoint, alone or a share of it: pieces, then a look at what arrived, then the manifest or a record.
//!
//! # Invariants
//! 1. The manifest is created last, and only after every piece was acknowledged and has its size.
//! 2. A checkpoint of this step that is there already is kept if it is whole and the same state; otherwise its
//!    manifest is removed before a piece of it is touched.
//! 3. What fails or is stopped leaves nothing of its own behind, as far as the store lets itself be told; but once others may
//!    have a share's record, its pieces stay for them, and go with older attempts.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use bytes::Bytes;

use crate::format::manifest::{MANIFEST_BYTES_MAX, Manifest, PieceInfo};
use crate::format::record::ShareRecord;
use crate::format::{Digest, INDEX, Kind, MANIFEST, assemble, piece, step_folder};
use crate::listing::newest_before;
use crate::read::Checkpoint;
use crate::reuse::copy_unchanged;
use crate::shares::{complete, put_record, remove_record};
use crate::snapshot::{Attempt, Snapshot};
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
    /// The shares are no checkpoint together.
    #[error("the shares of {url} do not fit together: {why}")]
    Misfit {
        /// The checkpoint.
        url: String,
        /// What is wrong.
        why: String,
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

/// What came of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// The checkpoint is complete, and has so many bytes.
    Complete(u64),
    /// This share is there, in so many bytes, and others are not.
    Share(u64),
}

/// Writes a checkpoint, or a share of one; and the manifest, if it is the last share to come.
pub(crate) async fn save(
    store: &Store,
    snapshot: &Snapshot,
    tuning: &Tuning,
    control: &Control,
) -> Result<Written, SaveError> {
    let attempt = &snapshot.attempt();
    if !attempt.share.is_whole() {
        // First: while this share has no record, nobody creates the manifest that may be taken away below.
        control.retry(tuning, async || remove_record(store, attempt, control).await).await?;
    }
    // One decides for all whether what is there is whole: while others mend their pieces, two may find otherwise.
    if attempt.share.index == 0 {
        let there = control.retry(tuning, async || already_there(store, attempt, control).await).await?;
        if let Some(there) = there {
            return Ok(Written::Complete(there.bytes()));
        }
    }
    let pieces = piece::pieces(snapshot, &attempt.key, tuning.file_bytes);
    let written = match put_pieces(store, attempt, &pieces, tuning, control).await {
        Ok(infos) if attempt.share.is_whole() => finish_alone(store, attempt, infos, tuning, control).await,
        Ok(infos) => return finish_share(store, attempt, infos, tuning, control).await,
        Err(error) => Err(error),
    };
    match &written {
        Ok(_) => tidy(store, attempt, control).await,
        Err(SaveError::Taken { .. } | SaveError::Lost { .. }) => {
            // By other writers of the same run, perhaps, who wrote the same state.
            if let Ok(Found::Same(there)) = look(store, attempt, control).await {
                return Ok(Written::Complete(there.bytes()));
            }
            discard(store, attempt, &pieces).await;
        }
        Err(_) => discard(store, attempt, &pieces).await,
    }
    written
}

/// The same state, whole, under the same step: a run that went back comes by its own checkpoints again.
async fn already_there(
    store: &Store,
    attempt: &Attempt,
    control: &Control,
) -> Result<Option<Manifest>, SaveError> {
    match look(store, attempt, control).await? {
        Found::Same(manifest) => return Ok(Some(manifest)),
        Found::Other(read) => {
            // Not one that other shares have created since.
            let name = manifest_of(attempt.step);
            if control.race(store.find(&name, MANIFEST_BYTES_MAX)).await??.is_some_and(|now| now == read) {
                control.race(store.delete(&name)).await??;
            }
        }
        Found::Nothing => {}
    }
    Ok(None)
}

/// What lies under the step of a snapshot.
enum Found {
    Nothing,
    /// The same state, whole.
    Same(Manifest),
    /// Another, or one with a flaw: the manifest as it was read.
    Other(Bytes),
}

async fn look(store: &Store, attempt: &Attempt, control: &Control) -> Result<Found, SaveError> {
    let name = manifest_of(attempt.step);
    let Some(bytes) = control.race(store.find(&name, MANIFEST_BYTES_MAX)).await?? else {
        return Ok(Found::Nothing);
    };
    if let Ok(manifest) = Manifest::decode(&bytes) {
        let checkpoint = Checkpoint::new(store, &manifest);
        if is_of(&manifest, attempt) && control.race(flaws(&checkpoint)).await??.is_empty() {
            return Ok(Found::Same(manifest));
        }
    }
    Ok(Found::Other(bytes))
}

pub(crate) fn manifest_of(step: u64) -> String {
    format!("{}/{MANIFEST}", step_folder(step))
}

pub(crate) fn is_of(manifest: &Manifest, attempt: &Attempt) -> bool {
    manifest.step == attempt.step
        && manifest.state_hash == attempt.state_hash
        && manifest.run_id == attempt.run.run_id
        && manifest.model == attempt.layout.fingerprint()
}

/// Uploads pieces, and looks whether the store has them.
async fn put_pieces(
    store: &Store,
    attempt: &Attempt,
    pieces: &[piece::Piece],
    tuning: &Tuning,
    control: &Control,
) -> Result<Vec<PieceInfo>, SaveError> {
    let folder = step_folder(attempt.step);
    let newest = async || Ok(control.race(newest_before(store, attempt.step)).await??);
    let last = control.retry(tuning, newest).await?;
    let mut infos = Vec::new();
    for piece in pieces {
        let copied = match &last {
            Some(last) => copy_unchanged(store, last, attempt, piece, tuning, control).await?,
            None => None,
        };
        infos.push(match copied {
            Some(info) => info,
            None => put_piece(store, &folder, piece, tuning, control).await?,
        });
    }
    for info in &infos {
        control.retry(tuning, async || arrived(store, &folder, info, control).await).await?;
    }
    Ok(infos)
}

/// The manifest, and what makes several files of weights one model.
async fn finish_alone(
    store: &Store,
    attempt: &Attempt,
    mut infos: Vec<PieceInfo>,
    tuning: &Tuning,
    control: &Control,
) -> Result<Written, SaveError> {
    if infos.iter().filter(|info| Kind::of(&info.name) == Some(Kind::Weights)).count() > 1 {
        let index = Bytes::from(assemble::index(&attempt.layout, &infos));
        infos.push(put_index(store, attempt.step, index, tuning, control).await?);
    }
    let manifest = ShareRecord::new(attempt, Vec::new()).manifest(nonce(), infos);
    let (name, bytes) = (manifest_of(attempt.step), Bytes::from(manifest.encode()));
    control.retry(tuning, async || publish(store, &name, &bytes, control).await).await?;
    Ok(Written::Complete(manifest.bytes()))
}

/// The record of a share; and the manifest, if all others are there.
async fn finish_share(
    store: &Store,
    attempt: &Attempt,
    infos: Vec<PieceInfo>,
    tuning: &Tuning,
    control: &Control,
) -> Result<Written, SaveError> {
    let bytes = infos.iter().map(|info| info.bytes).sum();
    control.retry(tuning, async || put_record(store, attempt, infos.clone(), control).await).await?;
    let done = control.retry(tuning, async || complete(store, attempt, tuning, control).await).await?;
    Ok(done.map_or(Written::Share(bytes), |manifest| Written::Complete(manifest.bytes())))
}

/// Writes `model.safetensors.index.json`.
pub(crate) async fn put_index(
    store: &Store,
    step: u64,
    index: Bytes,
    tuning: &Tuning,
    control: &Control,
) -> Result<PieceInfo, SaveError> {
    let mut digest = Digest::new(index.len() as u64, u64::MAX);
    digest.update(&index);
    let (folder, info) = (step_folder(step), digest.finish(INDEX.to_owned(), Vec::new()));
    let put = async || Ok(control.race(store.put(&format!("{folder}/{INDEX}"), index.clone())).await??);
    control.retry(tuning, put).await?;
    control.retry(tuning, async || arrived(store, &folder, &info, control).await).await?;
    Ok(info)
}

/// A store may acknowledge what it did not keep: the cheapest proof is the object's size.
async fn arrived(store: &Store, folder: &str, info: &PieceInfo, control: &Control) -> Result<(), SaveError> {
    let name = format!("{folder}/{}", info.name);
    match control.race(store.size(&name)).await?? {
        Some(bytes) if bytes == info.bytes => Ok(()),
        got => Err(SaveError::Lost { url: store.url(&name), bytes: info.bytes, got }),
    }
}

/// Creates an object on which all hangs: what was acknowledged is read back. Of a manifest it is the moment at which the
/// checkpoint begins to exist.
pub(crate) async fn publish(
    store: &Store,
    name: &str,
    bytes: &Bytes,
    control: &Control,
) -> Result<(), SaveError> {
    match control.race(store.create_only(name, bytes.clone())).await?? {
        Created::Ours => {}
        Created::Theirs(_) => return Err(SaveError::Taken { url: store.url(name) }),
    }
    match control.race(store.find(name, MANIFEST_BYTES_MAX)).await?? {
        Some(found) if found == *bytes => Ok(()),
        found => {
            // It was ours, and is of no use to anybody.
            control.race(store.delete(name)).await??;
            let got = found.map(|found| found.len() as u64);
            Err(SaveError::Lost { url: store.url(name), bytes: bytes.len() as u64, got })
        }
    }
}

/// Removes what lies beside a complete checkpoint and is none of it: records, and what other attempts left.
pub(crate) async fn tidy(store: &Store, attempt: &Attempt, control: &Control) {
    let folder = step_folder(attempt.step);
    let work = async {
        let Some(bytes) = store.find(&manifest_of(attempt.step), MANIFEST_BYTES_MAX).await? else {
            return Ok(());
        };
        let Ok(manifest) = Manifest::decode(&bytes) else { return Ok(()) };
        for name in store.list_folder(&folder).await?.into_keys() {
            if name != MANIFEST && manifest.piece(&name).is_none() {
                store.delete(&format!("{folder}/{name}")).await?;
            }
        }
        Ok::<(), StoreError>(())
    };
    match control.race(tokio::time::timeout(CLEANUP_TIMEOUT, work)).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => tracing::warn!(%error, folder, "checkpoint: remains were left beside it"),
        Ok(Err(_)) | Err(_) => tracing::warn!(folder, "checkpoint: remains were left beside it"),
    }
}

/// Removes what this writer wrote of a checkpoint that came to nothing, unless others made one of it.
pub(crate) async fn discard(store: &Store, attempt: &Attempt, pieces: &[piece::Piece]) {
    let (folder, step) = (step_folder(attempt.step), attempt.step);
    let work = async {
        if store.size(&manifest_of(step)).await?.is_some() {
            return Ok(());
        }
        for piece in pieces {
            store.delete(&format!("{folder}/{}", piece.name)).await?;
        }
        Ok::<(), StoreError>(())
    };
    match tokio::time::timeout(CLEANUP_TIMEOUT, work).await {
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
