//! A split's tokens: one memory-mapped file of fixed records, O(1) access.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::DataError;
use crate::manifest::Shard;

/// Tokens of a split, mapped.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    map: Option<Mmap>,
    token_bytes: usize,
    len: u64,
    blake3: String,
}

impl Tokens {
    /// Maps a shard; its size must be what the manifest says.
    pub(crate) fn open(folder: &Path, shard: &Shard, token_bytes: u8) -> Result<Self, DataError> {
        let path = folder.join(&shard.file);
        let file = File::open(&path).map_err(DataError::io("open", &path))?;
        let bytes = file.metadata().map_err(DataError::io("read", &path))?.len();
        let expected = shard.tokens.checked_mul(u64::from(token_bytes));
        if expected != Some(bytes) {
            let reason =
                format!("{} has {bytes} bytes where {} tokens are expected", shard.file, shard.tokens);
            return Err(DataError::Damaged { folder: folder.to_owned(), reason });
        }
        // SAFETY: datasets are written once, under a name of their own, and never changed; a process that changes one
        // nevertheless can spoil tokens, whose values are checked where they are used.
        let map = (bytes > 0)
            .then(|| unsafe { Mmap::map(&file) })
            .transpose()
            .map_err(DataError::io("map", &path))?;
        let (len, blake3) = (shard.tokens, shard.blake3.clone());
        Ok(Self { path, map, token_bytes: token_bytes.into(), len, blake3 })
    }

    /// Tokens.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Samples of `context + 1` tokens; neighbours share one token.
    pub fn samples(&self, context: usize) -> u64 {
        self.len.saturating_sub(1) / context as u64
    }

    /// Appends the `context + 1` tokens of a sample.
    ///
    /// # Panics
    /// Where there is no such sample.
    pub fn window(&self, sample: u64, context: usize, out: &mut Vec<i32>) {
        assert!(sample < self.samples(context), "sample {sample} is not below {}", self.samples(context));
        let first = (sample * context as u64) as usize * self.token_bytes;
        let bytes = &self.bytes()[first..first + (context + 1) * self.token_bytes];
        decode(bytes, self.token_bytes, out);
    }

    /// Compares the contents with the manifest's hash.
    pub fn verify(&self) -> Result<(), DataError> {
        let hash = blake3::hash(self.bytes()).to_hex();
        if hash.as_str() == self.blake3 {
            return Ok(());
        }
        let folder = self.path.parent().unwrap_or(Path::new(".")).to_owned();
        let reason = format!("{} does not have the hash of its manifest", self.path.display());
        Err(DataError::Damaged { folder, reason })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

/// Appends tokens of 2 or 4 bytes.
pub(crate) fn decode(bytes: &[u8], token_bytes: usize, out: &mut Vec<i32>) {
    match token_bytes {
        2 => out.extend(bytes.as_chunks::<2>().0.iter().map(|pair| i32::from(u16::from_le_bytes(*pair)))),
        _ => out.extend(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word) as i32)),
    }
}
