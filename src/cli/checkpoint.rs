//! `mattock checkpoint`: the arguments.

use clap::{Args, Subcommand};

use crate::exit::EXIT_CODES;

/// Look at checkpoints
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// What to do with them.
    #[command(subcommand)]
    pub action: CheckpointAction,
}

/// What `mattock checkpoint` can do.
#[derive(Debug, Subcommand)]
pub enum CheckpointAction {
    /// List the complete checkpoints under a prefix
    #[command(after_help = EXIT_CODES)]
    Ls(CheckpointUrl),
    /// Read every part of a checkpoint and compare its hash
    #[command(after_help = EXIT_CODES)]
    Verify(CheckpointUrl),
    /// Print a checkpoint's manifest
    #[command(after_help = EXIT_CODES)]
    Show(CheckpointUrl),
}

/// Where checkpoints are.
#[derive(Debug, Args)]
pub struct CheckpointUrl {
    /// A checkpoint or a prefix of them: a folder, file:// or s3://
    pub url: String,
}
