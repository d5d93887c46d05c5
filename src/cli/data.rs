//! `mattock data`: builds and shows a recipe's dataset.

use std::io::Write;

use clap::{Args, Subcommand};
use mattock_worker::task::Task;

use super::parts::open;
use super::recipe::RecipeFile;
use crate::exit::{EXIT_CODES, Exit, Failure};

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

/// Runs `mattock data`; `out` is standard output.
///
/// # Errors
/// Bad input where recipe or data are at fault.
pub fn run<T: Task>(args: &DataArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let (DataAction::Build(file) | DataAction::Show(file)) = &args.action;
    let facts = open::<T>(&file.resolve()?)?.facts();
    let folder = facts
        .dataset
        .as_ref()
        .map_or("nowhere: it is made as it is read".into(), |path| path.display().to_string());
    match &args.action {
        DataAction::Build(_) => writeln!(out, "dataset {} lies in {folder}", facts.dataset_hash),
        DataAction::Show(_) => writeln!(out, "{}\nfolder      {folder}", facts.summary),
    }
    .map_err(Failure::internal)?;
    Ok(Exit::Done)
}
