//! The timer is always due later: a driver that calls when it is told to never spins.

use std::time::Duration;

use super::{Invariant, demand};
use crate::facts::Fact;

pub(crate) struct Timers;

impl Invariant for Timers {
    fn name(&self) -> &'static str {
        "timers"
    }

    fn observe(&mut self, now: Duration, fact: &Fact<'_>) -> Result<(), String> {
        if let Fact::Decided { event, deadline: Some(deadline), .. } = fact {
            demand!(*deadline > now, "after {event:?} the timer is due at {deadline:?} already");
        }
        Ok(())
    }
}
