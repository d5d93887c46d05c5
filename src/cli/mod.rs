//! The command line: one file per subcommand, each with its arguments and what it does with them.
//!
//! Arguments are parsed once into structs without loose ends; nothing here knows of tensors, sockets or
//! object stores.

pub mod bench;
mod bench_coordinator;
pub mod chaos;
pub mod checkpoint;
pub mod coordinator;
pub mod data;
pub mod doctor;
pub mod generate;
mod nodes;
mod parts;
pub mod plan;
pub mod recipe;
pub mod scale;
pub mod train;
pub mod worker;

#[cfg(test)]
mod tests;

use std::marker::PhantomData;

use clap::{Parser, Subcommand};
use mattock_worker::task::Task;

use self::parts::{TaskParts, open};
use crate::exit::{EXIT_CODES, Exit, Failure};

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
    /// Train a model as a recipe says, with a coordinator and workers on this machine
    Train(train::TrainArgs),
    /// Run a coordinator alone: workers elsewhere join it with the token that it writes
    Coordinator(coordinator::CoordinatorArgs),
    /// Say what a run will need of memory, links and time, and whether it fits, before anything is spent
    Plan(plan::PlanArgs),
    /// Join a run as one worker
    Worker(worker::WorkerArgs),
    /// Change the number of workers of a run that is under way
    Scale(scale::ScaleArgs),
    /// Continue a text with a trained model
    Generate(generate::GenerateArgs),
    /// Look at checkpoints
    Checkpoint(checkpoint::CheckpointArgs),
    /// Look at a recipe without training
    Recipe(recipe::RecipeArgs),
    /// Build or show a recipe's dataset
    Data(data::DataArgs),
    /// Check this host before a run, and say what to mend
    Doctor(doctor::DoctorArgs),
    /// Measure collectives between processes
    Bench(bench::BenchArgs),
    /// Kill, stop, send away and add workers by a seed, kill the coordinator, and show that a run leaves no trace of it
    Chaos(chaos::ChaosArgs),
}

/// Does what the command line says, for runs of task `T`.
///
/// # Errors
/// Each subcommand's own.
pub fn run<T: Task>(command: &Command) -> Result<Exit, Failure> {
    let out = &mut std::io::stdout().lock();
    match command {
        Command::Train(args) => train::run(args, &TaskParts::<T>(PhantomData), out),
        Command::Coordinator(args) => coordinator::run(args, out),
        Command::Plan(args) => plan::run::<T>(args, out),
        Command::Worker(args) => worker::run::<T>(args),
        Command::Scale(args) => scale::run(args, out),
        Command::Generate(args) => generate::run(args, out),
        Command::Checkpoint(args) => checkpoint::run::<T>(args, out),
        Command::Recipe(args) => recipe::run(args, |recipe| open::<T>(recipe).map(drop), out),
        Command::Data(args) => data::run::<T>(args, out),
        Command::Doctor(args) => doctor::run(args, out),
        Command::Bench(args) => bench::run(args, out),
        Command::Chaos(args) => chaos::run(args, out),
    }
}
