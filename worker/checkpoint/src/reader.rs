//! Loading: the newest checkpoint that is whole, or a named one.
//!
//! # Invariants
//! 1. Every byte of what is returned was checked by a hash, and it is the model that was asked for.
//! 2. The newest is given up for the one before only for a flaw of its own, and the caller is told which. A store
//!    that fails, a checkpoint of another model or of a newer program is an error: older work is never taken
//!    silently where newer exists.

use std::ops::Range;

use crate::blocking::block_on;
use crate::flaw::{Flaw, Unusable};
use crate::format::manifest::{FORMAT, Manifest, ManifestError};
use crate::format::step_folder;
use crate::layout::Layout;
use crate::listing::{Listing, Summary, list_store};
use crate::location::{Location, Patience};
use crate::read::{Checkpoint, ReadError, Tensors};
use crate::snapshot::Files;
use crate::store::Store;
use crate::store_error::StoreError;

/// Which checkpoint to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest that is whole.
    Newest,
    /// The newest that is whole of this step, or of those before.
    UpTo(u64),
    /// That of this step, or none.
    Step(u64),
}

/// A checkpoint without its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its address.
    pub url: String,
    /// Step, state hash, run and pieces.
    pub manifest: Manifest,
    /// Configuration, tokenizer, recipe.
    pub files: Files,
}

/// A checkpoint's weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Where they came from.
    pub head: Head,
    /// Parameters, flat, as the layout says.
    pub params: Vec<f32>,
}

/// A checkpoint's whole state.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// Where it came from.
    pub head: Head,
    /// Parameters, flat, as the layout says; so are `m` and `v`. Of the ranges that were asked for.
    pub params: Vec<f32>,
    /// First moments.
    pub m: Vec<f32>,
    /// Second moments.
    pub v: Vec<f32>,
    /// Block exponents; at most one per element.
    pub exponents: Vec<i16>,
}

/// Why nothing was loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no checkpoint that is whole.
    #[error("{url} holds no complete checkpoint{}", because(.skipped))]
    None {
        /// The location.
        url: String,
        /// What was found instead.
        skipped: Vec<Unusable>,
    },
    /// There is no checkpoint of the step that was asked for.
    #[error("{url} holds no checkpoint of step {step}; {}", name_newest_good(.newest))]
    NoStep {
        /// The location.
        url: String,
        /// The step.
        step: u64,
        /// The newest complete one.
        newest: Option<u64>,
    },
    /// The checkpoint that was asked for is not whole.
    #[error("{bad}; {}", name_newest_good(.newest_good))]
    Bad {
        /// Which, and what is wrong.
        bad: Unusable,
        /// The newest that is whole.
        newest_good: Option<u64>,
    },
    /// A sound checkpoint, but of another model.
    #[error("checkpoint {url} is of another model: {difference}; resume with the recipe it was made with")]
    OtherModel {
        /// The checkpoint.
        url: String,
        /// The first difference.
        difference: String,
    },
    /// A sound checkpoint, but this program is too old for it.
    #[error(
        "checkpoint {url} has format {format}, written by {program}; this program reads formats up to {FORMAT}: use a newer one"
    )]
    TooNew {
        /// The checkpoint.
        url: String,
        /// Its format.
        format: u32,
        /// Who wrote it.
        program: String,
    },
}

/// Loads the whole state of a checkpoint of the model with this layout; also tells what was skipped on the way.
pub fn load(
    location: &Location,
    which: Which,
    layout: &Layout,
) -> Result<(Loaded, Vec<Unusable>), LoadError> {
    let all = 0..layout.elements();
    let all = std::slice::from_ref(&all);
    load_ranges(location, which, layout, all, all)
}

/// Loads the elements in these ranges (ascending, without overlap) of a checkpoint's parameters and moments, whoever wrote
/// them, and reads no more than the chunks in which they lie. The arrays hold the ranges' elements one after the other, and
/// zero where no tensor is. Exponents are all there.
pub fn load_ranges(
    location: &Location,
    which: Which,
    layout: &Layout,
    params: &[Range<usize>],
    moments: &[Range<usize>],
) -> Result<(Loaded, Vec<Unusable>), LoadError> {
    block_on(async || {
        pick(location, which, async |checkpoint: Checkpoint<'_>| {
            let head = head_of(&checkpoint).await?;
            let Tensors { params, moments: [m, v], exponents } =
                checkpoint.tensors(layout, params, moments).await?;
            Ok(Loaded { head, params, m, v, exponents })
        })
        .await
    })
}

/// Loads a checkpoint's weights; `layout` makes the model's layout from the configuration beside them, or says why
/// it cannot.
pub fn load_weights(
    location: &Location,
    which: Which,
    layout: impl Fn(&Head) -> Result<Layout, String> + Send + Sync,
) -> Result<(Weights, Vec<Unusable>), LoadError> {
    block_on(async || {
        pick(location, which, async |checkpoint: Checkpoint<'_>| {
            let head = head_of(&checkpoint).await?;
            let layout = layout(&head).map_err(ReadError::OtherModel)?;
            let all = 0..layout.elements();
            let params = checkpoint.params(&layout, std::slice::from_ref(&all)).await?;
            Ok(Weights { head, params })
        })
        .await
    })
}

/// Reads what lies beside a checkpoint's tensors, and leaves the tensors unread.
pub fn show(location: &Location, which: Which) -> Result<(Head, Vec<Unusable>), LoadError> {
    block_on(async || {
        pick(location, which, async |checkpoint: Checkpoint<'_>| head_of(&checkpoint).await).await
    })
}

async fn head_of(checkpoint: &Checkpoint<'_>) -> Result<Head, ReadError> {
    let url = checkpoint.store.url(&step_folder(checkpoint.manifest.step));
    Ok(Head { url, manifest: checkpoint.manifest.clone(), files: checkpoint.files().await? })
}

/// Reads the checkpoint that is asked for; if the newest is, those that are not whole are passed over.
async fn pick<T>(
    location: &Location,
    which: Which,
    read: impl AsyncFn(Checkpoint<'_>) -> Result<T, ReadError>,
) -> Result<(T, Vec<Unusable>), LoadError> {
    let store = location.open(Patience::Medium)?;
    let mut listing = list_store(&store).await?;
    if let Which::UpTo(step) = which {
        listing.complete.retain(|summary| summary.step <= step);
        listing.unusable.retain(|unusable| unusable.step <= step);
    }
    reject_too_new(&listing, which)?;
    match which {
        Which::Newest | Which::UpTo(_) => newest(&store, listing, read).await,
        Which::Step(step) => one(&store, listing, step, read).await.map(|loaded| (loaded, Vec::new())),
    }
}

async fn newest<T>(
    store: &Store,
    listing: Listing,
    read: impl AsyncFn(Checkpoint<'_>) -> Result<T, ReadError>,
) -> Result<(T, Vec<Unusable>), LoadError> {
    let mut skipped = listing.unusable;
    for Summary { step, url, manifest } in listing.complete {
        match read(Checkpoint::new(store, &manifest)).await {
            Ok(loaded) => {
                skipped.retain(|other| other.step > step);
                skipped.sort_by_key(|other| std::cmp::Reverse(other.step));
                return Ok((loaded, skipped));
            }
            Err(error) => skipped.push(Unusable { step, flaw: flaw_or_stop(&url, error)?, url }),
        }
    }
    skipped.sort_by_key(|other| std::cmp::Reverse(other.step));
    Err(LoadError::None { url: store.location().to_string(), skipped })
}

async fn one<T>(
    store: &Store,
    listing: Listing,
    step: u64,
    read: impl AsyncFn(Checkpoint<'_>) -> Result<T, ReadError>,
) -> Result<T, LoadError> {
    let newest = listing.complete.first().map(|newest| newest.step);
    let bad = match listing.complete.iter().find(|summary| summary.step == step) {
        Some(Summary { url, manifest, .. }) => match read(Checkpoint::new(store, manifest)).await {
            Ok(loaded) => return Ok(loaded),
            Err(error) => Unusable { step, flaw: flaw_or_stop(url, error)?, url: url.clone() },
        },
        None => match listing.unusable.into_iter().find(|unusable| unusable.step == step) {
            Some(bad) => bad,
            None => return Err(LoadError::NoStep { url: store.location().to_string(), step, newest }),
        },
    };
    for Summary { manifest, .. } in listing.complete.iter().filter(|other| other.step != step) {
        if read(Checkpoint::new(store, manifest)).await.is_ok() {
            return Err(LoadError::Bad { bad, newest_good: Some(manifest.step) });
        }
    }
    Err(LoadError::Bad { bad, newest_good: None })
}

/// What allows to go on to the checkpoint before, and what does not.
fn flaw_or_stop(url: &str, error: ReadError) -> Result<Flaw, LoadError> {
    match error {
        ReadError::Flaw(flaw) => Ok(flaw),
        ReadError::Store(error) => Err(error.into()),
        ReadError::OtherModel(difference) => Err(LoadError::OtherModel { url: url.to_owned(), difference }),
    }
}

/// A newer program's checkpoint is an error if it is the one asked for, or newer than all that can be read.
fn reject_too_new(listing: &Listing, which: Which) -> Result<(), LoadError> {
    let newest = listing.complete.first().map(|newest| newest.step);
    let asked_for = |unusable: &&Unusable| match which {
        Which::Newest | Which::UpTo(_) => Some(unusable.step) > newest,
        Which::Step(step) => unusable.step == step,
    };
    for Unusable { url, flaw, .. } in listing.unusable.iter().filter(asked_for) {
        if let Flaw::Manifest(ManifestError::TooNew { format, program }) = flaw {
            return Err(LoadError::TooNew { url: url.clone(), format: *format, program: program.clone() });
        }
    }
    Ok(())
}

fn because(skipped: &[Unusable]) -> String {
    skipped.iter().map(|unusable| format!("; {unusable}")).collect()
}

fn name_newest_good(step: &Option<u64>) -> String {
    match step {
        Some(step) => format!("the newest good one is that of step {step}"),
        None => "there is no other that is whole".to_owned(),
    }
}
