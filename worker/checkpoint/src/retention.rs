//! Removing checkpoints: the manifest first, so that what is half removed is not taken for a checkpoint.

use std::num::NonZeroU32;

use crate::format::{MANIFEST, step_folder};
use crate::listing::{list_store, steps};
use crate::store::Store;
use crate::store_error::StoreError;

/// Which checkpoints are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many complete ones.
    pub keep: NonZeroU32,
}

/// Removes complete checkpoints beyond the newest `keep`, and attempts older than the newest complete one. Never
/// touches the newest complete one, nor the one `just_saved`, which is an older one after a run went back.
pub(crate) async fn retain(
    store: &Store,
    retention: Retention,
    just_saved: u64,
) -> Result<Vec<u64>, StoreError> {
    let listing = list_store(store).await?;
    let Some(newest) = listing.complete.first().map(|newest| newest.step) else { return Ok(Vec::new()) };
    let keep = usize::try_from(retention.keep.get()).unwrap_or(usize::MAX);
    let complete = listing.complete.iter().skip(keep).map(|summary| summary.step);
    let attempts = listing.unusable.iter().map(|attempt| attempt.step).filter(|&step| step < newest);
    let mut removed: Vec<u64> = complete.chain(attempts).filter(|&step| step != just_saved).collect();
    removed.sort_unstable();
    for &step in &removed {
        remove(store, step).await?;
    }
    Ok(removed)
}

/// Removes a step's folder, manifest first.
pub(crate) async fn remove(store: &Store, step: u64) -> Result<(), StoreError> {
    let folder = step_folder(step);
    store.delete(&format!("{folder}/{MANIFEST}")).await?;
    for name in steps(store).await?.remove(&step).unwrap_or_default().into_keys() {
        store.delete(&format!("{folder}/{name}")).await?;
    }
    store.sweep_unfinished_uploads(&folder);
    Ok(())
}
