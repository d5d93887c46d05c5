//! Why a dataset could not be built or read.

use std::io;
use std::path::{Path, PathBuf};

use crate::store::StoreFault;

/// Why a dataset could not be built or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A glob or folder of the recipe.
    #[error("[data] text: '{pattern}' {reason}")]
    Pattern {
        /// As in the recipe.
        pattern: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A source file is no text.
    #[error("{} is not UTF-8 text (byte {at} on): exclude it, or convert it", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// First bad byte.
        at: usize,
    },
    /// The tokenizer cannot be trained, read or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// What was built is not what it should be.
    #[error("dataset {}: {reason}; remove the folder, and it is built again", folder.display())]
    Damaged {
        /// The dataset's folder.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What lies in a store is no dataset of ours, or cannot be used.
    #[error("dataset {url}: {reason}")]
    Published {
        /// Its manifest, or its place.
        url: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// An object is not what the manifest says, however often it is read.
    #[error("{url} {reason}, twice; publish the dataset again, which repairs it")]
    Object {
        /// The object.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFault),
    /// The cache of shards cannot do its work.
    #[error("the cache of shards in {}: {reason}", folder.display())]
    Cache {
        /// Where it lies.
        folder: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
}

impl DataError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
