//! An opened location: the few operations that checkpoints need.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::multipart::MultipartStore;
use object_store::path::Path as ObjectPath;
use object_store::{Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode};

use crate::location::Location;
use crate::store_error::StoreError;

/// How much longer than ours a small object of somebody else's may be.
const EXISTING_BYTES_MAX: u64 = 4 << 20;

/// A store and the prefix in it. Names are relative to the prefix.
#[derive(Clone)]
pub(crate) struct Store {
    store: Arc<dyn ObjectStore>,
    /// Where a store lets uploads be aborted by whoever knows their ids.
    uploads: Option<Arc<dyn MultipartStore>>,
    prefix: ObjectPath,
    location: Location,
}

/// What a create-only put found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Created {
    /// The object is there, with our bytes: by this put, or by one of the same content.
    Ours,
    /// Somebody else's object was there before.
    Theirs(Bytes),
}

/// An object that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// When it was written, by the store's clock: milliseconds since 1970.
    pub(crate) written_ms: i64,
}

impl Store {
    pub(crate) fn new(store: Arc<dyn ObjectStore>, prefix: ObjectPath, location: Location) -> Store {
        Store { store, uploads: None, prefix, location }
    }

    /// Has uploads noted; see [`uploads`](crate::uploads).
    pub(crate) fn with_uploads(self, uploads: Arc<dyn MultipartStore>) -> Store {
        Store { uploads: Some(uploads), ..self }
    }

    /// Through which uploads are noted.
    pub(crate) fn uploads(&self) -> Option<&Arc<dyn MultipartStore>> {
        self.uploads.as_ref()
    }

    /// The store itself, for uploads.
    pub(crate) fn inner(&self) -> &dyn ObjectStore {
        &*self.store
    }

    pub(crate) fn location(&self) -> &Location {
        &self.location
    }

    /// Path of an object (or folder) below the prefix.
    pub(crate) fn path(&self, name: &str) -> ObjectPath {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Address of an object for messages.
    pub(crate) fn url(&self, name: &str) -> String {
        format!("{}/{name}", self.location.to_string().trim_end_matches('/'))
    }

    /// An error of an operation on that object.
    pub(crate) fn error(&self, operation: &'static str, name: &str, source: Error) -> StoreError {
        StoreError::new(operation, &self.url(name), source)
    }

    pub(crate) async fn put(&self, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        let put = self.store.put(&self.path(name), bytes.into()).await;
        put.map(drop).map_err(|error| self.error("write", name, error))
    }

    /// Creates an object, unless there is one.
    ///
    /// A server may do the put and lose the reply; the client then repeats it and is told that the object exists.
    /// So `bytes` must hold a writer's nonce: reading them back tells whose they are.
    pub(crate) async fn create_only(&self, name: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let put = self.store.put_opts(&self.path(name), bytes.clone().into(), PutMode::Create.into()).await;
        match put {
            Ok(_) => Ok(Created::Ours),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
                let found = self.get(name, bytes.len() as u64 + EXISTING_BYTES_MAX).await?;
                Ok(if found == bytes { Created::Ours } else { Created::Theirs(found) })
            }
            Err(Error::NotImplemented { .. }) => self.create_unconditionally(name, bytes).await,
            Err(error) => Err(self.error("create", name, error)),
        }
    }

    /// For stores without conditional puts (or told to do without): one run writes to a prefix, so looking first
    /// is nearly as good.
    async fn create_unconditionally(&self, name: &str, bytes: Bytes) -> Result<Created, StoreError> {
        match self.get(name, bytes.len() as u64 + EXISTING_BYTES_MAX).await {
            Ok(found) if found == bytes => Ok(Created::Ours),
            Ok(found) => Ok(Created::Theirs(found)),
            Err(error) if error.is_missing() => self.put(name, bytes).await.map(|()| Created::Ours),
            Err(error) => Err(error),
        }
    }

    /// A small object as a whole; a longer one than `bytes_max` is an error.
    pub(crate) async fn get(&self, name: &str, bytes_max: u64) -> Result<Bytes, StoreError> {
        let failed = |error| self.error("read", name, error);
        let found = self.store.get(&self.path(name)).await.map_err(failed)?;
        if found.meta.size > bytes_max {
            let why = format!("it has {} bytes where at most {bytes_max} are expected", found.meta.size);
            return Err(failed(Error::Generic { store: "checkpoint", source: why.into() }));
        }
        found.bytes().await.map_err(failed)
    }

    /// As [`Store::get`], or nothing if there is no such object.
    pub(crate) async fn find(&self, name: &str, bytes_max: u64) -> Result<Option<Bytes>, StoreError> {
        match self.get(name, bytes_max).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Size of an object, or nothing if there is no such object.
    pub(crate) async fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        match self.store.head(&self.path(name)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error("look at", name, error)),
        }
    }

    /// When an object was written, by the store's clock: milliseconds since 1970.
    pub(crate) async fn written_ms(&self, name: &str) -> Result<i64, StoreError> {
        let head = self.store.head(&self.path(name)).await;
        head.map(|meta| meta.last_modified.timestamp_millis())
            .map_err(|error| self.error("look at", name, error))
    }

    /// Everything below the prefix: names relative to it, and sizes.
    pub(crate) async fn list(&self) -> Result<Vec<(String, u64)>, StoreError> {
        let found = self.list_below(&self.prefix).await?;
        Ok(found.into_iter().map(|Found { name, bytes, .. }| (name, bytes)).collect())
    }

    /// Everything below the prefix, with the time of writing.
    pub(crate) async fn list_with_times(&self) -> Result<Vec<Found>, StoreError> {
        self.list_below(&self.prefix).await
    }

    /// Everything in a folder below the prefix: names relative to the folder, and sizes.
    pub(crate) async fn list_folder(&self, folder: &str) -> Result<BTreeMap<String, u64>, StoreError> {
        let found = self.list_below(&self.path(folder)).await?;
        Ok(found.into_iter().map(|Found { name, bytes, .. }| (name, bytes)).collect())
    }

    async fn list_below(&self, folder: &ObjectPath) -> Result<Vec<Found>, StoreError> {
        let prefix = Some(folder).filter(|prefix| !prefix.as_ref().is_empty());
        let found: Result<Vec<ObjectMeta>, Error> = self.store.list(prefix).try_collect().await;
        let found = found.map_err(|error| StoreError::new("list", &self.location.to_string(), error))?;
        let relative = |meta: &ObjectMeta| -> Option<String> {
            let parts: Vec<_> = meta.location.prefix_match(folder)?.collect();
            Some(parts.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join("/"))
        };
        let describe = |meta: &ObjectMeta| {
            let written_ms = meta.last_modified.timestamp_millis();
            Some(Found { name: relative(meta)?, bytes: meta.size, written_ms })
        };
        Ok(found.iter().filter_map(describe).collect())
    }

    /// Copies an object within the store, which nothing is sent for.
    pub(crate) async fn copy(&self, from: &str, to: &str) -> Result<(), StoreError> {
        let copied = self.store.copy(&self.path(from), &self.path(to)).await;
        copied.map_err(|error| self.error("copy", from, error))
    }

    /// Deletes an object; one that is gone already is fine.
    pub(crate) async fn delete(&self, name: &str) -> Result<(), StoreError> {
        let paths = futures::stream::iter([Ok(self.path(name))]).boxed();
        match self.store.delete_stream(paths).try_for_each(|_| async { Ok(()) }).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error("delete", name, error)),
        }
    }
}

impl Store {
    /// Removes what a killed process left of its uploads in a folder. Only a local folder shows them; a bucket
    /// removes them by its lifecycle rules.
    pub(crate) fn sweep_unfinished_uploads(&self, folder: &str) {
        let Some(root) = self.location.folder() else { return };
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else { return };
        for entry in entries.flatten() {
            let unfinished = entry.file_name().to_str().is_some_and(is_unfinished_upload);
            if unfinished && let Err(error) = std::fs::remove_file(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "checkpoint: an upload was left behind");
            }
        }
        // Fails, as it should, if anything else is there.
        let _ = std::fs::remove_dir(root.join(folder));
    }
}

/// Names of `object_store`'s staging files: `NAME#1`.
fn is_unfinished_upload(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
}
