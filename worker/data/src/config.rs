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
    fn a_wrong_tokenizer_is_told_what_would_do() {
        let error = parse(r#"{"text": [], "tokenizer": {"kind": "words"}}"#).unwrap_err();
        assert!(error.contains("bpe"), "{error}");
    }
}
