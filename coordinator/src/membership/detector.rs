//! Who hangs, told from who is slow: by what pieces of work have taken in this run so far.
//!
//! A worker whose listening thread is well sends pulses although its training may stand still: a device is stuck, a host swaps. One
//! piece of work is given eight times what the slowest has taken anywhere, and one timeout at least; before any was done, for
//! devices compile at first, thirty timeouts.
//!
//! Deliberately absent: workers that wait for others. Somebody else is slow then.

use std::time::{Duration, Instant};

use crate::protocol::Pulse;

/// A piece of work may take so many times what the slowest has taken.
const TIMES_SLOWEST: u32 = 8;
/// The first may take so many timeouts.
const FIRST_TIMEOUTS: u32 = 30;

/// The longest that pieces of work have taken, over all workers.
#[derive(Debug, Clone)]
pub(super) struct Detector {
    timeout: Duration,
    slowest: Duration,
}

/// How far a worker is, and since when.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    pulse: Pulse,
    since: Instant,
}

impl Detector {
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, slowest: Duration::ZERO }
    }

    /// Takes in a pulse, after what was known of that worker.
    pub(super) fn note(&mut self, before: Option<Progress>, pulse: Pulse, now: Instant) -> Progress {
        self.slowest = self.slowest.max(Duration::from_millis(pulse.slowest_ms));
        let same = before.filter(|before| before.pulse.progress == pulse.progress);
        Progress { pulse, since: same.map_or(now, |before| before.since) }
    }

    /// How long one piece of work may take.
    pub(super) fn limit(&self) -> Duration {
        match self.slowest {
            Duration::ZERO => self.timeout * FIRST_TIMEOUTS,
            slowest => self.timeout.max(slowest * TIMES_SLOWEST),
        }
    }

    /// When a worker hangs that is this far; never, where it waits for others.
    pub(super) fn hangs_at(&self, progress: Progress) -> Option<Instant> {
        progress.pulse.busy.then(|| progress.since + self.limit())
    }

    /// Why a worker is given up that hangs.
    pub(super) fn verdict(&self) -> String {
        format!(
            "it is heard of, but has been at one piece of work for {:?}; the slowest so far took {:?}",
            self.limit(),
            self.slowest
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(2);

    fn pulse(progress: u64, busy: bool, slowest_ms: u64) -> Pulse {
        Pulse { progress, busy, slowest_ms }
    }

    #[test]
    fn who_stands_still_at_work_hangs() {
        let (mut detector, start) = (Detector::new(TIMEOUT), Instant::now());
        let first = detector.note(None, pulse(1, true, 100), start);
        assert_eq!(detector.hangs_at(first), Some(start + TIMEOUT));
        let still = detector.note(Some(first), pulse(1, true, 100), start + TIMEOUT / 2);
        assert_eq!(detector.hangs_at(still), Some(start + TIMEOUT), "a pulse is no progress");
        let further = detector.note(Some(still), pulse(2, true, 100), start + TIMEOUT / 2);
        assert_eq!(detector.hangs_at(further), Some(start + TIMEOUT / 2 + TIMEOUT));
    }

    #[test]
    fn who_waits_does_not() {
        let (mut detector, start) = (Detector::new(TIMEOUT), Instant::now());
        let waits = detector.note(None, pulse(1, false, 100), start);
        assert_eq!(detector.hangs_at(waits), None);
    }

    #[test]
    fn slow_work_and_the_first_are_given_their_time() {
        let mut detector = Detector::new(TIMEOUT);
        assert_eq!(detector.limit(), 30 * TIMEOUT);
        detector.note(None, pulse(1, true, 100), Instant::now());
        assert_eq!(detector.limit(), TIMEOUT);
        detector.note(None, pulse(1, true, 3000), Instant::now());
        assert_eq!(detector.limit(), Duration::from_secs(24));
        assert!(detector.verdict().contains("24s"));
    }
}
