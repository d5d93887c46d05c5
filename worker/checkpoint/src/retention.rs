//! Removing checkpoints: the manifest first, so that what is half removed is not taken for a checkpoint.

use std::num::NonZeroU32;

use crate::format::{MANIFEST, parse_step_folder, step_folder};
use crate::listing::{list_store, steps};
use crate::store::Store;
use crate::store_error::StoreError;
use crate::uploads::abort_orphans;

/// Which checkpoints are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many complete ones.
    pub keep: NonZeroU32,
    /// Beside these, those of every so many steps; none for 0.
    pub keep_every: u64,
}

impl Retention {
    fn keeps(self, step: u64) -> bool {
        step > 0 && self.keep_every > 0 && step.is_multiple_of(self.keep_every)
    }
}

/// Removes complete checkpoints that need not be kept, and attempts older than the newest complete one. Never touches the
/// newest complete one, nor the one `just_saved`, which is an older one after a run went back; nor attempts after that, on
/// which others may be at work.
pub(crate) async fn retain(
    store: &Store,
    retention: Retention,
    just_saved: u64,
) -> Result<Vec<u64>, StoreError> {
    let listing = list_store(store).await?;
    let Some(newest) = listing.complete.first().map(|newest| newest.step) else { return Ok(Vec::new()) };
    let keep = usize::try_from(retention.keep.get()).unwrap_or(usize::MAX);
    let complete = listing.complete.iter().skip(keep).map(|summary| summary.step);
    let complete = complete.filter(|&step| step != just_saved && !retention.keeps(step));
    let attempts = listing.unusable.iter().map(|attempt| attempt.step);
    let attempts = attempts.filter(|&step| step < newest && step < just_saved);
    let mut removed: Vec<u64> = complete.chain(attempts).collect();
    removed.sort_unstable();
    for &step in &removed {
        remove(store, step).await?;
    }
    let older = |object: &str, _| step_of(object).is_some_and(|step| step < newest && step < just_saved);
    abort_orphans(store, older, false).await?;
    Ok(removed)
}

/// The step in whose folder an object is.
pub(crate) fn step_of(object: &str) -> Option<u64> {
    parse_step_folder(object.split_once('/')?.0)
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
