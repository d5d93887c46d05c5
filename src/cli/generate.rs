//! `mattock generate`: the arguments.

use clap::Args;

use crate::exit::EXIT_CODES;

const EXAMPLES: &str = "\
Examples:
  mattock generate --checkpoint runs/first/checkpoints --prompt 'pub fn '
  mattock generate --checkpoint s3://bucket/run --prompt 'impl ' --tokens 200 --temperature 0
";

/// Continue a text with a trained model
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct GenerateArgs {
    /// A checkpoint, or a prefix of which the newest complete one is taken: a folder, file:// or s3://
    #[arg(long, value_name = "URL")]
    pub checkpoint: String,
    /// The text to go on from
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Tokens to sample
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub tokens: u32,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value = "0.8")]
    pub temperature: f64,
    /// Root of the sampling's randomness
    #[arg(long, value_name = "SEED", default_value = "0")]
    pub seed: u64,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
}
