//! A coordinator that is there, but does nothing: it is asked whether it lives, and anything that it says answers.
//!
//! Time is counted in looks: a launcher that was stopped itself, or starved, has not looked meanwhile, and a silence that
//! nobody listened to is none.

use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// Looks within the silence that is allowed.
const LOOKS: u32 = 8;

/// Asks, and counts.
pub(super) struct Watchdog {
    looks: Interval,
    /// Looks since it was asked, while it has not answered.
    unanswered: Option<u32>,
}

/// What a look comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// It is to be asked.
    Ask,
    /// It has time left.
    Wait,
    /// It has been silent for too long.
    GiveUp,
}

impl Watchdog {
    /// For silences of up to so long. Must be called within a Tokio runtime.
    pub(super) fn new(silence: Duration) -> Self {
        let pause = (silence / LOOKS).max(Duration::from_millis(1));
        let mut looks = interval_at(Instant::now() + pause, pause);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { looks, unanswered: None }
    }

    /// Completes when it is time for a look.
    pub(super) async fn due(&mut self) {
        self.looks.tick().await;
    }

    /// It has said something, or is not there to be asked.
    pub(super) fn answered(&mut self) {
        self.unanswered = None;
    }

    /// Looks.
    pub(super) fn look(&mut self) -> Look {
        let looks = self.unanswered.map_or(0, |looks| looks + 1);
        self.unanswered = Some(looks);
        match looks {
            0 => Look::Ask,
            looks if looks < LOOKS => Look::Wait,
            _ => Look::GiveUp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_answers_is_asked_again_and_who_does_not_is_given_up_after_all_looks() {
        let mut watchdog = Watchdog::new(Duration::from_secs(8));
        for _ in 0..3 {
            assert_eq!((watchdog.look(), watchdog.look()), (Look::Ask, Look::Wait));
            watchdog.answered();
        }
        let looks: Vec<Look> = (0..=LOOKS).map(|_| watchdog.look()).collect();
        assert_eq!((looks.first(), looks.last()), (Some(&Look::Ask), Some(&Look::GiveUp)));
        assert!(looks[1..LOOKS as usize].iter().all(|look| *look == Look::Wait));
    }
}
