//! A dataset, wherever it lies: built on a local disk and mapped as a whole, or published and streamed.

use std::path::Path;

use crate::order::SampleOrder;
use crate::shards::Split;
use crate::{Corpus, DataError, Stream, Tokenizer};

/// An opened dataset.
#[derive(Debug)]
pub enum Dataset {
    /// On a local disk.
    Built(Corpus),
    /// In a store.
    Streamed(Stream),
}

impl Dataset {
    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        match self {
            Self::Built(corpus) => &corpus.tokenizer,
            Self::Streamed(stream) => stream.tokenizer(),
        }
    }

    /// What defines a run's samples, in hex.
    pub fn identity(&self) -> String {
        match self {
            Self::Built(corpus) => corpus.manifest.dataset_hash.clone(),
            Self::Streamed(stream) => stream.published().identity(),
        }
    }

    /// Cross entropy in nats per token of the training split under its own unigram distribution.
    pub fn unigram_loss(&self) -> f64 {
        match self {
            Self::Built(corpus) => corpus.manifest.unigram_loss,
            Self::Streamed(stream) => stream.published().unigram_loss,
        }
    }

    /// What it is, in a few lines for a person.
    pub fn summary(&self) -> String {
        match self {
            Self::Built(corpus) => corpus.manifest.to_string(),
            Self::Streamed(stream) => format!("{}\naddress     {}", stream.published(), stream.url()),
        }
    }

    /// Where it was built, if it was.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Built(corpus) => Some(corpus.folder()),
            Self::Streamed(_) => None,
        }
    }

    /// Tokens of a split.
    pub fn tokens(&self, split: Split) -> u64 {
        match (self, split) {
            (Self::Built(corpus), Split::Train) => corpus.train.len(),
            (Self::Built(corpus), Split::HeldOut) => corpus.held_out.len(),
            (Self::Streamed(stream), split) => stream.published().split(split).tokens,
        }
    }

    /// Samples of `context + 1` tokens of a split.
    pub fn samples(&self, split: Split, context: usize) -> u64 {
        match (self, split) {
            (Self::Streamed(stream), Split::Train) => stream.published().samples(context),
            _ => self.tokens(split).saturating_sub(1) / context as u64,
        }
    }

    /// The order of training samples in steps of `size` samples and micro-batches of `micro`.
    pub fn order(&self, seed: u64, context: usize, size: u32, micro: u32) -> SampleOrder {
        match self {
            Self::Built(corpus) => SampleOrder::new(seed, corpus.train.samples(context)),
            Self::Streamed(stream) => stream.published().order(seed, context, size, micro),
        }
    }

    /// From now on these micro-batches are this worker's; what is streamed is fetched ahead for them.
    pub fn follow(&self, order: &SampleOrder, step: u64, share: &[u32], micro: u32) {
        if let Self::Streamed(stream) = self {
            stream.follow(order, step, share, micro);
        }
    }

    /// Appends the `context + 1` tokens of a sample of a split.
    ///
    /// # Errors
    /// Where it is streamed, and cannot be fetched.
    ///
    /// # Panics
    /// Where there is no such sample.
    pub fn window(
        &self,
        split: Split,
        sample: u64,
        context: usize,
        out: &mut Vec<i32>,
    ) -> Result<(), DataError> {
        match (self, split) {
            (Self::Built(corpus), Split::Train) => corpus.train.window(sample, context, out),
            (Self::Built(corpus), Split::HeldOut) => corpus.held_out.window(sample, context, out),
            (Self::Streamed(stream), split) => return stream.window(split, sample, context, out),
        }
        Ok(())
    }
}
