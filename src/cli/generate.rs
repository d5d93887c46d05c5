//! `mattock generate`: continues a text with a trained model.

use std::io::Write;

use anyhow::anyhow;
use clap::Args;
use mattock_checkpoint::{Foreign, Location, Which, load_weights, show};
use mattock_worker::storage;
use mattock_worker::task::Sampling;
use mattock_worker::task::gpt::Generator;

use super::checkpoint::locate;
use crate::exit::{EXIT_CODES, Exit, Failure};

const EXAMPLES: &str = "\
Examples:
  mattock generate --checkpoint runs/first/checkpoints --prompt 'pub fn '
  mattock generate --checkpoint s3://bucket/run --prompt 'impl ' --tokens 200 --temperature 0
";

/// Continue a text with a trained model
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct GenerateArgs {
    /// A checkpoint, a prefix of which the newest complete one is taken, or what transformers saved of a GPT-2 and its
    /// tokenizer: a folder, file:// or s3://
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
}

/// Runs `mattock generate`; `out` is standard output.
///
/// # Errors
/// Bad input where there is no such checkpoint, or it holds no language model.
pub fn run(args: &GenerateArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let (location, step) = locate(&args.checkpoint)?;
    let request = Sampling { tokens: args.tokens as usize, temperature: args.temperature, seed: args.seed };
    if step.is_none() && Foreign::is_at(&location).map_err(Failure::bad_input)? {
        let (generator, parameters) = Generator::open(&args.checkpoint).map_err(Failure::bad_input)?;
        let text = generator.text(&parameters, &args.prompt, &request).map_err(Failure::bad_input)?;
        writeln!(out, "{text}").map_err(Failure::internal)?;
        return Ok(Exit::Done);
    }
    let text = continue_text(&location, step.map_or(Which::Newest, Which::Step), &args.prompt, &request)?;
    writeln!(out, "{text}").map_err(Failure::internal)?;
    Ok(Exit::Done)
}

/// Loads a checkpoint's weights and draws from them.
///
/// # Errors
/// As [`run`].
pub fn continue_text(
    location: &Location,
    which: Which,
    prompt: &str,
    request: &Sampling,
) -> Result<String, Failure> {
    let (head, _) = show(location, which).map_err(Failure::bad_input)?;
    let config = String::from_utf8_lossy(&head.files.config_json).into_owned();
    let tokenizer = head.files.tokenizer_json.clone();
    let tokenizer =
        tokenizer.ok_or_else(|| Failure::bad_input(anyhow!("{} has no tokenizer.json", head.url)))?;
    let generator = Generator::new(&config, &tokenizer).map_err(Failure::bad_input)?;
    let layout = storage::layout(&generator.space()).map_err(Failure::internal)?;
    let step = Which::Step(head.manifest.step);
    let (weights, _) = load_weights(location, step, |_| Ok(layout.clone())).map_err(Failure::bad_input)?;
    generator.text(&weights.params, prompt, request).map_err(Failure::bad_input)
}
