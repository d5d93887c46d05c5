//! From a local dataset to a published one: shards first, the manifest last.
//!
//! Shards are named by their hashes, so writing one twice does no harm, and a publication that was broken off goes on
//! where it was. Publishing what is published already reads every shard, and repairs what is not as it should be.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::builder::Corpus;
use crate::shards::{Cutting, FILE, Published, Split, TOKENIZER, shard_name, unusable};
use crate::store::{ShardStore, StoreFault};
use crate::stream::manifest;
use crate::{DataError, Tokenizer};

/// Shards that are written at a time.
const PUTS_MAX: usize = 4;

/// Publishes a local dataset; `progress` is told how many shards of how many are done.
///
/// # Errors
/// Where the local dataset is damaged, the store fails, or another dataset lies there.
pub fn publish(
    corpus: &Corpus,
    cutting: Cutting,
    store: &dyn ShardStore,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Published, DataError> {
    corpus.verify()?;
    let published = Published::of(&corpus.manifest, cutting);
    let shard_bytes = published.shard_bytes() as usize;
    let make = |split, shard: u64| {
        let bytes = match split {
            Split::Train => corpus.train.bytes(),
            Split::HeldOut => corpus.held_out.bytes(),
        };
        bytes.chunks(shard_bytes.max(1)).nth(shard as usize).unwrap_or_default().to_vec()
    };
    publish_made(published, &corpus.tokenizer, &make, store, progress)
}

/// Publishes shards that are made on the spot: `make` gives the bytes of a split's shard.
///
/// # Errors
/// Where the store fails, or another dataset lies there.
pub fn publish_made(
    mut published: Published,
    tokenizer: &Tokenizer,
    make: &(dyn Fn(Split, u64) -> Vec<u8> + Sync),
    store: &dyn ShardStore,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Published, DataError> {
    published.tokenizer_bytes = tokenizer.json().len() as u64;
    if let Some(fault) = published.fault_of_numbers() {
        return Err(unusable(store.url(FILE), fault));
    }
    let taken = || unusable(store.url(FILE), "another dataset lies there: choose another place".to_owned());
    let repair = match manifest(store) {
        Ok(there) if there.is_cut_as(&published) => true,
        Ok(_) => return Err(taken()),
        Err(DataError::Published { .. }) if store.size(FILE)?.is_none() => false,
        Err(error) => return Err(error),
    };
    let upload = Upload { published: &published, make, store, progress, repair, done: AtomicU64::new(0) };
    let (train, held_out) = (upload.split(Split::Train)?, upload.split(Split::HeldOut)?);
    (published.train.shards, published.held_out.shards) = (train, held_out);
    for (name, bytes) in [(TOKENIZER, tokenizer.json().to_vec()), (FILE, published.to_json().into_bytes())] {
        if !store.create(name, bytes)? {
            return Err(taken());
        }
    }
    Ok(published)
}

struct Upload<'a> {
    published: &'a Published,
    make: &'a (dyn Fn(Split, u64) -> Vec<u8> + Sync),
    store: &'a dyn ShardStore,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Whether what is there is read and compared.
    repair: bool,
    done: AtomicU64,
}

impl Upload<'_> {
    /// Writes a split's shards; returns their hashes.
    fn split(&self, split: Split) -> Result<Vec<String>, DataError> {
        let count = |split| self.published.split(split).tokens.div_ceil(self.published.shard_tokens);
        let (shards, total) = (count(split), count(Split::Train) + count(Split::HeldOut));
        let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
        let hashes = Mutex::new(vec![Ok(String::new()); shards as usize]);
        let work = || {
            while !failed.load(Ordering::Relaxed) {
                let shard = next.fetch_add(1, Ordering::Relaxed);
                if shard >= shards {
                    return;
                }
                let put = self.put((self.make)(split, shard));
                failed.fetch_or(put.is_err(), Ordering::Relaxed);
                hashes.lock().unwrap_or_else(PoisonError::into_inner)[shard as usize] = put;
                (self.progress)(self.done.fetch_add(1, Ordering::Relaxed) + 1, total);
            }
        };
        std::thread::scope(|scope| (0..PUTS_MAX).for_each(|_| drop(scope.spawn(work))));
        let hashes = hashes.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(hashes.into_iter().collect::<Result<Vec<String>, StoreFault>>()?)
    }

    fn put(&self, bytes: Vec<u8>) -> Result<String, StoreFault> {
        let hash = blake3::hash(&bytes).to_hex().to_string();
        let name = shard_name(&hash);
        let there = match self.repair {
            true => self.is_sound(&name, &hash)?,
            false => self.store.size(&name)? == Some(bytes.len() as u64),
        };
        if !there {
            self.store.put(&name, bytes)?;
        }
        Ok(hash)
    }

    fn is_sound(&self, name: &str, hash: &str) -> Result<bool, StoreFault> {
        let mut hasher = blake3::Hasher::new();
        let read = self.store.read(name, &mut |bytes| {
            hasher.update(bytes);
            ControlFlow::Continue(())
        });
        match read {
            Err(fault) if fault.missing => Ok(false),
            read => read.map(|()| hasher.finalize().to_hex().as_str() == hash),
        }
    }
}
