//! Whatever happens to workers, a run ends with the bits of one to which nothing happened: real processes, killed, stopped,
//! sent away and added.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::Bench;
use mattock::chaos::events::{Events, of_kind};
use mattock_checkpoint::{Location, list, verify};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(120);
/// Far more steps than are ever run: a run ends when the test has seen what it waits for.
const ENDLESS: &str = "train.steps=100000";

/// A run that is watched by its events.
struct Watched {
    child: Child,
    out: PathBuf,
    events: Events,
}

impl Watched {
    fn start(bench: &Bench, out: &str, arguments: &[&str]) -> Self {
        let mut command = bench.command();
        command.args(["train", "recipe.toml", "--out", out, "--set", ENDLESS]).args(arguments);
        let errors = fs::File::create(bench.path(&format!("{out}.errors"))).unwrap();
        let child = command.stdout(Stdio::null()).stderr(errors).spawn().unwrap();
        Self { child, events: Events::of(&bench.path(out)), out: bench.path(out) }
    }

    fn read(&mut self) -> Vec<Value> {
        self.events.read().unwrap().to_vec()
    }

    /// Waits for an event; all that were read before count too.
    fn wait_for(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait_after(0, what, wanted)
    }

    /// Waits for an event after the first `seen` ones.
    fn wait_after(&mut self, seen: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + LONG;
        loop {
            if let Some(event) = self.read().iter().skip(seen).find(|event| wanted(event)) {
                return event.clone();
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the run ended ({ended:?}) before {what}:\n{}", self.errors());
            assert!(Instant::now() < until, "{what} never came:\n{}", self.errors());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait_for_step(&mut self, step: u64) {
        self.wait_for(&format!("step {step}"), |event| event["event"] == "step" && event["step"] == step);
    }

    /// Waits for a step of a ring of this size, after the first `seen` events.
    fn wait_for_world(&mut self, seen: usize, world: u64) {
        self.wait_after(seen, &format!("a step of {world}"), |event| {
            event["event"] == "step" && event["world_size"] == world
        });
    }

    /// Process ids by worker.
    fn workers(&mut self) -> BTreeMap<u64, i32> {
        let events = self.read();
        let joined = events.iter().filter(|event| event["event"] == "worker_joined");
        let ids =
            joined.map(|event| (event["worker"].as_u64().unwrap(), event["pid"].as_i64().unwrap() as i32));
        ids.collect()
    }

    fn signal(&self, pid: i32, signal: Signal) {
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.out.with_extension("errors")).unwrap_or_default()
    }

    /// Lets the run do a few steps more, and stops it in order.
    fn stop(mut self) -> Vec<Value> {
        let steps = self.read().iter().filter_map(|event| event["step"].as_u64()).max();
        self.wait_for_step(steps.unwrap_or(0) + 3);
        self.signal(self.child.id() as i32, Signal::TERM);
        let code = self.end();
        // For whoever looks at a test that fails.
        println!("{}", self.errors());
        assert_eq!(code, Some(130));
        self.read()
    }

    /// Waits for the end.
    fn end(&mut self) -> Option<i32> {
        let until = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "the run does not end:\n{}", self.errors());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.errors());
        }
        // Its children die with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kinds<'a>(events: &'a [Value], kind: &'a str) -> Vec<&'a Value> {
    of_kind(events, kind).collect()
}

/// Losses and hashes are those of a run to which nothing happens, and every micro-batch of every step was counted once.
#[track_caller]
fn assert_no_trace(bench: &Bench, events: &[Value]) {
    let disturbed = steps(events);
    for (step, event) in &disturbed {
        let ranks = event["ranks"].as_array().unwrap().iter();
        let computed = ranks.flat_map(|rank| rank["micro_batches"].as_array().unwrap());
        let mut computed: Vec<u64> = computed.map(|index| index.as_u64().unwrap()).collect();
        computed.sort_unstable();
        assert_eq!(computed, (0..7).collect::<Vec<u64>>(), "step {step}");
    }
    let last = *disturbed.last_key_value().unwrap().0;
    assert_eq!(disturbed.keys().copied().collect::<Vec<u64>>(), (1..=last).collect::<Vec<u64>>());
    let mut run = Watched::start(bench, "undisturbed", &["--workers", "1"]);
    run.wait_for_step(last);
    let events = run.stop();
    let undisturbed = steps(&events);
    for (step, event) in &disturbed {
        let expected = undisturbed[step];
        assert_eq!(event["loss"], expected["loss"], "step {step}");
        assert_eq!(event["state_hash"], expected["state_hash"], "step {step}");
    }
}

/// Steps, by their number; where one was done again, the last time.
fn steps(events: &[Value]) -> BTreeMap<u64, &Value> {
    kinds(events, "step").into_iter().map(|step| (step["step"].as_u64().unwrap(), step)).collect()
}

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
    let bench = Bench::new();
    let steps = ["--set", "train.steps=60", "--set", "elastic.timeout=2s"];
    let output =
        bench.command().args(["chaos", "recipe.toml", "--delay", "30"]).args(steps).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}\n{errors}");
    assert!(said.contains("seed 3: 60 steps with the same bits"), "{said}");
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
