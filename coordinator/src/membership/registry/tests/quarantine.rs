//! Who holds another state than the others goes.

use super::*;
use crate::membership::Dissent;

fn with_hash(step: u64, done: &[u32], state_hash: u64, basis: u64) -> Holding {
    Holding { state_hash: Some(state_hash), basis: Some(basis), ..holding(step, done, None) }
}

/// Three workers that train, and are recalled because a commit found different states.
fn differing() -> Run {
    let mut run = Run::train(1, 3);
    run.broken(2, None);
    run
}

#[test]
fn the_one_that_differs_is_named_and_what_it_did_is_done_again() {
    for (odd, what) in [(with_hash(4, &[2, 3], 8, 5), "state"), (with_hash(4, &[2, 3], 7, 6), "parameters")] {
        let mut run = differing();
        run.held(0, with_hash(4, &[0, 1], 7, 5));
        run.held(1, odd);
        let actions = run.held(2, with_hash(4, &[4, 5, 6, 7], 7, 5));
        let (got, want) = if what == "state" { (8, 7) } else { (6, 5) };
        let dissent = Dissent { step: 4, what, got, want, agreed: 2, ranks: 3 };
        assert_eq!(actions[0], Action::Quarantine(WorkerId(1), dissent.clone()));
        assert_eq!(actions[1], Action::Lose(WorkerId(1), dissent.to_string()));
        let shares = vec![(0, vec![0, 1, 2]), (2, vec![3, 4, 5, 6, 7])];
        assert_eq!(formed(&actions), (2, 4, None, shares), "the others keep what they have");
    }
}

#[test]
fn who_computes_another_gradient_than_the_others_goes() {
    let mut run = differing();
    let audited = |audit, done: &[u32]| Holding { audit: Some(audit), ..with_hash(4, done, 7, 5) };
    run.held(0, audited(3, &[0, 1]));
    run.held(1, audited(2, &[2, 3]));
    let actions = run.held(2, audited(3, &[4, 5]));
    let dissent = Dissent { step: 4, what: "gradient", got: 2, want: 3, agreed: 2, ranks: 3 };
    assert_eq!(actions[0], Action::Quarantine(WorkerId(1), dissent));
    assert!(formed(&actions).3.iter().all(|(worker, _)| *worker != 1));
}

#[test]
fn without_a_majority_the_run_stops() {
    let mut run = differing();
    run.lost(0);
    run.held(1, with_hash(4, &[], 7, 5));
    let actions = run.held(2, with_hash(4, &[], 8, 5));
    let [Action::End(Outcome::Failed, reason)] = &actions[..] else { panic!("{actions:?}") };
    assert!(reason.contains("no majority") && reason.contains("newest checkpoint"), "{reason}");
    assert!(reason.contains("0000000000000007") && reason.contains("0000000000000008"), "{reason}");
}

#[test]
fn who_is_a_step_behind_is_not_compared() {
    let mut run = differing();
    run.held(0, with_hash(5, &[], 9, 5));
    run.held(1, with_hash(4, &[2], 7, 5));
    let actions = run.held(2, with_hash(4, &[4], 7, 5));
    assert_eq!(formed(&actions).2, Some(0), "it is given the newest state");
}

#[test]
fn where_one_has_not_begun_to_compute_the_next_commit_decides() {
    let mut run = differing();
    run.held(0, with_hash(4, &[0], 7, 5));
    run.held(1, with_hash(4, &[2], 7, 6));
    let actions = run.held(2, Holding { basis: None, ..with_hash(4, &[], 7, 0) });
    assert_eq!(formed(&actions).3.len(), 3);
}

#[test]
fn states_that_the_ledger_finds_different_end_the_ring() {
    let mut run = Run::train(1, 3);
    let actions = run.step(Event::Disagreed("they differ".into()));
    assert!(
        matches!(&actions[..], [Action::Recall { reason, .. }] if reason == "they differ"),
        "{actions:?}"
    );
    assert_eq!(run.step(Event::Disagreed("they differ".into())), [], "once");
    for id in 0..2 {
        run.held(id, with_hash(4, &[], 7, 5));
    }
    let actions = run.held(2, with_hash(4, &[], 6, 5));
    assert!(matches!(&actions[0], Action::Quarantine(WorkerId(2), _)), "{actions:?}");
}

/// A ring of two, and a third that comes: what it has been given counts for nothing yet.
#[test]
fn the_majority_is_one_of_the_ring_that_is_over() {
    let mut run = Run::training();
    run.join(2);
    run.ready(2, None);
    run.held(0, with_hash(4, &[], 7, 5));
    let actions = run.held(1, with_hash(4, &[], 8, 5));
    assert!(matches!(&actions[..], [Action::End(Outcome::Failed, _)]), "{actions:?}");
}

#[test]
fn where_nobody_trains_a_disagreement_is_no_news() {
    let mut run = Run::new(2, 2);
    assert_eq!(run.step(Event::Disagreed("they differ".into())), []);
    (0..2).for_each(|id| drop(run.join(id)));
    (0..2).for_each(|id| drop(run.ready(id, Some(0))));
    assert_eq!(run.phase(), Phase::Forming);
    assert_eq!(run.step(Event::Disagreed("they differ".into())), []);
    (0..2).for_each(|id| drop(run.linked(id)));
    assert_eq!((run.phase(), run.step(Event::Tick)), (Phase::Running, vec![]), "nobody is recalled for it");
}

#[test]
fn without_a_majority_for_a_gradient_the_run_stops_too() {
    let mut run = differing();
    run.lost(0);
    let audited = |audit| Holding { audit: Some(audit), ..with_hash(4, &[], 7, 5) };
    run.held(1, audited(2));
    let actions = run.held(2, audited(3));
    let [Action::End(Outcome::Failed, reason)] = &actions[..] else { panic!("{actions:?}") };
    assert!(reason.contains("no majority") && reason.contains("gradient"), "{reason}");
}
