//! Finishing together: records of shares, and the manifest by whoever finds them all.
//!
//! The store is the arbiter, and there are no messages between writers. Each puts its record after its pieces, and looks after
//! that which records are there; so whoever is last sees them all. Several may be last at once: what they create is the same.
//!
//! # Invariants
//! 1. A record is there only while the pieces it speaks for were not touched since.
//! 2. The manifest is created only when every piece of every share was found in its size just before.
//! 3. Share 0 alone judges a manifest that was there before, and takes it away where it has a flaw. While share 0 has no record,
//!    nobody else believes a manifest, or creates one.
//! 4. A share that never comes leaves no checkpoint, and what the others wrote goes with older attempts.

use bytes::Bytes;

use crate::format::manifest::{MANIFEST_BYTES_MAX, Manifest, PieceInfo};
use crate::format::record::{ShareRecord, record_name};
use crate::format::{INDEX, MANIFEST, assemble, step_folder};
use crate::save::{SaveError, is_of, manifest_of, publish, put_index, tidy};
use crate::share::Share;
use crate::snapshot::Attempt;
use crate::store::Store;
use crate::upload::{Control, Tuning};

/// Removes the record of an earlier writer of this share: it would speak for pieces that are about to be replaced.
pub(crate) async fn remove_record(
    store: &Store,
    attempt: &Attempt,
    control: &Control,
) -> Result<(), SaveError> {
    Ok(control.race(store.delete(&name_of(attempt, attempt.share.index))).await??)
}

/// Tells the others what this share consists of.
pub(crate) async fn put_record(
    store: &Store,
    attempt: &Attempt,
    infos: Vec<PieceInfo>,
    control: &Control,
) -> Result<(), SaveError> {
    let name = name_of(attempt, attempt.share.index);
    let bytes = Bytes::from(ShareRecord::new(attempt, infos).encode());
    match publish(store, &name, &bytes, control).await {
        // Whoever else writes this share writes the same: this one is damaged.
        Err(SaveError::Taken { .. }) => {
            control.race(store.delete(&name)).await??;
            publish(store, &name, &bytes, control).await
        }
        // Somebody has made the manifest of it already, and removed it.
        Err(lost @ SaveError::Lost { .. }) => created(store, attempt, control).await?.map(drop).ok_or(lost),
        done => done,
    }
}

/// Shares without a record. None are missing once there is a manifest.
pub(crate) async fn missing(
    store: &Store,
    attempt: &Attempt,
    control: &Control,
) -> Result<Vec<u32>, SaveError> {
    let there = control.race(store.list_folder(&step_folder(attempt.step))).await??;
    if there.contains_key(MANIFEST) {
        return Ok(Vec::new());
    }
    let absent = |&index: &u32| !there.contains_key(&record_name(&attempt.key, share(attempt, index)));
    Ok((0..attempt.share.of).filter(absent).collect())
}

/// Creates the manifest, if the records of all shares are there; tells it, if it is there.
pub(crate) async fn complete(
    store: &Store,
    attempt: &Attempt,
    tuning: &Tuning,
    control: &Control,
) -> Result<Option<Manifest>, SaveError> {
    let first = name_of(attempt, 0);
    if attempt.share.index != 0 && control.race(store.size(&first)).await??.is_none() {
        return Ok(None);
    }
    if !missing(store, attempt, control).await?.is_empty() {
        return Ok(None);
    }
    if let Some(manifest) = created(store, attempt, control).await? {
        // Its own record may have come after whoever created the manifest has removed all.
        tidy(store, attempt, control).await;
        return Ok(Some(manifest));
    }
    let mut records = Vec::new();
    for index in 0..attempt.share.of {
        let name = name_of(attempt, index);
        // Somebody else may have made the manifest of them, and removed them.
        let Some(bytes) = control.race(store.find(&name, MANIFEST_BYTES_MAX)).await?? else {
            return created(store, attempt, control).await;
        };
        records.push(ShareRecord::decode(&bytes).map_err(|error| misfit(store, attempt, error.to_string()))?);
    }
    let assembled = assemble::assemble(&attempt.key, &attempt.layout, records);
    let assembled = assembled.map_err(|why| misfit(store, attempt, why))?;
    let manifest = assembled.manifest;
    all_there(store, &manifest, control).await?;
    put_index(store, attempt.step, assembled.index.into(), tuning, control).await?;
    match publish(store, &manifest_of(attempt.step), &manifest.encode().into(), control).await {
        Ok(()) => {}
        Err(taken @ SaveError::Taken { .. }) => {
            return created(store, attempt, control).await?.map(Some).ok_or(taken);
        }
        Err(error) => return Err(error),
    }
    tidy(store, attempt, control).await;
    Ok(Some(manifest))
}

/// What a manifest refers to is looked for just before it is created.
async fn all_there(store: &Store, manifest: &Manifest, control: &Control) -> Result<(), SaveError> {
    let folder = step_folder(manifest.step);
    let there = control.race(store.list_folder(&folder)).await??;
    for PieceInfo { name, bytes, .. } in manifest.pieces.iter().filter(|piece| piece.name != INDEX) {
        let got = there.get(name).copied();
        if got != Some(*bytes) {
            return Err(SaveError::Lost { url: store.url(&format!("{folder}/{name}")), bytes: *bytes, got });
        }
    }
    Ok(())
}

/// The manifest of the same state, if there is one.
async fn created(store: &Store, attempt: &Attempt, control: &Control) -> Result<Option<Manifest>, SaveError> {
    let name = manifest_of(attempt.step);
    let Some(bytes) = control.race(store.find(&name, MANIFEST_BYTES_MAX)).await?? else { return Ok(None) };
    match Manifest::decode(&bytes) {
        Ok(manifest) if is_of(&manifest, attempt) => Ok(Some(manifest)),
        Ok(_) | Err(_) => Err(SaveError::Taken { url: store.url(&name) }),
    }
}

fn misfit(store: &Store, attempt: &Attempt, why: String) -> SaveError {
    SaveError::Misfit { url: store.url(&step_folder(attempt.step)), why }
}

fn share(attempt: &Attempt, index: u32) -> Share {
    Share { index, ..attempt.share }
}

fn name_of(attempt: &Attempt, index: u32) -> String {
    format!("{}/{}", step_folder(attempt.step), record_name(&attempt.key, share(attempt, index)))
}
