//! The number of workers of a run under way is changed, and leaves no trace: real processes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::Output;

use common::Bench;
use common::watched::{Watched, assert_no_trace, kinds};
use rustix::process::Signal;

fn scale(bench: &Bench, workers: &str) -> Output {
    bench.command().args(["scale", "run", workers]).output().unwrap()
}

#[track_caller]
fn accepted(bench: &Bench, workers: &str) -> String {
    let output = scale(bench, workers);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn refused(bench: &Bench, workers: &str) -> String {
    let output = scale(bench, workers);
    assert_eq!(output.status.code(), Some(2));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_run_grows_and_shrinks_on_request() {
    let bench = Bench::new();
    assert!(refused(&bench, "2").contains("holds no run"));
    let mut run = Watched::start(&bench, "run", &["--workers", "2", "--set", "elastic.max_workers=5"]);
    run.wait_for_step(3);
    let first = run.workers();
    for (workers, said) in [(4, "2 more are started"), (1, "the newest 3 leave"), (2, "1 more are started")] {
        let seen = run.read().len();
        let told = accepted(&bench, &workers.to_string());
        assert!(told.contains(said), "{told}");
        run.wait_for_world(seen, workers);
    }
    let refusal = refused(&bench, "6");
    assert!(refusal.contains("1 to 5"), "{refusal}");
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!((kinds(&events, "worker_joined").len(), kinds(&events, "worker_left").len()), (5, 3));
    assert!(kinds(&events, "worker_lost").is_empty(), "nobody waits for those who leave");
    let last = kinds(&events, "step").last().unwrap()["ranks"][0]["worker"].as_u64();
    assert_eq!(last, first.keys().next().copied(), "the oldest stays");
    assert!(refused(&bench, "2").contains("not under way"));
}

#[test]
fn a_request_survives_the_coordinator_that_took_it() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "3"]);
    run.wait_for_step(3);
    let events = run.read();
    let coordinator = kinds(&events, "listening")[0]["pid"].as_i64().unwrap() as i32;
    accepted(&bench, "1");
    run.signal(coordinator, Signal::KILL);
    run.wait_for_world(events.len(), 1);
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert!(kinds(&events, "worker_lost").is_empty());
}
