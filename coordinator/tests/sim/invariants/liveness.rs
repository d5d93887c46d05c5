//! Once faults stop, the run has completed, or ended with a reason, within three timeouts and the time of its work.

use std::time::Duration;

use mattock_coordinator::membership::Phase;

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct Liveness {
    phase: Option<Phase>,
}

impl Invariant for Liveness {
    fn name(&self) -> &'static str {
        "liveness"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Decided { phase, .. } => self.phase = Some(*phase),
            Fact::TookOver => self.phase = Some(Phase::Gathering),
            Fact::TimeIsUp => {
                let phase = self.phase;
                demand!(
                    phase == Some(Phase::Ended),
                    "three timeouts and the time of its work after the last fault the run is {phase:?}"
                );
            }
            _ => {}
        }
        Ok(())
    }
}
