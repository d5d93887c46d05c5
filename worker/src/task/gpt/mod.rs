//! The built-in task: a decoder-only language model on text.

mod config;
mod inspect;
mod model;
mod outline;
mod pretrained;
mod sampling;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use mattock_data::{Dataset, SampleOrder, Split, Stream, StreamConfig};

pub use self::config::GptConfig;
pub use self::inspect::{Inspected, inspect};
pub use self::model::GptBlock;
use self::pretrained::Pretrained;
pub use self::pretrained::missing_hash;
pub use self::sampling::{Generator, GeneratorError};
use super::{Carry, Facts, Outline, Output, Pass, Source, Task, TaskError};
use crate::params::Space;
use crate::plan::Batch;
use crate::shards;
use mattock_kernels::Kernels;

/// A GPT-2-shaped language model on a corpus of text.
pub struct Gpt {
    config: GptConfig,
    data: Dataset,
    /// Where parameters come from that are not drawn.
    pretrained: Option<Pretrained>,
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
        let data = open(source)?;
        if data.samples(Split::Train, config.context) == 0 {
            let reason = format!(
                "the training split has {} tokens, too few (or shards too short) for one sample of context {}",
                data.tokens(Split::Train),
                config.context
            );
            return Err(TaskError::Table { table: "data", reason });
        }
        let pretrained = |url| Pretrained::open(url, &config, data.tokenizer().vocab());
        let pretrained = config
            .init
            .as_deref()
            .map(pretrained)
            .transpose()
            .map_err(|error| TaskError::Table { table: "model", reason: format!("init: {error}") })?;
        Ok(Self { config, data, pretrained })
    }

    fn outline(source: &Source<'_>) -> Result<Outline, TaskError> {
        let config: GptConfig = source.model()?;
        if let Some(reason) = config.fault() {
            return Err(TaskError::Table { table: "model", reason });
        }
        Ok(outline::of(&config, outline::vocab(source)?))
    }

    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> impl Iterator<Item = GptBlock<B>> {
        let seed = self.pretrained.is_none().then_some(seed);
        model::blocks(&self.config, self.data.tokenizer().vocab(), seed, device)
    }

    fn shapes<B: Backend>(&self, device: &B::Device) -> impl Iterator<Item = GptBlock<B>> {
        model::blocks(&self.config, self.data.tokenizer().vocab(), None, device)
    }

    fn pretrained(&self, space: &Space) -> Result<Option<Vec<f32>>, TaskError> {
        let load = |pretrained: &Pretrained| pretrained.load(space);
        self.pretrained.as_ref().map(load).transpose().map_err(|error| TaskError::Other(error.to_string()))
    }

    fn prefix(&self, index: usize) -> String {
        self.config.prefix(index)
    }

    fn samples(&self) -> u64 {
        self.data.samples(Split::Train, self.config.context)
    }

    fn tokens_per_sample(&self) -> u64 {
        self.config.context as u64
    }

    fn order(&self, seed: u64, batch: &Batch) -> SampleOrder {
        self.data.order(seed, self.config.context, batch.size, batch.micro)
    }

    fn follow(&self, order: &SampleOrder, batch: &Batch, step: u64, share: &[u32]) {
        self.data.follow(order, step, share, batch.micro);
    }

    fn batch(&self, samples: &[u64]) -> Result<TokenBatch, TaskError> {
        self.windows(Split::Train, samples)
    }

    fn token_ids<'a>(&self, batch: &'a TokenBatch) -> Option<&'a [i32]> {
        Some(&batch.tokens)
    }

    fn held_out(&self, size: usize) -> Result<Vec<(usize, TokenBatch)>, TaskError> {
        let samples: Vec<u64> = (0..self.data.samples(Split::HeldOut, self.config.context)).collect();
        let batch = |chunk: &[u64]| Ok((chunk.len(), self.windows(Split::HeldOut, chunk)?));
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
            dataset_hash: self.data.identity(),
            unigram_loss: Some(self.data.unigram_loss()),
            config_json: self.config.hugging_face(self.data.tokenizer().vocab()),
            tokenizer_json: Some(self.data.tokenizer().json().into()),
            summary: self.data.summary(),
            dataset: self.data.folder().map(ToOwned::to_owned),
        }
    }
}

/// Opens what `[data]` names: a published dataset, or text, which is built into one.
fn open(source: &Source<'_>) -> Result<Dataset, TaskError> {
    if source.data.contains_key("url") {
        let config: StreamConfig = source.data()?;
        let fault = |reason| TaskError::Table { table: "data", reason };
        let cache_bytes = config.cache_bytes().map_err(fault)?;
        let store = shards::open(&config.url).map_err(mattock_data::DataError::from)?;
        return Ok(Dataset::Streamed(Stream::open(store, source.cache, cache_bytes)?));
    }
    let mut progress = |state: mattock_data::Progress| (source.progress)(&state.to_string());
    let corpus = mattock_data::open_or_build(&source.data()?, source.cache, &mut progress)?;
    Ok(Dataset::Built(corpus))
}

impl Gpt {
    fn windows(&self, split: Split, samples: &[u64]) -> Result<TokenBatch, TaskError> {
        let context = self.config.context;
        let mut batch =
            TokenBatch { tokens: Vec::with_capacity(samples.len() * (context + 1)), rows: samples.len() };
        for &sample in samples {
            self.data.window(split, sample, context, &mut batch.tokens)?;
        }
        Ok(batch)
    }
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
