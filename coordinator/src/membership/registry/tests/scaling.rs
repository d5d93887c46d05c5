//! Fewer workers on request.

use super::*;

fn shrink(run: &mut Run, workers: u32) -> Vec<Action> {
    assert!(run.registry.may_scale(workers).is_ok());
    run.step(Event::Shrink(workers))
}

#[test]
fn the_newest_leave_after_their_step_and_others_may_come_later() {
    let mut run = Run::train(1, 4);
    assert_eq!(shrink(&mut run, 2), []);
    assert_eq!(run.step(Event::Heard(WorkerId(0))), []);
    let (members, reason) = recalled(&run.step(Event::Stepped));
    assert_eq!(members, [0, 1, 2, 3]);
    assert!(reason.contains("worker 3 leaves: the run was scaled to 2 workers"), "{reason}");
    (0..3).for_each(|id| drop(run.held(id, Holding::at(5))));
    let actions = run.held(3, Holding::at(5));
    let released: Vec<u64> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Release(id, _) => Some(id.0),
            _ => None,
        })
        .collect();
    assert_eq!(released, [2, 3]);
    let (_, step, source, shares) = formed(&actions);
    assert_eq!((step, source, shares.len()), (5, None, 2));
    (0..2).for_each(|id| drop(run.linked(id)));
    assert_eq!(run.phase(), Phase::Running);
    run.join(7);
    assert_eq!(recalled(&run.ready(7, None)).0, [0, 1], "a request is no bound");
}

#[test]
fn a_long_step_is_not_waited_for() {
    let mut run = Run::train(1, 3);
    assert_eq!(shrink(&mut run, 2), []);
    let due = run.registry.deadline().unwrap();
    assert!(due < run.now + TIMEOUT / 2, "in {:?}", due - run.now);
    run.now = due;
    assert_eq!(recalled(&run.step(Event::Tick)).0, [0, 1, 2]);
}

#[test]
fn who_is_told_to_leave_by_its_host_is_not_waited_for() {
    let mut run = Run::train(1, 3);
    assert_eq!(shrink(&mut run, 2), []);
    assert_eq!(recalled(&run.leaving(2)).0, [0, 1, 2]);
}

#[test]
fn who_has_no_state_yet_leaves_at_once() {
    let mut run = Run::training();
    run.join(2);
    assert_eq!(run.registry.may_scale(2), Ok(3));
    let actions = shrink(&mut run, 2);
    assert!(matches!(actions[..], [Action::Release(WorkerId(2), _)]), "{actions:?}");
}

#[test]
fn while_a_ring_is_changed_a_request_waits_for_the_next() {
    let mut run = Run::train(1, 3);
    run.lost(0);
    assert_eq!(run.phase(), Phase::Recalling);
    assert_eq!(shrink(&mut run, 1), []);
    run.held(1, Holding::at(2));
    let actions = run.held(2, Holding::at(2));
    assert_eq!(formed(&actions).3.len(), 2);
    (1..3).for_each(|id| drop(run.linked(id)));
    let (members, reason) = recalled(&run.step(Event::Stepped));
    assert_eq!(members, [1, 2]);
    assert!(reason.contains("worker 2 leaves"), "{reason}");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let mut run = Run::with_minimum(2, 3, 4);
    assert!(run.registry.may_scale(3).unwrap_err().contains("wait"));
    (0..3).for_each(|id| drop(run.join(id)));
    (0..3).for_each(|id| drop(run.ready(id, Some(0))));
    for wanted in [0, 1, 5] {
        let reason = run.registry.may_scale(wanted).unwrap_err();
        assert!(reason.contains("2 to 4"), "{reason}");
    }
    assert_eq!(run.registry.may_scale(4), Ok(3));
    run.step(Event::StopRequested);
    assert!(run.registry.may_scale(3).unwrap_err().contains("ending"));
}

#[test]
fn where_nobody_else_has_the_state_who_was_sent_away_stays_and_leaves_later() {
    let mut run = Run::train(1, 3);
    shrink(&mut run, 1);
    run.lost(0);
    run.held(1, Holding::at(4));
    let actions = run.held(2, Holding::at(4));
    assert_eq!(formed(&actions).3.len(), 2, "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::Release(..))), "{actions:?}");
    (1..3).for_each(|id| drop(run.linked(id)));
    let (members, reason) = recalled(&run.step(Event::Stepped));
    assert_eq!(members, [1, 2]);
    assert!(reason.contains("worker 2 leaves"), "{reason}");
}
