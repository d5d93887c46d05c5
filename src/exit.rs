//! How the program ends: one number per kind of ending, the same for every subcommand.

use std::fmt;
use std::process::ExitCode;

/// How the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All that was asked for is done.
    Done = 0,
    /// A fault of the program or the machine.
    Internal = 1,
    /// The command line, the recipe, the data or a folder can't be used as they are: mend the input and
    /// start again.
    BadInput = 2,
    /// A worker was lost or the run failed on its way; what was checkpointed can be resumed.
    RunFailed = 3,
    /// Stopped by Ctrl-C or SIGTERM, with a checkpoint to resume from.
    Interrupted = 130,
}

/// Exit codes as `--help` prints them.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    internal error
  2    bad input: nothing was started
  3    a worker was lost, or the run failed
  130  interrupted (Ctrl-C, SIGTERM), with a checkpoint to resume from";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that knows how the program should end.
#[derive(Debug)]
pub struct Failure {
    /// The code to end with.
    pub exit: Exit,
    /// What to print.
    pub error: anyhow::Error,
}

impl Failure {
    /// The user can mend it.
    pub fn bad_input(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::BadInput, error: error.into() }
    }

    /// The run broke on its way.
    pub fn run(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::RunFailed, error: error.into() }
    }

    /// Not the user's fault.
    pub fn internal(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Internal, error: error.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Many errors name their cause themselves: it is not said twice.
        let mut said = String::new();
        for cause in self.error.chain().map(ToString::to_string) {
            if !said.contains(&cause) {
                said = if said.is_empty() { cause } else { format!("{said}: {cause}") };
            }
        }
        f.write_str(&said)
    }
}

impl From<crate::recipe::RecipeError> for Failure {
    fn from(error: crate::recipe::RecipeError) -> Self {
        Self::bad_input(error)
    }
}

impl From<crate::run_dir::RunDirError> for Failure {
    fn from(error: crate::run_dir::RunDirError) -> Self {
        use crate::run_dir::RunDirError::{AnotherRun, Busy, Io, Occupied, Recipe, Record};
        match error {
            error @ (Occupied { .. } | AnotherRun { .. } | Busy { .. } | Record { .. } | Recipe(_)) => {
                Self::bad_input(error)
            }
            error @ Io { .. } => Self::internal(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::{EXIT_CODES, Exit, Failure};

    #[test]
    fn a_cause_is_said_once() {
        let disk = || anyhow!("the disk is full");
        let text = |error: anyhow::Error| Failure::run(error).to_string();
        assert_eq!(text(disk().context("cannot write x")), "cannot write x: the disk is full");
        assert_eq!(
            text(disk().context("cannot write x: the disk is full")),
            "cannot write x: the disk is full"
        );
    }

    #[test]
    fn the_help_names_every_code() {
        for exit in [Exit::Done, Exit::Internal, Exit::BadInput, Exit::RunFailed, Exit::Interrupted] {
            let code = format!("\n  {:<5}", exit as u8);
            assert!(EXIT_CODES.contains(&code), "no {code:?}");
        }
    }
}
