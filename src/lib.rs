//! Mattock: a distributed training orchestrator whose results do not depend on how many workers there were.
//!
//! This crate is the program and a thin facade over the crates that do the work. A trainer of one's own implements
//! [`Task`] and calls [`main`]; its binary then has every subcommand. See `examples/digits.rs`.

mod bench;
mod cache;
pub mod chaos;
pub mod cli;
pub mod exit;
pub mod launch;
mod npy;
pub mod progress;
pub mod recipe;
pub mod run_dir;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

pub use burn;
pub use mattock_data::SampleOrder;
pub use mattock_data::keys;
pub use mattock_worker::Kernels;
pub use mattock_worker::plan::Batch;
pub use mattock_worker::task::gpt::Gpt;
pub use mattock_worker::task::{Activations, Carry, Facts, Outline, Output, Pass, Source, Task, TaskError};

/// The whole program for a task: parses the command line, does what it says, and ends with the right code.
pub fn main<T: Task>() -> ExitCode {
    // Before anything opens a connection: two providers are compiled in, and rustls then has no default.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("error: another TLS provider is installed already; call mattock::main first");
        return exit::Exit::Internal.into();
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match cli::run::<T>(&cli::Cli::parse().command) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            // In one piece: others may write to the same place.
            let line = format!("error: {failure}\n");
            eprint!("{line}");
            failure.exit.into()
        }
    }
}
