//! What it costs to go from one ring to the next, by phase.
//!
//! ```text
//! noticed ──hold──> all have said what they hold ──form──> all linked ──(transfer)── step ──> the next step is committed
//! ```

use std::time::Instant;

use crate::event::{Event, StepRecord};

/// The phase in which ranks report the time of a state's transfer.
const TRANSFER: &str = "transfer";

/// A change of rings that is under way.
#[derive(Debug, Clone)]
pub struct Recovery {
    reasons: Vec<String>,
    noticed: Instant,
    formed: Option<Instant>,
    started: Option<Instant>,
}

impl Recovery {
    /// A ring does not hold any more, for this reason.
    pub fn begin(now: Instant, reason: &str) -> Self {
        Self { reasons: vec![reason.to_owned()], noticed: now, formed: None, started: None }
    }

    /// The ring that was to follow does not hold either.
    pub fn again(&mut self, reason: &str) {
        self.reasons.push(reason.to_owned());
        (self.formed, self.started) = (None, None);
    }

    /// The next ring was formed.
    pub fn form(&mut self, now: Instant) {
        self.formed = Some(now);
    }

    /// Its members are linked.
    pub fn start(&mut self, now: Instant) {
        self.started = Some(now);
    }

    /// It has committed its first step: what all this took.
    pub fn end(self, now: Instant, first: &StepRecord) -> Event {
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let formed = self.formed.unwrap_or(now);
        let started = self.started.unwrap_or(now);
        let transfers = first.ranks.iter().filter_map(|rank| rank.seconds.get(TRANSFER));
        let transfer = transfers.copied().fold(0.0, f64::max);
        Event::Recovered {
            generation: first.generation,
            world_size: first.world_size,
            step: first.step,
            reason: self.reasons.join("; "),
            hold_ms: ms(self.noticed, formed),
            form_ms: ms(formed, started),
            transfer_ms: transfer * 1e3,
            step_ms: (ms(started, now) - transfer * 1e3).max(0.0),
        }
    }
}
