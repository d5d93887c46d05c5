//! Token datasets: from text files to memory-mapped shards, and from (seed, step, micro-batch) to samples.
//!
//! A dataset is built once, under a name that is the hash of all that went into it, and mapped from then on. It may be
//! published: cut into shards in a store ([`publish`](mod@publish)), which are streamed through a cache on disk
//! ([`Stream`]). Where training stands is one integer, the step: [`order`] turns it into samples without counting anything.
//!
//! Whole shards are fetched, rather than the blocks that single samples lie in: that would keep a fully random order, but a
//! sample is some hundred bytes to some kilobytes, and a small model reads thousands a second, each a request that a
//! store answers in milliseconds and bills. `windows.rs` has the order that makes whole shards do.
//!
//! Deliberately absent: ranks and workers. Who computes a micro-batch has no influence on what is in it.

pub mod builder;
mod cache;
pub mod config;
pub mod dataset;
mod error;
mod fetch;
pub mod keys;
pub mod manifest;
pub mod order;
mod permutation;
pub mod publish;
pub mod shards;
pub mod sources;
pub mod store;
pub mod stream;
pub mod tokenizer;
pub mod tokens;
mod windows;

pub use builder::{Corpus, Progress, open_or_build};
pub use config::{StreamConfig, TextConfig, TokenizerConfig};
pub use dataset::Dataset;
pub use error::DataError;
pub use manifest::Manifest;
pub use order::SampleOrder;
pub use publish::{publish, publish_made};
pub use shards::{Cutting, Published, Split};
pub use sources::{registry_crates, sources};
pub use store::{ShardStore, StoreFault};
pub use stream::Stream;
pub use tokenizer::Tokenizer;
pub use tokens::Tokens;
