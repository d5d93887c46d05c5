//! Token datasets: from text files to memory-mapped shards, and from (seed, step, micro-batch) to samples.
//!
//! A dataset is built once, under a name that is the hash of all that went into it, and mapped from then on. Where
//! training stands is one integer, the step: [`order`] turns it into samples without counting anything.
//!
//! Deliberately absent: ranks and workers. Who computes a micro-batch has no influence on what is in it.

pub mod builder;
pub mod config;
mod error;
pub mod keys;
pub mod manifest;
pub mod order;
pub mod sources;
pub mod tokenizer;
pub mod tokens;

pub use builder::{Corpus, Progress, open_or_build};
pub use config::{TextConfig, TokenizerConfig};
pub use error::DataError;
pub use manifest::Manifest;
pub use order::SampleOrder;
pub use sources::{registry_crates, sources};
pub use tokenizer::Tokenizer;
pub use tokens::Tokens;
