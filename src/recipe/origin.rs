//! Where a value of a recipe was written.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where a value of a recipe was written: named in every error, and beside every line of `recipe show`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a recipe, or of one that it extends.
    File {
        /// The recipe, as it was named.
        path: Arc<Path>,
        /// Counted from 1.
        line: u32,
    },
    /// `--set key=value` on the command line.
    Set,
    /// Nobody wrote it: this program's default.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Set => f.write_str("--set"),
            Self::Default => f.write_str("default"),
        }
    }
}
