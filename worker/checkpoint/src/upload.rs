//! Sending one piece: parts cut from the arrays, hashed on the way, a few in flight.
//!
//! # Invariants
//! 1. Memory beside the arrays stays below (parts in flight + 1) parts.
//! 2. An upload that does not complete is aborted, whatever ended it.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use object_store::{Error, MultipartUpload};
use tokio::sync::watch;

use crate::folder::ALIGNMENT;
use crate::format::Digest;
use crate::format::manifest::{PieceInfo, as_pairs};
use crate::format::piece::Piece;
use crate::read::CHUNK_BYTES;
use crate::save::{SaveError, Stop};
use crate::store::Store;
use crate::store_error::{Reason, StoreError};
use crate::uploads::begin;

/// The most parts that S3 takes for one object.
const PARTS_MAX: u64 = 10_000;
/// How long telling a store to drop an upload may take.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Bounds on what a writer uses and how long it waits. The defaults suit a training run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Size of an upload's parts in bytes; S3 wants 5 MiB at least. Larger for objects of more than 10,000 of them.
    pub part_bytes: usize,
    /// Parts of one upload under way at a time.
    pub parts_in_flight: usize,
    /// Files of tensors are cut, between tensors, where they would be longer.
    pub file_bytes: u64,
    /// What of a piece has a hash of its own, and is the least that is read of it: a multiple of 8.
    pub chunk_bytes: u64,
    /// Tries of one operation, each after twice the pause of the one before. Within a try an S3 client repeats its
    /// requests too.
    pub tries_max: u32,
    /// The first pause between tries.
    pub pause: Duration,
    /// The longest that writing one checkpoint may take.
    pub deadline: Duration,
    /// A checkpoint under way in which nothing was acknowledged for so long gives way to a newer one that waits.
    /// One that progresses does not: otherwise a store that is slower than the interval would never hold any.
    pub stall: Duration,
    /// How often share 0 looks whether the others are done, at the least; more often at first.
    pub look: Duration,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            part_bytes: 8 << 20,
            parts_in_flight: 4,
            file_bytes: 1 << 30,
            chunk_bytes: CHUNK_BYTES,
            tries_max: 5,
            pause: Duration::from_millis(250),
            deadline: Duration::from_secs(1800),
            stall: Duration::from_secs(30),
            look: Duration::from_millis(500),
        }
    }
}

/// The least that S3 takes as a part.
const PART_BYTES_MIN: u64 = 5 << 20;
/// More in flight makes nothing faster.
const IN_FLIGHT_MAX: u64 = 16;

impl Tuning {
    /// The defaults, with parts of which so many fit in `memory` bytes: those in flight, and one that is being cut. Two
    /// parts of 5 MiB are the least.
    pub fn within(memory: u64) -> Tuning {
        let defaults = Tuning::default();
        let part_bytes = (memory / 4).clamp(PART_BYTES_MIN, defaults.part_bytes as u64);
        let part_bytes = part_bytes / ALIGNMENT as u64 * ALIGNMENT as u64;
        let in_flight = (memory / part_bytes).saturating_sub(1).clamp(1, IN_FLIGHT_MAX);
        Tuning { part_bytes: part_bytes as usize, parts_in_flight: in_flight as usize, ..defaults }
    }
}

/// The two lines between a save under way and its writer: stop this way, progress that way.
pub(crate) struct Control {
    pub(crate) stop: watch::Receiver<Option<Stop>>,
    pub(crate) progress: watch::Sender<u64>,
}

impl Control {
    /// Runs `work`, unless told to stop before it is done.
    pub(crate) async fn race<T>(&self, work: impl Future<Output = T>) -> Result<T, Stop> {
        let mut stop = self.stop.clone();
        let stopped = async {
            match stop.wait_for(Option::is_some).await.map(|stop| *stop) {
                Ok(Some(stop)) => stop,
                Ok(None) | Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            stop = stopped => Err(stop),
            done = work => Ok(done),
        }
    }

    /// Something was acknowledged.
    fn advance(&self) {
        self.progress.send_modify(|count| *count += 1);
    }

    /// Does something until it works, an error says that it never will, or the tries are used up.
    pub(crate) async fn retry<T>(
        &self,
        tuning: &Tuning,
        mut work: impl AsyncFnMut() -> Result<T, SaveError>,
    ) -> Result<T, SaveError> {
        let mut pause = tuning.pause;
        for left in (0..tuning.tries_max.max(1)).rev() {
            match work().await {
                Err(SaveError::Store(error)) if error.is_transient() && left > 0 => {
                    tracing::warn!(%error, ?pause, left, "checkpoint: trying again");
                    self.race(tokio::time::sleep(pause)).await?;
                    pause *= 2;
                }
                done => {
                    self.advance();
                    return done;
                }
            }
        }
        unreachable!("the last try returns")
    }
}

/// Writes a piece and tells its size and hash.
pub(crate) async fn put_piece(
    store: &Store,
    folder: &str,
    piece: &Piece,
    tuning: &Tuning,
    control: &Control,
) -> Result<PieceInfo, SaveError> {
    let (bytes, name) = (piece.bytes(), format!("{folder}/{}", piece.name));
    control
        .retry(tuning, async || match bytes > tuning.part_bytes as u64 {
            true => put_parts(store, &name, piece, tuning, control).await,
            false => put_whole(store, &name, piece, tuning, control).await,
        })
        .await
}

/// What is known of a piece before any of it has passed.
pub(crate) fn digest(piece: &Piece, tuning: &Tuning) -> Digest {
    Digest::new(piece.bytes(), tuning.chunk_bytes.next_multiple_of(8).max(8))
}

pub(crate) fn info(piece: &Piece, digest: Digest) -> PieceInfo {
    digest.finish(piece.name.clone(), as_pairs(&piece.holds))
}

async fn put_whole(
    store: &Store,
    name: &str,
    piece: &Piece,
    tuning: &Tuning,
    control: &Control,
) -> Result<PieceInfo, SaveError> {
    let whole = usize::try_from(piece.bytes()).unwrap_or(usize::MAX).next_multiple_of(8);
    let bytes = piece.parts(whole).next().unwrap_or_default();
    let mut digest = digest(piece, tuning);
    digest.update(&bytes);
    control.race(store.put(name, bytes)).await??;
    Ok(info(piece, digest))
}

async fn put_parts(
    store: &Store,
    name: &str,
    piece: &Piece,
    tuning: &Tuning,
    control: &Control,
) -> Result<PieceInfo, SaveError> {
    let failed = |error| store.error("write", name, error);
    let mut upload = control.race(begin(store, name)).await?.map_err(failed)?;
    let sent = async {
        let info = send_parts(&mut *upload, piece, tuning, control).await?;
        upload.complete().await.map(|_| info)
    };
    let sent = match control.race(sent).await {
        Ok(sent) => sent.map_err(|error| SaveError::Store(worth_repeating(failed(error)))),
        Err(stop) => Err(SaveError::Stopped(stop)),
    };
    if sent.is_err() {
        abort(&mut *upload, |error| store.error("abort the upload of", name, error)).await;
    }
    sent
}

/// An upload that the server does not know any more was completed and the reply lost, or forgotten: unlike a bucket
/// that does not exist, that may go better.
fn worth_repeating(error: StoreError) -> StoreError {
    let reason = if error.is_missing() { Reason::Other } else { error.reason };
    StoreError { reason, ..error }
}

async fn send_parts(
    upload: &mut dyn MultipartUpload,
    piece: &Piece,
    tuning: &Tuning,
    control: &Control,
) -> Result<PieceInfo, Error> {
    let mut digest = digest(piece, tuning);
    let mut in_flight = FuturesUnordered::new();
    for part in piece.parts(part_bytes(piece.bytes(), tuning.part_bytes)) {
        digest.update(&part);
        in_flight.push(upload.put_part(part.into()));
        while in_flight.len() >= tuning.parts_in_flight.max(1) {
            in_flight.next().await.transpose()?;
            control.advance();
        }
    }
    while let Some(done) = in_flight.next().await {
        done?;
        control.advance();
    }
    Ok(info(piece, digest))
}

async fn abort(upload: &mut dyn MultipartUpload, failed: impl Fn(Error) -> StoreError) {
    match tokio::time::timeout(ABORT_TIMEOUT, upload.abort()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = %failed(error), "checkpoint: an upload was left behind"),
        Err(_) => tracing::warn!("checkpoint: an upload was left behind: the store did not answer"),
    }
}

/// A part's size: as tuned, or larger where an object would have too many, and whole elements always.
fn part_bytes(piece_bytes: u64, tuned: usize) -> usize {
    let needed = usize::try_from(piece_bytes.div_ceil(PARTS_MAX)).unwrap_or(usize::MAX / 2);
    needed.max(tuned).max(8).next_multiple_of(if needed > tuned { ALIGNMENT } else { 8 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_stay_within_their_memory() {
        for memory in [16 << 20, 20 << 20, 33 << 20, 64 << 20, 64 << 30] {
            let Tuning { part_bytes, parts_in_flight, .. } = Tuning::within(memory);
            assert!(part_bytes as u64 * (parts_in_flight as u64 + 1) <= memory, "{memory}");
            assert!(part_bytes >= 5 << 20 && parts_in_flight > 0);
        }
    }

    #[test]
    fn no_object_has_more_parts_than_s3_takes() {
        for bytes in [1, 8 << 20, 100 << 30, 5 << 40] {
            let part = part_bytes(bytes, 8 << 20);
            assert!(part >= 8 << 20 && part.is_multiple_of(8));
            assert!(bytes.div_ceil(part as u64) <= PARTS_MAX);
        }
    }
}
