//! Where what is built once is kept: datasets, for now.

use std::env;
use std::path::PathBuf;

/// `$MATTOCK_CACHE`, else `mattock` below the user's cache folder.
pub(crate) fn folder() -> PathBuf {
    let below = |variable: &str, path: &str| {
        env::var_os(variable).filter(|value| !value.is_empty()).map(|value| PathBuf::from(value).join(path))
    };
    below("MATTOCK_CACHE", "")
        .or_else(|| below("XDG_CACHE_HOME", "mattock"))
        .or_else(|| below("HOME", ".cache/mattock"))
        .unwrap_or_else(|| env::temp_dir().join("mattock-cache"))
}
