//! `mattock scale`: another number of workers for a run that is under way.
//!
//! It speaks to the run's coordinator as a worker does, over mutual TLS, with a certificate that the join token gets it: who may
//! let workers in may also send them away. The coordinator sends away who is too many; its launcher starts who lacks.

use std::io::Write;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::Args;
use mattock_coordinator::identity::JoinToken;
use mattock_coordinator::{Client, JoinError};

use super::nodes::TOKEN;
use crate::exit::{EXIT_CODES, Exit, Failure};
use crate::run_dir::holds_run;

/// Between two tries to reach a coordinator that may have just been replaced.
const PAUSE: Duration = Duration::from_millis(500);
/// Timeouts of the run within which a coordinator must be reached: one that dies is replaced in fewer.
const TIMEOUTS: u32 = 3;

const EXAMPLES: &str = "\
Those that are started run on machine 0, beside the coordinator. Those that leave are the newest, wherever they are: each
finishes the step that it is in, and nobody waits for it. The result is the same for any number.

Examples:
  mattock scale runs/first 4
  mattock scale runs/first 1 --token-file /shared/run.token
";

/// Change the number of workers of a run that is under way
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct ScaleArgs {
    /// The run's folder
    #[arg(value_name = "RUN")]
    pub folder: PathBuf,
    /// Workers that the run is to have, on all machines together
    #[arg(value_name = "N")]
    pub workers: NonZeroU32,
    /// Where the run's join token is [default: token in RUN]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// Runs `mattock scale`; `out` is standard output.
///
/// # Errors
/// Bad input where there is no such run, or it may not have so many workers; a failed run where nobody answers.
pub fn run(args: &ScaleArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    if !holds_run(&args.folder) {
        let folder = args.folder.display();
        return Err(Failure::bad_input(anyhow!(
            "{folder} holds no run: give the folder that `mattock train` names"
        )));
    }
    let token = args.token_file.clone().unwrap_or_else(|| args.folder.join(TOKEN));
    let there = request(&token, args.workers.get())?;
    let said = match args.workers.get() {
        wanted if wanted > there => format!("{there} workers; {} more are started", wanted - there),
        wanted if wanted < there => format!("{there} workers; the newest {} leave", there - wanted),
        _ => format!("{there} workers, as it has now"),
    };
    writeln!(out, "{said}").map_err(Failure::internal)?;
    Ok(Exit::Done)
}

/// Asks the run's coordinator, or the one that takes its place, and returns how many workers there are.
fn request(token: &Path, workers: u32) -> Result<u32, Failure> {
    let begun = Instant::now();
    loop {
        // Another coordinator writes another token.
        let known = read(token)?;
        let limit = known.timeout();
        let error = match Client::enroll(&known, limit).and_then(|enrolled| enrolled.scale(workers)) {
            Ok(there) => return Ok(there),
            Err(JoinError::Refused(reason)) => {
                return Err(Failure::bad_input(anyhow!("the run cannot have {workers} workers: {reason}")));
            }
            Err(error) => error,
        };
        if begun.elapsed() >= TIMEOUTS * limit {
            return Err(Failure::run(anyhow!(
                "the run is not under way, or its coordinator is not reached: {error}"
            )));
        }
        sleep(PAUSE);
    }
}

fn read(token: &Path) -> Result<JoinToken, Failure> {
    if !token.exists() {
        return Err(Failure::bad_input(anyhow!(
            "the run is not under way: there is no {}; `mattock train --resume` goes on with a run that has ended early",
            token.display()
        )));
    }
    JoinToken::read(token).map_err(Failure::bad_input)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(folder: &Path) -> String {
        let args = ScaleArgs { folder: folder.to_owned(), workers: NonZeroU32::MIN, token_file: None };
        let failure = run(&args, &mut Vec::new()).unwrap_err();
        assert_eq!(failure.exit, Exit::BadInput);
        failure.to_string()
    }

    #[test]
    fn a_run_that_is_not_there_or_over_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(refusal(folder.path()).contains("holds no run"));
        std::fs::write(folder.path().join("run.json"), "{}").unwrap();
        assert!(refusal(folder.path()).contains("not under way"));
    }
}
