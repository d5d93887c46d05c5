//! `mattock checkpoint`: lists, verifies and shows checkpoints, clears up beside them, writes that of an untrained
//! model, and tells what a model computes.

use std::io::Write;
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, Subcommand};
use mattock_checkpoint::{ClaimError, How, Location, Which, claim, gc, list, show, verify};
use mattock_worker::Parameter;
use mattock_worker::storage::save_initial;
use mattock_worker::task::Task;
use mattock_worker::task::gpt::inspect;

use super::parts::{fresh_id, open};
use super::recipe::RecipeFile;
use crate::exit::{EXIT_CODES, Exit, Failure};

/// Look at checkpoints, or write that of an untrained model
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
    /// Remove what writers that died left behind, once it is old enough to be nobody's
    #[command(after_help = EXIT_CODES)]
    Gc(GcArgs),
    /// Write the checkpoint of step 0: a recipe's initial parameters, as its run starts from them
    #[command(after_help = EXIT_CODES)]
    Init(InitArgs),
    /// Print what a GPT-2 computes for given tokens, ours or one that transformers wrote
    #[command(after_help = EXIT_CODES)]
    Logits(LogitsArgs),
}

/// Arguments of `mattock checkpoint logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The folder of one checkpoint, with config.json and model.safetensors or its index: a folder, file:// or s3://
    pub url: String,
    /// Token ids, the first to the last
    #[arg(long, value_name = "ID,...", value_delimiter = ',', required = true)]
    pub tokens: Vec<u32>,
    /// Print the gradients of the mean loss as well, by name
    #[arg(long)]
    pub gradients: bool,
}

/// Arguments of `mattock checkpoint init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// What would be trained.
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Where to write, a place without checkpoints: a folder, file:// or s3://
    #[arg(long, value_name = "URL")]
    pub out: String,
}

/// Arguments of `mattock checkpoint gc`.
#[derive(Debug, Args)]
pub struct GcArgs {
    /// A prefix of checkpoints: a folder, file:// or s3://
    pub url: String,
    /// How long nobody must have touched what is removed, such as 24h
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = length_of_time)]
    pub grace: Duration,
    /// Only tell what would be removed
    #[arg(long)]
    pub dry_run: bool,
}

fn length_of_time(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<jiff::SignedDuration>().ok().and_then(|length| Duration::try_from(length).ok());
    parsed.ok_or_else(|| "expected a length of time with its unit, such as 24h or 30m".to_owned())
}

/// Where checkpoints are.
#[derive(Debug, Args)]
pub struct CheckpointUrl {
    /// A checkpoint or a prefix of them: a folder, file:// or s3://
    pub url: String,
}

/// A place, and the checkpoint meant if the address ends in one.
///
/// # Errors
/// Bad input where the address is none.
pub fn locate(url: &str) -> Result<(Location, Option<u64>), Failure> {
    let trimmed = url.trim_end_matches('/');
    let (prefix, last) = trimmed.rsplit_once('/').unwrap_or((".", trimmed));
    let step = last.strip_prefix("step-").and_then(|digits| digits.parse().ok());
    let place = if step.is_some() { prefix } else { url };
    Ok((Location::parse(place).map_err(Failure::bad_input)?, step))
}

/// Runs `mattock checkpoint`; `out` is standard output.
///
/// # Errors
/// Bad input where the store or the checkpoint cannot be read, or is not whole.
pub fn run<T: Task>(args: &CheckpointArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    match &args.action {
        CheckpointAction::Ls(at) => print_list(&at.url, out),
        CheckpointAction::Verify(at) => print_verdicts(&at.url, out),
        CheckpointAction::Show(at) => print_manifest(&at.url, out),
        CheckpointAction::Gc(args) => collect(args, out),
        CheckpointAction::Init(args) => write_initial::<T>(args, out),
        CheckpointAction::Logits(args) => print_logits(args, out),
    }
}

fn print_list(url: &str, out: &mut impl Write) -> Result<Exit, Failure> {
    let (location, _) = locate(url)?;
    let listing = list(&location).map_err(Failure::bad_input)?;
    for summary in &listing.complete {
        let megabytes = summary.manifest.bytes() as f64 / 1e6;
        writeln!(out, "step {:>8}  {megabytes:>9.1} MB  {}", summary.step, summary.url)
            .map_err(Failure::internal)?;
    }
    for unusable in &listing.unusable {
        writeln!(out, "step {:>8}  unusable      {}: {}", unusable.step, unusable.url, unusable.flaw)
            .map_err(Failure::internal)?;
    }
    Ok(Exit::Done)
}

fn print_verdicts(url: &str, out: &mut impl Write) -> Result<Exit, Failure> {
    let (location, step) = locate(url)?;
    let verdicts = verify(&location, step).map_err(Failure::bad_input)?;
    for verdict in &verdicts {
        let state = if verdict.flaws.is_empty() { "whole" } else { "BAD" };
        writeln!(out, "step {:>8}  {state:<5}  {}", verdict.step, verdict.url).map_err(Failure::internal)?;
        for flaw in &verdict.flaws {
            writeln!(out, "               {flaw}").map_err(Failure::internal)?;
        }
    }
    match verdicts.iter().filter(|verdict| !verdict.flaws.is_empty()).count() {
        0 => Ok(Exit::Done),
        bad => Err(Failure::bad_input(anyhow!("{bad} of {} checkpoints cannot be used", verdicts.len()))),
    }
}

fn print_manifest(url: &str, out: &mut impl Write) -> Result<Exit, Failure> {
    let (location, step) = locate(url)?;
    let (head, skipped) =
        show(&location, step.map_or(Which::Newest, Which::Step)).map_err(Failure::bad_input)?;
    for skipped in skipped {
        eprintln!("passed over {skipped}");
    }
    out.write_all(&head.manifest.encode()).map_err(Failure::internal)?;
    Ok(Exit::Done)
}

fn collect(args: &GcArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let (location, step) = locate(&args.url)?;
    if step.is_some() {
        return Err(Failure::bad_input(anyhow!(
            "{} is one checkpoint: give the place in which checkpoints are",
            args.url
        )));
    }
    let garbage = gc(&location, args.grace, args.dry_run).map_err(Failure::bad_input)?;
    for name in &garbage.objects {
        writeln!(out, "{name}").map_err(Failure::internal)?;
    }
    let (objects, uploads, megabytes) = (garbage.objects.len(), garbage.uploads, garbage.bytes as f64 / 1e6);
    let done = if args.dry_run { "would be removed" } else { "removed" };
    writeln!(out, "{objects} objects ({megabytes:.1} MB) and {uploads} unfinished uploads {done}")
        .map_err(Failure::internal)?;
    Ok(Exit::Done)
}

fn write_initial<T: Task>(args: &InitArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let recipe = args.recipe.resolve()?;
    let task = open::<T>(&recipe)?;
    let location = Location::parse(&args.out).map_err(Failure::bad_input)?;
    let run = claim(&location, &fresh_id(), How::Fresh).map_err(|error| match error {
        ClaimError::Taken { url, holder, .. } => Failure::bad_input(anyhow!(
            "{url} holds checkpoints of run {holder}: name another place by --out"
        )),
        error => Failure::bad_input(error),
    })?;
    let url = save_initial(&task, &recipe.plan, &args.out, &run, &recipe.text).map_err(Failure::bad_input)?;
    writeln!(out, "{url}").map_err(Failure::internal)?;
    Ok(Exit::Done)
}

/// As one JSON object; logits are `[tokens][vocab]`, gradients flat in row-major order.
fn print_logits(args: &LogitsArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let inspected = inspect(&args.url, &args.tokens).map_err(Failure::bad_input)?;
    let mut json = serde_json::json!({ "logits": inspected.logits, "loss": inspected.loss });
    if args.gradients {
        let of = |(parameter, values): (Parameter, Vec<f32>)| (parameter.name, serde_json::json!(values));
        json["gradients"] = inspected.gradients.into_iter().map(of).collect::<serde_json::Map<_, _>>().into();
    }
    writeln!(out, "{json}").map_err(Failure::internal)?;
    Ok(Exit::Done)
}
