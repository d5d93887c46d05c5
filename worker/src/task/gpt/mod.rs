//! The built-in task: a decoder-only language model on text.

mod config;
mod model;
mod sampling;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use mattock_data::{Corpus, TextConfig, Tokens as TokenFile};

pub use self::config::GptConfig;
pub use self::model::GptBlock;
pub use self::sampling::{Generator, GeneratorError};
use super::{Carry, Facts, Output, Pass, Source, Task, TaskError};
use mattock_kernels::Kernels;

/// A GPT-2-shaped language model on a corpus of text.
pub struct Gpt {
    config: GptConfig,
    corpus: Corpus,
}

/// Tokens of a micro-batch: rows of `context + 1`.
pub struct TokenBatch {
    tokens: Vec<i32>,
    rows: usize,
}

impl Task for Gpt {
    type Block<B: Backend> = GptBlock<B>;
    type Batch = TokenBatch;

    fn open(source: &Source<'_>) -> Result<Self, TaskError> {
        let config: GptConfig = source.model()?;
        if let Some(reason) = config.fault() {
            return Err(TaskError::Table { table: "model", reason });
        }
        let text: TextConfig = source.data()?;
        let mut progress = |state: mattock_data::Progress| (source.progress)(&state.to_string());
        let corpus = mattock_data::open_or_build(&text, source.cache, &mut progress)?;
        if corpus.train.samples(config.context) == 0 {
            let reason = format!(
                "the training split has {} tokens, too few for one sample of context {}",
                corpus.train.len(),
                config.context
            );
            return Err(TaskError::Table { table: "data", reason });
        }
        Ok(Self { config, corpus })
    }

    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> Vec<GptBlock<B>> {
        model::blocks(&self.config, self.corpus.tokenizer.vocab(), seed, device)
    }

    fn prefix(&self, index: usize) -> String {
        self.config.prefix(index)
    }

    fn samples(&self) -> u64 {
        self.corpus.train.samples(self.config.context)
    }

    fn tokens_per_sample(&self) -> u64 {
        self.config.context as u64
    }

    fn batch(&self, samples: &[u64]) -> TokenBatch {
        windows(&self.corpus.train, samples, self.config.context)
    }

    fn token_ids<'a>(&self, batch: &'a TokenBatch) -> Option<&'a [i32]> {
        Some(&batch.tokens)
    }

    fn held_out(&self, size: usize) -> Vec<(usize, TokenBatch)> {
        let samples: Vec<u64> = (0..self.corpus.held_out.samples(self.config.context)).collect();
        let batch = |chunk: &[u64]| (chunk.len(), windows(&self.corpus.held_out, chunk, self.config.context));
        samples.chunks(size).map(batch).collect()
    }

    fn forward<B: Kernels>(
        &self,
        block: &GptBlock<B>,
        input: Option<Carry<B>>,
        batch: &TokenBatch,
        pass: Pass,
    ) -> Output<B> {
        block.forward(input, |device| batch.tensors(device), pass)
    }

    fn facts(&self) -> Facts {
        Facts {
            dataset_hash: self.corpus.manifest.dataset_hash.clone(),
            unigram_loss: Some(self.corpus.manifest.unigram_loss),
            config_json: self.config.hugging_face(self.corpus.tokenizer.vocab()),
            tokenizer_json: Some(self.corpus.tokenizer.json().into()),
            summary: self.corpus.manifest.to_string(),
            dataset: Some(self.corpus.folder().to_owned()),
        }
    }
}

fn windows(tokens: &TokenFile, samples: &[u64], context: usize) -> TokenBatch {
    let mut batch =
        TokenBatch { tokens: Vec::with_capacity(samples.len() * (context + 1)), rows: samples.len() };
    for &sample in samples {
        tokens.window(sample, context, &mut batch.tokens);
    }
    batch
}

impl TokenBatch {
    fn tensors<B: Backend>(&self, device: &B::Device) -> model::Tokens<B> {
        let width = self.tokens.len() / self.rows;
        let part = |shift: usize| -> Vec<i32> {
            self.tokens.chunks(width).flat_map(|row| &row[shift..shift + width - 1]).copied().collect()
        };
        let inputs = TensorData::new(part(0), [self.rows, width - 1]);
        let targets = TensorData::new(part(1), [self.rows * (width - 1)]);
        model::Tokens {
            inputs: Tensor::<B, 2, Int>::from_data(inputs, device),
            targets: Tensor::<B, 1, Int>::from_data(targets, device),
        }
    }
}
