//! Streaming from a store: what comes is what was published, faults are ridden out or told, the cache keeps its bound.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod faults;
mod processes;
mod set;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mattock_data::{Split, Stream};

use crate::set::{CACHE, CONTEXT, MICRO, SIZE, Set};

/// How long anything that must happen is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Every sample of both splits, whatever the order, compared with the local dataset.
fn read_all(set: &Set, stream: &Stream) {
    let cut = stream.published().cut(CONTEXT).unwrap();
    let (mut streamed, mut local) = (Vec::new(), Vec::new());
    for sample in 0..stream.published().samples(CONTEXT) {
        let (shard, within) = cut.locate(sample);
        stream.window(Split::Train, sample, CONTEXT, &mut streamed).unwrap();
        let first = shard * stream.published().shard_tokens + within * CONTEXT as u64;
        // One token a sample, so that any first token is a sample.
        (first..=first + CONTEXT as u64).for_each(|token| set.token(token, &mut local));
    }
    assert!(streamed == local, "what was streamed is not what was built");
}

#[test]
fn what_is_streamed_is_what_was_built() {
    let set = Set::new();
    read_all(&set, &set.open());
}

#[test]
fn a_run_reads_each_shard_of_an_epoch_about_once() {
    let set = Set::new();
    let stream = set.open();
    let order = stream.published().order(1, CONTEXT, SIZE, MICRO);
    let shares: Vec<u32> = (0..SIZE / MICRO).collect();
    let mut tokens = Vec::new();
    for step in 0..order.samples() / u64::from(SIZE) {
        stream.follow(&order, step, &shares, MICRO);
        for index in &shares {
            for sample in order.micro_batch(step, *index, MICRO, SIZE) {
                stream.window(Split::Train, sample, CONTEXT, &mut tokens).unwrap();
            }
        }
    }
    let (reads, shards) = (set.shard_reads(), stream.published().train.shards.len());
    // The end of an epoch comes back to the last window of each lane, and what was fetched too early to stay comes again.
    assert!(reads >= shards && reads <= 2 * shards, "{reads} reads of {shards} shards");
    assert!(set.cached() <= CACHE);
}

#[test]
fn what_comes_next_is_fetched_before_anybody_asks() {
    let set = Set::new();
    let stream = set.open();
    let order = stream.published().order(1, CONTEXT, SIZE, MICRO);
    stream.follow(&order, 0, &[0], MICRO);
    let ahead: BTreeSet<u64> = order.ahead(0, &[0], MICRO).unwrap().into_iter().flatten().collect();
    wait_until("all that was announced is there", || set.shard_reads() == ahead.len());
    // Another share: other lanes.
    stream.follow(&order, 0, &[3], MICRO);
    let other: BTreeSet<u64> = order.ahead(0, &[3], MICRO).unwrap().into_iter().flatten().collect();
    assert_ne!(ahead, other);
    wait_until("announcements follow the share", || set.shard_reads() == ahead.union(&other).count());
    let mut tokens = Vec::new();
    for sample in order.micro_batch(0, 3, MICRO, SIZE) {
        stream.window(Split::Train, sample, CONTEXT, &mut tokens).unwrap();
    }
    assert_eq!(set.shard_reads(), ahead.union(&other).count(), "nothing is fetched twice");
}

#[test]
fn streams_that_share_a_cache_fetch_a_shard_once() {
    let set = Set::new();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let stream = set.open();
                let mut tokens = Vec::new();
                stream.window(Split::Train, 0, CONTEXT, &mut tokens).unwrap();
            });
        }
    });
    assert_eq!(set.shard_reads(), 1);
}

#[test]
fn a_cache_that_cannot_hold_what_is_drawn_from_is_refused() {
    let set = Set::new();
    let error = set.try_open(CACHE / 2).unwrap_err().to_string();
    assert!(error.contains("raise [data] cache"), "{error}");
}
