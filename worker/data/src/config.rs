//! The `[data]` table of tasks on text.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Text files, and how they become tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Globs or folders; `$VAR` and `~` at the start are expanded, `$CARGO_HOME` as Cargo does.
    pub text: Vec<String>,
    /// How text becomes tokens.
    #[serde(default = "bytes")]
    pub tokenizer: TokenizerConfig,
    /// Share of the tokens that is never trained on.
    #[serde(default = "one_percent")]
    pub held_out: f64,
}

/// A published dataset, streamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConfig {
    /// A folder, `file://` or `s3://bucket/prefix`.
    pub url: String,
    /// The most that the cache of shards takes on disk, such as `10GiB`.
    #[serde(default = "ten_gibibytes")]
    pub cache: String,
}

impl StreamConfig {
    /// Bytes of the cache.
    ///
    /// # Errors
    /// Says in words what is wrong with it.
    pub fn cache_bytes(&self) -> Result<u64, String> {
        parse_size(&self.cache).map_err(|why| format!("cache = {:?} is no size: {why}", self.cache))
    }
}

/// A number of bytes with a unit, such as `64KiB`.
///
/// # Errors
/// Says in words what is wrong with it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        unit => return Err(format!("'{unit}' is no unit: B, KiB, MiB and GiB are, and KB, MB and GB")),
    };
    let number: u64 = digits.parse().map_err(|error| format!("'{digits}' is no number: {error}"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text} is too much"))
}

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected { kind = \"bytes\" }, { kind = \"bpe\", vocab = N } or { file = \"tokenizer.json\" }"
)]
pub enum TokenizerConfig {
    /// Trained on the text, or none at all.
    Kind(TokenizerKind),
    /// A file in Hugging Face's format.
    File(TokenizerFile),
}

/// A tokenizer that is made here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum TokenizerKind {
    /// A token per byte.
    Bytes {},
    /// Byte-level pair encoding, trained on the text.
    Bpe {
        /// Tokens, the 256 bytes included.
        vocab: u32,
    },
}

/// A tokenizer from elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerFile {
    /// `tokenizer.json`.
    pub file: PathBuf,
}

fn bytes() -> TokenizerConfig {
    TokenizerConfig::Kind(TokenizerKind::Bytes {})
}

fn ten_gibibytes() -> String {
    "10GiB".to_owned()
}

fn one_percent() -> f64 {
    0.01
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<TextConfig, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn the_three_tokenizers_are_told_apart() {
        let kind = |json: &str| parse(&format!(r#"{{"text": [], "tokenizer": {json}}}"#)).unwrap().tokenizer;
        assert_eq!(kind(r#"{"kind": "bytes"}"#), bytes());
        assert_eq!(
            kind(r#"{"kind": "bpe", "vocab": 512}"#),
            TokenizerConfig::Kind(TokenizerKind::Bpe { vocab: 512 })
        );
        let file = TokenizerFile { file: "t.json".into() };
        assert_eq!(kind(r#"{"file": "t.json"}"#), TokenizerConfig::File(file));
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("4B"), Ok(4));
        assert_eq!(parse_size("64KiB"), Ok(65536));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("12"), Ok(12));
        assert!(parse_size("4 parsecs").unwrap_err().contains("parsecs"));
        assert!(parse_size("B").is_err());
        assert!(parse_size("99999999TiB").unwrap_err().contains("too much"));
    }

    #[test]
    fn a_wrong_tokenizer_is_told_what_would_do() {
        let error = parse(r#"{"text": [], "tokenizer": {"kind": "words"}}"#).unwrap_err();
        assert!(error.contains("bpe"), "{error}");
    }
}
