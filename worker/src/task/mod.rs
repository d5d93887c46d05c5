//! What is trained: the contract by which users bring a model and data of their own.
//!
//! A model is a sequence of blocks, each a Burn module; a model that is not cut into blocks is a sequence of one.
//! Blocks are what parameters are sharded and gradients are summed by, so a task never mentions workers, ranks or
//! sums. What flows from one block to the next is a [`Carry`]; the last block returns the loss.
//!
//! # Invariants
//! 1. [`Task::batch`] and [`Task::forward`] are pure: the same samples and the same [`Pass`] give the same bits.
//! 2. All randomness comes from the [`Pass`], never from a rank, a clock or a global generator.

mod carry;
pub mod gpt;
mod outline;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use mattock_data::SampleOrder;
use mattock_data::keys::MicroBatchKey;
use mattock_kernels::Kernels;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::carry::Carry;
pub use self::outline::{Activations, Outline};
use crate::params::Space;
use crate::plan::{Batch, Table};

/// What a block returns.
pub enum Output<B: Backend> {
    /// The input of the next block.
    Next(Carry<B>),
    /// The last block's: the mean loss over the micro-batch, shape `[1]`.
    Loss(Tensor<B, 1>),
}

/// How a forward pass is run.
#[derive(Debug, Clone, Copy)]
pub enum Pass {
    /// For gradients: dropout is on, its masks drawn from the key.
    Train(MicroBatchKey),
    /// For measurement: no dropout.
    Evaluate,
}

/// From where a task is opened.
pub struct Source<'a> {
    /// The recipe's `[model]` table.
    pub model: &'a Table,
    /// The recipe's `[data]` table.
    pub data: &'a Table,
    /// Folder for what is built once and reused.
    pub cache: &'a Path,
    /// Is told what is under way, in words for a person.
    pub progress: &'a dyn Fn(&str),
}

impl Source<'_> {
    /// The `[model]` table as a configuration; a key that it does not know is an error.
    pub fn model<C: Serialize + DeserializeOwned>(&self) -> Result<C, TaskError> {
        read("model", self.model)
    }

    /// The `[data]` table as a configuration; a key that it does not know is an error.
    pub fn data<C: Serialize + DeserializeOwned>(&self) -> Result<C, TaskError> {
        read("data", self.data)
    }
}

/// Reads a table strictly. What the type itself does not refuse shows as a key that is lost on the way back.
fn read<C: Serialize + DeserializeOwned>(table: &'static str, value: &Table) -> Result<C, TaskError> {
    let fault = |reason: String| TaskError::Table { table, reason };
    let config: C = serde_json::from_value(value.clone().into()).map_err(|error| fault(error.to_string()))?;
    let known = serde_json::to_value(&config).map_err(|error| fault(error.to_string()))?;
    match value.keys().find(|&key| known.get(key).is_none()) {
        None => Ok(config),
        Some(key) => {
            let names: Vec<String> =
                known.as_object().into_iter().flatten().map(|(name, _)| format!("`{name}`")).collect();
            Err(fault(format!("unknown field `{key}`, expected one of {}", names.join(", "))))
        }
    }
}

/// Why a task could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// A table of the recipe does not fit.
    #[error("recipe table [{table}]: {reason}")]
    Table {
        /// `model` or `data`.
        table: &'static str,
        /// What is wrong, and what would do.
        reason: String,
    },
    /// The dataset cannot be built or read.
    #[error(transparent)]
    Data(#[from] mattock_data::DataError),
    /// Anything else that a task of one's own may meet.
    #[error("{0}")]
    Other(String),
}

/// A model and the data that it is trained on.
pub trait Task: Sized + Send + Sync + 'static {
    /// A block of the model.
    type Block<B: Backend>: Module<B>;
    /// A micro-batch on the host.
    type Batch: Send + 'static;

    /// Opens what the recipe's tables describe, building the dataset where it is not there yet.
    fn open(source: &Source<'_>) -> Result<Self, TaskError>;

    /// The model's blocks with their initial parameters, a pure function of `seed`: one after the other, so that nobody has to
    /// hold all of them at once.
    fn blocks<B: Backend>(&self, seed: u64, device: &B::Device) -> impl Iterator<Item = Self::Block<B>>;

    /// The same blocks, for whoever looks at their shapes and puts in other values. A task that can make them without drawing
    /// any says so here.
    fn shapes<B: Backend>(&self, device: &B::Device) -> impl Iterator<Item = Self::Block<B>> {
        self.blocks(0, device)
    }

    /// The shapes of what would be opened, for who plans a run. A task that knows them without its data says so here, and draws
    /// no parameters for it.
    ///
    /// # Errors
    /// As [`Task::open`].
    fn outline(source: &Source<'_>) -> Result<Outline, TaskError> {
        let task = Self::open(source)?;
        let space = Space::of_task(&task);
        Ok(Outline { space, tokens_per_sample: task.tokens_per_sample(), activations: None })
    }

    /// Parameters to start from in place of those that [`Task::blocks`] draws, over the whole flat space: the same on all
    /// workers. `None` where they are drawn.
    ///
    /// # Errors
    /// Where they cannot be read.
    fn pretrained(&self, space: &Space) -> Result<Option<Vec<f32>>, TaskError> {
        let _ = space;
        Ok(None)
    }

    /// What the parameters of block `index` are called by, before their dotted path; empty for none.
    fn prefix(&self, index: usize) -> String {
        let _ = index;
        String::new()
    }

    /// Training samples in an epoch.
    fn samples(&self) -> u64;

    /// Tokens (or whatever throughput is counted in) of a sample.
    fn tokens_per_sample(&self) -> u64 {
        1
    }

    /// The order in which they are trained on, in steps of this shape: a pure function, whoever trains.
    fn order(&self, seed: u64, batch: &Batch) -> SampleOrder {
        let _ = batch;
        SampleOrder::new(seed, self.samples())
    }

    /// Is told which micro-batches of a step are this worker's, before it asks for the first: for a task that fetches
    /// ahead. What [`Task::batch`] returns must not depend on it.
    fn follow(&self, order: &SampleOrder, batch: &Batch, step: u64, share: &[u32]) {
        let _ = (order, batch, step, share);
    }

    /// The training samples of these indices, each below [`Task::samples`], as one micro-batch.
    ///
    /// # Errors
    /// Where they cannot be read; this worker then cannot go on.
    fn batch(&self, samples: &[u64]) -> Result<Self::Batch, TaskError>;

    /// The token ids of a batch, one row per sample; `None` where samples are no tokens.
    fn token_ids<'a>(&self, batch: &'a Self::Batch) -> Option<&'a [i32]> {
        let _ = batch;
        None
    }

    /// Held-out samples, in batches of `size` (the last may be smaller), with the number of samples of each.
    ///
    /// # Errors
    /// Where they cannot be read.
    fn held_out(&self, size: usize) -> Result<Vec<(usize, Self::Batch)>, TaskError> {
        let _ = size;
        Ok(Vec::new())
    }

    /// Runs one block. `input` is `None` for the first; the last returns [`Output::Loss`].
    fn forward<B: Kernels>(
        &self,
        block: &Self::Block<B>,
        input: Option<Carry<B>>,
        batch: &Self::Batch,
        pass: Pass,
    ) -> Output<B>;

    /// What is known of model and data, for the summary and the checkpoints.
    fn facts(&self) -> Facts;
}

/// How text is drawn from a model.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// Tokens to draw.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Of the draw.
    pub seed: u64,
}

/// What is known of model and data.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// BLAKE3 of the dataset's contents, in hex.
    pub dataset_hash: String,
    /// Cross entropy in nats of a unigram model of the same tokens.
    pub unigram_loss: Option<f64>,
    /// `config.json` of the checkpoints, in Hugging Face's form where the model has one.
    pub config_json: String,
    /// `tokenizer.json` of the checkpoints.
    pub tokenizer_json: Option<Arc<[u8]>>,
    /// What the dataset is, in a few lines for a person.
    pub summary: String,
    /// Where the dataset was built.
    pub dataset: Option<PathBuf>,
}
