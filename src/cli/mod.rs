//! The command line: one file per subcommand, each with its arguments and what it does with them.
//!
//! Arguments are parsed once into structs without loose ends; nothing here knows of tensors, sockets or
//! object stores.

pub mod checkpoint;
pub mod coordinator;
pub mod data;
pub mod generate;
pub mod recipe;
pub mod train;
pub mod worker;

#[cfg(test)]
mod tests;

use clap::{Parser, Subcommand};

use crate::exit::EXIT_CODES;

/// Train a model on any number of workers, with the same bits on any number of workers
#[derive(Debug, Parser)]
#[command(name = "mattock", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Look at a recipe without training
    Recipe(recipe::RecipeArgs),
}
