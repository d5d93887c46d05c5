//! `mattock data`: the arguments.

use clap::{Args, Subcommand};

use super::recipe::RecipeFile;
use crate::exit::EXIT_CODES;

/// Build or show a recipe's dataset
#[derive(Debug, Args)]
pub struct DataArgs {
    /// What to do with it.
    #[command(subcommand)]
    pub action: DataAction,
}

/// What `mattock data` can do.
#[derive(Debug, Subcommand)]
pub enum DataAction {
    /// Build a recipe's dataset now rather than when training starts
    #[command(after_help = EXIT_CODES)]
    Build(RecipeFile),
    /// Print the manifest of a recipe's dataset
    #[command(after_help = EXIT_CODES)]
    Show(RecipeFile),
}
