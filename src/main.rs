//! The program: parses, dispatches, and ends with the right code; nothing else.

use std::process::ExitCode;

use clap::Parser;
use mattock::cli::{self, Cli, Command};

fn main() -> ExitCode {
    let ended = match Cli::parse().command {
        Command::Recipe(args) => cli::recipe::run(&args, |_| Ok(()), &mut std::io::stdout().lock()),
    };
    match ended {
        Ok(exit) => exit.into(),
        Err(failure) => {
            eprintln!("error: {failure}");
            failure.exit.into()
        }
    }
}
