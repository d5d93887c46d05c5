//! What can be wrong with a checkpoint that was found: the reason it is skipped, refused or reported.

use std::fmt;

use crate::format::manifest::ManifestError;

/// Why a checkpoint is not whole. Names the piece.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Flaw {
    /// Its writing was cut short, or goes on.
    #[error("it has no manifest.json: its writing was cut short")]
    NoManifest,
    /// The manifest itself.
    #[error("manifest.json: {0}")]
    Manifest(#[from] ManifestError),
    /// The folder was renamed or copied.
    #[error("manifest.json is that of step {step}")]
    OtherStep {
        /// The step in the manifest.
        step: u64,
    },
    /// An object that is needed or vouched for is not there.
    #[error("{piece} is missing")]
    Missing {
        /// The object.
        piece: String,
    },
    /// An object was cut short or replaced.
    #[error("{piece} has {got} bytes, the manifest says {want}")]
    Size {
        /// The object.
        piece: String,
        /// Size in the manifest.
        want: u64,
        /// Size found.
        got: u64,
    },
    /// An object's bytes changed.
    #[error("{piece} is corrupt: its BLAKE3 is not the one in the manifest")]
    Hash {
        /// The object.
        piece: String,
    },
    /// An object's content contradicts itself or the manifest, though its bytes are those that were written.
    #[error("{piece} makes no sense: {why}")]
    Content {
        /// The object.
        piece: String,
        /// What is wrong.
        why: String,
    },
}

/// A checkpoint that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unusable {
    /// The step of its folder.
    pub step: u64,
    /// Its address.
    pub url: String,
    /// What is wrong with it.
    pub flaw: Flaw,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "checkpoint {}: {}", self.url, self.flaw)
    }
}
