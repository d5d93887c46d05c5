//! Who comes in another's place, or reads the state again: where it goes, and who waits for it.

use super::*;

/// Three workers of a divided state that train, of which worker 1 dies, and a process starts in its place.
fn replacing() -> Run {
    let mut run = Run::train(1, 3);
    run.registry.config.divided = true;
    assert_eq!(run.step(Event::Replaced), []);
    assert_eq!(recalled(&run.lost(1)).0, [0, 2]);
    run.held(0, Holding::at(4));
    run
}

fn workers(actions: &[Action]) -> Vec<u64> {
    formed(actions).3.into_iter().map(|(worker, _)| worker).collect()
}

#[test]
fn a_newcomer_takes_the_place_of_who_is_gone() {
    let mut run = Run::train(1, 3);
    run.lost(0);
    run.held(1, Holding::at(4));
    assert_eq!(workers(&run.held(2, Holding::at(4))), [1, 2], "nobody waits where all have all of the state");
    let mut run = replacing();
    assert_eq!(run.held(2, Holding::at(4)), [], "and here nobody says that it waits for more workers");
    run.join(3);
    assert_eq!(workers(&run.ready(3, None)), [0, 3, 2]);
}

#[test]
fn a_ring_of_divided_state_does_not_wait_long() {
    let mut run = replacing();
    run.held(2, Holding::at(4));
    let until = run.registry.deadline().unwrap();
    assert!(until > run.now && until <= run.now + Duration::from_secs(2));
    run.now = until - Duration::from_nanos(1);
    assert_eq!(run.step(Event::Tick), []);
    run.now = until;
    assert_eq!(workers(&run.step(Event::Tick)), [0, 2]);
    assert!(run.registry.deadline().is_some_and(|deadline| deadline > run.now), "no timer is left behind");
}

#[test]
fn whoever_is_expected_while_a_ring_holds_is_forgotten_in_time() {
    let mut run = Run::train(1, 3);
    run.registry.config.divided = true;
    run.step(Event::Replaced);
    run.now = run.registry.deadline().unwrap();
    run.step(Event::Tick);
    (0..3).for_each(|id| drop(run.step(Event::Heard(WorkerId(id)))));
    run.lost(1);
    run.held(0, Holding::at(4));
    assert_eq!(workers(&run.held(2, Holding::at(4))), [0, 2]);
}

#[test]
fn who_is_to_stop_waits_for_nobody() {
    let mut run = replacing();
    run.step(Event::StopRequested);
    assert_eq!(workers(&run.held(2, Holding::at(4))), [0, 2]);
}

#[test]
fn nobody_begins_alone_with_a_divided_state_that_all_read() {
    let mut run = Run::train(1, 2);
    run.registry.config.divided = true;
    run.broken(0, None);
    run.held(0, Holding::default());
    assert_eq!(run.held(1, Holding::default())[0], Action::Restore(vec![WorkerId(0), WorkerId(1)]));
    assert_eq!(run.ready(1, Some(3)), []);
    assert_eq!(workers(&run.ready(0, Some(3))), [0, 1]);
}

#[test]
fn who_is_lost_while_it_reads_is_not_waited_for() {
    let mut run = Run::train(1, 2);
    run.registry.config.divided = true;
    run.broken(0, None);
    run.held(0, Holding::default());
    run.held(1, Holding::default());
    run.ready(1, Some(3));
    assert_eq!(workers(&run.lost(0)), [1]);
}

#[test]
fn nobody_waits_for_a_replacement_where_all_have_all_of_the_state() {
    let mut run = Run::train(1, 3);
    run.step(Event::Replaced);
    run.lost(1);
    run.held(0, Holding::at(4));
    assert_eq!(workers(&run.held(2, Holding::at(4))), [0, 2]);
}
