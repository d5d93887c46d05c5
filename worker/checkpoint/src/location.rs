//! Where checkpoints live: a folder or a URL, checked when parsed and opened when used.
//!
//! A [`Location`] is plain data. Each use opens a store of its own from it, because an HTTP client's connections
//! belong to the runtime that made them, and the writer's runtime is not the reader's.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;

use crate::folder::Folder;
use crate::format::parse_step_folder;
use crate::reader::Which;
use crate::s3;
use crate::store::Store;
use crate::store_error::StoreError;

/// A prefix in some store.
#[derive(Debug, Clone)]
pub struct Location {
    place: Place,
    url: String,
}

#[derive(Debug, Clone)]
enum Place {
    /// An absolute folder.
    Folder(PathBuf),
    S3 {
        bucket: String,
        prefix: ObjectPath,
    },
    /// Lost with the process; the same name is the same store.
    Memory(String),
    /// Whatever the caller brought.
    Given(Arc<dyn ObjectStore>),
}

/// Why a text names no place for checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a place for checkpoints: {why}")]
pub struct LocationError {
    /// What was given.
    pub text: String,
    /// What is wrong with it, and what would be right.
    pub why: String,
}

/// How long a store is worth waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// A run depends on it: ride out an outage of minutes.
    Long,
    /// Somebody waits for what is read.
    Medium,
    /// Somebody waits for a first answer.
    Short,
}

impl Patience {
    /// Longest time over all repetitions of one request.
    pub(crate) fn per_request(self) -> Duration {
        match self {
            Patience::Long => Duration::from_secs(240),
            Patience::Medium => Duration::from_secs(30),
            Patience::Short => Duration::from_secs(4),
        }
    }

    /// Longest time for one try of a request.
    pub(crate) fn per_try(self) -> Duration {
        match self {
            Patience::Long => Duration::from_secs(120),
            Patience::Medium => Duration::from_secs(60),
            Patience::Short => Duration::from_secs(3),
        }
    }

    /// Repetitions of one request.
    pub(crate) fn tries(self) -> usize {
        match self {
            Patience::Long => 8,
            Patience::Medium => 4,
            Patience::Short => 2,
        }
    }
}

impl Location {
    /// Understands a folder (relative to the working directory, or absolute), `file:///folder`,
    /// `s3://bucket/prefix`, and `memory://name` for tests. Paths are taken literally: nothing is percent-decoded.
    pub fn parse(text: &str) -> Result<Location, LocationError> {
        let wrong = |why: &str| Err(LocationError { text: text.to_owned(), why: why.to_owned() });
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None if text.is_empty() => return wrong("it is empty: give a folder or a URL"),
            None => ("file", text),
        };
        match scheme {
            "file" if text.starts_with("file://") && !rest.starts_with('/') => {
                wrong("a file:// URL needs an absolute path, such as file:///data/checkpoints")
            }
            "file" => folder(text, rest),
            "s3" => bucket(text, rest),
            "memory" => Ok(Location { place: Place::Memory(rest.to_owned()), url: text.to_owned() }),
            "gs" | "az" | "abfs" | "abfss" => {
                wrong("this build has no client for it: use s3://, file:// or a folder")
            }
            "http" | "https" => {
                wrong("for an S3 server give s3://bucket/prefix and set AWS_ENDPOINT to its address")
            }
            _ => wrong("known are s3://, file://, memory:// and plain folders"),
        }
    }

    /// Understands the address of a location or of one checkpoint in it, such as the writer tells.
    pub fn parse_checkpoint(text: &str) -> Result<(Location, Which), LocationError> {
        let step = |folder: &str| Some(Which::Step(parse_step_folder(folder)?));
        match text.trim_end_matches('/').rsplit_once('/') {
            Some((parent, folder)) if !parent.ends_with('/') => match step(folder) {
                Some(which) => Ok((Location::parse(parent)?, which)),
                None => Ok((Location::parse(text)?, Which::Newest)),
            },
            _ => Ok((Location::parse(text)?, Which::Newest)),
        }
    }

    /// Uses a store of the caller's, whose root is the prefix; `url` is for messages.
    pub fn given(url: impl Into<String>, store: Arc<dyn ObjectStore>) -> Location {
        Location { place: Place::Given(store), url: url.into() }
    }

    /// The folder, if it is one: a plain path that other tools can open.
    pub fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Folder(folder) => Some(folder),
            Place::S3 { .. } | Place::Memory(_) | Place::Given(_) => None,
        }
    }

    /// Opens it for reading: a folder that does not exist is an error here.
    pub(crate) fn open(&self, patience: Patience) -> Result<Store, StoreError> {
        let failed = |error| StoreError::new("open", &self.url, error);
        let store = |store: Arc<dyn ObjectStore>| Store::new(store, ObjectPath::default(), self.clone());
        Ok(match &self.place {
            Place::Folder(folder) => store(Arc::new(Folder::open(folder).map_err(failed)?)),
            Place::S3 { bucket, prefix } => {
                let client = Arc::new(s3::client(bucket, std::env::vars_os(), patience).map_err(failed)?);
                Store::new(Arc::clone(&client) as _, prefix.clone(), self.clone()).with_uploads(client)
            }
            Place::Memory(name) => store(memory(name)).with_uploads(memory(name)),
            Place::Given(given) => store(Arc::clone(given)),
        })
    }

    /// Opens it for writing: a folder is made where there is none.
    pub(crate) fn create(&self, patience: Patience) -> Result<Store, StoreError> {
        if let Place::Folder(folder) = &self.place {
            std::fs::create_dir_all(folder).map_err(|source| {
                StoreError::new(
                    "make the folder",
                    &self.url,
                    object_store::Error::Generic { store: "LocalFileSystem", source: source.into() },
                )
            })?;
        }
        self.open(patience)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl std::str::FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Location, LocationError> {
        Location::parse(text)
    }
}

fn folder(text: &str, path: &str) -> Result<Location, LocationError> {
    let absolute = std::path::absolute(path).map_err(|error| LocationError {
        text: text.to_owned(),
        why: format!("the path cannot be used: {error}"),
    })?;
    let url = absolute.display().to_string();
    Ok(Location { place: Place::Folder(absolute), url })
}

fn bucket(text: &str, rest: &str) -> Result<Location, LocationError> {
    let wrong = |why: String| LocationError { text: text.to_owned(), why };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if bucket.is_empty() || !bucket.bytes().all(plain) {
        return Err(wrong(format!("{bucket:?} is no bucket's name: it should look like s3://bucket/prefix")));
    }
    let prefix = ObjectPath::parse(prefix.trim_end_matches('/')).map_err(|error| wrong(error.to_string()))?;
    let url = match prefix.as_ref() {
        "" => format!("s3://{bucket}"),
        prefix => format!("s3://{bucket}/{prefix}"),
    };
    Ok(Location { place: Place::S3 { bucket: bucket.to_owned(), prefix }, url })
}

/// The store of that name in this process.
fn memory(name: &str) -> Arc<InMemory> {
    static STORES: LazyLock<Mutex<BTreeMap<String, Arc<InMemory>>>> = LazyLock::new(Mutex::default);
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(stores.entry(name.to_owned()).or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_urls_are_understood() {
        let here = std::env::current_dir().unwrap();
        for (text, url) in [
            ("/data/ckpt", "/data/ckpt".to_owned()),
            ("runs/a b#1", here.join("runs/a b#1").display().to_string()),
            ("file:///data/ckpt/", "/data/ckpt/".to_owned()),
            ("s3://bucket", "s3://bucket".to_owned()),
            ("s3://bucket/a/b/", "s3://bucket/a/b".to_owned()),
            ("memory://x", "memory://x".to_owned()),
        ] {
            assert_eq!(Location::parse(text).unwrap().to_string(), url);
        }
    }

    #[test]
    fn a_checkpoint_is_named_by_its_folder() {
        for (text, url, which) in [
            ("/data/ckpt", "/data/ckpt", Which::Newest),
            ("/data/ckpt/step-00000100/", "/data/ckpt", Which::Step(100)),
            ("s3://bucket/a/step-00000007", "s3://bucket/a", Which::Step(7)),
            ("s3://bucket/step-00000007", "s3://bucket", Which::Step(7)),
            ("s3://bucket", "s3://bucket", Which::Newest),
        ] {
            let (location, found) = Location::parse_checkpoint(text).unwrap();
            assert_eq!((location.to_string().as_str(), found), (url, which));
        }
    }

    #[test]
    fn what_is_no_place_is_refused_with_a_way_on() {
        for (text, hint) in [
            ("", "empty"),
            ("file://data", "absolute"),
            ("s3://", "s3://bucket/prefix"),
            ("s3:///prefix", "s3://bucket/prefix"),
            ("s3://bucket/a//b", "a//b"),
            ("gs://bucket", "this build"),
            ("az://container", "this build"),
            ("https://minio:9000/bucket", "AWS_ENDPOINT"),
            ("ftp://host", "known are"),
        ] {
            let error = Location::parse(text).unwrap_err().to_string();
            assert!(error.contains(hint) && error.contains(text), "{error}");
        }
    }
}
