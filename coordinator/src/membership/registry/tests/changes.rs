//! From ring to ring: recall, hearing, joining, leaving, waiting, restoring.

use super::*;
use crate::protocol::Pulse;

#[test]
fn a_death_recalls_the_ring_and_what_is_missing_is_handed_out() {
    let mut run = Run::train(1, 3);
    let actions = run.lost(2);
    assert_eq!(actions[0], Action::Lose(WorkerId(2), "killed".into()));
    assert_eq!(recalled(&actions), (vec![0, 1], "worker 2 was lost: killed".to_owned()));
    assert_eq!(run.held(0, holding(0, &[0], Some(1))), [], "the other has not answered");
    // 5 to 7 went with the dead, and 4 was not begun.
    let next = formed(&run.held(1, holding(0, &[2], Some(3))));
    assert_eq!(next, (2, 0, None, vec![(0, vec![0, 1, 4, 6]), (1, vec![2, 3, 5, 7])]));
    run.linked(0);
    assert!(matches!(run.linked(1)[..], [Action::Start(_)]));
}

#[test]
fn who_is_behind_gets_the_state_from_one_that_has_it() {
    let mut run = Run::train(1, 3);
    run.lost(0);
    run.held(1, holding(4, &[3, 4], Some(5)));
    // What was added up of an older step counts for nothing.
    let next = formed(&run.held(2, holding(5, &[], None)));
    assert_eq!(next, (2, 5, Some(1), vec![(1, vec![0, 1, 2, 3]), (2, vec![4, 5, 6, 7])]));
}

#[test]
fn an_answer_counts_once_and_only_to_this_recall() {
    let mut run = Run::training();
    assert_eq!(run.step(Event::Held(WorkerId(0), 1, holding(0, &[1], None))), [], "nobody asked");
    assert_eq!(run.phase(), Phase::Running);
    run.broken(1, None);
    assert_eq!(run.step(Event::Held(WorkerId(0), 7, holding(0, &[1], None))), []);
    assert_eq!(run.step(Event::Held(WorkerId(9), 1, holding(0, &[1], None))), []);
    run.held(0, holding(0, &[0], None));
    run.held(0, holding(0, &[0, 1, 2, 3, 4, 5, 6, 7], None));
    let (.., places) = formed(&run.held(1, holding(0, &[4], None)));
    assert_eq!(places, [(0, vec![0, 1, 3, 6]), (1, vec![2, 4, 5, 7])]);
}

#[test]
fn who_is_called_lost_may_speak_for_itself() {
    let mut run = Run::training();
    assert_eq!(recalled(&run.broken(1, Some(0))), (vec![0, 1], "worker 1: it broke".to_owned()));
    run.held(1, Holding::at(0));
    run.now += TIMEOUT / HEARING - Duration::from_nanos(1);
    assert_eq!(run.step(Event::Tick), []);
    assert_eq!(formed(&run.held(0, Holding::at(0))).3.len(), 2, "both go on");
}

#[test]
fn who_is_called_lost_and_does_not_speak_is_lost() {
    let mut run = Run::training();
    run.broken(1, Some(0));
    run.held(1, Holding::at(0));
    run.now += TIMEOUT / HEARING;
    assert_eq!(run.registry.deadline(), Some(run.now), "the hearing ends by itself");
    let actions = run.step(Event::Tick);
    assert!(matches!(&actions[0], Action::Lose(WorkerId(0), cause) if cause.contains("did not say in time")));
    assert_eq!(formed(&actions).3, [(1, (0..8).collect())]);
}

#[test]
fn a_heartbeat_is_no_answer() {
    let mut run = Run::training();
    run.broken(1, Some(0));
    run.now += TIMEOUT / HEARING;
    let actions = run.step(Event::Heard(WorkerId(0)));
    assert!(matches!(actions[..], [Action::Lose(WorkerId(0), _)]), "{actions:?}");
}

#[test]
fn a_break_of_another_ring_or_of_a_stranger_means_nothing() {
    let mut run = Run::training();
    let broken = |generation| Break { generation, lost_rank: Some(0), text: "late".into() };
    assert_eq!(run.step(Event::Broken(WorkerId(1), broken(0))), []);
    assert_eq!(run.step(Event::Broken(WorkerId(9), broken(1))), []);
}

#[test]
fn who_accuses_itself_or_nobody_is_given_the_timeout_like_the_rest() {
    for lost_rank in [None, Some(1), Some(9)] {
        let mut run = Run::training();
        run.broken(1, lost_rank);
        run.now += TIMEOUT - Duration::from_nanos(1);
        assert_eq!(run.step(Event::Tick), []);
        assert_eq!(run.phase(), Phase::Recalling);
    }
}

/// A ring in which this one calls the other lost, and both answer.
fn break_and_answer(run: &mut Run) -> Vec<Action> {
    let actions = run.broken(1, Some(0));
    run.held(0, Holding::at(0));
    run.held(1, Holding::at(0));
    run.linked(0);
    run.linked(1);
    actions
}

#[test]
fn rings_that_break_in_a_row_cost_the_accused_its_place() {
    let mut run = Run::training();
    for _ in 0..BREAKS_MAX {
        break_and_answer(&mut run);
        assert_eq!(run.phase(), Phase::Running);
    }
    let actions = run.broken(1, Some(0));
    let lost = actions.iter().any(|action| {
        matches!(action, Action::Lose(WorkerId(0), cause) if cause.contains("rings with it broke in a row"))
    });
    assert!(lost, "{actions:?}");
    assert_eq!(formed(&run.held(1, Holding::at(0))).3.len(), 1);
}

#[test]
fn a_death_explains_the_breaks_before_it() {
    let mut run = Run::train(1, 3);
    for _ in 0..BREAKS_MAX {
        run.broken(1, Some(0));
        (0..3).for_each(|id| drop(run.held(id, Holding::at(0))));
        (0..3).for_each(|id| drop(run.linked(id)));
    }
    run.lost(2);
    (0..2).for_each(|id| drop(run.held(id, Holding::at(0))));
    (0..2).for_each(|id| drop(run.linked(id)));
    let actions = run.broken(1, Some(0));
    assert!(matches!(actions[..], [Action::Recall { .. }]), "nobody has to go: {actions:?}");
}

#[test]
fn who_comes_or_leaves_breaks_nothing() {
    let mut run = Run::training();
    for id in 2..3 + u64::from(BREAKS_MAX) {
        run.join(id);
        run.ready(id, None);
        let members: Vec<u64> = run.registry.workers().map(|(worker, _)| worker.0).collect();
        members.iter().for_each(|&member| drop(run.held(member, Holding::at(0))));
        members.iter().for_each(|&member| drop(run.linked(member)));
        run.leaving(id);
        members.iter().for_each(|&member| drop(run.held(member, Holding::at(0))));
        members.iter().for_each(|&member| drop(run.linked(member)));
        assert_eq!(run.phase(), Phase::Running);
    }
    let actions = run.broken(1, Some(0));
    assert!(matches!(actions[..], [Action::Recall { .. }]), "{actions:?}");
}

#[test]
fn a_step_ends_a_row_of_breaks() {
    let mut run = Run::training();
    for _ in 0..2 * BREAKS_MAX {
        let actions = break_and_answer(&mut run);
        assert!(matches!(actions[..], [Action::Recall { .. }]), "{actions:?}");
        run.step(Event::Stepped);
    }
}

#[test]
fn a_joiner_without_a_state_gets_one_in_the_next_ring() {
    let mut run = Run::training();
    assert_eq!(run.join(2), [Action::Admit(WorkerId(2))], "nobody is disturbed while it loads");
    assert_eq!(recalled(&run.ready(2, None)), (vec![0, 1], "worker 2 joins".to_owned()));
    run.held(0, holding(3, &[0, 1], None));
    let next = formed(&run.held(1, holding(3, &[], Some(4))));
    assert_eq!(next, (2, 3, Some(0), vec![(0, vec![0, 1, 3, 7]), (1, vec![4, 5]), (2, vec![2, 6])]));
}

#[test]
fn a_joiner_waits_while_a_ring_forms() {
    let mut run = Run::training();
    run.broken(0, None);
    run.held(0, Holding::at(0));
    run.held(1, Holding::at(0));
    run.join(2);
    assert_eq!(run.ready(2, None), []);
    run.linked(0);
    assert!(matches!(run.linked(1)[..], [Action::Start(_)]));
    assert_eq!(recalled(&run.step(Event::Tick)).1, "worker 2 joins");
}

#[test]
fn nobody_is_let_in_when_the_run_is_all_but_over() {
    let mut run = Run::training();
    run.join(2);
    run.step(Event::Finished(WorkerId(0), finish(7, Some(0.5))));
    assert_eq!(run.ready(2, None), []);
    let over = run.step(Event::Finished(WorkerId(1), finish(7, None)));
    assert_eq!(end(&over).0, Outcome::Completed(finish(7, Some(0.5))));
}

#[test]
fn nobody_is_let_in_to_be_stopped() {
    let mut run = Run::training();
    run.join(2);
    run.step(Event::StopRequested);
    assert_eq!(run.ready(2, None), []);
    let recall = run.lost(0);
    assert_eq!(recalled(&recall).0, [1]);
    assert_eq!(formed(&run.held(1, Holding::at(1))).3.len(), 2, "where a ring is formed anyway, it may help");
}

#[test]
fn a_leaver_is_released_and_its_part_handed_out() {
    let mut run = Run::train(2, 3);
    assert_eq!(recalled(&run.leaving(0)), (vec![0, 1, 2], "worker 0 leaves: told to".to_owned()));
    run.held(0, holding(0, &[0, 1], None));
    run.held(1, holding(0, &[2], None));
    let actions = run.held(2, holding(0, &[5], None));
    assert_eq!(actions[0], Action::Release(WorkerId(0), "told to".into()));
    assert_eq!(formed(&actions).3, [(1, vec![0, 2, 3, 6]), (2, vec![1, 4, 5, 7])]);
}

#[test]
fn who_is_in_no_ring_leaves_at_once() {
    let mut run = Run::training();
    run.join(2);
    assert_eq!(run.leaving(2), [Action::Release(WorkerId(2), "told to".into())]);
    assert_eq!(run.leaving(2), [], "it has left");
}

#[test]
fn a_leaver_without_whom_too_few_are_left_stops_the_run() {
    let mut run = Run::train(2, 2);
    assert_eq!(run.leaving(0), [Action::Stop]);
    assert_eq!(run.phase(), Phase::Running, "it writes the checkpoint with the others");
    assert_eq!(run.leaving(1), []);
}

#[test]
fn below_the_minimum_the_run_waits_and_goes_on_by_itself() {
    let mut run = Run::train(2, 2);
    run.lost(0);
    let waits = run.held(1, holding(3, &[4], None));
    assert_eq!(waits, [Action::Wait { ready: 1, needed: 2 }]);
    run.now += TIMEOUT / 2;
    run.step(Event::Heard(WorkerId(1)));
    run.join(2);
    let next = formed(&run.ready(2, None));
    assert_eq!((next.0, next.1, next.2), (2, 3, Some(1)));
    assert_eq!(next.3, [(2, vec![0, 2, 5, 7]), (1, vec![1, 3, 4, 6])]);
}

#[test]
fn a_run_that_waits_and_is_stopped_forms_a_ring_of_those_there_are() {
    let mut run = Run::train(2, 2);
    run.lost(0);
    run.held(1, Holding::at(3));
    let next = formed(&run.step(Event::StopRequested));
    assert_eq!((next.0, next.3), (2, vec![(1, (0..8).collect())]));
    assert!(matches!(run.linked(1)[..], [Action::Start(_), Action::Stop]));
}

#[test]
fn when_everybody_is_gone_those_who_come_load_from_storage() {
    let mut run = Run::training();
    run.lost(0);
    let actions = run.lost(1);
    assert_eq!(actions.last(), Some(&Action::Wait { ready: 0, needed: 1 }));
    run.join(2);
    let restores = run.ready(2, None);
    assert_eq!(restores, [Action::Restore(vec![WorkerId(2)])]);
    assert_eq!(formed(&run.ready(2, Some(2))), (2, 2, None, vec![(2, (0..8).collect())]));
}

#[test]
fn a_state_half_received_is_none() {
    let mut run = Run::training();
    run.join(2);
    run.ready(2, None);
    run.held(0, Holding::at(1));
    run.held(1, Holding::at(1));
    // Both who had it die while it is on its way.
    run.lost(0);
    run.lost(1);
    assert_eq!(run.held(2, Holding::default())[0], Action::Restore(vec![WorkerId(2)]));
}

#[test]
fn silence_is_given_one_timeout() {
    let mut run = Run::training();
    run.now += TIMEOUT / 2;
    run.step(Event::Heard(WorkerId(1)));
    assert_eq!(run.registry.deadline(), Some(run.now + TIMEOUT / 2));
    run.now += TIMEOUT / 2;
    let actions = run.step(Event::Tick);
    assert!(matches!(&actions[0], Action::Lose(WorkerId(0), cause) if cause.contains("nothing was heard")));
    assert_eq!(recalled(&actions).0, [1]);
}

/// Each of thousands says every second that it is alive.
#[test]
fn a_heartbeat_is_no_reason_to_look_at_everybody() {
    let mut run = Run::training();
    let due = run.registry.deadline();
    run.now += TIMEOUT / 2;
    (0..2).for_each(|id| drop(run.step(Event::Heard(WorkerId(id)))));
    assert_eq!(run.registry.deadline(), due, "it may be early");
    run.now += TIMEOUT / 2;
    assert_eq!(run.step(Event::Tick), []);
    assert_eq!(run.registry.deadline(), Some(run.now + TIMEOUT / 2));
}

#[test]
fn an_accusation_counts_while_others_answer_too() {
    let mut run = Run::train(1, 4);
    // Rank 2 is dead. Rank 1 gives the ring up because of it, and rank 0, because of rank 1, is the first to say so.
    run.broken(0, Some(1));
    run.broken(1, Some(2));
    run.held(1, Holding::at(0));
    run.broken(1, Some(2));
    for id in [0, 3] {
        run.held(id, Holding::at(0));
    }
    run.now += TIMEOUT / HEARING;
    let actions = run.step(Event::Tick);
    assert!(matches!(actions[0], Action::Lose(WorkerId(2), _)), "{actions:?}");
    assert_eq!(formed(&actions).3.len(), 3);
}

#[test]
fn who_has_answered_may_still_say_who_is_lost() {
    let mut run = Run::train(1, 3);
    run.broken(0, None);
    run.held(1, Holding::at(0));
    run.broken(1, Some(2));
    run.held(0, Holding::at(0));
    run.now += TIMEOUT / HEARING;
    let actions = run.step(Event::Tick);
    assert!(matches!(actions[0], Action::Lose(WorkerId(2), _)), "{actions:?}");
    assert_eq!(formed(&actions).3.len(), 2);
}

#[test]
fn who_is_heard_of_and_does_not_answer_is_given_one_timeout() {
    let mut run = Run::training();
    run.broken(1, None);
    run.held(1, Holding::at(0));
    for _ in 0..3 {
        run.now += TIMEOUT / 4;
        run.step(Event::Heard(WorkerId(0)));
        assert_eq!(run.step(Event::Heard(WorkerId(1))), []);
    }
    run.now += TIMEOUT / 4;
    assert_eq!(run.registry.deadline(), Some(run.now));
    let actions = run.step(Event::Tick);
    assert!(matches!(&actions[0], Action::Lose(WorkerId(0), cause) if cause.contains("did not say in time")));
    assert_eq!(formed(&actions).3.len(), 1);
}

#[test]
fn who_was_lost_when_it_was_done_is_not_asked() {
    let mut run = Run::train(1, 3);
    let pulse = Pulse { progress: 1, busy: true, slowest_ms: 1 };
    run.step(Event::Pulse(WorkerId(1), pulse));
    run.step(Event::Finished(WorkerId(0), finish(7, None)));
    run.step(Event::Finished(WorkerId(1), finish(7, None)));
    run.lost(0);
    run.now += 2 * TIMEOUT;
    // Both were silent for long; one of them because nobody cared.
    run.step(Event::Heard(WorkerId(2)));
    let actions = run.lost(2);
    assert_eq!(actions[1], Action::Lose(WorkerId(0), "killed".into()));
    assert_eq!(recalled(&actions), (vec![1], "worker 2 was lost: killed".to_owned()));
    assert_eq!(run.registry.deadline(), Some(run.now + TIMEOUT));
    assert_eq!(formed(&run.held(1, Holding::at(8))).3.len(), 1);
}

#[test]
fn the_last_who_have_the_state_do_not_leave_while_the_run_waits() {
    let mut run = Run::train(2, 2);
    run.lost(0);
    run.held(1, Holding::at(3));
    let actions = run.leaving(1);
    assert_eq!(formed(&actions).3, [(1, (0..8).collect())], "it writes the checkpoint first");
    assert!(matches!(run.linked(1)[..], [Action::Start(_), Action::Stop]));
}

#[test]
fn a_joiner_that_cannot_use_the_input_costs_the_run_nothing() {
    let mut run = Run::training();
    run.join(2);
    let failure = Failure { text: "no such file".into(), blame: Blame::Input };
    let actions = run.step(Event::Failed(WorkerId(2), failure));
    assert_eq!(actions, [Action::Lose(WorkerId(2), "no such file".into())]);
    assert_eq!(run.step(Event::Abandoned { cause: "status 2".into(), bad_input: true, left: 2 }), []);
    assert_eq!(run.phase(), Phase::Running);
}

#[test]
fn a_checkpoint_that_nobody_can_load_ends_the_run() {
    let mut run = Run::training();
    run.lost(0);
    run.lost(1);
    run.join(2);
    run.ready(2, None);
    let failure = Failure { text: "it is damaged".into(), blame: Blame::Input };
    assert_eq!(end(&run.step(Event::Failed(WorkerId(2), failure))).0, Outcome::BadInput);
}

#[test]
fn who_was_lost_or_has_left_comes_back_as_another_only() {
    let mut run = Run::train(1, 3);
    run.lost(0);
    run.join(3);
    run.leaving(3);
    for id in [0, 3] {
        let refused = run.join(id);
        assert!(matches!(&refused[..], [Action::Refuse(_, reason)] if reason.contains("as a new worker")));
    }
    assert_eq!(run.join(4), [Action::Admit(WorkerId(4))]);
}

#[test]
fn who_is_not_of_the_ring_calls_nobody_of_it_lost() {
    let mut run = Run::training();
    run.join(2);
    run.broken(0, None);
    assert_eq!(run.phase(), Phase::Recalling);
    let before = format!("{:?}", run.registry.workers);
    assert_eq!(run.broken(2, Some(1)), []);
    // Only the time at which the newcomer was heard of is another, and here it is the same.
    assert_eq!(format!("{:?}", run.registry.workers), before);
    run.broken(1, Some(0));
    assert_ne!(format!("{:?}", run.registry.workers), before, "what a member says is heard");
}

#[test]
fn who_is_linked_in_an_older_ring_is_not_linked_in_this_one() {
    let mut run = Run::train(1, 3);
    run.lost(2);
    run.held(0, Holding::at(4));
    run.held(1, Holding::at(4));
    assert_eq!(run.phase(), Phase::Forming);
    assert_eq!(run.step(Event::Linked(WorkerId(0), 1)), []);
    assert_eq!(run.linked(1), [], "worker 0 is awaited");
    assert!(matches!(run.linked(0)[..], [Action::Start(_)]));
}

#[test]
fn whoever_is_heard_of_has_to_answer_a_recall_in_time_all_the_same() {
    let mut run = Run::train(1, 3);
    let begun = run.now;
    run.now = begun + TIMEOUT / 2;
    run.lost(2);
    let until = run.now + TIMEOUT;
    run.now = begun + TIMEOUT * 9 / 10;
    for id in [0, 1] {
        run.step(Event::Heard(WorkerId(id)));
    }
    run.now = begun + TIMEOUT;
    assert_eq!(run.step(Event::Tick), []);
    assert_eq!(run.registry.deadline(), Some(until));
}
