//! Streaming a dataset, measured: a set made on the spot, published, and read as training reads it.
//!
//! What is read is compared with what was made, sample by sample: a loader that is fast and wrong fails here.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use mattock_coordinator::membership::assigned;
use mattock_data::keys::Stream as Random;
use mattock_data::manifest::Shard;
use mattock_data::{
    Cutting, Manifest, Published, SampleOrder, ShardStore, Split, StoreFault, Stream, Tokenizer, publish_made,
};
use mattock_worker::shards;
use serde::Serialize;

/// Places of the epoch at which training is resumed.
const RESUMES: u64 = 16;
/// Between two looks at what the cache holds.
const LOOK: Duration = Duration::from_millis(2);
/// Numbers of workers among whom a step is split.
const WORLDS: [u32; 4] = [1, 2, 3, 7];
/// Steps that are split.
const SPLIT_STEPS: u64 = 1000;

/// What is made and how it is read.
#[derive(Debug, Clone)]
pub(crate) struct DataWork {
    /// Where it is published.
    pub(crate) url: String,
    /// Bytes of the set.
    pub(crate) bytes: u64,
    pub(crate) cutting: Cutting,
    /// Bytes of the cache.
    pub(crate) cache_bytes: u64,
    /// Tokens of a sample.
    pub(crate) context: usize,
    /// Samples of a step.
    pub(crate) size: u32,
    /// Samples of a micro-batch.
    pub(crate) micro: u32,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DataSample {
    set_bytes: u64,
    shards: u64,
    shard_bytes: u64,
    window: u64,
    publish_seconds: f64,
    /// From nothing, with an empty cache, to the first micro-batch: the median and the longest of all places.
    resume_median_seconds: f64,
    resume_longest_seconds: f64,
    /// Of all micro-batches of an epoch, on one worker, beginning with an empty cache.
    tokens_per_second: f64,
    /// What the store gave, as a share of the set: one worker, and the first of two.
    read_by_one: f64,
    read_by_one_of_two: f64,
    cache_bytes: u64,
    /// The most that the cache held at any look.
    cache_held_bytes: u64,
    /// Steps that were split among 1, 2, 3 and 7 workers, and held the same samples.
    same_steps: u64,
}

impl DataSample {
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}

impl fmt::Display for DataSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (set, shard) = (mb(self.set_bytes), mb(self.shard_bytes));
        writeln!(f, "set             {set:.0} MB in {} shards of {shard:.1} MB", self.shards)?;
        writeln!(f, "window          {} shards", self.window)?;
        writeln!(f, "published in    {:.1} s", self.publish_seconds)?;
        let (median, longest) = (self.resume_median_seconds, self.resume_longest_seconds);
        writeln!(
            f,
            "resume          {median:.3} s, {longest:.3} s at most, at {RESUMES} places, cache empty"
        )?;
        writeln!(f, "loader          {:.3e} tokens/s, an epoch from an empty cache", self.tokens_per_second)?;
        writeln!(f, "read            {:.3} of the set by one worker", self.read_by_one)?;
        writeln!(f, "                {:.3} of the set by the first of two", self.read_by_one_of_two)?;
        let (held, bound) = (mb(self.cache_held_bytes), mb(self.cache_bytes));
        writeln!(f, "cache           {held:.1} MB at most, of {bound:.1} MB allowed")?;
        write!(f, "same samples    {} steps among 1, 2, 3 and 7 workers", self.same_steps)
    }
}

/// Makes a set, and measures how it is read; `scratch` is an empty folder for caches.
pub(crate) fn measure_data(work: &DataWork, scratch: &Path) -> anyhow::Result<DataSample> {
    let began = Instant::now();
    let published = make(work)?;
    let publish_seconds = began.elapsed().as_secs_f64();
    let order = published.order(42, work.context, work.size, work.micro);
    let epoch = order.samples() / u64::from(work.size);
    ensure!(epoch >= RESUMES, "an epoch has {epoch} steps only: make the set larger");

    let mut resumes = (0..RESUMES)
        .map(|at| resume(work, &order, epoch * at / RESUMES, &scratch.join(format!("resume-{at}"))))
        .collect::<anyhow::Result<Vec<f64>>>()?;
    resumes.sort_by(f64::total_cmp);
    let micro_batches = work.size / work.micro;
    let one = Reading::of(work, &order, 0..micro_batches, epoch, &scratch.join("one"))?;
    let half = assigned(micro_batches, 2, 0);
    let one_of_two = Reading::of(work, &order, half, epoch, &scratch.join("half"))?;
    let tokens = epoch * u64::from(work.size) * work.context as u64;
    Ok(DataSample {
        set_bytes: published.train.tokens * u64::from(published.token_bytes),
        shards: published.train.shards.len() as u64,
        shard_bytes: published.shard_bytes(),
        window: published.window,
        publish_seconds,
        resume_median_seconds: resumes[resumes.len() / 2],
        resume_longest_seconds: resumes[resumes.len() - 1],
        tokens_per_second: tokens as f64 / one.seconds,
        read_by_one: one.share(work),
        read_by_one_of_two: one_of_two.share(work),
        cache_bytes: work.cache_bytes,
        cache_held_bytes: one.held.max(one_of_two.held),
        same_steps: same_samples(work, &order, epoch)?,
    })
}

/// The token at a place of the set, a byte.
fn token(at: u64) -> u8 {
    Random::new(at / 8).bits().to_le_bytes()[(at % 8) as usize]
}

/// Makes and publishes the set.
fn make(work: &DataWork) -> anyhow::Result<Published> {
    let tokenizer = Tokenizer::bytes()?;
    let tokens = work.bytes / 2;
    let name = format!("made on the spot: {tokens} tokens");
    let shard = |tokens| Shard { file: String::new(), tokens, blake3: String::new() };
    let manifest = Manifest {
        format: 1,
        dataset_hash: hash(name.as_bytes()),
        files: 0,
        bytes: tokens,
        vocab: 256,
        token_bytes: 2,
        unigram_loss: 256f64.ln(),
        tokenizer_hash: hash(tokenizer.json()),
        train: shard(tokens),
        held_out: shard(0),
    };
    let set = Published::of(&manifest, work.cutting);
    let shard_tokens = set.shard_tokens;
    let make = move |_, shard: u64| {
        let range = shard * shard_tokens..((shard + 1) * shard_tokens).min(tokens);
        // Eight at a time, which is what a draw gives.
        let draws =
            (range.start / 8..range.end.div_ceil(8)).map(|draw| Random::new(draw).bits().to_le_bytes());
        let bytes = draws.flatten().skip((range.start % 8) as usize).take((range.end - range.start) as usize);
        bytes.flat_map(|byte| [byte, 0]).collect()
    };
    let store = shards::create(&work.url)?;
    Ok(publish_made(set, &tokenizer, &make, &*store, &|_, _| ())?)
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// A store that counts what it gives.
struct Counted {
    store: Arc<dyn ShardStore>,
    bytes: Arc<AtomicU64>,
}

impl ShardStore for Counted {
    fn read(&self, name: &str, take: &mut dyn FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), StoreFault> {
        self.store.read(name, &mut |bytes| {
            self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            take(bytes)
        })
    }

    fn size(&self, name: &str) -> Result<Option<u64>, StoreFault> {
        self.store.size(name)
    }

    fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreFault> {
        self.store.put(name, bytes)
    }

    fn create(&self, name: &str, bytes: Vec<u8>) -> Result<bool, StoreFault> {
        self.store.create(name, bytes)
    }

    fn url(&self, name: &str) -> String {
        self.store.url(name)
    }
}

/// The time from nothing to the first micro-batch of a step.
fn resume(work: &DataWork, order: &SampleOrder, step: u64, cache: &Path) -> anyhow::Result<f64> {
    let began = Instant::now();
    let stream = Stream::open(shards::open(&work.url)?, cache, work.cache_bytes)?;
    let all: Vec<u32> = (0..work.size / work.micro).collect();
    stream.follow(order, step, &all, work.micro);
    let mut tokens = Vec::new();
    for sample in order.micro_batch(step, 0, work.micro, work.size) {
        stream.window(Split::Train, sample, work.context, &mut tokens)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    drop(stream);
    // What was fetched ahead may still be coming in.
    let _ = std::fs::remove_dir_all(cache);
    Ok(seconds)
}

/// What reading an epoch cost.
struct Reading {
    seconds: f64,
    /// Bytes that came from the store.
    bytes: u64,
    /// The most bytes in the cache.
    held: u64,
}

impl Reading {
    fn share(&self, work: &DataWork) -> f64 {
        self.bytes as f64 / work.bytes as f64
    }

    /// Reads these micro-batches of an epoch's steps.
    fn of(
        work: &DataWork,
        order: &SampleOrder,
        share: Range<u32>,
        epoch: u64,
        cache: &Path,
    ) -> anyhow::Result<Self> {
        let bytes = Arc::new(AtomicU64::new(0));
        let store = Arc::new(Counted { store: shards::open(&work.url)?, bytes: Arc::clone(&bytes) });
        let stream = Stream::open(store, cache, work.cache_bytes)?;
        let done = AtomicBool::new(false);
        let (seconds, held) = std::thread::scope(|scope| {
            let looking = scope.spawn(|| most_held(&stream, &done));
            let began = Instant::now();
            let read = read(work, &stream, order, share, epoch);
            let seconds = began.elapsed().as_secs_f64();
            done.store(true, Ordering::Relaxed);
            let held = looking.join().map_err(|_| anyhow!("the cache could not be looked at"))??;
            read.map(|()| (seconds, held))
        })?;
        drop(stream);
        std::fs::remove_dir_all(cache).context("cannot remove the cache")?;
        Ok(Self { seconds, bytes: bytes.load(Ordering::Relaxed), held })
    }
}

/// Reads, and compares the ends of each sample with what was made.
fn read(
    work: &DataWork,
    stream: &Stream,
    order: &SampleOrder,
    share: Range<u32>,
    epoch: u64,
) -> anyhow::Result<()> {
    let share: Vec<u32> = share.collect();
    let cut = stream.published().cut(work.context).context("the set has no more shards than a window")?;
    let mut tokens = Vec::with_capacity(work.micro as usize * (work.context + 1));
    for step in 0..epoch {
        stream.follow(order, step, &share, work.micro);
        for &index in &share {
            tokens.clear();
            for sample in order.micro_batch(step, index, work.micro, work.size) {
                stream.window(Split::Train, sample, work.context, &mut tokens)?;
                let (shard, within) = cut.locate(sample);
                let first = shard * stream.published().shard_tokens + within * work.context as u64;
                let row = &tokens[tokens.len() - work.context - 1..];
                let ends = [row[0], row[work.context]].map(|token| token as u8);
                ensure!(
                    ends == [token(first), token(first + work.context as u64)],
                    "sample {sample} is not what was made; this is a bug"
                );
            }
        }
    }
    Ok(())
}

/// Looks at the cache until told to stop.
fn most_held(stream: &Stream, done: &AtomicBool) -> anyhow::Result<u64> {
    let mut most = 0;
    loop {
        // Once more after the end.
        let last = done.load(Ordering::Relaxed);
        most = most.max(stream.cached_bytes()?);
        if last {
            return Ok(most);
        }
        std::thread::sleep(LOOK);
    }
}

/// Splits steps all over an epoch among different numbers of workers, and compares the samples.
fn same_samples(work: &DataWork, order: &SampleOrder, epoch: u64) -> anyhow::Result<u64> {
    let steps = SPLIT_STEPS.min(epoch);
    let micro_batches = work.size / work.micro;
    for step in (0..steps).map(|number| epoch * number / steps) {
        let of_world = |world: u32| -> BTreeSet<u64> {
            let shares = (0..world).flat_map(|rank| assigned(micro_batches, world, rank));
            shares.flat_map(|index| order.micro_batch(step, index, work.micro, work.size)).collect()
        };
        let sets: Vec<BTreeSet<u64>> = WORLDS.iter().map(|&world| of_world(world)).collect();
        let whole = sets.iter().all(|set| *set == sets[0] && set.len() == work.size as usize);
        ensure!(whole, "step {step} depends on the number of workers; this is a bug");
    }
    Ok(steps)
}
