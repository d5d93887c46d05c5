//! What a checkpoint looks like in storage. All of it is pure: bytes in, values out.
//!
//! ```text
//! PREFIX/run.json                    whose prefix this is: created once
//! PREFIX/step-00000100/
//!     model.safetensors              weights, as Hugging Face has them; or several files and
//!     model.safetensors.index.json   which of them has which tensor
//!     optimizer.safetensors          NAME.m and NAME.v for every weight NAME; or several files
//!     exponents.bin                  block exponents: magic, count, little-endian i16
//!     config.json  tokenizer.json  recipe.toml
//!     manifest.json                  written last: names, sizes and BLAKE3 of all the above
//! ```
//!
//! Where several shares write, files of tensors are named after attempt and share, `model-KEY-00002-of-00004.safetensors`, and
//! until there is a manifest `share-KEY-00002-of-00004.json` lies beside them. Moments are divided anywhere: `NAME.m[512..768]`
//! has these elements of the flattened tensor.
//!
//! # Invariants
//! 1. No manifest, no checkpoint: whatever else lies in the folder is an attempt.
//! 2. A manifest names every byte it vouches for, its own included.
//! 3. Nothing read from storage is trusted with an index or a length before it is checked.

pub(crate) mod assemble;
mod digest;
pub(crate) mod entries;
pub(crate) mod exponents;
pub(crate) mod manifest;
pub(crate) mod piece;
pub(crate) mod plan;
pub(crate) mod record;
pub(crate) mod safetensors;
mod seal;

pub(crate) use digest::Digest;
pub use manifest::FORMAT;

/// Weights.
pub const MODEL: &str = "model.safetensors";
/// Which file of weights has which tensor.
pub const INDEX: &str = "model.safetensors.index.json";
/// First and second moments.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// Block exponents.
pub const EXPONENTS: &str = "exponents.bin";
/// The model's shape.
pub const CONFIG: &str = "config.json";
/// The tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// The resolved recipe.
pub const RECIPE: &str = "recipe.toml";
/// The manifest, written last.
pub const MANIFEST: &str = "manifest.json";
/// Whose prefix this is.
pub const RUN: &str = "run.json";

/// Suffix of a first moment's name.
pub(crate) const M: &str = ".m";
/// Suffix of a second moment's name.
pub(crate) const V: &str = ".v";

/// What a file of tensors holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Weights,
    Moments,
}

impl Kind {
    /// Of a piece of that name, if it has tensors.
    pub(crate) fn of(name: &str) -> Option<Kind> {
        let stem = name.strip_suffix(".safetensors")?;
        [Kind::Weights, Kind::Moments].into_iter().find(|kind| {
            stem.strip_prefix(kind.stem()).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        })
    }

    /// How the names of its files begin.
    pub(crate) fn stem(self) -> &'static str {
        match self {
            Kind::Weights => "model",
            Kind::Moments => "optimizer",
        }
    }

    /// What follows a tensor's name, for each array.
    pub(crate) fn suffixes(self) -> &'static [&'static str] {
        match self {
            Kind::Weights => &[""],
            Kind::Moments => &[M, V],
        }
    }
}

/// The folder of a step's checkpoint.
pub fn step_folder(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step whose folder this is, if it is one.
pub(crate) fn parse_step_folder(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_folder(step) == name).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_names() {
        for (name, kind) in [
            (MODEL, Some(Kind::Weights)),
            ("model-00112233-00001-of-00004.safetensors", Some(Kind::Weights)),
            (OPTIMIZER, Some(Kind::Moments)),
            ("optimizer-00001-of-00002.safetensors", Some(Kind::Moments)),
            (INDEX, None),
            ("modelled.safetensors", None),
            (EXPONENTS, None),
        ] {
            assert_eq!(Kind::of(name), kind, "{name}");
        }
    }

    #[test]
    fn step_folders_sort_and_parse_back() {
        assert_eq!(step_folder(100), "step-00000100");
        assert!(step_folder(99) < step_folder(100));
        for step in [0, 7, 99_999_999, 100_000_000, u64::MAX] {
            assert_eq!(parse_step_folder(&step_folder(step)), Some(step));
        }
        for other in ["step-1", "step-+0000100", "step-000000100", "steps", "step-", "best"] {
            assert_eq!(parse_step_folder(other), None, "{other}");
        }
    }
}
