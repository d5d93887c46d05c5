//! `mattock recipe`: check a recipe, or show it with nothing left open.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use mattock_worker::task::TaskError;
use mattock_worker::task::gpt::missing_hash;

use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::recipe::Resolved;

/// Look at a recipe without training.
#[derive(Debug, Args)]
pub struct RecipeArgs {
    /// What to do with it.
    #[command(subcommand)]
    pub action: RecipeAction,
}

/// What `mattock recipe` can do.
#[derive(Debug, Subcommand)]
pub enum RecipeAction {
    /// Say whether a recipe is valid
    #[command(after_help = EXIT_CODES)]
    Check(RecipeFile),
    /// Print a recipe with every default filled in, and each value's origin beside it
    #[command(after_help = EXIT_CODES)]
    Show(RecipeFile),
}

/// A recipe and what is laid over it.
#[derive(Debug, Clone, Args)]
pub struct RecipeFile {
    /// The recipe, a TOML file
    pub recipe: PathBuf,
    /// Lay a value over the recipe's, such as --set train.steps=100; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

impl RecipeFile {
    /// Reads and checks it.
    ///
    /// # Errors
    /// Bad input, whatever is wrong with it.
    pub fn resolve(&self) -> Result<Resolved, Failure> {
        Ok(Resolved::load(&self.recipe, &self.sets)?)
    }

    /// As [`RecipeFile::resolve`], for a run: with the hash of the weights that it starts from, if it starts from some.
    ///
    /// # Errors
    /// As there, and where these weights cannot be read.
    pub fn resolve_for_run(&self) -> Result<Resolved, Failure> {
        let recipe = self.resolve()?;
        let missing = missing_hash(&recipe.plan.model).map_err(|error| match error {
            TaskError::Table { table, reason } => Failure::bad_input(recipe.table_error(table, &reason)),
            error => Failure::bad_input(error),
        })?;
        let Some(hash) = missing else { return Ok(recipe) };
        let sets = [&self.sets[..], &[format!("model.init_hash={hash:?}")]].concat();
        Ok(Resolved::load(&self.recipe, &sets)?)
    }
}

/// Runs `mattock recipe`; `out` is standard output. `check` is the task's own check of its tables.
///
/// # Errors
/// Bad input where the recipe is not valid.
pub fn run(
    args: &RecipeArgs,
    check: impl FnOnce(&Resolved) -> Result<(), Failure>,
    out: &mut impl Write,
) -> Result<Exit, Failure> {
    let (RecipeAction::Check(file) | RecipeAction::Show(file)) = &args.action;
    let recipe = file.resolve()?;
    check(&recipe)?;
    match &args.action {
        RecipeAction::Check(_) => writeln!(
            out,
            "{} is valid: {} steps of {} micro-batches of {}",
            file.recipe.display(),
            recipe.plan.steps,
            recipe.plan.batch.micro_batches(),
            recipe.plan.batch.micro,
        ),
        RecipeAction::Show(_) => out.write_all(recipe.text.as_bytes()),
    }
    .map_err(Failure::internal)?;
    Ok(Exit::Done)
}
