//! Each thing that is compared, broken on purpose.

use serde_json::json;

use super::*;

fn step(number: u64, hash: &str, shares: &[(u64, &[u64])]) -> Value {
    let ranks: Vec<Value> =
        shares.iter().map(|(worker, share)| json!({ "worker": worker, "micro_batches": share })).collect();
    json!({ "event": "step", "step": number, "loss": 1.5, "state_hash": hash, "ranks": ranks })
}

fn joined(worker: u64) -> Value {
    json!({ "event": "worker_joined", "worker": worker, "pid": 100 + worker })
}

fn ended(hash: &str) -> Value {
    json!({ "event": "run_ended", "outcome": "done", "state_hash": hash, "held_out_loss": 2.5 })
}

fn started() -> Value {
    json!({ "event": "run_started" })
}

fn quarantined(worker: u64, step: u64) -> Value {
    json!({ "event": "worker_quarantined", "worker": worker, "step": step })
}

/// A run of two steps and three micro-batches, to which nothing happened.
fn good() -> Vec<Value> {
    let steps = [step(1, "a", &[(0, &[0, 2]), (1, &[1])]), step(2, "b", &[(0, &[0]), (1, &[1, 2])])];
    let mut events = vec![joined(0), joined(1), started()];
    events.extend(steps);
    events.push(ended("b"));
    events
}

fn audit(events: &[Value], harm: &Harm) -> Result<Report, String> {
    Reference::of(&good(), 3).unwrap().audit(events, harm)
}

fn struck(workers: &[u64]) -> Harm {
    Harm { struck: workers.iter().copied().collect(), ..Harm::default() }
}

/// The same with its second step replaced.
fn with_second(step: Value) -> Vec<Value> {
    let mut events = good();
    events[4] = step;
    events
}

/// The same with these before the second step.
fn with(events: &[Value]) -> Vec<Value> {
    let mut all = good();
    all.splice(4..4, events.iter().cloned());
    all
}

#[test]
fn a_run_that_shows_no_trace_is_good() {
    let recovered =
        json!({ "event": "recovered", "hold_ms": 1.0, "form_ms": 2.0, "transfer_ms": 0.0, "step_ms": 4.5 });
    let mut events = with(&[recovered]);
    events[5] = step(2, "b", &[(0, &[0, 1, 2])]);
    let report = audit(&events, &struck(&[1])).unwrap();
    assert_eq!((report.steps, report.corrupted, report.recoveries_ms), (2, 0, vec![7.5]));
    let back = json!({ "event": "worker_returned", "worker": 1, "pid": 101 });
    assert_eq!(audit(&with(&[back]), &Harm::default()).unwrap().restores, 0);
}

#[test]
fn every_step_is_compared() {
    let mut other_loss = step(2, "b", &[(0, &[0]), (1, &[1, 2])]);
    other_loss["loss"] = json!(1.5 + f64::EPSILON);
    let mut no_loss = other_loss.clone();
    no_loss["loss"] = Value::Null;
    let third = step(3, "d", &[(0, &[0, 1, 2])]);
    for (events, what) in [
        (good()[..4].to_vec(), "step 2 is missing"),
        (with_second(step(2, "c", &[(0, &[0, 1, 2])])), "step 2 is"),
        (with_second(other_loss), "step 2 is"),
        (with_second(no_loss), "step 2 has no loss"),
        (with_second(step(2, "", &[(0, &[0, 1, 2])])), "step 2 has no state hash"),
        (with(&good()[3..4]), "step 1 was recorded twice"),
        (with(&[third]), "step 3 is one too many"),
        (
            with_second(step(2, "b", &[(0, &[0, 1]), (1, &[1, 2])])),
            "step 2 counted micro-batches [0, 1, 1, 2]",
        ),
        (with_second(step(2, "b", &[(0, &[0, 1])])), "step 2 counted micro-batches [0, 1]"),
        (with_second(step(2, "b", &[(0, &[0, 1, 3])])), "step 2 counted micro-batches [0, 1, 3]"),
    ] {
        let error = audit(&events, &struck(&[1])).unwrap_err();
        assert!(error.contains(what), "{error}, wanted {what}");
    }
}

#[test]
fn the_end_is_compared() {
    let mut other_held_out = ended("b");
    other_held_out["held_out_loss"] = json!(2.6);
    let mut without = ended("b");
    without["held_out_loss"] = Value::Null;
    let untold = json!({ "event": "run_ended", "outcome": "failed" });
    for (end, what) in [
        (ended("c"), "ended with state Some(\"c\")"),
        (untold, "ended with state None"),
        (other_held_out, "held-out loss is 2.6"),
        (without, "held-out loss is null"),
        (started(), "how the run ended"),
    ] {
        let mut events = good();
        *events.last_mut().unwrap() = end;
        let error = audit(&events, &Harm::default()).unwrap_err();
        assert!(error.contains(what), "{error}, wanted {what}");
    }
}

#[test]
fn nothing_is_read_from_storage_while_workers_live() {
    let events = with(&[started()]);
    assert!(audit(&events, &struck(&[0])).unwrap_err().contains("from storage"));
    let all_died = Harm { all_died: true, ..Harm::default() };
    assert_eq!(audit(&events, &all_died).unwrap().restores, 1);
    let recalled = json!({ "event": "ring_recalled", "reason": format!("worker 1: {SHARDS_LOST}") });
    assert!(audit(&with(&[recalled, started()]), &struck(&[0])).is_ok());
}

#[test]
fn who_was_not_struck_is_there_to_the_end_as_the_same_process() {
    let gone = with_second(step(2, "b", &[(1, &[0, 1, 2])]));
    let mut late_gone = good();
    late_gone[3] = step(1, "a", &[(0, &[0]), (1, &[1]), (2, &[2])]);
    late_gone.insert(0, joined(2));
    let other = json!({ "event": "worker_returned", "worker": 1, "pid": 7 });
    let nameless = json!({ "event": "worker_returned", "worker": 1 });
    for (events, what) in [
        (gone, "worker 0 is gone"),
        (late_gone, "worker 2 is gone"),
        (with(&[other]), "is process Some(101), and then Some(7)"),
        (with(&[nameless]), "is process Some(101), and then None"),
        (good()[1..].to_vec(), "worker 0 trains, and no event says"),
    ] {
        for all_died in [false, true] {
            let harm = Harm { all_died, ..struck(&[1]) };
            let error = audit(&events, &harm).unwrap_err();
            assert!(error.contains(what), "{error}, wanted {what}");
        }
    }
}

#[test]
fn memory_that_fails_is_found_and_nothing_else_is() {
    let flip = Harm { flip: Some(Flip { worker: 1, step: 2 }), ..struck(&[1]) };
    assert_eq!(audit(&with(&[quarantined(1, 1)]), &flip).unwrap().corrupted, 1);
    for (named, harm) in [
        (vec![], &flip),
        (vec![quarantined(0, 1)], &flip),
        (vec![quarantined(1, 2)], &flip),
        (vec![quarantined(1, 1), quarantined(0, 1)], &flip),
        (vec![quarantined(1, 1)], &struck(&[1])),
    ] {
        let error = audit(&with(&named), harm).unwrap_err();
        assert!(error.contains("quarantined were"), "{error}");
    }
}

#[test]
fn who_was_to_die_has_died_at_its_moment_and_no_other() {
    let lost = |worker: u64| json!({ "event": "worker_lost", "worker": worker });
    let dies = |step, moment| Harm { death: Some(Death { worker: 1, step, moment }), ..struck(&[1]) };
    let before = with(&[lost(1)]);
    let mut after = good();
    after.insert(5, lost(1));
    for (events, harm) in [
        (&before, dies(1, Moment::Any)),
        (&before, dies(2, Moment::Buckets)),
        (&before, dies(3, Moment::Summed)),
        (&before, dies(1, Moment::Committed)),
        (&after, dies(2, Moment::Updating)),
    ] {
        audit(events, &harm).unwrap();
    }
    for (events, harm, what) in [
        (&good(), dies(2, Moment::Buckets), "lost were []"),
        (&with(&[lost(0)]), dies(2, Moment::Buckets), "lost were [Some(0)]"),
        (&with(&[lost(1), lost(0)]), dies(2, Moment::Buckets), "lost were [Some(1), Some(0)]"),
        (&before, dies(2, Moment::Any), "worker 1 is killed after step 2, and step 1 was the newest"),
        (&before, dies(1, Moment::Summed), "step 1 was the newest"),
        (&after, dies(2, Moment::Buckets), "step 2 was the newest"),
        (&after, dies(1, Moment::Updating), "step 2 was the newest"),
        (&before, dies(4, Moment::Committed), "step 1 was the newest"),
    ] {
        let error = audit(events, &harm).unwrap_err();
        assert!(error.contains(what), "{error}, wanted {what}");
    }
    // Steps that were done again are not on record before the loss.
    let all_died = Harm { all_died: true, ..dies(9, Moment::Summed) };
    audit(&with(&[lost(1), started()]), &all_died).unwrap();
}

#[test]
fn what_others_hold_is_not_read_from_storage() {
    let recalled = json!({ "event": "ring_recalled", "reason": format!("worker 1: {SHARDS_LOST}") });
    let events = with(&[recalled, started()]);
    assert!(audit(&events, &struck(&[1])).is_ok());
    let held = Harm { held: true, ..struck(&[1]) };
    assert!(audit(&events, &held).unwrap_err().contains("from storage"));
}

#[test]
fn a_reference_is_whole() {
    for (events, what) in [
        (vec![ended("b")], "no steps"),
        (good()[..5].to_vec(), "how the run ended"),
        (with_second(step(2, "b", &[(0, &[0, 1])])), "counted micro-batches"),
        (with_second(step(2, "c", &[(0, &[0, 1, 2])])), "its last step has Some(\"c\")"),
    ] {
        let error = Reference::of(&events, 3).unwrap_err();
        assert!(error.contains(what), "{error}, wanted {what}");
    }
    let reference = Reference::of(&good(), 3).unwrap();
    assert!(reference.up_to(3).unwrap_err().contains("no step 3"));
    // A run that was stopped early measures its held-out loss elsewhere.
    let mut stopped = good()[..4].to_vec();
    stopped.push(
        json!({ "event": "run_ended", "outcome": "interrupted", "state_hash": "a", "held_out_loss": 9.0 }),
    );
    assert_eq!(reference.up_to(1).unwrap().audit(&stopped, &Harm::default()).unwrap().steps, 1);
}
