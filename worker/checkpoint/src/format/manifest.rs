//! The manifest: what a complete checkpoint consists of. Once it exists, the checkpoint does.
//!
//! It is JSON for people and tools, one member per line, and ends with a `check`: BLAKE3 over all text before it.
//!
//! # What a newer program reads
//! `format` counts incompatible changes only. A reader takes every format up to its own, and refuses a newer one by
//! name; members it does not know are left alone. `format` and `check` keep their meaning in every format.
//! Format 1 had one file of weights and one of moments, and neither hashes of chunks nor what each piece holds.

use std::collections::HashSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::seal::{encode, unseal};

/// The format written by this program, and the newest it reads.
pub const FORMAT: u32 = 2;
/// The longest manifest that is read.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// The most pieces a checkpoint may have.
const PIECES_MAX: usize = 65_536;

/// What a complete checkpoint consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Counts incompatible changes of the layout in storage.
    pub format: u32,
    /// Name and version of the program that wrote it.
    pub program: String,
    /// The run it belongs to.
    pub run_id: String,
    /// Drawn anew by each writer, who knows its own manifest by it.
    pub nonce: String,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Root of the run's randomness.
    pub seed: u64,
    /// The state hash after `step`: 16 hexadecimal digits in the file.
    #[serde(with = "hex_u64")]
    pub state_hash: u64,
    /// [`Layout::fingerprint`](crate::Layout::fingerprint) of the model.
    pub model: String,
    /// Hash of the dataset's manifest.
    pub dataset: String,
    /// How many writers divided it among themselves.
    #[serde(default = "one")]
    pub shares: u32,
    /// Every object beside this one.
    pub pieces: Vec<PieceInfo>,
}

/// One object of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceInfo {
    /// Name below the checkpoint's folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 of its bytes, in hexadecimal.
    pub blake3: String,
    /// Hashes of its chunks, where it has more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<Chunks>,
    /// Of which elements of the flat space it has values: from, and up to; `"0..256"` in the file. Empty where it has none,
    /// or it is not told.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "spans")]
    pub holds: Vec<[u64; 2]>,
}

/// Hashes by which a part of a piece can be checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunks {
    /// Size of each chunk; the last may be shorter.
    pub bytes: u64,
    /// BLAKE3 of each, in hexadecimal.
    pub blake3: Vec<String>,
}

impl Chunks {
    /// As many hashes as a piece of so many bytes has chunks, and chunks of whole elements.
    fn fit(&self, bytes: u64) -> bool {
        let count = self.bytes > 0
            && self.bytes.is_multiple_of(8)
            && bytes.div_ceil(self.bytes) == self.blake3.len() as u64;
        count && self.blake3.iter().all(|hash| blake3::Hash::from_hex(hash).is_ok())
    }
}

fn one() -> u32 {
    1
}

/// Ranges, as they are stored.
pub(crate) fn as_pairs(ranges: &[Range<usize>]) -> Vec<[u64; 2]> {
    ranges.iter().map(|range| [range.start as u64, range.end as u64]).collect()
}

/// Ranges, as they are used; those that are none are empty.
pub(crate) fn as_ranges(pairs: &[[u64; 2]]) -> Vec<Range<usize>> {
    let index = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    pairs.iter().map(|&[start, end]| index(start)..index(end)).collect()
}

/// Why a manifest is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Its check does not cover its text: torn or corrupt.
    #[error("the manifest's check does not match its text: it was cut short or changed")]
    Check,
    /// Sound, but of a format this program does not know.
    #[error(
        "format {format}, written by {program}; this program reads formats up to {FORMAT}: use a newer one"
    )]
    TooNew {
        /// The manifest's format.
        format: u32,
        /// Who wrote it.
        program: String,
    },
    /// The check holds but the content makes no sense.
    #[error("the manifest makes no sense: {0}")]
    Nonsense(String),
}

impl Manifest {
    /// The piece of that name.
    pub fn piece(&self, name: &str) -> Option<&PieceInfo> {
        self.pieces.iter().find(|piece| piece.name == name)
    }

    /// Sum of the pieces' sizes.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().fold(0, |sum, piece| sum.saturating_add(piece.bytes))
    }

    /// The bytes to store.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads stored bytes back: the check first, then the format, then the rest.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let text = unseal(bytes).ok_or(ManifestError::Check)?;
        let nonsense = |error: serde_json::Error| ManifestError::Nonsense(error.to_string());
        let head: Head = serde_json::from_slice(text).map_err(nonsense)?;
        if head.format > FORMAT {
            return Err(ManifestError::TooNew { format: head.format, program: head.program });
        }
        let manifest: Manifest = serde_json::from_slice(text).map_err(nonsense)?;
        manifest.reject_nonsense()?;
        Ok(manifest)
    }

    fn reject_nonsense(&self) -> Result<(), ManifestError> {
        let mut names = HashSet::new();
        let odd = |piece: &&PieceInfo| {
            !is_plain_name(&piece.name)
                || blake3::Hash::from_hex(&piece.blake3).is_err()
                || piece.chunks.as_ref().is_some_and(|chunks| !chunks.fit(piece.bytes))
        };
        if self.format == 0 {
            Err(ManifestError::Nonsense("format 0".into()))
        } else if self.pieces.len() > PIECES_MAX {
            Err(ManifestError::Nonsense(format!("{} pieces; at most {PIECES_MAX}", self.pieces.len())))
        } else if let Some(piece) = self.pieces.iter().find(odd) {
            Err(ManifestError::Nonsense(format!("piece {:?} has an odd name or hash", piece.name)))
        } else if let Some(piece) = self.pieces.iter().find(|piece| !names.insert(&piece.name)) {
            Err(ManifestError::Nonsense(format!("piece {} is named twice", piece.name)))
        } else {
            Ok(())
        }
    }
}

/// What every format has.
#[derive(Deserialize)]
struct Head {
    format: u32,
    #[serde(default)]
    program: String,
}

/// A name that stays in its folder, whatever store it is used with.
fn is_plain_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=128).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// A u64 as 16 hexadecimal digits: JSON numbers are exact to 53 bits in most other tools.
pub(crate) mod hex_u64 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{value:016x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        u64::from_str_radix(&text, 16).map_err(D::Error::custom)
    }
}

/// Ranges as texts, one on a line.
mod spans {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(spans: &[[u64; 2]], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(spans.iter().map(|[start, end]| format!("{start}..{end}")))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<[u64; 2]>, D::Error> {
        let parse = |text: &String| {
            let (start, end) = text.split_once("..")?;
            let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
            (start < end).then_some([start, end])
        };
        let texts = Vec::<String>::deserialize(from)?;
        let spans =
            texts.iter().map(|text| parse(text).ok_or_else(|| D::Error::custom("a range that is none")));
        spans.collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::seal::{CHECK_OPENS, seal};
    use super::*;

    fn sample() -> Manifest {
        let hash = |bytes: &[u8]| blake3::hash(bytes).to_hex().to_string();
        let chunks = Chunks { bytes: 8, blake3: vec![hash(b"12345678"), hash(b"9")] };
        let config = PieceInfo {
            name: "config.json".into(),
            bytes: 2,
            blake3: hash(b"{}"),
            chunks: None,
            holds: Vec::new(),
        };
        let weights = PieceInfo {
            name: "model.safetensors".into(),
            bytes: 9,
            blake3: hash(b"123456789"),
            chunks: Some(chunks),
            holds: vec![[0, 4], [256, 260]],
        };
        Manifest {
            format: FORMAT,
            program: "mattock 0.1.0".into(),
            run_id: "quickstart-7f".into(),
            nonce: "0011".into(),
            step: 100,
            total_steps: 400,
            seed: u64::MAX,
            state_hash: 0x0123_4567_89ab_cdef,
            model: "m".into(),
            dataset: "d".into(),
            shares: 1,
            pieces: vec![config, weights],
        }
    }

    /// Whoever changes these bytes changes the format: see the policy in the module's header.
    #[test]
    fn bytes_are_pinned() {
        let golden = include_str!("manifest.golden.json");
        assert_eq!(String::from_utf8(sample().encode()).unwrap(), golden);
        assert_eq!(Manifest::decode(golden.as_bytes()).unwrap(), sample());
    }

    #[test]
    fn what_earlier_programs_wrote_is_read() {
        let golden = include_str!("manifest.v1.golden.json");
        let manifest = Manifest::decode(golden.as_bytes()).unwrap();
        let mut pieces = sample().pieces;
        pieces.truncate(1);
        assert_eq!(manifest, Manifest { format: 1, pieces, ..sample() });
    }

    #[test]
    fn hashes_that_do_not_fit_the_piece_are_refused() {
        let changes: [fn(&mut Chunks); 4] = [
            |chunks| chunks.bytes = 0,
            |chunks| chunks.bytes = 12,
            |chunks| drop(chunks.blake3.pop()),
            |chunks| chunks.blake3[1].push('0'),
        ];
        for change in changes {
            let mut manifest = sample();
            change(manifest.pieces[1].chunks.as_mut().unwrap());
            assert!(matches!(Manifest::decode(&manifest.encode()), Err(ManifestError::Nonsense(_))));
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let good = sample().encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Manifest::decode(&bad), Err(ManifestError::Check), "bit {bit}");
        }
    }

    #[test]
    fn any_cut_is_noticed() {
        let good = sample().encode();
        for length in 0..good.len() {
            assert_eq!(Manifest::decode(&good[..length]), Err(ManifestError::Check), "{length} bytes");
        }
    }

    #[test]
    fn a_newer_format_is_refused_by_name_whatever_else_it_holds() {
        let newer = seal("{\n  \"format\": 7,\n  \"program\": \"mattock 3.0.0\",\n  \"pieces\": 12");
        let error = Manifest::decode(&newer).unwrap_err();
        assert_eq!(error, ManifestError::TooNew { format: 7, program: "mattock 3.0.0".into() });
    }

    #[test]
    fn an_unknown_member_of_a_known_format_is_left_alone() {
        let text = String::from_utf8(sample().encode()).unwrap();
        let (open, _) = text.split_once(CHECK_OPENS).unwrap();
        let with_more = seal(&format!("{open},\n  \"later\": [1, 2]"));
        assert_eq!(Manifest::decode(&with_more).unwrap(), sample());
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in ["../run.json", "a/b", "", ".hidden", "a b", "x#1"] {
            let mut manifest = sample();
            manifest.pieces[0].name = name.into();
            let error = Manifest::decode(&manifest.encode()).unwrap_err();
            assert!(matches!(error, ManifestError::Nonsense(_)), "{name}");
        }
    }

    #[test]
    fn a_piece_named_twice_is_refused() {
        let mut manifest = sample();
        manifest.pieces.push(manifest.pieces[0].clone());
        assert!(matches!(Manifest::decode(&manifest.encode()), Err(ManifestError::Nonsense(_))));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::decode(&bytes);
        }

        #[test]
        fn decoding_sealed_text_never_panics(text in ".{0,200}") {
            let _ = Manifest::decode(&seal(&text));
        }

        #[test]
        fn what_is_encoded_decodes(step: u64, seed: u64, state_hash: u64, program in ".{0,20}", run_id in ".{0,20}") {
            let manifest = Manifest { step, seed, state_hash, program, run_id, ..sample() };
            prop_assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
        }
    }
}
