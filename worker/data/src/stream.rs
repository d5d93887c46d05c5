//! A published dataset as it is trained on: shards come through the cache, before they are needed where the order tells.
//!
//! [`Stream::follow`] says which micro-batches are this worker's; the order says which shards they draw from now and next, and
//! a few threads bring those, in that order. Whoever reads a sample whose shard is not there yet waits for it, and it
//! comes first. Assembling a micro-batch copies some kilobytes from mapped memory, so it is not done ahead.
//!
//! # Invariants
//! 1. What is read does not depend on what was announced: announcements only save waiting.
//! 2. Mapped are the shards that are drawn from now, and a few others.
//! 3. Every wait has a deadline.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cache::{Cache, Mapped};
use crate::fetch::{Fetched, Fetcher, Wanted, read_small};
use crate::order::SampleOrder;
use crate::shards::{FILE, FILE_BYTES_MAX, Published, Split, TOKENIZER, unusable};
use crate::store::ShardStore;
use crate::{DataError, Tokenizer};

/// Shards that are fetched at a time.
const FETCHES_MAX: usize = 4;
/// Shards beside those that are drawn from now that stay mapped.
const OTHERS_MAX: usize = 2;
/// How long a shard is waited for.
const SHARD_TIMEOUT: Duration = Duration::from_secs(600);
/// After the cache had no room for what comes next.
const NO_ROOM_PAUSE: Duration = Duration::from_secs(1);

/// A published dataset.
pub struct Stream {
    published: Published,
    url: String,
    tokenizer: Tokenizer,
    shared: Arc<Shared>,
}

struct Shared {
    wanted: Vec<Wanted>,
    fetcher: Fetcher,
    state: Mutex<State>,
    changed: Condvar,
}

/// Shards are numbered through both splits, the training split's first.
#[derive(Default)]
struct State {
    /// Waited for.
    urgent: VecDeque<usize>,
    /// Being fetched.
    running: BTreeSet<usize>,
    /// What is drawn from now, and after that next, in order of need.
    plan: Vec<usize>,
    /// How many of them are drawn from now.
    now: usize,
    /// Of the plan: looked after.
    settled: BTreeSet<usize>,
    held: BTreeMap<usize, Arc<Mapped>>,
    failed: BTreeMap<usize, DataError>,
    no_room_until: Option<Instant>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.fetcher.closed.store(true, Ordering::Relaxed);
        let _state = self.shared.lock();
        self.shared.changed.notify_all();
    }
}

impl Stream {
    /// Opens what lies in a store, with a cache in a folder below `cache` of at most `cache_bytes`.
    ///
    /// # Errors
    /// Where there is no dataset, it is not whole, or the cache is too small for it.
    pub fn open(store: Arc<dyn ShardStore>, cache: &Path, cache_bytes: u64) -> Result<Self, DataError> {
        let published = manifest(&*store)?;
        let url = store.url("").trim_end_matches('/').to_owned();
        let hash = published.tokenizer_hash.clone();
        let bytes = published.tokenizer_bytes;
        let json = read_small(&*store, &Wanted { name: TOKENIZER.to_owned(), hash, bytes })?;
        let tokenizer = Tokenizer::from_json(json)?;
        if tokenizer.vocab() as u64 != u64::from(published.vocab) {
            return Err(unusable(url, "its tokenizer has another vocabulary than its manifest says".into()));
        }
        let folder = cache.join("shards").join(&published.identity()[..32]);
        let least = published.cache_bytes_min();
        if cache_bytes < least {
            let reason = format!(
                "{cache_bytes} bytes are too few for this dataset, which needs {least}: {} shards of {} bytes are drawn \
                 from at a time; raise [data] cache, or publish with smaller shards or a smaller window",
                published.shards_at_once(),
                published.shard_bytes()
            );
            return Err(DataError::Cache { folder, reason });
        }
        let cache = Cache::open(folder.clone(), cache_bytes).map_err(DataError::io("create", &folder))?;
        let wanted = [Split::Train, Split::HeldOut].into_iter().flat_map(|split| published.wanted(split));
        let shared = Arc::new(Shared {
            wanted: wanted.collect(),
            fetcher: Fetcher { store, cache, closed: AtomicBool::new(false) },
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        for number in 0..FETCHES_MAX {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("shards-{number}"))
                .spawn(move || shared.work())
                .map_err(DataError::io("start a thread for", &folder))?;
        }
        Ok(Self { published, url, tokenizer, shared })
    }

    /// What it is.
    pub fn published(&self) -> &Published {
        &self.published
    }

    /// Where it lies.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Bytes that the cache holds at this moment, all processes' together.
    ///
    /// # Errors
    /// Where its folder cannot be read.
    pub fn cached_bytes(&self) -> Result<u64, DataError> {
        let cache = &self.shared.fetcher.cache;
        cache.held().map_err(DataError::io("look at", cache.folder()))
    }

    /// From now on these micro-batches of `micro` samples are this worker's, beginning with those of `step`.
    pub fn follow(&self, order: &SampleOrder, step: u64, share: &[u32], micro: u32) {
        let shards = self.published.train.shards.len();
        let [now, next] = match order.ahead(step, share, micro) {
            Some(lists) => lists.map(|list| list.into_iter().map(|shard| shard as usize).collect()),
            None => [(0..shards).collect::<Vec<usize>>(), Vec::new()],
        };
        let plan = [&now[..], &next[..]].concat();
        let mut state = self.shared.lock();
        if state.plan == plan && state.now == now.len() {
            return;
        }
        let settled = std::mem::take(&mut state.settled);
        state.settled = settled.into_iter().filter(|shard| plan.contains(shard)).collect();
        state.held.retain(|shard, _| now.contains(shard));
        (state.plan, state.now, state.no_room_until) = (plan, now.len(), None);
        self.shared.changed.notify_all();
    }

    /// Appends the `context + 1` tokens of a sample of a split.
    ///
    /// # Errors
    /// Where a shard cannot be fetched.
    ///
    /// # Panics
    /// Where there is no such sample.
    pub fn window(
        &self,
        split: Split,
        sample: u64,
        context: usize,
        out: &mut Vec<i32>,
    ) -> Result<(), DataError> {
        let list = self.published.split(split);
        let first = match split {
            Split::Train => self.published.first_token(sample, context),
            Split::HeldOut => sample * context as u64,
        };
        let (mut at, end) = (first, first + context as u64 + 1);
        assert!(end <= list.tokens, "sample {sample} ends at {end} of {} tokens", list.tokens);
        let before = if split == Split::Train { 0 } else { self.published.train.shards.len() };
        let width = usize::from(self.published.token_bytes);
        while at < end {
            let (shard, offset) = (at / self.published.shard_tokens, at % self.published.shard_tokens);
            let take = (end - at).min(self.published.shard_tokens - offset);
            let mapped = self.shared.get(before + shard as usize)?;
            let bytes = &mapped.bytes()[offset as usize * width..(offset + take) as usize * width];
            crate::tokens::decode(bytes, width, out);
            at += take;
        }
        Ok(())
    }
}

/// Reads and checks a store's manifest.
pub(crate) fn manifest(store: &dyn ShardStore) -> Result<Published, DataError> {
    let url = store.url(FILE);
    let mut bytes = Vec::new();
    let read = store.read(FILE, &mut |chunk| {
        bytes.extend_from_slice(chunk);
        match bytes.len() as u64 > FILE_BYTES_MAX {
            true => std::ops::ControlFlow::Break(()),
            false => std::ops::ControlFlow::Continue(()),
        }
    });
    match read {
        Err(fault) if fault.missing => {
            let reason = format!("there is no such object: `mattock data build RECIPE --to {url}` makes one");
            Err(unusable(url, reason.replace(&format!("/{FILE}`"), "`")))
        }
        Err(fault) => Err(fault.into()),
        Ok(()) => Published::parse(&bytes).map_err(|reason| unusable(url, reason)),
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A shard, waited for.
    fn get(&self, shard: usize) -> Result<Arc<Mapped>, DataError> {
        let mut state = self.lock();
        if let Some(mapped) = state.held.get(&shard) {
            return Ok(Arc::clone(mapped));
        }
        let deadline = Instant::now() + SHARD_TIMEOUT;
        state.urgent.push_back(shard);
        self.changed.notify_all();
        loop {
            if let Some(mapped) = state.held.get(&shard) {
                return Ok(Arc::clone(mapped));
            }
            if let Some(error) = state.failed.remove(&shard) {
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let url = self.fetcher.store.url(&self.wanted[shard].name);
                let reason = format!("did not come within {} s", SHARD_TIMEOUT.as_secs());
                return Err(DataError::Object { url, reason });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A fetching thread's life.
    fn work(&self) {
        while let Some((shard, urgent, keep)) = self.next() {
            let wanted = &self.wanted[shard];
            let done = match urgent {
                true => self.fetcher.map(wanted, &keep),
                false => self.fetcher.prefetch(wanted, &keep),
            };
            self.settle(shard, urgent, done);
        }
    }

    /// What to fetch, whether it is waited for, and what may not give way to it; `None` at the end.
    fn next(&self) -> Option<(usize, bool, BTreeSet<String>)> {
        let mut state = self.lock();
        loop {
            if self.fetcher.closed.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(shard) = state.urgent.pop_front() {
                let keep = &state.plan[..state.now];
                return Some((
                    shard,
                    true,
                    keep.iter().map(|&shard| self.wanted[shard].hash.clone()).collect(),
                ));
            }
            let pause = state.no_room_until.map(|until| until.saturating_duration_since(Instant::now()));
            let pause = pause.filter(|pause| !pause.is_zero());
            let due = |shard: &usize| !state.settled.contains(shard) && !state.running.contains(shard);
            if pause.is_none()
                && let Some(at) = state.plan.iter().position(due)
            {
                let shard = state.plan[at];
                let keep = state.plan[..at].iter().map(|&shard| self.wanted[shard].hash.clone()).collect();
                state.running.insert(shard);
                return Some((shard, false, keep));
            }
            let waited = self.changed.wait_timeout(state, pause.unwrap_or(SHARD_TIMEOUT));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn settle(&self, shard: usize, urgent: bool, done: Result<Fetched, DataError>) {
        let mut state = self.lock();
        if !urgent {
            state.running.remove(&shard);
        }
        match done {
            Ok(Fetched::Mapped(mapped)) => {
                let now: BTreeSet<usize> = state.plan[..state.now].iter().copied().collect();
                let others: Vec<usize> =
                    state.held.keys().copied().filter(|shard| !now.contains(shard)).collect();
                if !now.contains(&shard) && others.len() >= OTHERS_MAX {
                    others.iter().for_each(|other| drop(state.held.remove(other)));
                }
                state.held.insert(shard, Arc::new(mapped));
                state.settled.insert(shard);
            }
            Ok(Fetched::Cached) => drop(state.settled.insert(shard)),
            Ok(Fetched::NoRoom) => state.no_room_until = Some(Instant::now() + NO_ROOM_PAUSE),
            Err(error) if urgent => drop(state.failed.insert(shard, error)),
            Err(_) if self.fetcher.closed.load(Ordering::Relaxed) => {}
            Err(error) => {
                // Who needs it will ask for it, and hear what is wrong.
                tracing::warn!(%error, "data: not fetched ahead");
                state.settled.insert(shard);
            }
        }
        self.changed.notify_all();
    }
}
