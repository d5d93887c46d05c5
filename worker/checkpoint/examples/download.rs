//! How fast a checkpoint is loaded, beside plain reads of as many bytes from the same place: what hashes, headers and copying to
//! where it belongs cost. Run by `scripts/bench-checkpoint`.
//!
//! `download URL MIB READERS ROUNDS` writes a checkpoint, and prints a line of JSON for each round: every reader loads an even part of
//! parameters and moments, as ranks do whose state is divided; plain reads take the same bytes of the same files in requests of the
//! same size, as many under way, keep them, and check nothing. Readers are threads that begin together.

#[path = "common/mod.rs"]
mod common;

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use common::{Failure, checkpoint, model, open};
use futures::stream::{self, StreamExt, TryStreamExt};
use mattock_checkpoint::{Location, Which, load_ranges};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

/// Bytes of a request, and requests under way, as the library has them.
const REQUEST_BYTES: u64 = 8 << 20;
const IN_FLIGHT: usize = 4;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, mebibytes, readers, rounds] = &arguments[..] else {
        return Err("download URL MIB READERS ROUNDS".into());
    };
    let (mebibytes, readers, rounds): (usize, usize, u64) =
        (mebibytes.parse()?, readers.parse()?, rounds.parse()?);
    let bytes = mebibytes << 20;
    checkpoint(url, bytes, 1, 1)?;
    for round in 0..rounds {
        let plain = || measured(readers, |reader| plain_reads(url, reader, readers));
        let load = || measured(readers, |reader| load_part(url, bytes, reader, readers));
        // In turn: who comes second may get memory that the first has just given back, which is cheaper to touch.
        let [(read, plain, plain_cpu), (loaded, load, load_cpu)] = match round.is_multiple_of(2) {
            true => [plain()?, load()?],
            false => {
                let load = load()?;
                [plain()?, load]
            }
        };
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let rate = |bytes: u64, took: Duration| gib(bytes) * 1024.0 / took.as_secs_f64();
        println!(
            "{{\"plain_mib_s\": {:.1}, \"load_mib_s\": {:.1}, \"plain_cpu_s_gib\": {:.2}, \"load_cpu_s_gib\": {:.2}}}",
            rate(read, plain),
            rate(loaded, load),
            plain_cpu / gib(read),
            load_cpu / gib(loaded)
        );
    }
    Ok(())
}

/// Seconds that all threads of this program have had, in the kernel and out of it.
fn cpu_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Files that lie in memory are read again from where they are kept; only root may ask for that, and others measure memory.
fn forget_files() {
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
}

/// What all readers do at the same time: bytes in all, how long it took, and how many seconds of the processors.
fn measured(
    readers: usize,
    act: impl Fn(usize) -> Result<u64, Failure> + Sync,
) -> Result<(u64, Duration, f64), Failure> {
    forget_files();
    let before = cpu_time();
    let (bytes, took) = together(readers, act)?;
    Ok((bytes, took, cpu_time() - before))
}

/// What all readers do at the same time: bytes in all, and how long it took.
fn together(
    readers: usize,
    act: impl Fn(usize) -> Result<u64, Failure> + Sync,
) -> Result<(u64, Duration), Failure> {
    let start = Barrier::new(readers + 1);
    std::thread::scope(|scope| {
        let (act, start) = (&act, &start);
        let threads: Vec<_> = (0..readers)
            .map(|reader| {
                scope.spawn(move || {
                    start.wait();
                    act(reader)
                })
            })
            .collect();
        start.wait();
        let begun = Instant::now();
        let mut bytes = 0;
        for thread in threads {
            bytes += thread.join().map_err(|_| "a reader panicked")??;
        }
        Ok((bytes, begun.elapsed()))
    })
}

fn load_part(url: &str, bytes: usize, reader: usize, readers: usize) -> Result<u64, Failure> {
    let layout = model(bytes)?;
    let part = |reader: usize| layout.elements() * reader / readers;
    let range = part(reader)..part(reader + 1);
    let ranges = std::slice::from_ref(&range);
    let (loaded, _) = load_ranges(&Location::parse(url)?, Which::Newest, &layout, ranges, ranges)?;
    let elements = loaded.params.len() + loaded.m.len() + loaded.v.len();
    Ok((elements * size_of::<f32>()) as u64)
}

/// Reads an even part of each file of tensors.
#[tokio::main(flavor = "current_thread")]
async fn plain_reads(url: &str, reader: usize, readers: usize) -> Result<u64, Failure> {
    let (store, prefix) = open(url)?;
    let files: Vec<(Path, u64)> =
        store.list(Some(&prefix)).map_ok(|file| (file.location, file.size)).try_collect().await?;
    let tensors = files.into_iter().filter(|(path, _)| path.as_ref().ends_with(".safetensors"));
    let requests: Vec<_> = tensors
        .flat_map(|(path, size)| {
            let part = |reader: usize| size * reader as u64 / readers as u64;
            let (path, end) = (Arc::new(path), part(reader + 1));
            (part(reader)..end)
                .step_by(REQUEST_BYTES as usize)
                .map(move |start| (Arc::clone(&path), start..end.min(start + REQUEST_BYTES)))
        })
        .collect();
    let store = &store;
    let mut reads = stream::iter(requests)
        .map(|(path, range)| async move { store.get_range(&path, range).await })
        .buffer_unordered(IN_FLIGHT);
    // Kept until all are there, as a load keeps them: memory that nobody has touched yet costs, too.
    let mut chunks = Vec::new();
    while let Some(chunk) = reads.try_next().await? {
        chunks.push(chunk);
    }
    Ok(chunks.iter().map(|chunk| chunk.len() as u64).sum())
}
