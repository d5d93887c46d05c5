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
    committed: Option<Instant>,
}

impl Recovery {
    /// A ring does not hold any more, for this reason.
    pub fn begin(now: Instant, reason: &str) -> Self {
        Self { reasons: vec![reason.to_owned()], noticed: now, formed: None, started: None, committed: None }
    }

    /// The ring that was to follow does not hold either.
    pub fn again(&mut self, reason: &str) {
        self.reasons.push(reason.to_owned());
        (self.formed, self.started, self.committed) = (None, None, None);
    }

    /// The next ring was formed.
    pub fn form(&mut self, now: Instant) {
        self.formed = Some(now);
    }

    /// Its members are linked.
    pub fn start(&mut self, now: Instant) {
        self.started = Some(now);
    }

    /// All its ranks have committed a step, which may be recorded later: of divided state, the next step tells the hash.
    pub fn commit(&mut self, now: Instant) {
        self.committed.get_or_insert(now);
    }

    /// Whether a ring has started since: only then is a step that is committed its first, and none of the ring before.
    pub fn has_started(&self) -> bool {
        self.started.is_some()
    }

    /// Its first step is recorded: what all this took until that was committed.
    pub fn end(self, now: Instant, first: &StepRecord) -> Event {
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let now = self.committed.unwrap_or(now);
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::event::RankRecord;

    fn step(transfers: &[f64]) -> StepRecord {
        let rank = |(rank, seconds): (usize, &f64)| RankRecord {
            rank: rank as u32,
            worker: rank as u64,
            micro_batches: Vec::new(),
            tx_bytes: 0,
            rx_bytes: 0,
            held: BTreeMap::new(),
            sent: BTreeMap::new(),
            seconds: BTreeMap::from([(TRANSFER.to_owned(), *seconds)]),
        };
        StepRecord {
            step: 8,
            loss: 1.0,
            grad_norm: 1.0,
            lr: 1.0,
            state_hash: String::new(),
            tokens: 1,
            wide_blocks: 0,
            world_size: transfers.len() as u32,
            generation: 3,
            ranks: transfers.iter().enumerate().map(rank).collect(),
        }
    }

    #[test]
    fn each_phase_has_its_time_and_a_second_break_adds_to_the_first() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let mut recovery = Recovery::begin(at(0), "worker 2 was lost");
        recovery.form(at(10));
        recovery.start(at(20));
        recovery.again("worker 3 was lost");
        assert!(!recovery.has_started(), "a step of the ring before is not its first");
        recovery.form(at(50));
        recovery.start(at(90));
        assert!(recovery.has_started());
        recovery.commit(at(390));
        recovery.commit(at(700));
        let event = recovery.end(at(900), &step(&[0.0, 0.25]));
        let want = Event::Recovered {
            generation: 3,
            world_size: 2,
            step: 8,
            reason: "worker 2 was lost; worker 3 was lost".to_owned(),
            hold_ms: 50.0,
            form_ms: 40.0,
            transfer_ms: 250.0,
            step_ms: 50.0,
        };
        assert_eq!(event, want);
    }

    #[test]
    fn a_transfer_that_is_said_to_take_longer_than_the_step_leaves_none_for_it() {
        let zero = Instant::now();
        let mut recovery = Recovery::begin(zero, "it broke");
        recovery.form(zero);
        recovery.start(zero);
        let Event::Recovered { step_ms, .. } = recovery.end(zero, &step(&[9.0])) else {
            panic!("not recovered")
        };
        assert!(step_ms.abs() < f64::EPSILON);
    }
}
