//! Another coordinator in the place of one that has died: how often, when, and what it must be told.
//!
//! It is the same command, with what only the launcher knows: the newest step that is on record, and the port that workers
//! still speak to. A step makes another try worth while; without one the pauses grow, and end.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::child::Program;

/// Before a dead coordinator is started again; each time without a step in between twice as long,
const PAUSE: Duration = Duration::from_millis(200);
/// but not longer than this.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Commands that wait for it: processes that have ended.
const COMMANDS_MAX: usize = 4096;

/// The coordinators after the first.
pub(super) struct Successor {
    /// How many may be started in a row.
    restarts: u32,
    /// How many were, without a step.
    fruitless: u32,
    /// When the next is started.
    due: Option<Instant>,
    /// One was started, and does not listen yet.
    starting: bool,
    /// The newest step on record; 0 where there is none.
    recorded: u64,
    /// How the last one ended.
    status: ExitStatus,
    /// What it is told when it listens.
    commands: Vec<Value>,
}

impl Successor {
    /// None yet, and up to so many in a row.
    pub(super) fn new(restarts: u32) -> Self {
        Self {
            restarts,
            fruitless: 0,
            due: None,
            starting: false,
            recorded: 0,
            status: ExitStatus::from_raw(0),
            commands: Vec::new(),
        }
    }

    /// The coordinator has ended before the run; whether another is started.
    pub(super) fn is_wanted(&mut self, status: ExitStatus) -> bool {
        self.status = status;
        if self.fruitless >= self.restarts {
            return false;
        }
        let pause = PAUSE.saturating_mul(1 << self.fruitless.min(16)).min(PAUSE_MAX);
        self.fruitless += 1;
        (self.due, self.starting) = (Some(Instant::now() + pause), true);
        true
    }

    /// Whether one is to be started.
    pub(super) fn is_due(&self) -> bool {
        self.due.is_some()
    }

    /// When.
    pub(super) fn at(&self) -> Instant {
        self.due.unwrap_or_else(Instant::now)
    }

    /// Whether one is awaited: it takes no commands yet.
    pub(super) fn is_starting(&self) -> bool {
        self.starting
    }

    /// How the last one ended.
    pub(super) fn status(&self) -> ExitStatus {
        self.status
    }

    /// The next one's program, and what is said of it.
    pub(super) fn program(&mut self, first: &Program, port: Option<u16>) -> (Program, String) {
        self.due = None;
        let mut program = first.clone();
        program.args.extend(["--recorded".into(), self.recorded.to_string().into()]);
        if let Some(port) = port {
            program.args.extend(["--port".into(), port.to_string().into()]);
        }
        let said = format!(
            "it has died ({}): starting another, which takes over ({} of {} without a step)",
            self.status, self.fruitless, self.restarts
        );
        (program, said)
    }

    /// It listens; what it is to be told now.
    pub(super) fn listens(&mut self) -> Vec<Value> {
        self.starting = false;
        std::mem::take(&mut self.commands)
    }

    /// Keeps a command for it.
    pub(super) fn tell_later(&mut self, command: Value) {
        if self.commands.len() < COMMANDS_MAX {
            self.commands.push(command);
        }
    }

    /// A step is on record, or the run went back to it.
    pub(super) fn recorded(&mut self, step: u64) {
        (self.recorded, self.fruitless) = (step, 0);
    }

    /// Another has the run: no more are started.
    pub(super) fn give_up(&mut self) {
        self.restarts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> Program {
        Program { path: "mattock".into(), args: vec!["coordinator".into()], env: Vec::new() }
    }

    #[test]
    fn tries_in_a_row_are_few_and_a_step_makes_them_worth_while() {
        let killed = ExitStatus::from_raw(9);
        let mut successor = Successor::new(2);
        assert!(successor.is_wanted(killed) && successor.is_wanted(killed) && !successor.is_wanted(killed));
        successor.recorded(7);
        assert!(successor.is_wanted(killed) && successor.is_due());
        let (program, said) = successor.program(&program(), Some(4433));
        assert_eq!(program.args[1..], ["--recorded", "7", "--port", "4433"]);
        assert!(said.contains("signal: 9") && !successor.is_due() && successor.is_starting(), "{said}");
        successor.give_up();
        assert!(!successor.is_wanted(killed), "another has the run");
    }

    #[test]
    fn what_it_missed_it_is_told_once() {
        let mut successor = Successor::new(1);
        successor.is_wanted(ExitStatus::from_raw(9));
        successor.tell_later(Value::from(1));
        assert_eq!(successor.listens(), [Value::from(1)]);
        assert!(successor.listens().is_empty() && !successor.is_starting());
    }
}
