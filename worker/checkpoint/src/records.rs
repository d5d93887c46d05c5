//! Numbered records beside the checkpoints: each is created once and never changed, and the highest is what holds.
//!
//! Creating one is the only decision that is taken here, and the store takes it: of several writers of one number one
//! wins. A store that cannot decide that (it has no conditional puts, or ignores the condition) is refused, for two
//! winners would both go on.

use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{Error, PutMode};

use crate::blocking::block_on;
use crate::location::{Location, Patience};
use crate::save::nonce;
use crate::store::Store;
use crate::store_error::StoreError;

/// The longest record.
pub const RECORD_BYTES_MAX: usize = 16 << 10;
/// For everything that one call asks of the store.
const LIMIT: Duration = Duration::from_secs(10);

/// Why a record could not be read or created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It does not refuse a second object of one name.
    #[error(
        "{url} lets two writers create one object (it ignores conditional puts), so nobody can tell which of two \
         coordinators holds a run: use a store or a version of it that honours If-None-Match"
    )]
    Unconditional {
        /// The location.
        url: String,
    },
    /// It does not answer.
    #[error("{url} has not answered within {} s", LIMIT.as_secs())]
    Silent {
        /// The location.
        url: String,
    },
}

/// The numbered records of one folder of a location.
#[derive(Debug, Clone)]
pub struct Records {
    location: Location,
    folder: String,
}

impl Records {
    /// Those in `folder`, a single name.
    pub fn new(location: Location, folder: &str) -> Self {
        Self { location, folder: folder.to_owned() }
    }

    /// Where a record is, for people.
    pub fn url(&self, number: u64) -> String {
        format!("{}/{}", self.location, self.name(number))
    }

    /// Whether the store lets one writer of a number win, and only one: tries it, and removes what it tried it with.
    ///
    /// # Errors
    /// [`RecordError::Unconditional`] where it does not.
    pub fn probe(&self) -> Result<(), RecordError> {
        self.limited(async |store| {
            let name = format!("probe-{}", nonce());
            let first = create(store, &name, nonce().into()).await?;
            let second = create(store, &name, nonce().into()).await;
            store.delete(&name).await?;
            let decides = first && !second?;
            decides.then_some(()).ok_or_else(|| RecordError::Unconditional { url: self.location.to_string() })
        })
    }

    /// The highest record above `after`, if there is one.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn newest(&self, after: u64) -> Result<Option<(u64, Vec<u8>)>, RecordError> {
        self.reading(async |store| {
            let (folder, offset) = (store.path(&self.folder), store.path(&self.name(after)));
            let failed = |error| store.error("list", &self.folder, error);
            let listed = store.inner().list_with_offset(Some(&folder), &offset).try_collect::<Vec<_>>();
            let found = match listed.await {
                Err(Error::NotFound { .. }) => return Ok(None),
                found => found.map_err(failed)?,
            };
            let numbers = found.iter().filter_map(|meta| meta.location.filename()?.parse::<u64>().ok());
            let Some(number) = numbers.filter(|number| *number > after).max() else { return Ok(None) };
            let record = store.find(&self.name(number), RECORD_BYTES_MAX as u64).await?;
            Ok(record.map(|record| (number, record.to_vec())))
        })
    }

    /// One record, if it is there.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn read(&self, number: u64) -> Result<Option<Vec<u8>>, RecordError> {
        self.reading(async |store| {
            Ok(store.find(&self.name(number), RECORD_BYTES_MAX as u64).await?.map(|record| record.to_vec()))
        })
    }

    /// Creates a record, unless there is one of that number; whether it is this one. `record` must hold a nonce: a store may
    /// do the put, lose the reply and be asked again, and then only the bytes tell whose the record is.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn create(&self, number: u64, record: &[u8]) -> Result<bool, RecordError> {
        let bytes = Bytes::copy_from_slice(record);
        self.limited(async |store| create(store, &self.name(number), bytes).await)
    }

    fn name(&self, number: u64) -> String {
        format!("{}/{number:08}", self.folder)
    }

    /// As [`limited`](Self::limited), where nothing is made that is not there.
    fn reading<T: Send>(
        &self,
        work: impl AsyncFnOnce(&Store) -> Result<Option<T>, RecordError> + Send,
    ) -> Result<Option<T>, RecordError> {
        match self.location.open(Patience::Short) {
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
            Ok(_) => self.limited(work),
        }
    }

    fn limited<T: Send>(
        &self,
        work: impl AsyncFnOnce(&Store) -> Result<T, RecordError> + Send,
    ) -> Result<T, RecordError> {
        block_on(async || {
            let store = self.location.create(Patience::Short)?;
            let done = tokio::time::timeout(LIMIT, work(&store)).await;
            done.unwrap_or_else(|_| Err(RecordError::Silent { url: self.location.to_string() }))
        })
    }
}

/// As [`Store::create_only`], but never without the condition.
async fn create(store: &Store, name: &str, bytes: Bytes) -> Result<bool, RecordError> {
    let path = store.path(name);
    match store.inner().put_opts(&path, bytes.clone().into(), PutMode::Create.into()).await {
        Ok(_) => Ok(true),
        Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
            // The store may have done the put, lost its reply, and been asked again.
            Ok(store.find(name, RECORD_BYTES_MAX as u64).await?.is_some_and(|found| found == bytes))
        }
        Err(Error::NotImplemented { .. }) => {
            Err(RecordError::Unconditional { url: store.location().to_string() })
        }
        Err(error) => Err(store.error("create", name, error).into()),
    }
}
