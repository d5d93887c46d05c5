//! Text to tokens and back: bytes, or byte-level pair encoding by Hugging Face's `tokenizers`.

use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, PreTokenizerWrapper, Tokenizer as HuggingFace};

use crate::DataError;

/// Bytes of text that a tokenizer is trained on at most: more does not change small vocabularies, and takes minutes.
const TRAINING_BYTES_MAX: usize = 16 << 20;

/// Text to tokens and back.
pub struct Tokenizer {
    inner: HuggingFace,
    json: Vec<u8>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab", &self.vocab()).finish_non_exhaustive()
    }
}

fn fault(error: impl std::fmt::Display) -> DataError {
    DataError::Tokenizer(error.to_string())
}

impl Tokenizer {
    /// A token per byte: pair encoding without a single merge.
    pub fn bytes() -> Result<Self, DataError> {
        Self::train(&[], 256)
    }

    /// Trains `vocab` tokens, the 256 bytes included, on documents in their order.
    pub fn train(documents: &[&str], vocab: u32) -> Result<Self, DataError> {
        if vocab < 256 {
            return Err(fault(format!("vocab = {vocab} is less than the 256 bytes that any text may hold")));
        }
        let mut inner = HuggingFace::new(ModelWrapper::BPE(BPE::default()));
        inner.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true))));
        inner.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(false, true, true))));
        let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
            .vocab_size(vocab as usize)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(Vec::<AddedToken>::new())
            .build()
            .into();
        let mut left = TRAINING_BYTES_MAX;
        let sample = documents.iter().take_while(|document| {
            let room = left > 0;
            left = left.saturating_sub(document.len());
            room
        });
        inner.train(&mut trainer, sample.copied()).map_err(fault)?;
        Self::from_json(inner.to_string(false).map_err(fault)?.into_bytes())
    }

    /// Reads `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        Self::from_json(std::fs::read(path).map_err(DataError::io("read tokenizer", path))?)
    }

    /// From the contents of `tokenizer.json`.
    pub fn from_json(json: Vec<u8>) -> Result<Self, DataError> {
        let inner = HuggingFace::from_bytes(&json).map_err(fault)?;
        Ok(Self { inner, json })
    }

    /// The contents of `tokenizer.json`.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// Tokens that there are.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Text to tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok(self.inner.encode_fast(text, false).map_err(fault)?.get_ids().to_vec())
    }

    /// Texts to tokens, in parallel.
    pub fn encode_all(&self, texts: Vec<&str>) -> Result<Vec<Vec<u32>>, DataError> {
        let encoded = self.inner.encode_batch_fast(texts, false).map_err(fault)?;
        Ok(encoded.into_iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// Tokens to text; what is not UTF-8 is replaced.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner.decode(tokens, false).map_err(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "fn main() { println!(\"größe 你好\"); }\n\tlet x = 1;\n";

    #[test]
    fn bytes_are_a_token_each() {
        let tokenizer = Tokenizer::bytes().unwrap();
        assert_eq!(tokenizer.vocab(), 256);
        let tokens = tokenizer.encode(TEXT).unwrap();
        assert_eq!(tokens.len(), TEXT.len());
        assert_eq!(tokenizer.decode(&tokens).unwrap(), TEXT);
    }

    #[test]
    fn pair_encoding_is_shorter_and_comes_back() {
        let documents = vec![TEXT; 50];
        let tokenizer = Tokenizer::train(&documents, 300).unwrap();
        let tokens = tokenizer.encode(TEXT).unwrap();
        assert!(tokens.len() < TEXT.len());
        assert_eq!(tokenizer.decode(&tokens).unwrap(), TEXT);
        assert_eq!(Tokenizer::from_json(tokenizer.json().to_vec()).unwrap().encode(TEXT).unwrap(), tokens);
    }

    #[test]
    fn training_is_reproducible() {
        let documents = vec!["abc abd abe bcd cde", "the ring, the ring, a gradient", "zebra abra cadabra"];
        let json = || Tokenizer::train(&documents, 280).unwrap().json().to_vec();
        assert_eq!(json(), json());
    }

    #[test]
    fn fewer_tokens_than_bytes_are_refused() {
        assert!(Tokenizer::train(&[], 100).unwrap_err().to_string().contains("256"));
    }
}
