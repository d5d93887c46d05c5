//! How fast a checkpoint is written, beside plain multipart puts of as many bytes to the same place: what hashes, records, looks
//! and the manifest cost. Run by `scripts/bench-checkpoint`.
//!
//! `upload URL MIB WRITERS ROUNDS` prints a line of JSON for each round. Plain puts have parts and parts in flight of the same
//! number and size, hash nothing, and are as many at a time as there are writers.

use std::error::Error;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{FuturesUnordered, TryStreamExt};
use mattock_checkpoint::{
    Files, Layout, Location, Retention, RunFacts, Share, Slices, Snapshot, TensorMeta, Tuning, Writer,
};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

/// Tensors of the model.
const TENSORS: usize = 96;
/// Longer than a round takes.
const PATIENCE: Duration = Duration::from_secs(600);

type Failure = Box<dyn Error + Send + Sync>;

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
    // Two rustls providers may be linked, and then none is the default. Fails if one is set.
    let _ = rustls::crypto::ring::default_provider().install_default();
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

fn open(url: &str) -> Result<(Arc<dyn ObjectStore>, Path), Failure> {
    Ok(match url.strip_prefix("s3://") {
        Some(rest) => {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            (Arc::new(AmazonS3Builder::from_env().with_bucket_name(bucket).build()?), Path::parse(prefix)?)
        }
        None => {
            std::fs::create_dir_all(url)?;
            (Arc::new(LocalFileSystem::new_with_prefix(url)?.with_fsync(true)), Path::default())
        }
    })
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

/// Writes a checkpoint; how long the copy of a share took, and all of the writing after it.
fn checkpoint(url: &str, bytes: usize, of: u32, step: u64) -> Result<(Duration, Duration), Failure> {
    let elements = (bytes / 12 / TENSORS).next_multiple_of(256) * TENSORS;
    let each = elements / TENSORS;
    let tensor = |n| TensorMeta { name: format!("layer.{n}"), shape: vec![each], offset: n * each };
    let layout = Arc::new(Layout::new((0..TENSORS).map(tensor).collect(), elements)?);
    let state: Vec<f32> = (0..elements).map(|n| (n as u64 ^ step << 20) as f32).collect();
    let location = Location::parse(url)?;
    let retention = Retention { keep: NonZeroU32::MIN, keep_every: 0 };
    let (mut writers, mut copy) = (Vec::new(), Duration::ZERO);
    let mut snapshots = Vec::new();
    for index in 0..of {
        let share = Share { index, of, attempt: 1 };
        let moments = share.of_elements(elements, 256);
        let begun = Instant::now();
        let params = Slices::cut(&state, &share.of_tensors(&layout));
        let [m, v] = [0, 1].map(|_| Slices::cut(&state, std::slice::from_ref(&moments)));
        copy = copy.max(begun.elapsed());
        snapshots.push(Snapshot {
            step,
            state_hash: step,
            layout: Arc::clone(&layout),
            share,
            params,
            m,
            v,
            exponents: Arc::new(vec![0; elements / 256]),
            files: Arc::new(Files { config_json: "{}".into(), ..Files::default() }),
            run: Arc::new(RunFacts {
                run_id: "bench".into(),
                program: "bench".into(),
                seed: 0,
                total_steps: step,
                dataset: String::new(),
            }),
        });
        writers.push(Writer::start(&location, retention, Tuning::default())?);
    }
    let begun = Instant::now();
    for (writer, snapshot) in writers.iter_mut().zip(snapshots) {
        writer.submit(snapshot)?;
    }
    // Share 0 is told when all are there.
    for writer in writers.into_iter().rev() {
        writer.finish(PATIENCE).map_err(|error| error.to_string())?;
    }
    Ok((copy, begun.elapsed()))
}
