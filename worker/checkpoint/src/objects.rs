//! A location's plain objects, for whoever keeps something else than checkpoints there: datasets, for now.
//!
//! Calls block and may come from any thread, inside a runtime or not: requests run on a runtime of the value's own. Each
//! request is repeated by the client as its patience says, and given up after that.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TrySendError, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use object_store::ObjectStoreExt;
use tokio::runtime::{Builder, Runtime};

use crate::location::{Location, Patience};
use crate::store::{Created, Store};
use crate::store_error::StoreError;

/// How long a reader waits for the next bytes, and a writer for the end: longer than the client's own repetitions.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Chunks that wait for a slow reader.
const CHUNKS_MAX: usize = 16;

/// The objects of a location.
pub struct Objects {
    store: Store,
    runtime: Option<Runtime>,
}

impl Drop for Objects {
    fn drop(&mut self) {
        // May happen inside another runtime, where waiting would be a panic.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Objects {
    /// Opens a location for reading.
    ///
    /// # Errors
    /// Where it cannot be opened, such as a folder that is not there.
    pub fn open(location: &Location) -> Result<Objects, StoreError> {
        Objects::with(location, Location::open)
    }

    /// Opens a location for writing: a folder is made where there is none.
    ///
    /// # Errors
    /// Where it cannot be opened or made.
    pub fn create(location: &Location) -> Result<Objects, StoreError> {
        Objects::with(location, Location::create)
    }

    fn with(
        location: &Location,
        open: impl Fn(&Location, Patience) -> Result<Store, StoreError>,
    ) -> Result<Objects, StoreError> {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(|error| {
                let source = object_store::Error::Generic { store: "runtime", source: error.into() };
                StoreError::new("start a client for", &location.to_string(), source)
            })?;
        let guard = runtime.enter();
        let store = open(location, Patience::Medium)?;
        drop(guard);
        Ok(Objects { store, runtime: Some(runtime) })
    }

    /// Address of an object; of the location, where the name is empty.
    pub fn url(&self, name: &str) -> String {
        self.store.url(name)
    }

    /// Size of an object; `None` where there is none.
    ///
    /// # Errors
    /// Where the store fails.
    pub fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        self.wait("look at", name, async |store, name| store.size(&name).await)
    }

    /// Writes an object.
    ///
    /// # Errors
    /// Where the store fails.
    pub fn put(&self, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.wait("write", name, async move |store, name| store.put(&name, bytes).await)
    }

    /// Creates an object; tells what is there already, if it is not the same. Equal objects of several writers are one.
    ///
    /// # Errors
    /// Where the store fails.
    pub fn create_only(&self, name: &str, bytes: Bytes) -> Result<Option<Bytes>, StoreError> {
        let created = async move |store: Store, name: String| store.create_only(&name, bytes).await;
        Ok(match self.wait("create", name, created)? {
            Created::Ours => None,
            Created::Theirs(found) => Some(found),
        })
    }

    /// Hands an object's bytes to `take`, in order, until it breaks off; that is no error.
    ///
    /// # Errors
    /// Where the store fails; what was handed out before is then worth nothing.
    pub fn read(&self, name: &str, take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), StoreError> {
        let (sender, chunks) = sync_channel(CHUNKS_MAX);
        let (store, path) = (self.store.clone(), self.store.path(name));
        self.spawn(async move {
            let mut stream = match store.inner().get(&path).await {
                Ok(found) => found.into_stream(),
                Err(error) => return drop(sender.send(Err(error))),
            };
            while let Some(chunk) = stream.next().await {
                let mut waiting = chunk;
                // The channel is not made for tasks: its end would block the only thread of this runtime.
                loop {
                    match sender.try_send(waiting) {
                        Ok(()) => break,
                        Err(TrySendError::Disconnected(_)) => return,
                        Err(TrySendError::Full(back)) => waiting = back,
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        loop {
            match chunks.recv_timeout(SILENCE_MAX) {
                Ok(Ok(chunk)) if take(&chunk).is_break() => return Ok(()),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(self.store.error("read", name, error)),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => return Err(self.silent("read", name)),
            }
        }
    }

    fn wait<T: Send + 'static, F: Future<Output = Result<T, StoreError>> + Send + 'static>(
        &self,
        operation: &'static str,
        name: &str,
        work: impl FnOnce(Store, String) -> F,
    ) -> Result<T, StoreError> {
        let (sender, done): (_, Receiver<Result<T, StoreError>>) = sync_channel(1);
        let work = work(self.store.clone(), name.to_owned());
        self.spawn(async move { drop(sender.send(work.await)) });
        done.recv_timeout(SILENCE_MAX).unwrap_or_else(|_| Err(self.silent(operation, name)))
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(work);
        }
    }

    fn silent(&self, operation: &'static str, name: &str) -> StoreError {
        let why = format!("no answer within {} s", SILENCE_MAX.as_secs());
        self.store.error(
            operation,
            name,
            object_store::Error::Generic { store: "objects", source: why.into() },
        )
    }
}
