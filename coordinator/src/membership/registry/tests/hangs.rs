//! Workers that live, but whose training stands still.

use super::*;
use crate::protocol::Pulse;

impl Run {
    fn pulse(&mut self, id: u64, progress: u64, busy: bool) -> Vec<Action> {
        self.step(Event::Pulse(WorkerId(id), Pulse { progress, busy, slowest_ms: 100 }))
    }

    /// An eighth of a timeout later, everybody is heard of, and this far.
    fn later(&mut self, progress: [(u64, bool); 2]) -> Vec<Action> {
        self.now += TIMEOUT / 8;
        let pulses = (0..).zip(progress).map(|(id, (progress, busy))| self.pulse(id, progress, busy));
        pulses.flatten().collect()
    }
}

#[test]
fn who_stands_still_at_work_is_lost_and_who_waits_for_it_is_not() {
    let mut run = Run::training();
    for _ in 0..8 {
        assert_eq!(run.later([(4, true), (7, false)]), []);
    }
    let actions = run.later([(4, true), (7, false)]);
    let [Action::Lose(WorkerId(0), reason), Action::Recall { members, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert!(reason.contains("one piece of work"), "{reason}");
    assert_eq!(members[..], [WorkerId(1)]);
}

#[test]
fn who_gets_on_is_not_lost_however_slow() {
    let mut run = Run::training();
    for pulses in 0..80 {
        assert_eq!(run.later([(pulses / 8, true), (7, false)]), []);
    }
}

#[test]
fn who_is_done_does_not_hang() {
    let mut run = Run::training();
    run.step(Event::Finished(WorkerId(0), finish(7, None)));
    for _ in 0..80 {
        assert_eq!(run.later([(4, true), (7, false)]), []);
    }
}

#[test]
fn who_loads_does_not_hang() {
    let mut run = Run::training();
    run.join(2);
    for _ in 0..80 {
        assert_eq!(run.later([(0, false), (7, false)]), []);
        assert_eq!(run.pulse(2, 4, true), [], "opening a task may take long");
    }
}
