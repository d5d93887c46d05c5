//! Workers that die at the moments of a step at which it matters most: between sums, commit and update, whole state or divided.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
// Only builds with debug assertions let a worker die at a moment.
#![cfg(debug_assertions)]

mod common;

use common::Bench;
use common::watched::{Watched, assert_no_trace, kinds};

/// The step in which a worker dies.
const STEP: u64 = 5;

/// One dies when some buckets have left to be summed, all are summed, the step is committed, or is being written.
fn one_dies(shard: &str, first_has_buddies: bool) {
    for (index, moment) in ["buckets", "summed", "committed", "updating"].into_iter().enumerate() {
        let workers = 1 + (index + shard.len()) % 4;
        let buddies = (index % 2 == 0) == first_has_buddies;
        let what = format!("{moment}, {workers} workers, buddies: {buddies}");
        let bench = Bench::new();
        let faults = format!("{moment}:{}:{STEP}", workers / 2);
        let (count, shard) = (workers.to_string(), format!("parallel.shard={shard}"));
        let buddies = format!("parallel.buddies={buddies}");
        let arguments = ["--workers", &count, "--set", &shard, "--set", &buddies];
        let mut run = Watched::start_with(&bench, "run", &arguments, &[("MATTOCK_FAULTS", &faults)]);
        let lost = run.wait_for(&format!("a death: {what}"), |event| event["event"] == "worker_lost");
        assert_eq!(lost["worker"], workers as u64 / 2, "{what}");
        let seen = run.read().len();
        run.wait_for_world(seen, workers as u64);
        let events = run.stop();
        assert_no_trace(&bench, &events);
        let lost = kinds(&events, "worker_lost");
        assert_eq!(lost.len(), 1, "{what}: who lived on was not kept: {lost:?}");
        // What one alone has, and a shard without a second holder, goes with it.
        let is_held = workers > 1 && (shard.ends_with("none") || buddies.ends_with("true"));
        let again = kinds(&events, "step").iter().filter(|step| step["step"] == STEP - 1).count();
        assert!(again == 1 || !is_held, "{what}: steps were done again");
    }
}

#[test]
fn at_the_worst_moments_of_whole_state() {
    one_dies("none", true);
}

#[test]
fn at_the_worst_moments_of_a_divided_optimizer() {
    one_dies("optimizer", true);
}

#[test]
fn at_the_worst_moments_of_state_that_is_divided_altogether() {
    one_dies("full", false);
}

/// Each sharding among one to four workers, and who dies when, by a dozen seeds.
#[test]
fn a_dozen_aimed_deaths_leave_no_trace() {
    let bench = Bench::new();
    let output = aimed(&bench).args(["--seeds", "12"]).output().unwrap();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}\n{errors}");
    assert_eq!(said.matches("16 steps with the same bits").count(), 12, "{said}");
    for workers in 1..=4 {
        for shard in ["none", "optimizer", "full"] {
            assert!(said.contains(&format!("{workers} workers, shard {shard}, ")), "{said}");
        }
    }
}

/// The undisturbed run is made to go wrong, and those that are held against it are right.
#[test]
fn a_difference_is_seen() {
    let bench = Bench::new();
    let chaos =
        aimed(&bench).args(["--seed", "3", "--seeds", "1"]).env("MATTOCK_FAULTS", "wrong:0:6").output();
    let output = chaos.unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{errors}");
    assert!(errors.contains("seed 3: step 6 is Step"), "{errors}");
}

fn aimed(bench: &Bench) -> std::process::Command {
    let mut command = bench.command();
    command.args(["chaos", "recipe.toml", "--aimed", "--delay", "30", "--set", "train.steps=16"]);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
