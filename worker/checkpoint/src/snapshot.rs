//! What the trainer hands over at a step: shared, immutable memory, so that handing over costs nothing.
//!
//! The arrays are read while they are uploaded, so they must be copies that nobody writes to: the copy out of the
//! device is the only pause a checkpoint causes. Where several write, each hands over its own share only.

use std::sync::Arc;

use bytes::Bytes;

use crate::layout::Layout;
use crate::share::{Share, key};
use crate::slices::{Slices, common};

/// The state of a run after `step` steps, or one share of it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Steps done; the position in the data follows from it.
    pub step: u64,
    /// The state hash after that step: of the whole state, whoever holds it.
    pub state_hash: u64,
    /// Where each tensor lies in the flat space.
    pub layout: Arc<Layout>,
    /// Which part of the checkpoint this is.
    pub share: Share,
    /// Parameters of whole tensors, such as [`Share::of_tensors`] proposes.
    pub params: Slices,
    /// First moments of any elements.
    pub m: Slices,
    /// Second moments of the same elements.
    pub v: Slices,
    /// Block exponents in eighths; at most one per element. All of them in every share: share 0 writes them.
    pub exponents: Arc<Vec<i16>>,
    /// What lies beside the weights: the same in every share.
    pub files: Arc<Files>,
    /// What is the same in every checkpoint of a run.
    pub run: Arc<RunFacts>,
}

/// Small files of a checkpoint, opaque here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// The model's shape, as Hugging Face's `config.json`.
    pub config_json: Bytes,
    /// The tokenizer, as Hugging Face's `tokenizer.json`.
    pub tokenizer_json: Option<Bytes>,
    /// The resolved recipe; its BLAKE3 in the manifest is the recipe's hash.
    pub recipe_toml: Option<Bytes>,
}

/// What is the same in every checkpoint of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFacts {
    /// The run that writes here; see [`claim`](crate::claim).
    pub run_id: String,
    /// Name and version of the program that writes.
    pub program: String,
    /// Root of all randomness.
    pub seed: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Hash of the dataset's manifest.
    pub dataset: String,
}

/// A snapshot that contradicts itself: a bug of the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("snapshot of step {step}: {array} {why}")]
pub struct SnapshotError {
    /// The snapshot's step.
    pub step: u64,
    /// Which array.
    pub array: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// What a checkpoint under way is, without its arrays.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) step: u64,
    pub(crate) state_hash: u64,
    pub(crate) layout: Arc<Layout>,
    pub(crate) share: Share,
    pub(crate) run: Arc<RunFacts>,
    /// What its shares have in common, and no other attempt has.
    pub(crate) key: String,
}

impl Snapshot {
    /// Every array is as the layout and the share want it.
    pub fn check(&self) -> Result<(), SnapshotError> {
        let wrong = |array, why: &str| Err(SnapshotError { step: self.step, array, why: why.to_owned() });
        let elements = self.layout.elements();
        if self.share.index >= self.share.of {
            return wrong("share", "has a number beyond the last");
        }
        for (array, slices) in [("params", &self.params), ("m", &self.m), ("v", &self.v)] {
            if slices.ranges().last().is_some_and(|last| last.end > elements) {
                return wrong(array, "has elements beyond the layout's");
            }
            if self.share.is_whole() && !self.layout.tensors().iter().all(|t| slices.has(&t.span())) {
                return wrong(array, "lacks elements, and nobody else has them");
            }
        }
        let cut =
            |span| !self.params.has(&span) && self.params.ranges().iter().any(|r| common(r, &span).is_some());
        if self.layout.tensors().iter().any(|tensor| cut(tensor.span())) {
            return wrong("params", "has a part of a tensor: weights are divided between tensors");
        }
        if self.m.ranges() != self.v.ranges() {
            return wrong("v", "is of other elements than m");
        }
        if self.exponents.len() > elements {
            return wrong("exponents", "has more blocks than there are elements");
        }
        Ok(())
    }

    /// What it is, without its arrays.
    pub(crate) fn attempt(&self) -> Attempt {
        let (run, files, share) = (&*self.run, &*self.files, self.share);
        let file = |bytes: Option<&Bytes>| bytes.map_or([0; 32], |bytes| *blake3::hash(bytes).as_bytes());
        let key = key(&[
            run.run_id.as_bytes(),
            run.dataset.as_bytes(),
            self.layout.fingerprint().as_bytes(),
            &[self.step, self.state_hash, run.seed, run.total_steps, share.attempt, share.of.into()]
                .map(u64::to_le_bytes)
                .concat(),
            &file(Some(&files.config_json)),
            &file(files.tokenizer_json.as_ref()),
            &file(files.recipe_toml.as_ref()),
        ]);
        Attempt {
            step: self.step,
            state_hash: self.state_hash,
            layout: Arc::clone(&self.layout),
            share,
            run: Arc::clone(&self.run),
            key,
        }
    }
}
