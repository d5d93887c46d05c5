//! How fast a checkpoint is written, beside plain multipart puts of as many bytes to the same place: what hashes, records, looks
//! and the manifest cost. Run by `scripts/bench-checkpoint`.
//!
//! `upload URL MIB WRITERS ROUNDS` prints a line of JSON for each round. Plain puts have parts and parts in flight of the same
//! number and size, hash nothing, and are as many at a time as there are writers.

#[path = "common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Failure, checkpoint, open};
use futures::stream::{FuturesUnordered, TryStreamExt};
use mattock_checkpoint::Tuning;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, mebibytes, writers, rounds] = &arguments[..] else {
        return Err("upload URL MIB WRITERS ROUNDS".into());
    };
    let (mebibytes, writers, rounds): (usize, u32, u64) =
        (mebibytes.parse()?, writers.parse()?, rounds.parse()?);
    let bytes = mebibytes << 20;
    for round in 1..=rounds {
        let plain = plain_puts(url, bytes / writers as usize, writers)?;
        let (copy, written) = checkpoint(url, bytes, writers, round)?;
        let rate = |took: Duration| mebibytes as f64 / took.as_secs_f64();
        println!(
            "{{\"plain_mib_s\": {:.1}, \"checkpoint_mib_s\": {:.1}, \"copy_ms\": {:.2}}}",
            rate(plain),
            rate(written),
            copy.as_secs_f64() * 1e3
        );
    }
    Ok(())
}

/// Puts as many objects at a time as there are writers; how long that took.
fn plain_puts(url: &str, bytes: usize, writers: u32) -> Result<Duration, Failure> {
    let tuning = Tuning::default();
    let part = Bytes::from(vec![7; tuning.part_bytes]);
    let begun = Instant::now();
    let threads: Vec<_> = (0..writers)
        .map(|writer| {
            // Each with a store of its own: connections end with the runtime that they were made in.
            let (store, prefix) = open(url)?;
            let (path, part) = (prefix.join(format!("plain-{writer}")), part.clone());
            Ok(std::thread::spawn(move || put(&*store, &path, bytes, &part, tuning.parts_in_flight)))
        })
        .collect::<Result<_, Failure>>()?;
    for thread in threads {
        thread.join().map_err(|_| "a put panicked")??;
    }
    Ok(begun.elapsed())
}

#[tokio::main(flavor = "current_thread")]
async fn put(
    store: &dyn ObjectStore,
    path: &Path,
    bytes: usize,
    part: &Bytes,
    in_flight: usize,
) -> Result<(), Failure> {
    let mut upload = store.put_multipart(path).await?;
    let mut parts = FuturesUnordered::new();
    for start in (0..bytes).step_by(part.len()) {
        parts.push(upload.put_part(part.slice(..part.len().min(bytes - start)).into()));
        if parts.len() >= in_flight {
            parts.try_next().await?;
        }
    }
    while parts.try_next().await?.is_some() {}
    upload.complete().await?;
    store.delete(path).await?;
    Ok(())
}
