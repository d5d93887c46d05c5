//! What a built dataset is: written last, read first.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::DataError;

/// Of the dataset's folder; another one is built again.
pub(crate) const FORMAT: u32 = 1;
/// Name in the folder.
pub(crate) const FILE: &str = "manifest.json";

/// What a built dataset is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// BLAKE3 over the tokens of both splits and the tokenizer, in hex.
    pub dataset_hash: String,
    /// Source files.
    pub files: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Tokens of the vocabulary.
    pub vocab: u32,
    /// Bytes of a token in the shards: 2 or 4, little endian.
    pub token_bytes: u8,
    /// Cross entropy in nats per token of the training split under its own unigram distribution.
    pub unigram_loss: f64,
    /// BLAKE3 of `tokenizer.json`, in hex.
    pub tokenizer_hash: String,
    /// Tokens that are trained on.
    pub train: Shard,
    /// Tokens that are not.
    pub held_out: Shard,
}

/// One file of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// In the dataset's folder.
    pub file: String,
    /// Tokens.
    pub tokens: u64,
    /// BLAKE3 of the file, in hex.
    pub blake3: String,
}

impl Manifest {
    /// Reads a folder's manifest; `None` where there is none, or one of another format.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>, DataError> {
        let path = folder.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(DataError::io("read", &path)(error)),
        };
        let manifest: Self = serde_json::from_str(&text).map_err(|error| DataError::Damaged {
            folder: folder.to_owned(),
            reason: format!("{FILE}: {error}"),
        })?;
        Ok((manifest.format == FORMAT).then_some(manifest))
    }

    /// As it lies in the folder.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}

impl std::fmt::Display for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "dataset     {}", self.dataset_hash)?;
        writeln!(f, "files       {} ({:.1} MB of text)", self.files, self.bytes as f64 / 1e6)?;
        writeln!(f, "vocabulary  {} tokens, {} bytes each in the shards", self.vocab, self.token_bytes)?;
        writeln!(f, "training    {} tokens ({})", self.train.tokens, self.train.file)?;
        writeln!(f, "held out    {} tokens ({})", self.held_out.tokens, self.held_out.file)?;
        write!(f, "unigram     {:.4} nats a token", self.unigram_loss)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_manifests_bytes_are_pinned() {
        let shard = |file: &str, tokens| Shard { file: file.into(), tokens, blake3: "00".into() };
        let manifest = Manifest {
            format: FORMAT,
            dataset_hash: "ab".into(),
            files: 2,
            bytes: 3,
            vocab: 256,
            token_bytes: 2,
            unigram_loss: 1.5,
            tokenizer_hash: "cd".into(),
            train: shard("train.tokens", 5),
            held_out: shard("held_out.tokens", 1),
        };
        let hash = blake3::hash(manifest.to_json().as_bytes()).to_hex();
        assert_eq!(&hash[..16], "dc622ff91e311cc1");
        assert_eq!(serde_json::from_str::<Manifest>(&manifest.to_json()).unwrap(), manifest);
    }

    proptest! {
        #[test]
        fn any_text_is_a_manifest_or_an_error(text in ".{0,200}") {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(FILE), text).unwrap();
            let _ = Manifest::read(folder.path());
        }
    }
}
