//! `mattock data`: builds and shows a recipe's dataset, and what of it a run reads.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, Subcommand};
use mattock_worker::samples::token_ids;
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
    Build(RecipeFile),
    /// Print the manifest of a recipe's dataset
    #[command(after_help = EXIT_CODES)]
    Show(RecipeFile),
    /// Write the token ids that a run's first steps train on, as a NumPy array
    #[command(after_help = EXIT_CODES)]
    Batches(BatchesArgs),
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
        DataAction::Build(file) => {
            let facts = open::<T>(&file.resolve()?)?.facts();
            writeln!(out, "dataset {} lies in {}", facts.dataset_hash, folder(&facts))
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

/// Writes the array, all of it or nothing; returns its shape.
fn write_batches<T: Task>(args: &BatchesArgs) -> Result<[u64; 3], Failure> {
    let recipe = args.recipe.resolve()?;
    let (task, plan) = (open::<T>(&recipe)?, recipe.plan);
    let ids = |step| {
        token_ids(&task, &plan, step)
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
