//! From the store into the cache: read, compared with the hash, and read again once where it differs.

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::DataError;
use crate::cache::{Begin, Cache, Mapped, Part};
use crate::store::{ShardStore, StoreFault};

/// Tries of one object where the store fails in a way that may pass.
const TRIES_MAX: u32 = 5;
/// The first pause between them; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// How long a shard that is needed now waits for room that others use.
const ROOM_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks at what another process does.
const PAUSE: Duration = Duration::from_millis(10);

/// An object with a hash.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// Its name in the store.
    pub(crate) name: String,
    /// In hex.
    pub(crate) hash: String,
    pub(crate) bytes: u64,
}

/// What came of looking after a shard.
#[derive(Debug)]
pub(crate) enum Fetched {
    Mapped(Mapped),
    /// In the cache, not mapped.
    Cached,
    /// Of a shard that is not needed yet.
    NoRoom,
}

/// Brings shards from a store into a cache.
pub(crate) struct Fetcher {
    pub(crate) store: Arc<dyn ShardStore>,
    pub(crate) cache: Cache,
    /// Ends all waiting.
    pub(crate) closed: AtomicBool,
}

impl Fetcher {
    /// Maps a shard, fetched where it is not here: for one that is needed now.
    pub(crate) fn map(&self, wanted: &Wanted, keep: &BTreeSet<String>) -> Result<Fetched, DataError> {
        let deadline = Instant::now() + ROOM_TIMEOUT;
        loop {
            let found = self.cache.find(&wanted.hash, wanted.bytes).map_err(|error| self.broken(&error))?;
            if let Some(mapped) = found {
                return Ok(Fetched::Mapped(mapped));
            }
            match self.begin(wanted, keep, true)? {
                Begin::Part(part) => self.download(part, wanted)?,
                Begin::There => {}
                Begin::Busy => self.pause(PAUSE)?,
                Begin::Full if Instant::now() < deadline => self.pause(PAUSE)?,
                Begin::Full => {
                    let bound = self.cache.bytes_max();
                    return Err(self.unfit(format!(
                        "all of its {bound} bytes are in use, and {} more are needed: raise [data] cache, or give \
                         each run a folder of its own (MATTOCK_CACHE)",
                        wanted.bytes
                    )));
                }
            }
        }
    }

    /// Brings a shard into the cache, for later.
    pub(crate) fn prefetch(&self, wanted: &Wanted, keep: &BTreeSet<String>) -> Result<Fetched, DataError> {
        while !self.cache.has(&wanted.hash) {
            match self.begin(wanted, keep, false)? {
                Begin::Part(part) => self.download(part, wanted)?,
                Begin::There => {}
                Begin::Busy => self.pause(PAUSE)?,
                Begin::Full => return Ok(Fetched::NoRoom),
            }
        }
        Ok(Fetched::Cached)
    }

    fn begin(&self, wanted: &Wanted, keep: &BTreeSet<String>, insist: bool) -> Result<Begin, DataError> {
        let begun = self.cache.begin(&wanted.hash, wanted.bytes, keep, insist);
        begun.map_err(|error| self.broken(&error))
    }

    fn download(&self, mut part: Part, wanted: &Wanted) -> Result<(), DataError> {
        let written = read_right(&*self.store, wanted, &self.closed, &mut |event| match event {
            Read::Start => part.restart(),
            Read::Bytes(bytes) => part.write(bytes),
        });
        match written {
            Ok(()) => part.finish().map_err(|error| self.broken(&error)),
            Err(ReadError::Sink(error)) => Err(self.broken(&error)),
            Err(ReadError::Data(error)) => Err(error),
        }
    }

    fn pause(&self, pause: Duration) -> Result<(), DataError> {
        std::thread::sleep(pause);
        match self.closed.load(Ordering::Relaxed) {
            true => Err(closed()),
            false => Ok(()),
        }
    }

    fn broken(&self, error: &io::Error) -> DataError {
        self.unfit(format!("{error}; it must be a local folder that may be written, with room for it"))
    }

    fn unfit(&self, reason: String) -> DataError {
        DataError::Cache { folder: self.cache.folder().to_owned(), reason }
    }
}

fn closed() -> DataError {
    let text = "the dataset was closed".to_owned();
    StoreFault { text, missing: false, again: false }.into()
}

/// What a reader of an object hears.
enum Read<'a> {
    /// From the beginning, perhaps once more.
    Start,
    Bytes(&'a [u8]),
}

enum ReadError {
    Data(DataError),
    Sink(io::Error),
}

/// A small object as a whole.
pub(crate) fn read_small(store: &dyn ShardStore, wanted: &Wanted) -> Result<Vec<u8>, DataError> {
    let mut whole = Vec::new();
    let read = read_right(store, wanted, &AtomicBool::new(false), &mut |event| {
        match event {
            Read::Start => whole.clear(),
            Read::Bytes(bytes) => whole.extend_from_slice(bytes),
        }
        Ok(())
    });
    match read {
        Ok(()) => Ok(whole),
        Err(ReadError::Data(error)) => Err(error),
        Err(ReadError::Sink(_)) => unreachable!("memory takes all"),
    }
}

/// Reads an object until it has the right hash: once more where it has not, some times more where the store fails.
fn read_right(
    store: &dyn ShardStore,
    wanted: &Wanted,
    closed_flag: &AtomicBool,
    sink: &mut dyn FnMut(Read<'_>) -> io::Result<()>,
) -> Result<(), ReadError> {
    let (mut flaws, mut tries, mut pause) = (0, 1, FIRST_PAUSE);
    loop {
        let reason = match read_once(store, wanted, closed_flag, sink)? {
            Ok(None) => return Ok(()),
            Ok(Some(reason)) => reason,
            Err(fault) if fault.missing => "is not there".to_owned(),
            Err(fault) if fault.again && tries < TRIES_MAX => {
                tracing::warn!(%fault, ?pause, "data: trying again");
                std::thread::sleep(pause);
                (tries, pause) = (tries + 1, pause * 2);
                continue;
            }
            Err(fault) => return Err(ReadError::Data(fault.into())),
        };
        let url = store.url(&wanted.name);
        flaws += 1;
        if flaws > 1 {
            return Err(ReadError::Data(DataError::Object { url, reason }));
        }
        tracing::warn!(%url, %reason, "data: fetching it again");
        std::thread::sleep(pause);
    }
}

type Flaw = Option<String>;

/// Reads an object once; tells what is wrong with it, if anything.
fn read_once(
    store: &dyn ShardStore,
    wanted: &Wanted,
    closed_flag: &AtomicBool,
    sink: &mut dyn FnMut(Read<'_>) -> io::Result<()>,
) -> Result<Result<Flaw, StoreFault>, ReadError> {
    let (mut hasher, mut got, mut sunk) = (blake3::Hasher::new(), 0u64, Ok(()));
    sink(Read::Start).map_err(ReadError::Sink)?;
    let read = store.read(&wanted.name, &mut |bytes| {
        got += bytes.len() as u64;
        if got > wanted.bytes || closed_flag.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        hasher.update(bytes);
        sunk = sink(Read::Bytes(bytes));
        if sunk.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    sunk.map_err(ReadError::Sink)?;
    if closed_flag.load(Ordering::Relaxed) {
        return Err(ReadError::Data(closed()));
    }
    Ok(read.map(|()| match got.cmp(&wanted.bytes) {
        std::cmp::Ordering::Greater => Some(format!("has more than its {} bytes", wanted.bytes)),
        std::cmp::Ordering::Less => Some(format!("has {got} bytes where {} are expected", wanted.bytes)),
        std::cmp::Ordering::Equal if hasher.finalize().to_hex().as_str() != wanted.hash => {
            Some("does not have the hash of the manifest".to_owned())
        }
        std::cmp::Ordering::Equal => None,
    }))
}
