//! Collecting garbage: what writers that died left behind, once it is old enough to be nobody's.
//!
//! # Invariants
//! 1. Nothing that a manifest names is touched, nor a manifest, whatever its state: damaged checkpoints are for people to judge.
//! 2. A folder in which anything is younger than the grace period is somebody's work, and left alone.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::blocking::block_on;
use crate::format::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::format::{MANIFEST, step_folder};
use crate::location::{Location, Patience};
use crate::retention::step_of;
use crate::store::{Found, Store};
use crate::store_error::StoreError;
use crate::uploads::abort_orphans;

/// What was found that is nobody's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Garbage {
    /// Objects, relative to the location.
    pub objects: Vec<String>,
    /// Their size in bytes.
    pub bytes: u64,
    /// Uploads that were begun and neither completed nor aborted.
    pub uploads: usize,
}

/// Removes what no checkpoint needs and nobody has touched for `grace`; or only tells of it, if `dry`.
///
/// # Errors
/// Where the store fails; what was removed until then stays removed.
pub fn gc(location: &Location, grace: Duration, dry: bool) -> Result<Garbage, StoreError> {
    block_on(async || {
        let store = location.open(Patience::Medium)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let before = i64::try_from(now.saturating_sub(grace).as_millis()).unwrap_or(i64::MAX);
        let garbage = collect(&store, before).await?;
        let objects: Vec<String> = garbage.iter().map(|found| found.name.clone()).collect();
        let bytes = garbage.iter().map(|found| found.bytes).sum();
        if !dry {
            for name in &objects {
                store.delete(name).await?;
            }
        }
        let uploads = abort_orphans(&store, |_, written| written < before, dry).await?;
        Ok(Garbage { objects, bytes, uploads })
    })
}

/// Objects that are nobody's and were written before that time.
async fn collect(store: &Store, before: i64) -> Result<Vec<Found>, StoreError> {
    let mut folders: BTreeMap<u64, Vec<Found>> = BTreeMap::new();
    let mut garbage = Vec::new();
    for found in store.list_with_times().await? {
        match step_of(&found.name) {
            Some(step) => folders.entry(step).or_default().push(found),
            None if found.name.starts_with("probe-") && found.written_ms < before => garbage.push(found),
            None => {}
        }
    }
    for (step, objects) in folders {
        if objects.iter().any(|found| found.written_ms >= before) {
            continue;
        }
        let name = format!("{}/{MANIFEST}", step_folder(step));
        let manifest = match store.find(&name, MANIFEST_BYTES_MAX).await? {
            Some(bytes) => match Manifest::decode(&bytes) {
                Ok(manifest) => Some(manifest),
                Err(_) => continue,
            },
            None => None,
        };
        let named = |name: &str| {
            let piece = name.split_once('/').map_or(name, |(_, piece)| piece);
            piece == MANIFEST || manifest.as_ref().is_some_and(|manifest| manifest.piece(piece).is_some())
        };
        garbage.extend(objects.into_iter().filter(|found| !named(&found.name)));
    }
    Ok(garbage)
}
