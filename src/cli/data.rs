//! `mattock data`: builds and shows a recipe's dataset, and what of it a run reads.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, Subcommand};
use mattock_data::config::parse_size;
use mattock_data::{Corpus, Cutting, Published};
use mattock_worker::samples::token_ids;
use mattock_worker::shards;
use mattock_worker::task::{Facts, Task};

use super::parts::open;
use super::recipe::RecipeFile;
use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::npy;

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
    Build(BuildArgs),
    /// Print the manifest of a recipe's dataset
    #[command(after_help = EXIT_CODES)]
    Show(RecipeFile),
    /// Write the token ids that a run's first steps train on, as a NumPy array
    #[command(after_help = EXIT_CODES)]
    Batches(BatchesArgs),
}

/// Arguments of `mattock data build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// What is trained.
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Publish it there too, in shards, for recipes whose `[data]` names this url: a folder, file:// or s3://bucket/prefix
    #[arg(long, value_name = "URL")]
    pub to: Option<String>,
    /// Size of a shard
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = parse_size, requires = "to")]
    pub shard: u64,
    /// Shards that are shuffled together; where there are more, this and the size are part of what defines results
    #[arg(long, value_name = "SHARDS", default_value = "16", requires = "to")]
    pub window: u64,
}

/// Arguments of `mattock data batches`.
#[derive(Debug, Args)]
pub struct BatchesArgs {
    /// What is trained.
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Steps to write, from the first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// The file: 32-bit integers of shape [steps, sequences, context + 1], micro-batch after micro-batch
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Runs `mattock data`; `out` is standard output.
///
/// # Errors
/// Bad input where recipe or data are at fault.
pub fn run<T: Task>(args: &DataArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    match &args.action {
        DataAction::Build(args) => {
            let facts = open::<T>(&args.recipe.resolve()?)?.facts();
            let built = writeln!(out, "dataset {} lies in {}", facts.dataset_hash, folder(&facts));
            match &args.to {
                None => built,
                Some(url) => {
                    let published = publish(&facts, args, url)?;
                    built.and_then(|()| {
                        let shards = published.train.shards.len() + published.held_out.shards.len();
                        writeln!(out, "published at {url}: {shards} shards, dataset {}", published.identity())
                    })
                }
            }
        }
        DataAction::Show(file) => {
            let facts = open::<T>(&file.resolve()?)?.facts();
            writeln!(out, "{}\nfolder      {}", facts.summary, folder(&facts))
        }
        DataAction::Batches(batches) => {
            let [steps, rows, columns] = write_batches::<T>(batches)?;
            writeln!(out, "{steps} x {rows} x {columns} token ids are in {}", batches.out.display())
        }
    }
    .map_err(Failure::internal)?;
    Ok(Exit::Done)
}

fn folder(facts: &Facts) -> String {
    let path = facts.dataset.as_ref();
    path.map_or("nowhere: it is made as it is read".into(), |path| path.display().to_string())
}

/// Publishes what was built.
fn publish(facts: &Facts, args: &BuildArgs, url: &str) -> Result<Published, Failure> {
    let corpus = facts.dataset.clone().map(Corpus::open).transpose().map_err(Failure::bad_input)?.flatten();
    let corpus = corpus.ok_or_else(|| {
        let why = "only a dataset that is built from text can be published, and this recipe's is not";
        Failure::bad_input(anyhow!(why))
    })?;
    let store = shards::create(url).map_err(Failure::bad_input)?;
    let cutting = Cutting { shard_bytes: args.shard, window: args.window };
    let progress = |done, of| eprintln!("publishing: {done} of {of} shards");
    mattock_data::publish(&corpus, cutting, &*store, &progress).map_err(Failure::bad_input)
}

/// Writes the array, all of it or nothing; returns its shape.
fn write_batches<T: Task>(args: &BatchesArgs) -> Result<[u64; 3], Failure> {
    let recipe = args.recipe.resolve()?;
    let (task, plan) = (open::<T>(&recipe)?, recipe.plan);
    let ids = |step| {
        token_ids(&task, &plan, step)
            .map_err(Failure::bad_input)?
            .ok_or_else(|| Failure::bad_input(anyhow!("this recipe's samples are no tokens")))
    };
    let rows = u64::from(plan.batch.size);
    let shape = [args.steps, rows, ids(0)?.len() as u64 / rows];
    let failed = |error| {
        let path = args.out.display();
        Failure::bad_input(anyhow::Error::new(error).context(format!("{path} cannot be written")))
    };
    let unfinished = args.out.with_added_extension("part");
    let mut file = BufWriter::new(File::create(&unfinished).map_err(failed)?);
    let mut fill = || {
        npy::write_header(&mut file, shape).map_err(failed)?;
        for step in 0..args.steps {
            npy::write_elements(&mut file, &ids(step)?).map_err(failed)?;
        }
        file.flush().and_then(|()| fs::rename(&unfinished, &args.out)).map_err(failed)
    };
    fill().inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
    Ok(shape)
}
