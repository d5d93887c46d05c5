//! `mattock train`: the arguments.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::Args;

use super::recipe::RecipeFile;
use crate::exit::EXIT_CODES;

const EXAMPLES: &str = "\
Examples:
  mattock train configs/quickstart.toml
  mattock train configs/quickstart.toml --workers 4 --set train.steps=1000
  mattock train configs/quickstart.toml --out runs/first --resume
";

/// Train a model as a recipe says, with a coordinator and workers on this machine
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct TrainArgs {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Worker processes to start; the result is the same for any number
    #[arg(long, value_name = "N", default_value = "2")]
    pub workers: NonZeroU32,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// The run's folder [default: a fresh runs/NAME-DATE-TIME]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on from the newest checkpoint, or from that of STEP
    #[arg(long, value_name = "STEP", num_args = 0..=1, require_equals = true)]
    pub resume: Option<Option<u64>>,
    /// Remove what --out and the checkpoint prefix hold, and start afresh
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
    /// Print one JSON object about the run on standard output at the end
    #[arg(long)]
    pub json: bool,
}
