//! What did not change since the last checkpoint is not sent again: the store copies it, found by its BLAKE3.
//!
//! A tokenizer stays the same for a whole run, and so do the weights of layers that are not trained, whose files hold nothing
//! else where the model is large ([`Tuning::file_bytes`](crate::Tuning)). A piece is hashed before it is sent if the last
//! checkpoint has one of its size; as a rule the first chunk tells them apart.
//!
//! A copy, not a reference: each checkpoint's folder opens in any tool, stands when others are removed, and is not damaged
//! with them. A folder on a disk makes a link of it, which costs nothing; there small pieces are written again, so that
//! checkpoints have little in common that one damaged block could take from all of them. And before anything is copied, some
//! of it is read and checked, other chunks each time: what is damaged is sent anew, and not passed on from one checkpoint to
//! the next.

use crate::format::manifest::{Manifest, PieceInfo};
use crate::format::piece::Piece;
use crate::format::{Digest, step_folder};
use crate::read::Checkpoint;
use crate::save::SaveError;
use crate::snapshot::Attempt;
use crate::store::Store;
use crate::upload::{Control, Tuning, digest, info};

/// In folders, smaller pieces are written again.
const LINKED_BYTES_MIN: u64 = 1 << 20;

/// Has the store copy a piece from the last checkpoint, if that has it; nothing where it has not, or the copy fails.
pub(crate) async fn copy_unchanged(
    store: &Store,
    last: &Manifest,
    attempt: &Attempt,
    piece: &Piece,
    tuning: &Tuning,
    control: &Control,
) -> Result<Option<PieceInfo>, SaveError> {
    let bytes = piece.bytes();
    if bytes == 0 || store.location().folder().is_some() && bytes < LINKED_BYTES_MIN {
        return Ok(None);
    }
    let candidates: Vec<&PieceInfo> = last.pieces.iter().filter(|info| info.bytes == bytes).collect();
    let Some(found) = hash_unless_new(&candidates, piece, tuning) else { return Ok(None) };
    let there = candidates.into_iter().find(|there| there.blake3 == found.blake3);
    let Some(there) = there else { return Ok(None) };
    let checkpoint = Checkpoint::new(store, last);
    match control.race(checkpoint.seems_sound(there, attempt.step)).await? {
        Ok(true) => {}
        Ok(false) | Err(_) => return Ok(None),
    }
    let (folder, from) = (step_folder(attempt.step), format!("{}/{}", step_folder(last.step), there.name));
    match control.race(store.copy(&from, &format!("{folder}/{}", piece.name))).await? {
        Ok(()) => Ok(Some(found)),
        Err(error) => {
            tracing::debug!(%error, "checkpoint: sending what could not be copied");
            Ok(None)
        }
    }
}

/// The piece's hashes, unless its first chunk is that of none of the candidates.
fn hash_unless_new(candidates: &[&PieceInfo], piece: &Piece, tuning: &Tuning) -> Option<PieceInfo> {
    if candidates.is_empty() {
        return None;
    }
    let mut whole = digest(piece, tuning);
    let chunk_bytes =
        usize::try_from(tuning.chunk_bytes).unwrap_or(usize::MAX / 2).next_multiple_of(8).max(8);
    for (n, chunk) in piece.parts(chunk_bytes).enumerate() {
        if n == 0 && piece.bytes() > chunk.len() as u64 {
            let mut first = Digest::new(chunk.len() as u64, u64::MAX);
            first.update(&chunk);
            let first = first.finish(String::new(), Vec::new()).blake3;
            let may_be = |there: &&PieceInfo| match &there.chunks {
                Some(chunks) if chunks.bytes == chunk.len() as u64 => chunks.blake3.first() == Some(&first),
                Some(_) | None => true,
            };
            if !candidates.iter().any(may_be) {
                return None;
            }
        }
        whole.update(&chunk);
    }
    Some(info(piece, whole))
}
