//! Who hangs, told from who is slow: by what pieces of work have taken in this run so far.
//!
//! A worker whose listening thread is well sends pulses although its training may stand still: a device is stuck, a host swaps. One
//! piece of work is given eight times what the slowest has taken anywhere, and one timeout at least; before any was done, for
//! devices compile at first, thirty timeouts.
//!
//! Only pulses count: a worker of which nothing is heard may get on all the while, or be stopped with its piece of work.
//!
//! Deliberately absent: workers that wait for others. Somebody else is slow then.

use std::time::{Duration, Instant};

use crate::protocol::Pulse;

/// A piece of work may take so many times what the slowest has taken.
const TIMES_SLOWEST: u32 = 8;
/// The first may take so many timeouts.
const FIRST_TIMEOUTS: u32 = 30;
/// What lies between two pulses counts up to this part of a timeout.
const GAP: u32 = 4;

/// The longest that pieces of work have taken, over all workers.
#[derive(Debug, Clone)]
pub(super) struct Detector {
    timeout: Duration,
    slowest: Duration,
}

/// How far a worker is, and for how long it was seen to be no further.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    pulse: Pulse,
    seen: Instant,
    standing: Duration,
}

impl Detector {
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, slowest: Duration::ZERO }
    }

    /// Takes in a pulse, after what was known of that worker.
    pub(super) fn note(&mut self, before: Option<Progress>, pulse: Pulse, now: Instant) -> Progress {
        self.slowest = self.slowest.max(Duration::from_millis(pulse.slowest_ms));
        let stands = |before: Progress| before.standing + (now - before.seen).min(self.timeout / GAP);
        let same = before.filter(|before| before.pulse.progress == pulse.progress && pulse.busy);
        Progress { pulse, seen: now, standing: same.map_or(Duration::ZERO, stands) }
    }

    /// How long one piece of work may take.
    fn limit(&self) -> Duration {
        match self.slowest {
            Duration::ZERO => self.timeout * FIRST_TIMEOUTS,
            slowest => self.timeout.max(slowest * TIMES_SLOWEST),
        }
    }

    /// Why a worker is given up that is this far, if it hangs.
    pub(super) fn verdict(&self, progress: Progress) -> Option<String> {
        (progress.standing >= self.limit()).then(|| {
            format!(
                "it is heard of, but has been at one piece of work for {:?}; the slowest so far took {:?}",
                progress.standing, self.slowest
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(2);
    const EVERY: Duration = Duration::from_millis(250);

    /// Pulses of one worker that stands still, until it is given up; after how long that is.
    fn given_up_after(detector: &mut Detector, busy: bool) -> Option<Duration> {
        let start = Instant::now();
        let pulse = Pulse { progress: 1, busy, slowest_ms: 0 };
        let mut progress = detector.note(None, pulse, start);
        for pulses in 1..2000 {
            progress = detector.note(Some(progress), pulse, start + EVERY * pulses);
            if detector.verdict(progress).is_some() {
                return Some(EVERY * pulses);
            }
        }
        None
    }

    #[test]
    fn slow_work_and_the_first_are_given_their_time() {
        let mut detector = Detector::new(TIMEOUT);
        for (slowest_ms, limit_s) in [(0, 60), (100, 2), (3000, 24)] {
            detector.note(None, Pulse { progress: 1, busy: true, slowest_ms }, Instant::now());
            assert_eq!(given_up_after(&mut detector, true), Some(Duration::from_secs(limit_s)));
        }
    }

    #[test]
    fn who_waits_or_gets_on_does_not_hang() {
        let (mut detector, start) = (Detector::new(TIMEOUT), Instant::now());
        assert_eq!(given_up_after(&mut detector, false), None);
        let mut progress = None;
        for pulses in 0..2000 {
            let pulse = Pulse { progress: u64::from(pulses / 7), busy: true, slowest_ms: 1 };
            let next = detector.note(progress, pulse, start + EVERY * pulses);
            assert_eq!(detector.verdict(next), None);
            progress = Some(next);
        }
    }

    #[test]
    fn silence_is_no_standing_still() {
        let (mut detector, start) = (Detector::new(TIMEOUT), Instant::now());
        let pulse = Pulse { progress: 1, busy: true, slowest_ms: 1 };
        let before = detector.note(None, pulse, start);
        let after = detector.note(Some(before), pulse, start + 10 * TIMEOUT);
        assert_eq!((after.standing, detector.verdict(after)), (TIMEOUT / GAP, None));
    }
}
