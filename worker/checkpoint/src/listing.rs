//! What lies in a location: complete checkpoints, and what looks like one but is not.
//!
//! Complete means here: a sound manifest, and every piece there in its size. Bytes are compared with their hashes
//! when they are read.

use std::collections::BTreeMap;

use crate::blocking::block_on;
use crate::flaw::{Flaw, Unusable};
use crate::format::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::format::{MANIFEST, parse_step_folder, step_folder};
use crate::location::{Location, Patience};
use crate::store::Store;
use crate::store_error::StoreError;

/// The checkpoints of a location, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Those with a sound manifest and all pieces.
    pub complete: Vec<Summary>,
    /// The rest, with the reason.
    pub unusable: Vec<Unusable>,
}

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Steps done.
    pub step: u64,
    /// Its address.
    pub url: String,
    /// What it consists of.
    pub manifest: Manifest,
}

/// Lists the checkpoints of a location. Errors if the location cannot be read or does not exist.
pub fn list(location: &Location) -> Result<Listing, StoreError> {
    block_on(async || list_store(&location.open(Patience::Medium)?).await)
}

pub(crate) async fn list_store(store: &Store) -> Result<Listing, StoreError> {
    let mut listing = Listing::default();
    for (step, objects) in steps(store).await?.into_iter().rev() {
        let url = store.url(&step_folder(step));
        match read_manifest(store, step, &objects).await? {
            Ok(manifest) => listing.complete.push(Summary { step, url, manifest }),
            Err(flaw) => listing.unusable.push(Unusable { step, url, flaw }),
        }
    }
    Ok(listing)
}

/// The newest complete checkpoint before this step.
pub(crate) async fn newest_before(store: &Store, step: u64) -> Result<Option<Manifest>, StoreError> {
    let steps = steps(store).await?;
    for (&step, objects) in steps.range(..step).rev() {
        if let Ok(manifest) = read_manifest(store, step, objects).await? {
            return Ok(Some(manifest));
        }
    }
    Ok(None)
}

/// Names and sizes of the objects in each step's folder.
pub(crate) async fn steps(store: &Store) -> Result<BTreeMap<u64, BTreeMap<String, u64>>, StoreError> {
    let mut steps: BTreeMap<u64, BTreeMap<String, u64>> = BTreeMap::new();
    for (name, bytes) in store.list().await? {
        let step = name.split_once('/').and_then(|(folder, piece)| Some((parse_step_folder(folder)?, piece)));
        if let Some((step, piece)) = step {
            steps.entry(step).or_default().insert(piece.to_owned(), bytes);
        }
    }
    Ok(steps)
}

async fn read_manifest(
    store: &Store,
    step: u64,
    objects: &BTreeMap<String, u64>,
) -> Result<Result<Manifest, Flaw>, StoreError> {
    match objects.get(MANIFEST) {
        None => return Ok(Err(Flaw::NoManifest)),
        Some(&bytes) if bytes > MANIFEST_BYTES_MAX => {
            let why = format!("{bytes} bytes are too many for a manifest");
            return Ok(Err(Flaw::Content { piece: MANIFEST.into(), why }));
        }
        Some(_) => {}
    }
    let name = format!("{}/{MANIFEST}", step_folder(step));
    let Some(bytes) = store.find(&name, MANIFEST_BYTES_MAX).await? else { return Ok(Err(Flaw::NoManifest)) };
    Ok(check(step, &bytes, objects))
}

fn check(step: u64, bytes: &[u8], objects: &BTreeMap<String, u64>) -> Result<Manifest, Flaw> {
    let manifest = Manifest::decode(bytes)?;
    if manifest.step != step {
        return Err(Flaw::OtherStep { step: manifest.step });
    }
    for info in &manifest.pieces {
        match objects.get(&info.name) {
            None => return Err(Flaw::Missing { piece: info.name.clone() }),
            Some(&got) if got != info.bytes => {
                return Err(Flaw::Size { piece: info.name.clone(), want: info.bytes, got });
            }
            Some(_) => {}
        }
    }
    Ok(manifest)
}
