//! What can be wrong with a recipe, said so that it can be mended without reading the manual.

use std::io;
use std::path::PathBuf;

use super::Origin;

/// Why a recipe is refused. Every message names the place, the key and a way on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The file is missing or can't be read.
    #[error("cannot read the recipe {}: {source}", path.display())]
    Read {
        /// The recipe, or one that it extends.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not TOML.
    #[error("{origin}: not valid TOML: {message}")]
    Syntax {
        /// The line.
        origin: Origin,
        /// What the parser expected.
        message: String,
    },
    /// A key that no part of the program reads.
    #[error("{origin}: unknown key `{key}`; the nearest is `{nearest}`")]
    UnknownKey {
        /// Where it was written.
        origin: Origin,
        /// Its whole path.
        key: String,
        /// The most similar valid key.
        nearest: String,
    },
    /// A key without a default that nobody wrote.
    #[error("{}: `{key}` is missing ({what})", path.display())]
    Missing {
        /// The recipe.
        path: PathBuf,
        /// Its whole path.
        key: String,
        /// What the key is for.
        what: String,
    },
    /// A value of the wrong type, out of range, or at odds with another.
    #[error("{origin}: `{key}` {problem}")]
    Value {
        /// Where it was written.
        origin: Origin,
        /// The key's whole path.
        key: String,
        /// What is wrong with it, and what would do.
        problem: String,
    },
    /// A chain of `extends` that has no end.
    #[error("{origin}: `extends` {problem}")]
    Extends {
        /// Where it was written.
        origin: Origin,
        /// What is wrong with it.
        problem: String,
    },
    /// A `--set` that isn't `key=value`.
    #[error("--set {argument}: {problem}")]
    Set {
        /// The argument as given.
        argument: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The task refuses its own table, for a reason that names no key.
    #[error("{origin}: [{table}]: {message}")]
    Task {
        /// The table's first line.
        origin: Origin,
        /// `model` or `data`.
        table: String,
        /// What the task said.
        message: String,
    },
}
