//! Reading checkpoints for their own sake: is every byte there that the manifest vouches for?

use crate::blocking::block_on;
use crate::flaw::Flaw;
use crate::listing::{Listing, Summary, list_store};
use crate::location::{Location, Patience};
use crate::read::{Checkpoint, ReadError};
use crate::reader::LoadError;
use crate::store::Store;
use crate::store_error::StoreError;

/// What was found of one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The step of its folder.
    pub step: u64,
    /// Its address.
    pub url: String,
    /// Bytes that the manifest vouches for; none if there is no sound manifest.
    pub bytes: u64,
    /// Everything that is wrong with it; empty if it is whole.
    pub flaws: Vec<Flaw>,
}

/// Reads every piece of the checkpoint of that step, or of all checkpoints, newest first.
pub fn verify(location: &Location, step: Option<u64>) -> Result<Vec<Verdict>, LoadError> {
    block_on(async || {
        let store = location.open(Patience::Medium)?;
        let listing = list_store(&store).await?;
        let newest = listing.complete.first().map(|newest| newest.step);
        let verdicts = verdicts(&store, listing, step).await?;
        match (step, verdicts.is_empty()) {
            (Some(step), true) => Err(LoadError::NoStep { url: location.to_string(), step, newest }),
            (None, true) => Err(LoadError::None { url: location.to_string(), skipped: Vec::new() }),
            (_, false) => Ok(verdicts),
        }
    })
}

async fn verdicts(store: &Store, listing: Listing, step: Option<u64>) -> Result<Vec<Verdict>, StoreError> {
    let asked_for = |other: u64| step.is_none_or(|step| step == other);
    let mut verdicts = Vec::new();
    for Summary { step, url, manifest } in listing.complete {
        if asked_for(step) {
            let flaws = flaws(&Checkpoint::new(store, &manifest)).await?;
            verdicts.push(Verdict { step, url, bytes: manifest.bytes(), flaws });
        }
    }
    for unusable in listing.unusable {
        if asked_for(unusable.step) {
            let flaws = vec![unusable.flaw];
            verdicts.push(Verdict { step: unusable.step, url: unusable.url, bytes: 0, flaws });
        }
    }
    verdicts.sort_by_key(|verdict| std::cmp::Reverse(verdict.step));
    Ok(verdicts)
}

/// What is wrong with each piece.
pub(crate) async fn flaws(checkpoint: &Checkpoint<'_>) -> Result<Vec<Flaw>, StoreError> {
    let mut flaws = Vec::new();
    for info in &checkpoint.manifest.pieces {
        match checkpoint.check(info).await {
            Ok(()) => {}
            Err(ReadError::Flaw(flaw)) => flaws.push(flaw),
            Err(ReadError::Store(error)) => return Err(error),
            Err(ReadError::OtherModel(why)) => flaws.push(Flaw::Content { piece: info.name.clone(), why }),
        }
    }
    Ok(flaws)
}
