//! What the trainer hands over at a step: shared, immutable memory, so that handing over costs nothing.
//!
//! The arrays are read while they are uploaded, so they must be copies that nobody writes to: the copy out of the
//! device is the only pause a checkpoint causes.

use std::sync::Arc;

use bytes::Bytes;

use crate::layout::Layout;

/// The whole state of a run after `step` steps.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Steps done; the position in the data follows from it.
    pub step: u64,
    /// The state hash after that step.
    pub state_hash: u64,
    /// Where each tensor lies in the flat arrays.
    pub layout: Arc<Layout>,
    /// Parameters, flat: `layout.elements()` long, as are `m` and `v`.
    pub params: Arc<Vec<f32>>,
    /// First moments.
    pub m: Arc<Vec<f32>>,
    /// Second moments.
    pub v: Arc<Vec<f32>>,
    /// Block exponents in eighths; at most one per element.
    pub exponents: Arc<Vec<i16>>,
    /// What lies beside the weights.
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

/// An array of the snapshot does not fit its layout: a bug of the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("snapshot of step {step}: {array} has {got} elements where the layout allows {want}")]
pub struct SnapshotError {
    /// The snapshot's step.
    pub step: u64,
    /// Which array.
    pub array: &'static str,
    /// Its length.
    pub got: usize,
    /// The length that fits (for exponents the largest).
    pub want: usize,
}

impl Snapshot {
    /// Every array is as long as the layout says.
    pub fn check(&self) -> Result<(), SnapshotError> {
        let want = self.layout.elements();
        let wrong = |array, got| Err(SnapshotError { step: self.step, array, got, want });
        for (array, values) in [("params", &self.params), ("m", &self.m), ("v", &self.v)] {
            if values.len() != want {
                return wrong(array, values.len());
            }
        }
        if self.exponents.len() > want {
            return wrong("exponents", self.exponents.len());
        }
        Ok(())
    }
}
