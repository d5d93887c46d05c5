//! A run ends once, with a reason, and after the end nothing is decided.

use std::time::Duration;

use mattock_coordinator::membership::{Action, Phase};

use super::{Invariant, demand};
use crate::facts::Fact;

#[derive(Default)]
pub(crate) struct Finality {
    ended: bool,
}

impl Invariant for Finality {
    fn name(&self) -> &'static str {
        "finality"
    }

    fn observe(&mut self, _: Duration, fact: &Fact<'_>) -> Result<(), String> {
        let Fact::Decided { event, actions, phase, deadline } = fact else { return Ok(()) };
        demand!(!self.ended || actions.is_empty(), "{event:?} after the end leads to {actions:?}");
        let ends: Vec<&Action> = actions.iter().filter(|action| matches!(action, Action::End(..))).collect();
        demand!(ends.len() <= 1, "the run ends twice: {ends:?}");
        if let Some(Action::End(_, reason)) = ends.first() {
            demand!(!reason.is_empty(), "the run ends without a reason");
            demand!(
                matches!(actions.last(), Some(Action::End(..))),
                "something is decided with the end, after it: {actions:?}"
            );
            self.ended = true;
        }
        demand!((*phase == Phase::Ended) == self.ended, "the phase is {phase:?} at the end or before it");
        demand!(!self.ended || deadline.is_none(), "a timer is set after the end");
        Ok(())
    }
}
