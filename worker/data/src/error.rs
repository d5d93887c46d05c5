//! Why a dataset could not be built or read.

use std::io;
use std::path::{Path, PathBuf};

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
}

impl DataError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}
