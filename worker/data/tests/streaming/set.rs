//! A dataset of some dozens of small shards, in a folder that plays the store, with faults on demand.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use mattock_data::{
    Corpus, Cutting, DataError, Progress, ShardStore, StoreFault, Stream, TextConfig, TokenizerConfig,
    open_or_build, publish,
};

pub(crate) const CONTEXT: usize = 20;
pub(crate) const SIZE: u32 = 8;
pub(crate) const MICRO: u32 = 2;
/// Bytes of a shard.
const SHARD: u64 = 4096;
/// Shards that are shuffled together.
const WINDOW: u64 = 4;
/// Bytes of the cache: the least that it may have, a quarter of the set.
pub(crate) const CACHE: u64 = (2 * WINDOW + 2) * SHARD;

/// What a store does to an object, once or always.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Corrupt,
    Truncate,
    Lengthen,
    Missing,
    /// Fails as a store does that is busy.
    Busy,
}

/// A folder as a store.
pub(crate) struct FolderStore {
    folder: PathBuf,
    /// By name: the fault, and how often it still happens.
    faults: Mutex<BTreeMap<String, (Fault, usize)>>,
    reads: Mutex<BTreeMap<String, usize>>,
}

impl FolderStore {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder, faults: Mutex::default(), reads: Mutex::default() }
    }

    fn fault_of(&self, name: &str) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap();
        let (fault, left) = faults.get_mut(name)?;
        *left = left.checked_sub(1)?;
        Some(*fault)
    }
}

fn fault(error: &std::io::Error, name: &str) -> StoreFault {
    let missing = error.kind() == std::io::ErrorKind::NotFound;
    StoreFault { text: format!("{name}: {error}"), missing, again: false }
}

impl ShardStore for FolderStore {
    fn read(&self, name: &str, take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), StoreFault> {
        *self.reads.lock().unwrap().entry(name.to_owned()).or_default() += 1;
        let mut bytes = fs::read(self.folder.join(name)).map_err(|error| fault(&error, name))?;
        let failed = |missing| StoreFault { text: format!("{name} fails"), missing, again: !missing };
        match self.fault_of(name) {
            None => {}
            Some(Fault::Corrupt) => bytes[7] ^= 1,
            Some(Fault::Truncate) => bytes.truncate(bytes.len() / 2),
            Some(Fault::Lengthen) => bytes.push(0),
            Some(Fault::Missing) => return Err(failed(true)),
            Some(Fault::Busy) => {
                // Not at once: half of it was handed out.
                let _ = take(&bytes[..bytes.len() / 2]);
                return Err(failed(false));
            }
        }
        for chunk in bytes.chunks(1000) {
            if take(chunk).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn size(&self, name: &str) -> Result<Option<u64>, StoreFault> {
        Ok(fs::metadata(self.folder.join(name)).ok().map(|found| found.len()))
    }

    fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreFault> {
        let path = self.folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).map_err(|error| fault(&error, name))
    }

    fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, StoreFault> {
        match fs::read(self.folder.join(name)) {
            Ok(found) => Ok(found == bytes),
            Err(_) => self.put(name, bytes).map(|()| true),
        }
    }

    fn url(&self, name: &str) -> String {
        format!("folder/{name}")
    }
}

/// A published dataset and a cache.
pub(crate) struct Set {
    folder: tempfile::TempDir,
    pub(crate) store: Arc<FolderStore>,
    corpus: Corpus,
}

impl Set {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = (0..12_000).map(|number: u32| format!("{} ", number.wrapping_mul(2_654_435_761) % 9973));
        fs::write(folder.path().join("text.txt"), text.collect::<String>()).unwrap();
        let config = TextConfig {
            text: vec![folder.path().join("text.txt").display().to_string()],
            tokenizer: TokenizerConfig::Kind(mattock_data::config::TokenizerKind::Bytes {}),
            held_out: 0.01,
        };
        let corpus = open_or_build(&config, &folder.path().join("built"), &mut |_: Progress| ()).unwrap();
        let set = Self { store: Arc::new(FolderStore::new(folder.path().join("store"))), folder, corpus };
        set.publish().unwrap();
        set
    }

    pub(crate) fn publish(&self) -> Result<(), DataError> {
        let cutting = Cutting { shard_bytes: SHARD, window: WINDOW };
        publish(&self.corpus, cutting, &*self.store, &|_, _| ()).map(drop)
    }

    pub(crate) fn store_folder(&self) -> &Path {
        &self.store.folder
    }

    pub(crate) fn cache_folder(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    pub(crate) fn open(&self) -> Stream {
        self.try_open(CACHE).unwrap()
    }

    pub(crate) fn try_open(&self, cache_bytes: u64) -> Result<Stream, DataError> {
        let store: Arc<dyn ShardStore> = Arc::<FolderStore>::clone(&self.store);
        Stream::open(store, &self.cache_folder(), cache_bytes)
    }

    /// Appends a token of the training split.
    pub(crate) fn token(&self, token: u64, out: &mut Vec<i32>) {
        // A sample of context 1 holds two tokens; the last token is the second of the last one.
        let last = self.corpus.train.samples(1) - 1;
        let mut pair = Vec::new();
        self.corpus.train.window(token.min(last), 1, &mut pair);
        out.push(pair[(token - token.min(last)) as usize]);
    }

    /// Name in the store of the shard of a training sample's first token.
    pub(crate) fn shard_name(&self, stream: &Stream, shard: usize) -> String {
        format!("shards/{}", stream.published().train.shards[shard])
    }

    /// Makes the store do this to an object for the next so many reads.
    pub(crate) fn harm(&self, name: &str, fault: Fault, times: usize) {
        self.store.faults.lock().unwrap().insert(name.to_owned(), (fault, times));
    }

    /// How often shards were read.
    pub(crate) fn shard_reads(&self) -> usize {
        let reads = self.store.reads.lock().unwrap();
        reads.iter().filter(|(name, _)| name.starts_with("shards/")).map(|(_, reads)| reads).sum()
    }

    /// Files of the cache, with their lengths.
    pub(crate) fn files(&self) -> Vec<(PathBuf, u64)> {
        let folders = fs::read_dir(self.cache_folder().join("shards")).into_iter().flatten().flatten();
        let files = folders.flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
        files.filter_map(|file| Some((file.path(), file.metadata().ok()?.len()))).collect()
    }

    /// Bytes of the cache.
    pub(crate) fn cached(&self) -> u64 {
        self.files().iter().map(|(_, bytes)| bytes).sum()
    }
}
