//! Every state that counts is that of one process alone: whoever commits a step, gets a state, reports or saves one.

use std::time::Duration;

use mattock_coordinator::WorkerId;

use super::{Invariant, demand};
use crate::facts::{Cause, Fact, Setup};
use crate::state::State;

pub(crate) struct States {
    micro_batches: u32,
    serial: Vec<State>,
    /// A bit has flipped somewhere: what follows may be anything, until the run ends.
    corrupt: bool,
    /// Whose memory it was, where that is to be found out.
    flipped: Option<WorkerId>,
}

impl States {
    pub(crate) fn new(setup: &Setup) -> Self {
        Self {
            micro_batches: setup.micro_batches,
            serial: vec![State::INITIAL],
            corrupt: false,
            flipped: None,
        }
    }

    fn check(&mut self, what: &str, step: u64, hash: u64) -> Result<(), String> {
        while (self.serial.len() as u64) <= step {
            let last = self.serial[self.serial.len() - 1];
            self.serial.push(last.next(last.sum(0..self.micro_batches)));
        }
        let want = self.serial[step as usize].hash;
        demand!(hash == want || self.corrupt, "{what}: after step {step} {hash:016x} instead of {want:016x}");
        Ok(())
    }
}

impl Invariant for States {
    fn name(&self) -> &'static str {
        "state"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Caused(Cause::Corruption) => self.corrupt = true,
            Fact::Caused(Cause::Flipped(worker)) => self.flipped = Some(*worker),
            // Nothing of that may be used.
            Fact::Committed { worker, .. } | Fact::Reported(worker, _) if self.flipped == Some(*worker) => {}
            // Where its state is wrong, so may be what it saves; real ones are found out by their hash.
            Fact::Saved(_) if self.flipped.is_some() => {}
            Fact::Committed { worker, state, .. } => {
                self.check(&format!("{worker} commits"), state.step, state.hash)?;
            }
            Fact::Received(worker, state) => {
                self.check(&format!("{worker} has got a state"), state.step, state.hash)?;
            }
            Fact::Saved(state) => self.check("a checkpoint", state.step, state.hash)?,
            Fact::Reported(worker, report) => {
                self.check(&format!("{worker} reports"), report.step, report.state_hash.unwrap_or_default())?;
            }
            _ => {}
        }
        Ok(())
    }
}
