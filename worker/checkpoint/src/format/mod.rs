//! What a checkpoint looks like in storage. All of it is pure: bytes in, values out.
//!
//! ```text
//! PREFIX/run.json                    whose prefix this is: created once
//! PREFIX/step-00000100/
//!     model.safetensors              weights, as Hugging Face has them
//!     optimizer.safetensors          NAME.m and NAME.v for every weight NAME
//!     exponents.bin                  block exponents: magic, count, little-endian i16
//!     config.json  tokenizer.json  recipe.toml
//!     manifest.json                  written last: names, sizes and BLAKE3 of all the above
//! ```
//!
//! # Invariants
//! 1. No manifest, no checkpoint: whatever else lies in the folder is an attempt.
//! 2. A manifest names every byte it vouches for, its own included.
//! 3. Nothing read from storage is trusted with an index or a length before it is checked.

pub(crate) mod exponents;
pub(crate) mod manifest;
pub(crate) mod piece;
pub(crate) mod safetensors;

pub use manifest::FORMAT;

/// Weights.
pub const MODEL: &str = "model.safetensors";
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
