//! How runs end.

use super::*;

#[test]
fn who_is_done_may_be_silent_and_sets_no_timer() {
    let mut run = Run::training();
    run.step(Event::Finished(WorkerId(0), finish(7, None)));
    run.now += TIMEOUT / 2;
    run.step(Event::Heard(WorkerId(1)));
    run.now += TIMEOUT / 2;
    assert_eq!(run.step(Event::Tick), []);
    assert_eq!(run.registry.deadline(), Some(run.now + TIMEOUT / 2), "the other was heard later");
    run.now += TIMEOUT / 2 - Duration::from_nanos(1);
    assert_eq!(run.step(Event::Tick), []);
    assert_eq!(run.lost(0), []);
    let over = run.step(Event::Finished(WorkerId(1), finish(7, Some(0.5))));
    assert_eq!(over, [Action::End(Outcome::Completed(finish(7, Some(0.5))), "all steps are done".into())]);
}

#[test]
fn nobody_is_done_before_training() {
    let mut run = Run::new(1, 1);
    run.join(0);
    run.step(Event::Finished(WorkerId(0), finish(7, None)));
    run.now += TIMEOUT;
    assert!(matches!(run.step(Event::Tick)[..], [Action::Lose(WorkerId(0), _)]));
}

#[test]
fn different_final_states_are_a_failure() {
    let mut run = Run::training();
    run.step(Event::Finished(WorkerId(0), finish(7, None)));
    let (outcome, reason) = end(&run.step(Event::Finished(WorkerId(1), finish(8, None))));
    assert!(outcome == Outcome::Failed && reason.contains("different states"), "{reason}");
}

#[test]
fn a_failure_is_the_runs_the_inputs_or_the_workers() {
    let fail = |blame| {
        let failure = Failure { text: "the disk is full".into(), blame };
        Run::training().step(Event::Failed(WorkerId(0), failure))
    };
    let reason = "worker 0: the disk is full".to_owned();
    assert_eq!(fail(Blame::Run), [Action::End(Outcome::Failed, reason.clone())]);
    assert_eq!(fail(Blame::Input), [Action::End(Outcome::BadInput, reason)]);
    let actions = fail(Blame::Worker);
    assert_eq!(actions[0], Action::Lose(WorkerId(0), "the disk is full".into()));
    assert_eq!(recalled(&actions).0, [1], "the other goes on");
}

#[test]
fn a_stop_while_workers_gather_ends_the_run() {
    let end = Action::End(Outcome::Failed, "stopped before training began".into());
    assert_eq!(Run::new(1, 1).step(Event::StopRequested), [end]);
}

#[test]
fn a_process_that_ends_before_it_joins_ends_a_run_that_waits_for_it() {
    for (bad_input, outcome) in [(true, Outcome::BadInput), (false, Outcome::Failed)] {
        let abandoned = || Event::Abandoned { cause: "exit status 2".into(), bad_input, left: 1 };
        let reason = "a worker ended before it joined: exit status 2".to_owned();
        assert_eq!(Run::new(2, 2).step(abandoned()), [Action::End(outcome, reason)]);
    }
}

#[test]
fn the_last_of_a_run_whose_processes_are_not_replaced_ends_it() {
    let abandoned = |left| Event::Abandoned { cause: "exit status 9".into(), bad_input: false, left };
    let mut run = Run::training();
    run.lost(0);
    assert_eq!(run.step(abandoned(1)), []);
    run.held(1, Holding::at(0));
    let actions = run.lost(1);
    assert!(!actions.iter().any(|action| matches!(action, Action::End(..))), "another may come: {actions:?}");
    let (outcome, reason) = end(&run.step(abandoned(0)));
    assert_eq!(outcome, Outcome::WorkerLost(WorkerId(1)));
    assert!(reason.contains("no worker is left"), "{reason}");
}

/// Others may come from elsewhere.
#[test]
fn while_a_worker_is_left_the_run_waits_though_no_process_is_replaced() {
    let mut run = Run::train(2, 2);
    run.lost(0);
    assert_eq!(run.held(1, Holding::at(0)), [Action::Wait { ready: 1, needed: 2 }]);
    let abandoned = Event::Abandoned { cause: "exit status 9".into(), bad_input: false, left: 0 };
    assert_eq!(run.step(abandoned), []);
    run.join(2);
    assert_eq!(formed(&run.ready(2, None)).3.len(), 2);
}

#[test]
fn a_stopped_run_without_workers_ends() {
    let mut run = Run::training();
    run.step(Event::StopRequested);
    run.lost(0);
    let (outcome, reason) = end(&run.lost(1));
    assert!(outcome == Outcome::Failed && reason.contains("resume"), "{reason}");
}

#[test]
fn workers_that_start_from_different_steps_do_not_form_a_ring() {
    let mut run = Run::new(2, 2);
    run.join(0);
    run.join(1);
    run.ready(0, Some(3));
    let (outcome, reason) = end(&run.ready(1, Some(4)));
    assert!(outcome == Outcome::Failed && reason.contains("different steps"), "{reason}");
}

#[test]
fn after_the_end_nothing_is_decided() {
    let mut run = Run::new(1, 1);
    run.step(Event::StopRequested);
    assert_eq!(run.join(0), []);
    assert_eq!(run.registry.deadline(), None);
}

#[test]
fn who_does_not_train_is_missed_though_it_says_that_it_is_done() {
    let mut run = Run::training();
    run.join(2);
    run.step(Event::Finished(WorkerId(2), finish(1, None)));
    run.now += TIMEOUT;
    let events = [Event::Heard(WorkerId(0)), Event::Heard(WorkerId(1)), Event::Tick];
    let actions: Vec<Action> = events.into_iter().flat_map(|event| run.step(event)).collect();
    assert!(actions.iter().any(|action| matches!(action, Action::Lose(WorkerId(2), _))), "{actions:?}");
}

#[test]
fn a_process_that_ends_early_does_not_matter_where_enough_others_have_joined() {
    let mut run = Run::with_minimum(2, 2, 3);
    run.join(0);
    run.join(1);
    let abandoned = Event::Abandoned { cause: "exit status 9".into(), bad_input: false, left: 2 };
    assert_eq!(run.step(abandoned), []);
    run.ready(0, Some(0));
    assert_eq!(formed(&run.ready(1, Some(0))).3.len(), 2);
}
