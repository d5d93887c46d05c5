//! Whatever happens to workers, a run ends with the bits of one to which nothing happened: real processes, killed, stopped,
//! sent away and added.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::Stdio;
use std::time::Duration;

use common::Bench;
use common::watched::{Watched, assert_no_trace, kinds, steps};
use mattock_checkpoint::{Location, list, verify};
use mattock_worker::trainer::SHARDS_LOST;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

#[test]
fn a_killed_worker_is_replaced_and_leaves_no_trace() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "3"]);
    run.wait_for_step(5);
    let before = run.workers();
    // The one that writes checkpoints, and another.
    for victim in [0, 2] {
        let seen = run.read().len();
        run.signal(before[&victim], Signal::KILL);
        run.wait_for(&format!("the loss of worker {victim}"), |event| {
            event["event"] == "worker_lost" && event["worker"] == victim
        });
        run.wait_for_world(seen, 3);
    }
    let survivor = before[&1];
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(kinds(&events, "run_started").len(), 1, "nothing was read from storage");
    assert_eq!(kinds(&events, "worker_joined").len(), 5);
    assert_eq!(kinds(&events, "worker_joined").iter().filter(|event| event["pid"] == survivor).count(), 1);
    assert!(kinds(&events, "recovered").len() >= 2, "what it cost is told");
}

/// Options of a run whose state is divided among its workers.
const SHARDED: [&str; 4] = ["--workers", "3", "--set", "parallel.shard=optimizer"];

#[test]
fn a_shard_is_taken_from_its_second_holder() {
    take_from_the_second_holder(&SHARDED);
}

#[test]
fn a_shard_of_everything_is_taken_from_its_second_holder() {
    take_from_the_second_holder(&["--workers", "3", "--set", "parallel.shard=full"]);
}

fn take_from_the_second_holder(arguments: &[&str]) {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", arguments);
    run.wait_for_step(5);
    for victim in [0, 2] {
        let (seen, workers) = (run.read().len(), run.workers());
        run.signal(workers[&victim], Signal::KILL);
        run.wait_for(&format!("the loss of worker {victim}"), |event| {
            event["event"] == "worker_lost" && event["worker"] == victim
        });
        run.wait_for_world(seen, 3);
    }
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(kinds(&events, "worker_joined").len(), 5);
    let steps = kinds(&events, "step").len();
    assert_eq!(steps, self::steps(&events).len(), "no step was done again: nothing was read from storage");
}

#[test]
fn shards_that_are_lost_with_both_holders_are_read_from_storage() {
    for (out, without) in [("pair", None), ("single", Some("parallel.buddies=false"))] {
        let bench = Bench::new();
        let set: Vec<&str> = without.iter().flat_map(|set| ["--set", set]).collect();
        let mut run = Watched::start(&bench, out, &[&SHARDED[..], &set].concat());
        run.wait_for_step(6);
        let workers = run.workers();
        // The shards of ranks 1 and 2, or of rank 1.
        let victims = if without.is_some() { 1..2 } else { 1..3 };
        let seen = run.read().len();
        victims.for_each(|victim| run.signal(workers[&victim], Signal::KILL));
        run.wait_for_world(seen, 3);
        let events = run.stop();
        let said = events.iter().any(|event| event.to_string().contains(SHARDS_LOST));
        assert!(said, "{out}: nobody says why steps are done again");
        let survivor = workers[&0];
        let joined = kinds(&events, "worker_joined").into_iter().filter(|event| event["pid"] == survivor);
        assert_eq!(joined.count(), 1, "who lives on reads it, too");
        assert!(kinds(&events, "worker_lost").iter().all(|event| event["worker"] != 0), "{out}");
        assert_no_trace(&bench, &events);
    }
}

#[test]
fn without_respawn_a_run_goes_on_with_fewer() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "3", "--no-respawn"]);
    run.wait_for_step(3);
    let workers = run.workers();
    run.signal(workers[&0], Signal::KILL);
    run.signal(workers[&1], Signal::KILL);
    run.wait_for_world(0, 1);
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(kinds(&events, "step").last().unwrap()["world_size"], 1);
}

#[test]
fn a_stopped_worker_is_given_up_after_the_timeout_and_killed() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "2", "--set", "elastic.timeout=2s"]);
    run.wait_for_step(3);
    let workers = run.workers();
    run.signal(workers[&1], Signal::STOP);
    let lost = run.wait_for("its loss", |event| event["event"] == "worker_lost");
    assert_eq!(lost["worker"], 1);
    let reason = lost["reason"].as_str().unwrap();
    assert!(reason.contains("nothing was heard") || reason.contains("no message"), "{lost}");
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert!(kill_process(Pid::from_raw(workers[&1]).unwrap(), Signal::CONT).is_err(), "it is still there");
}

#[test]
fn a_worker_that_stops_for_less_than_the_timeout_stays() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "2"]);
    run.wait_for_step(3);
    let workers = run.workers();
    run.signal(workers[&0], Signal::STOP);
    std::thread::sleep(Duration::from_millis(500));
    run.signal(workers[&0], Signal::CONT);
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(kinds(&events, "ring_formed").len(), 1);
}

#[test]
fn who_joins_a_run_under_way_gets_the_state_and_takes_part() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "1"]);
    run.wait_for_step(3);
    let mut joiner =
        bench.command().args(["worker", "--token-file", "run/token"]).stderr(Stdio::piped()).spawn().unwrap();
    run.wait_for_world(0, 2);
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(joiner.wait().unwrap().code(), Some(0));
}

#[test]
fn who_is_told_to_leave_leaves_after_its_step_and_nobody_waits() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "3"]);
    run.wait_for_step(3);
    let workers = run.workers();
    run.signal(workers[&0], Signal::TERM);
    let left = run.wait_for("its leave", |event| event["event"] == "worker_left");
    run.wait_for_world(0, 2);
    assert!(left["reason"].as_str().unwrap().contains("SIGTERM"), "{left}");
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert!(kinds(&events, "worker_lost").is_empty());
    assert_eq!(kinds(&events, "step").last().unwrap()["world_size"], 2, "who leaves is not replaced");
}

#[test]
fn with_too_few_left_a_leave_ends_the_run_with_a_checkpoint() {
    let bench = Bench::new();
    let two = ["--workers", "2", "--set", "elastic.min_workers=2"];
    let mut run = Watched::start(&bench, "run", &two);
    run.wait_for_step(3);
    let workers = run.workers();
    run.signal(workers[&1], Signal::TERM);
    assert_eq!(run.end(), Some(130), "{}", run.errors());
    let events = run.read();
    let last = *steps(&events).last_key_value().unwrap().0;
    assert!(run.out.join(format!("checkpoints/step-{last:08}/manifest.json")).is_file());
    assert_no_trace(&bench, &events);
}

#[test]
fn below_its_minimum_a_run_waits_and_goes_on_by_itself() {
    let bench = Bench::new();
    let two = ["--workers", "2", "--no-respawn", "--set", "elastic.min_workers=2"];
    let mut run = Watched::start(&bench, "run", &two);
    run.wait_for_step(3);
    let workers = run.workers();
    run.signal(workers[&0], Signal::KILL);
    let waiting = run.wait_for("the wait", |event| event["event"] == "waiting");
    assert_eq!((&waiting["ready"], &waiting["needed"]), (&Value::from(1), &Value::from(2)));
    let mut joiner = bench.command().args(["worker", "--token-file", "run/token"]).spawn().unwrap();
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(joiner.wait().unwrap().code(), Some(0));
}

#[test]
fn when_everybody_dies_the_run_goes_on_from_its_newest_checkpoint() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "2"]);
    run.wait_for("a checkpoint", |event| event["event"] == "checkpoint");
    let workers = run.workers();
    // Both at once: nobody is left to give its state away.
    workers.values().for_each(|&pid| run.signal(pid, Signal::STOP));
    workers.values().for_each(|&pid| run.signal(pid, Signal::KILL));
    run.wait_for("a worker in their place", |event| {
        event["event"] == "ring_formed" && event["generation"] == 2
    });
    let events = run.stop();
    assert_no_trace(&bench, &events);
    let started = kinds(&events, "run_started");
    assert!(started.last().unwrap()["resumed_from"].as_u64() >= Some(4), "{started:?}");
}

/// A checkpoint after every step: whoever is killed is killed while one is written. Its share never comes, or comes from
/// nobody; what was complete stays, and the run's last checkpoint is.
#[test]
fn workers_killed_while_they_write_checkpoints_cost_no_complete_one() {
    let bench = Bench::new();
    let every_step = ["--workers", "3", "--set", "checkpoint.every=1", "--set", "checkpoint.keep=1000000"];
    let mut run = Watched::start(&bench, "run", &every_step);
    for victim in [2, 0] {
        let seen = run.read().len();
        run.wait_after(seen, "a checkpoint", |event| event["event"] == "checkpoint");
        let workers = run.workers();
        run.signal(workers[&victim], Signal::KILL);
        let seen = run.read().len();
        run.wait_for(&format!("the loss of worker {victim}"), |event| {
            event["event"] == "worker_lost" && event["worker"] == victim
        });
        run.wait_for_world(seen, 3);
        run.wait_after(seen, "a checkpoint of all", |event| event["event"] == "checkpoint");
    }
    let events = run.stop();
    assert_no_trace(&bench, &events);
    let location = Location::parse(bench.path("run/checkpoints").to_str().unwrap()).unwrap();
    let complete = list(&location).unwrap().complete;
    assert_eq!(Some(&complete[0].step), steps(&events).keys().next_back(), "the last step is saved");
    assert!(complete.iter().any(|summary| summary.manifest.shares == 3), "each wrote a share");
    let told = kinds(&events, "checkpoint").len();
    assert!(complete.len() >= told, "{told} checkpoints were told of, {} are there", complete.len());
    for summary in complete {
        assert_eq!(verify(&location, Some(summary.step)).unwrap()[0].flaws, []);
    }
}

#[test]
fn chaos_leaves_no_trace() {
    // Memory fails only where this program can make it.
    let corrupt = if cfg!(debug_assertions) { &["--corrupt"][..] } else { &[] };
    let said = survive_chaos(&[&["--set", "train.steps=60"], corrupt].concat());
    assert_eq!(said.matches("memory that failed was found").count(), 3 * corrupt.len(), "{said}");
}

#[test]
fn chaos_among_workers_that_divide_the_state_leaves_no_trace() {
    for shard in ["parallel.shard=optimizer", "parallel.shard=full"] {
        survive_chaos(&["--set", "train.steps=60", "--workers", "4", "--set", shard]);
    }
}

fn survive_chaos(arguments: &[&str]) -> String {
    let bench = Bench::new();
    let chaos = ["chaos", "recipe.toml", "--delay", "30", "--set", "elastic.timeout=2s"];
    let output = bench.command().args(chaos).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}\n{errors}");
    assert!(said.contains("seed 3: 60 steps with the same bits"), "{said}");
    said
}

#[test]
fn when_everybody_dies_and_nobody_comes_the_run_fails_and_says_why() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "1", "--no-respawn"]);
    run.wait_for_step(3);
    let workers = run.workers();
    run.signal(workers[&0], Signal::KILL);
    let status = run.child.wait().unwrap();
    assert_eq!(status.code(), Some(3), "{}", run.errors());
    assert!(run.errors().contains("worker 0 was lost, and no worker is left"), "{}", run.errors());
}

/// A bit flips in the memory of one of three: it is named and sent away before anything that it computed is written, and
/// the one in its place gets the others' state.
#[cfg(debug_assertions)]
#[test]
fn a_worker_whose_memory_fails_is_named_and_replaced() {
    let bench = Bench::new();
    let faults = [("MATTOCK_FAULTS", "flip:1:5")];
    let mut run = Watched::start_with(&bench, "run", &["--workers", "3"], &faults);
    let named = run.wait_for("its name", |event| event["event"] == "worker_quarantined");
    assert_eq!((&named["worker"], &named["step"]), (&1.into(), &4.into()), "{named}");
    assert_eq!((&named["agreed"], &named["ranks"]), (&2.into(), &3.into()), "{named}");
    assert_ne!(named["hash"], named["majority"], "{named}");
    let seen = run.read().len();
    run.wait_for_world(seen, 3);
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(kinds(&events, "run_started").len(), 1, "nothing was read from storage");
    let lost = kinds(&events, "worker_lost");
    assert!(lost.len() == 1 && lost[0]["worker"] == 1, "{lost:?}");
}

/// The same among two, of which nobody can say who is right.
#[cfg(debug_assertions)]
#[test]
fn where_two_differ_the_run_stops() {
    let bench = Bench::new();
    let faults = [("MATTOCK_FAULTS", "flip:1:5")];
    let mut run = Watched::start_with(&bench, "run", &["--workers", "2"], &faults);
    assert_eq!(run.end(), Some(3), "{}", run.errors());
    let events = run.read();
    assert_eq!(*steps(&events).last_key_value().unwrap().0, 4, "nothing was written after it");
    let ended = kinds(&events, "run_ended")[0]["error"].as_str().unwrap().to_owned();
    assert!(ended.contains("no majority") && ended.contains("newest checkpoint"), "{ended}");
}

/// One of three takes four times as long for a micro-batch: it gets fewer, which leaves no trace.
#[cfg(debug_assertions)]
#[test]
fn a_slow_worker_gets_fewer_micro_batches() {
    for shard in ["none", "full"] {
        let bench = Bench::new();
        // What workers measure on a busy machine would be anything.
        let faults = [("MATTOCK_FAULTS", "slow:0:1000,slow:1:1100,slow:2:4000")];
        let shard = format!("parallel.shard={shard}");
        let arguments = ["--workers", "3", "--set", &shard];
        let mut run = Watched::start_with(&bench, "run", &arguments, &faults);
        let event = run.wait_for("other shares", |event| event["event"] == "rebalanced");
        assert_eq!(event["median_ms"], 1.1, "{event}");
        let slow = event["shares"].as_array().unwrap().iter().find(|share| share["worker"] == 2).unwrap();
        assert_eq!((&slow["before"], &slow["after"], &slow["ms"]), (&3.into(), &1.into(), &4.0.into()));
        let of_slow = |event: &Value| event["ranks"][2]["micro_batches"].as_array().map(Vec::len);
        run.wait_for("a step of these", |event| event["event"] == "step" && of_slow(event) == Some(1));
        // With other shares a ring breaks as any does.
        let (seen, workers) = (run.read().len(), run.workers());
        run.signal(workers[&0], Signal::KILL);
        run.wait_for_world(seen, 3);
        let errors = run.errors();
        let events = run.stop();
        assert_no_trace(&bench, &events);
        assert!(errors.contains("worker 2 has 1 micro-batches of a step instead of 3"), "{errors}");
    }
}

/// A device computes wrongly: no hash of the state shows that, another worker that computes the same does.
#[cfg(debug_assertions)]
#[test]
fn a_device_that_computes_wrongly_is_found_by_an_audit() {
    let bench = Bench::new();
    // From the first step on, and all are audited: nothing of it is ever written.
    let faults = [("MATTOCK_FAULTS", "wrong:1:1")];
    let mut run = Watched::start_with(&bench, "run", &["--workers", "3", "--audit", "1"], &faults);
    let named = run.wait_for("its name", |event| event["event"] == "worker_quarantined");
    assert_eq!((&named["worker"], &named["what"]), (&1.into(), &"gradient".into()), "{named}");
    let seen = run.read().len();
    run.wait_for_world(seen, 3);
    let events = run.stop();
    assert_no_trace(&bench, &events);
    let recalled = kinds(&events, "ring_recalled")[0]["reason"].as_str().unwrap().to_owned();
    assert!(recalled.contains("different gradients of micro-batch"), "{recalled}");
    let lost = kinds(&events, "worker_lost");
    assert!(lost.len() == 1 && lost[0]["worker"] == 1, "{lost:?}");
}
