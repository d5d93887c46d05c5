//! A coordinator that has taken over, and workers that come back to it.

use super::*;
use crate::protocol::Place;

/// Below every ring of the coordinator that has taken over.
const FLOOR: u64 = 1000;

fn candidate(id: u64) -> Candidate {
    Candidate { address: format!("address {id}"), fingerprint: "one".into() }
}

/// A ring of these workers, in this order.
fn ring(generation: u64, step: u64, workers: &[u64]) -> Formation {
    let place = |&id: &u64| Place {
        worker: WorkerId(id),
        address: format!("address {id}"),
        micro_batches: Vec::new(),
        first: Vec::new(),
    };
    Formation { generation, step, source: None, places: workers.iter().map(place).collect() }
}

impl Run {
    fn taken_over(expected: u32, max_workers: u32) -> Self {
        Self::taken_over_with(1, expected, max_workers)
    }

    fn taken_over_with(min_workers: u32, expected: u32, max_workers: u32) -> Self {
        let run = Self::with_minimum(min_workers, expected, max_workers);
        let registry = Registry::taking_over(run.registry.config.clone(), run.now, FLOOR);
        Self { registry, now: run.now }
    }

    /// A worker comes back that was in this ring.
    fn back(&mut self, id: u64, ring: &Formation, holding: Holding) -> Vec<Action> {
        let mut actions = self.step(Event::CameBack(WorkerId(id), candidate(id)));
        actions.extend(self.step(Event::Past(WorkerId(id), ring.clone())));
        actions.extend(self.step(Event::Returned(WorkerId(id), holding)));
        actions
    }

    /// So much later, these having been heard of meanwhile.
    fn wait(&mut self, time: Duration, heard: &[u64]) -> Vec<Action> {
        let until = self.now + time;
        let mut actions = Vec::new();
        while self.now < until {
            self.now = (self.now + TIMEOUT / 8).min(until);
            heard.iter().for_each(|&id| actions.extend(self.step(Event::Heard(WorkerId(id)))));
            actions.extend(self.step(Event::Tick));
        }
        actions
    }
}

#[test]
fn when_all_of_the_last_ring_are_back_it_goes_on_as_after_a_recall() {
    let (mut run, last) = (Run::taken_over(2, 3), ring(7, 4, &[2, 1]));
    assert_eq!(run.back(1, &last, holding(5, &[0], Some(1))), [Action::Admit(WorkerId(1))]);
    assert!(run.registry.awaits_returns());
    let actions = run.back(2, &last, holding(5, &[4, 5, 6], Some(7)));
    let (generation, step, source, shares) = formed(&actions);
    assert!(generation > FLOOR && !run.registry.awaits_returns());
    assert_eq!((step, source), (5, None));
    assert_eq!(shares, [(2, vec![3, 4, 5, 6, 7]), (1, vec![0, 1, 2])], "ranks are as they were");
}

/// It hung up, for its welcome was long in coming, and calls again.
#[test]
fn who_hung_up_before_it_said_what_it_holds_may_come_back_once_more() {
    let (mut run, last) = (Run::taken_over(2, 2), ring(7, 4, &[1, 2]));
    run.back(1, &last, holding(4, &[], None));
    assert_eq!(run.step(Event::CameBack(WorkerId(2), candidate(2))), [Action::Admit(WorkerId(2))]);
    assert_eq!(run.step(Event::Lost(WorkerId(2), "it hung up".into())), []);
    assert!(run.registry.awaits_returns(), "it may come yet");
    let actions = run.back(2, &last, holding(4, &[], None));
    assert_eq!(actions[0], Action::Admit(WorkerId(2)));
    assert_eq!(formed(&actions).3.len(), 2);
    // One that has said it, and one who is new, are lost.
    let mut run = Run::taken_over(3, 3);
    run.back(1, &ring(7, 4, &[1, 2, 3]), holding(4, &[], None));
    run.join(8);
    for id in [1, 8] {
        let actions = run.step(Event::Lost(WorkerId(id), "gone".into()));
        assert!(matches!(&actions[..], [Action::Lose(..)]), "{actions:?}");
    }
}

#[test]
fn what_it_means_that_one_leaves_is_known_when_all_are_back() {
    for (min_workers, stops) in [(2, false), (3, true)] {
        let (mut run, last) = (Run::taken_over_with(min_workers, 3, 3), ring(7, 4, &[1, 2, 3]));
        run.back(1, &last, holding(4, &[], None));
        run.back(3, &last, holding(4, &[], None));
        assert_eq!(run.leaving(3), []);
        assert!(run.registry.awaits_returns() && !run.registry.stop);
        run.back(2, &last, holding(4, &[], None));
        assert_eq!(run.registry.stop, stops, "with {min_workers} at least");
    }
}

#[test]
fn the_newest_ring_that_anybody_tells_of_is_waited_for() {
    let mut run = Run::taken_over(3, 3);
    run.back(1, &ring(6, 4, &[1, 2, 3]), holding(4, &[], None));
    run.back(2, &ring(7, 4, &[1, 2]), holding(5, &[], None));
    assert_eq!(run.phase(), Phase::Forming);
    // Who comes later is one more.
    run.linked(1);
    run.linked(2);
    run.back(3, &ring(6, 4, &[1, 2, 3]), holding(4, &[], None));
    assert_eq!(run.phase(), Phase::Recalling);
}

#[test]
fn who_does_not_come_back_in_time_is_lost_and_out_for_good() {
    let (mut run, last) = (Run::taken_over(2, 3), ring(7, 4, &[1, 2]));
    run.back(1, &last, holding(4, &[], None));
    assert_eq!(run.wait(TIMEOUT, &[1]), []);
    let actions = run.wait(TIMEOUT, &[1]);
    assert!(matches!(&actions[0], Action::Lose(WorkerId(2), reason) if reason.contains("come back")));
    assert_eq!(formed(&actions).3.len(), 1);
    let actions = run.step(Event::CameBack(WorkerId(2), candidate(2)));
    assert!(matches!(&actions[..], [Action::Refuse(WorkerId(2), _)]), "{actions:?}");
}

#[test]
fn who_was_in_before_has_its_place_however_quick_others_are() {
    let (mut run, last) = (Run::taken_over(2, 2), ring(7, 4, &[1, 2]));
    assert!(matches!(run.join(8)[..], [Action::Admit(_)]));
    assert!(matches!(run.join(9)[..], [Action::Admit(_)]));
    assert!(matches!(run.join(10)[..], [Action::Refuse(..)]));
    run.back(1, &last, holding(4, &[], None));
    assert_eq!(formed(&run.back(2, &last, holding(4, &[], None))).3.len(), 2);
}

#[test]
fn where_nobody_comes_back_those_who_join_load_from_storage() {
    let mut run = Run::taken_over(2, 2);
    for id in [8, 9] {
        run.join(id);
        assert_eq!(run.ready(id, None), []);
    }
    let actions = run.wait(2 * TIMEOUT, &[8, 9]);
    assert_eq!(actions, [Action::Restore(vec![WorkerId(8), WorkerId(9)])]);
    let (_, step, source, shares) = formed(&run.ready(8, Some(4)));
    assert_eq!((step, source, shares.len()), (4, None, 1), "the first goes on, the other joins");
}

#[test]
fn a_run_that_had_not_begun_begins_with_those_who_were_ready() {
    let mut run = Run::taken_over(2, 2);
    run.step(Event::CameBack(WorkerId(1), candidate(1)));
    run.ready(1, Some(0));
    run.join(8);
    run.ready(8, None);
    let (_, step, source, _) = formed(&run.wait(2 * TIMEOUT, &[1, 8]));
    assert_eq!((step, source), (0, Some(0)), "who is new gets the state");
}

#[test]
fn a_run_that_had_not_begun_waits_for_no_more_than_it_needs() {
    // Of five that were expected two are gone for good, with the coordinator that waited for them.
    let mut run = Run::taken_over_with(3, 5, 5);
    for id in [1, 2] {
        run.step(Event::CameBack(WorkerId(id), candidate(id)));
        run.ready(id, Some(0));
    }
    assert_eq!(run.wait(2 * TIMEOUT, &[1, 2]), [], "others may still come, and these are too few");
    assert!(!run.registry.awaits_returns());
    assert!(matches!(run.join(8)[..], [Action::Admit(_)]));
    let (_, step, source, shares) = formed(&run.ready(8, None));
    assert_eq!((step, source, shares.len()), (0, Some(0), 3));
}

#[test]
fn what_kind_the_run_is_those_say_who_come_back() {
    let (mut run, last) = (Run::taken_over(1, 3), ring(7, 4, &[1]));
    let stranger = Candidate { fingerprint: "another".into(), ..candidate(8) };
    assert_eq!(run.step(Event::Joined(WorkerId(8), stranger)), [Action::Admit(WorkerId(8))]);
    let actions = run.back(1, &last, holding(4, &[], None));
    assert!(matches!(&actions[..], [Action::Refuse(WorkerId(8), _), Action::Admit(_), Action::Form(_)]));
}

#[test]
fn a_stop_waits_for_those_who_come_back() {
    let (mut run, last) = (Run::taken_over(2, 2), ring(7, 4, &[1, 2]));
    assert_eq!(run.step(Event::StopRequested), []);
    run.back(1, &last, holding(4, &[], None));
    run.back(2, &last, holding(4, &[], None));
    run.linked(1);
    let actions = run.linked(2);
    assert!(matches!(actions[..], [Action::Start(_), Action::Stop]), "{actions:?}");
}

#[test]
fn whether_a_leave_stops_the_run_is_known_when_all_are_back() {
    let (mut run, last) = (Run::taken_over(2, 2), ring(7, 4, &[1, 2]));
    run.back(1, &last, holding(4, &[], None));
    assert_eq!(run.leaving(1), [], "nobody else is back yet");
    let actions = run.back(2, &last, holding(4, &[], None));
    assert!(matches!(&actions[1], Action::Release(WorkerId(1), _)), "{actions:?}");
    assert_eq!(formed(&actions).3, [(2, (0..8).collect())]);
    let mut run = Run::taken_over(2, 2);
    run.back(1, &ring(7, 4, &[1]), holding(4, &[], None));
    assert_eq!(run.leaving(1), [Action::Stop], "it is the last");
}

#[test]
fn where_nobody_comes_at_all_the_time_to_come_back_ends_by_itself() {
    let mut run = Run::taken_over(2, 2);
    assert_eq!(run.registry.deadline(), Some(run.now + 2 * TIMEOUT), "before anything has happened");
    assert_eq!(run.step(Event::StopRequested), []);
    run.now += 2 * TIMEOUT;
    let (outcome, reason) = end(&run.step(Event::Tick));
    assert!(outcome == Outcome::Failed && reason.contains("stopped"), "{reason}");
}

#[test]
fn a_ring_that_is_older_than_another_is_not_the_last() {
    let mut run = Run::taken_over(3, 3);
    run.back(2, &ring(7, 4, &[1, 2]), holding(5, &[], None));
    run.back(1, &ring(6, 4, &[1, 2, 3]), holding(5, &[], None));
    assert_eq!(run.phase(), Phase::Forming, "nobody waits for worker 3");
}
