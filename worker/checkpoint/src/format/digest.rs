//! Hashes of a piece: one of the whole, as `b3sum` prints it, and one per chunk, so that a range can be checked without the rest.

use blake3::Hasher;

use super::manifest::{Chunks, PieceInfo};

/// Hashes a piece as it passes by.
pub(crate) struct Digest {
    whole: Hasher,
    chunk: Hasher,
    chunk_bytes: u64,
    done: Vec<String>,
}

impl Digest {
    /// For a piece of `bytes`, in chunks of `chunk_bytes`.
    pub(crate) fn new(bytes: u64, chunk_bytes: u64) -> Digest {
        // Where there is one chunk its hash is that of the whole.
        let chunk_bytes = if bytes > chunk_bytes { chunk_bytes.max(1) } else { u64::MAX };
        Digest { whole: Hasher::new(), chunk: Hasher::new(), chunk_bytes, done: Vec::new() }
    }

    /// Takes the next bytes.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        while self.chunk_bytes != u64::MAX && !bytes.is_empty() {
            let room = usize::try_from(self.chunk_bytes - self.chunk.count()).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.chunk.update(now);
            if self.chunk.count() == self.chunk_bytes {
                self.close();
            }
            bytes = rest;
        }
    }

    /// What is known of the piece now that all of it has passed.
    pub(crate) fn finish(mut self, name: String, holds: Vec<[u64; 2]>) -> PieceInfo {
        if self.chunk.count() > 0 {
            self.close();
        }
        let chunks = (!self.done.is_empty()).then_some(Chunks { bytes: self.chunk_bytes, blake3: self.done });
        let blake3 = self.whole.finalize().to_hex().to_string();
        PieceInfo { name, bytes: self.whole.count(), blake3, chunks, holds }
    }

    fn close(&mut self) {
        self.done.push(self.chunk.finalize().to_hex().to_string());
        self.chunk.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_hashed_however_the_bytes_come() {
        let bytes: Vec<u8> = (0..100).collect();
        for step in 1..=100 {
            let mut digest = Digest::new(100, 32);
            bytes.chunks(step).for_each(|bytes| digest.update(bytes));
            let info = digest.finish("x".into(), Vec::new());
            let want: Vec<String> =
                bytes.chunks(32).map(|chunk| blake3::hash(chunk).to_hex().to_string()).collect();
            assert_eq!(info.chunks, Some(Chunks { bytes: 32, blake3: want }));
            assert_eq!((info.bytes, info.blake3), (100, blake3::hash(&bytes).to_hex().to_string()));
        }
    }

    #[test]
    fn a_piece_of_one_chunk_has_one_hash() {
        let mut digest = Digest::new(32, 32);
        digest.update(&[7; 32]);
        assert_eq!(digest.finish("x".into(), Vec::new()).chunks, None);
    }
}
