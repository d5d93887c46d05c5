//! A share's record: all that its writer did, told to whoever finds it.
//!
//! It looks like a manifest, and is as little believed before its check holds. When the records of all shares are there, they
//! make up the manifest ([`assemble`](super::assemble)), and are removed.

use serde::{Deserialize, Serialize};

use super::manifest::{Manifest, ManifestError, PieceInfo, hex_u64};
use super::seal;
use crate::share::Share;
use crate::snapshot::Attempt;

/// `share-KEY-00001-of-00004.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ShareRecord {
    pub(crate) format: u32,
    pub(crate) program: String,
    pub(crate) run_id: String,
    /// The attempt's key: what all its records have in common.
    pub(crate) attempt: String,
    /// Which share, from 0.
    pub(crate) share: u32,
    pub(crate) of: u32,
    pub(crate) step: u64,
    pub(crate) total_steps: u64,
    pub(crate) seed: u64,
    #[serde(with = "hex_u64")]
    pub(crate) state_hash: u64,
    pub(crate) model: String,
    pub(crate) dataset: String,
    pub(crate) pieces: Vec<PieceInfo>,
}

/// The name of a share's record, below the checkpoint's folder.
pub(crate) fn record_name(key: &str, share: Share) -> String {
    format!("share-{key}-{:05}-of-{:05}.json", u64::from(share.index) + 1, share.of)
}

impl ShareRecord {
    pub(crate) fn new(attempt: &Attempt, pieces: Vec<PieceInfo>) -> ShareRecord {
        let run = &*attempt.run;
        ShareRecord {
            format: super::FORMAT,
            program: run.program.clone(),
            run_id: run.run_id.clone(),
            attempt: attempt.key.clone(),
            share: attempt.share.index,
            of: attempt.share.of,
            step: attempt.step,
            total_steps: run.total_steps,
            seed: run.seed,
            state_hash: attempt.state_hash,
            model: attempt.layout.fingerprint(),
            dataset: run.dataset.clone(),
            pieces,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        seal::encode(self)
    }

    /// Reads stored bytes back. What its pieces are named is checked with the manifest that they become part of.
    pub(crate) fn decode(bytes: &[u8]) -> Result<ShareRecord, ManifestError> {
        let text = seal::unseal(bytes).ok_or(ManifestError::Check)?;
        serde_json::from_slice(text).map_err(|error| ManifestError::Nonsense(error.to_string()))
    }

    /// The manifest of which these pieces are all.
    pub(crate) fn manifest(&self, nonce: String, pieces: Vec<PieceInfo>) -> Manifest {
        Manifest {
            format: super::FORMAT,
            program: self.program.clone(),
            run_id: self.run_id.clone(),
            nonce,
            step: self.step,
            total_steps: self.total_steps,
            seed: self.seed,
            state_hash: self.state_hash,
            model: self.model.clone(),
            dataset: self.dataset.clone(),
            shares: self.of,
            pieces,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whoever changes these bytes keeps writers of two versions from finishing each other's checkpoints.
    #[test]
    fn bytes_are_pinned() {
        let record = ShareRecord {
            format: 2,
            program: "mattock 0.1.0".into(),
            run_id: "quickstart-7f".into(),
            attempt: "0011223344556677".into(),
            share: 1,
            of: 4,
            step: 100,
            total_steps: 400,
            seed: 7,
            state_hash: 0x0123_4567_89ab_cdef,
            model: "m".into(),
            dataset: "d".into(),
            pieces: Vec::new(),
        };
        let golden = include_str!("record.golden.json");
        assert_eq!(String::from_utf8(record.encode()).unwrap(), golden);
        assert_eq!(ShareRecord::decode(golden.as_bytes()).unwrap(), record);
        assert_eq!(record_name("k", Share { index: 1, of: 4, attempt: 0 }), "share-k-00002-of-00004.json");
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,200}") {
            let _ = ShareRecord::decode(&bytes);
            let _ = ShareRecord::decode(&seal::seal(&text));
        }
    }
}
