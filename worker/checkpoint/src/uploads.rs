//! Uploads that can be found again: where a store keeps the parts of an upload whose writer died, and shows them to nobody, a
//! note beside the checkpoints says what to abort.
//!
//! The note is written once the store has given the upload its id, and removed when it is completed or aborted. A writer that
//! dies between the two requests leaves an upload without a note: that remains to the bucket's lifecycle rules.
//!
//! Deliberately absent: folders, whose unfinished uploads are files beside the others.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartUpload, PutPayload, PutResult, Result, UploadPart};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::save::nonce;
use crate::store::Store;
use crate::store_error::StoreError;

/// Where notes lie.
const FOLDER: &str = "uploads/";
/// The longest note that is read.
const NOTE_BYTES_MAX: u64 = 64 << 10;

/// An upload under way, or left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The object, relative to the prefix.
    object: String,
    /// The upload's id, as the store named it.
    id: String,
}

/// Begins an upload, and notes it where it could not be found otherwise.
pub(crate) async fn begin(store: &Store, name: &str) -> Result<Box<dyn MultipartUpload>> {
    let path = store.path(name);
    let Some(uploads) = store.uploads() else {
        return store.inner().put_multipart_opts(&path, Default::default()).await;
    };
    let id = uploads.create_multipart(&path).await?;
    let note = serde_json::to_vec(&Note { object: name.to_owned(), id: id.clone() }).expect("two strings");
    let name = format!("{FOLDER}{}.json", nonce());
    match store.put(&name, Bytes::from(note)).await {
        Ok(()) => {
            let (store, uploads) = (store.clone(), Arc::clone(uploads));
            Ok(Box::new(Noted { store, uploads, path, id, note: name, parts: Arc::default(), next: 0 }))
        }
        Err(error) => {
            // Better none than one that nobody would find.
            let _ = uploads.abort_multipart(&path, &id).await;
            Err(*error.source)
        }
    }
}

/// Aborts the noted uploads of objects that `orphaned` says are nobody's, given their names and the notes' times of writing;
/// tells how many. Only counts them, if `dry`.
pub(crate) async fn abort_orphans(
    store: &Store,
    orphaned: impl Fn(&str, i64) -> bool,
    dry: bool,
) -> std::result::Result<usize, StoreError> {
    let Some(uploads) = store.uploads() else { return Ok(0) };
    let mut aborted = 0;
    for found in store.list_with_times().await?.into_iter().filter(|found| found.name.starts_with(FOLDER)) {
        let Some(bytes) = store.find(&found.name, NOTE_BYTES_MAX).await? else { continue };
        // What is no note is not ours to judge.
        let Ok(note) = serde_json::from_slice::<Note>(&bytes) else { continue };
        if !orphaned(&note.object, found.written_ms) {
            continue;
        }
        aborted += 1;
        if dry {
            continue;
        }
        match uploads.abort_multipart(&store.path(&note.object), &note.id).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => store.delete(&found.name).await?,
            Err(error) => return Err(store.error("abort the upload of", &note.object, error)),
        }
    }
    Ok(aborted)
}

struct Noted {
    store: Store,
    uploads: Arc<dyn MultipartStore>,
    path: Path,
    id: String,
    note: String,
    /// Parts that arrived, by number.
    parts: Arc<Mutex<Vec<Option<PartId>>>>,
    next: usize,
}

impl fmt::Debug for Noted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Noted({}, {})", self.path, self.id)
    }
}

impl Noted {
    async fn forget(&self) {
        if let Err(error) = self.store.delete(&self.note).await {
            tracing::warn!(%error, "checkpoint: the note of an upload was left behind");
        }
    }
}

#[async_trait]
impl MultipartUpload for Noted {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let number = self.next;
        self.next += 1;
        let (uploads, path, id) = (Arc::clone(&self.uploads), self.path.clone(), self.id.clone());
        let parts = Arc::clone(&self.parts);
        Box::pin(async move {
            let part = uploads.put_part(&path, &id, number, data).await?;
            let mut parts = parts.lock().await;
            let needed = parts.len().max(number + 1);
            parts.resize_with(needed, || None);
            parts[number] = Some(part);
            Ok(())
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let parts: Option<Vec<PartId>> = self.parts.lock().await.iter().cloned().collect();
        let Some(parts) = parts.filter(|parts| parts.len() == self.next) else {
            let source = "completed before all of its parts were there".into();
            return Err(object_store::Error::Generic { store: "checkpoint", source });
        };
        let done = self.uploads.complete_multipart(&self.path, &self.id, parts).await?;
        self.forget().await;
        Ok(done)
    }

    async fn abort(&mut self) -> Result<()> {
        self.uploads.abort_multipart(&self.path, &self.id).await?;
        self.forget().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocking::block_on;
    use crate::gc::gc;
    use crate::location::{Location, Patience};

    /// An upload with one part, as a killed writer leaves it; its id, and how many uploads of that id there are.
    async fn left_behind(store: &Store, name: &str) -> String {
        let mut upload = begin(store, name).await.unwrap();
        upload.put_part(Bytes::from_static(b"half").into()).await.unwrap();
        let notes = store.list_folder("uploads").await.unwrap();
        let note = store.get(&format!("uploads/{}", notes.keys().next_back().unwrap()), 1000).await.unwrap();
        serde_json::from_slice::<Note>(&note).unwrap().id
    }

    async fn is_there(store: &Store, name: &str, id: &String) -> bool {
        let uploads = store.uploads().unwrap();
        uploads.put_part(&store.path(name), id, 1, Bytes::from_static(b"more").into()).await.is_ok()
    }

    #[test]
    fn what_a_killed_writer_left_is_aborted_and_the_rest_is_not() {
        let location = Location::parse("memory://uploads-of-killed-writers").unwrap();
        let [old, new] = ["step-00000001/model.safetensors", "step-00000003/model.safetensors"];
        let (first, second) = block_on(async || {
            let store = location.create(Patience::Short).unwrap();
            let first = left_behind(&store, old).await;
            assert!(is_there(&store, old, &first).await);
            let earlier = |object: &str, _| object.starts_with("step-00000001/");
            assert_eq!(abort_orphans(&store, earlier, true).await.unwrap(), 1, "only counted");
            assert!(is_there(&store, old, &first).await);
            assert_eq!(abort_orphans(&store, earlier, false).await.unwrap(), 1);
            assert!(!is_there(&store, old, &first).await);
            (first, left_behind(&store, new).await)
        });
        assert_ne!(first, second);
        let hour = std::time::Duration::from_secs(3600);
        assert_eq!(gc(&location, hour, false).unwrap().uploads, 0, "somebody may be at it");
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(gc(&location, std::time::Duration::ZERO, false).unwrap().uploads, 1);
        block_on(async || {
            let store = location.open(Patience::Short).unwrap();
            assert!(!is_there(&store, new, &second).await);
            assert!(store.list().await.unwrap().is_empty(), "notes go with their uploads");
        });
    }

    #[test]
    fn what_ends_well_or_is_aborted_leaves_no_note() {
        let location = Location::parse("memory://uploads-that-end").unwrap();
        block_on(async || {
            let store = location.create(Patience::Short).unwrap();
            let mut upload = begin(&store, "step-00000001/a").await.unwrap();
            let parts =
                [b"one, ".as_slice(), b"two"].map(|part| upload.put_part(Bytes::from_static(part).into()));
            // In whatever order they arrive.
            for part in parts.into_iter().rev() {
                part.await.unwrap();
            }
            upload.complete().await.unwrap();
            assert_eq!(store.get("step-00000001/a", 100).await.unwrap(), "one, two");
            let mut upload = begin(&store, "step-00000001/b").await.unwrap();
            drop(upload.put_part(Bytes::from_static(b"never sent").into()));
            assert!(upload.complete().await.is_err());
            upload.abort().await.unwrap();
            assert_eq!(store.list().await.unwrap().len(), 1, "the object alone");
        });
    }
}
