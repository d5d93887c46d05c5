//! A coordinator that dies, or stops and comes back, leaves no trace in a run: real processes, killed and stopped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::Bench;
use common::watched::{LONG, Watched, assert_no_trace, kinds, steps};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn is(kind: &'static str) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == kind
}

/// The process of the newest coordinator.
fn coordinator_of(run: &mut Watched) -> i32 {
    let events = run.read();
    kinds(&events, "listening").last().unwrap()["pid"].as_i64().unwrap() as i32
}

#[test]
fn a_killed_coordinator_is_replaced_and_leaves_no_trace() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "3"]);
    run.wait_for_step(5);
    let workers = run.workers();
    for take_over in 1..=2 {
        let seen = run.read().len();
        let coordinator = coordinator_of(&mut run);
        run.signal(coordinator, Signal::KILL);
        let event = run.wait_after(seen, "a take-over", is("took_over"));
        assert_eq!(
            (&event["incarnation"], &event["returned"]),
            (&Value::from(take_over + 1), &Value::from(3))
        );
        let seen = run.read().len();
        run.wait_for_world(seen, 3);
    }
    assert_eq!(run.workers(), workers, "all of them are the same processes");
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(kinds(&events, "run_started").len(), 1, "nothing was read from storage");
    assert_eq!(kinds(&events, "worker_lost").len(), 0);
    let all = kinds(&events, "step").len();
    assert_eq!(all, steps(&events).len(), "each step is on record once");
    assert!(!bench.path("run/secret").exists(), "the secret goes with the run");
}

#[test]
fn a_coordinator_that_hangs_is_killed_and_replaced() {
    let bench = Bench::new();
    let mut run = Watched::start(&bench, "run", &["--workers", "2", "--set", "elastic.timeout=2s"]);
    run.wait_for_step(5);
    let (seen, coordinator) = (run.read().len(), coordinator_of(&mut run));
    run.signal(coordinator, Signal::STOP);
    let event = run.wait_after(seen, "a take-over", is("took_over"));
    assert_eq!(event["returned"], 2);
    run.wait_for_world(seen, 2);
    assert!(run.errors().contains("it has not answered"), "{}", run.errors());
    assert!(kill_process(Pid::from_raw(coordinator).unwrap(), Signal::CONT).is_err(), "it is still there");
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert!(kinds(&events, "worker_lost").is_empty());
    assert!(kinds(&events, "alive").is_empty(), "that it lives is no event of the run");
}

/// On a machine that has other things to do, a coordinator may not run for longer than a timeout.
#[test]
fn a_coordinator_that_stops_for_longer_than_a_timeout_loses_nobody() {
    let bench = Bench::new();
    let timeout = Duration::from_secs(2);
    let mut run = Watched::start(&bench, "run", &["--workers", "3", "--set", "elastic.timeout=2s"]);
    run.wait_for_step(5);
    let workers = run.workers();
    let coordinator = coordinator_of(&mut run);
    run.signal(coordinator, Signal::STOP);
    sleep(timeout + timeout / 2);
    // Where this test was late itself, its launcher has killed it, and another has taken over: that costs no worker either.
    let _ = kill_process(Pid::from_raw(coordinator).unwrap(), Signal::CONT);
    let seen = run.read().len();
    run.wait_for_world(seen, 3);
    assert_eq!(run.workers(), workers, "all of them are the same processes");
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert!(kinds(&events, "worker_lost").is_empty());
    assert_eq!(kinds(&events, "run_started").len(), 1, "nothing was read from storage");
}

#[test]
fn a_worker_that_dies_with_the_coordinator_is_replaced() {
    let bench = Bench::new();
    let arguments = ["--workers", "3", "--set", "elastic.timeout=3s"];
    let mut run = Watched::start(&bench, "run", &arguments);
    run.wait_for_step(5);
    let workers = run.workers();
    let seen = run.read().len();
    // Stopped first, so that it does not tell of the worker's end.
    let coordinator = coordinator_of(&mut run);
    run.signal(coordinator, Signal::STOP);
    run.signal(workers[&1], Signal::KILL);
    run.signal(coordinator, Signal::KILL);
    run.wait_after(seen, "the loss of worker 1", |event| is("worker_lost")(event) && event["worker"] == 1);
    run.wait_for_world(seen, 3);
    let events = run.stop();
    assert_no_trace(&bench, &events);
    assert_eq!(kinds(&events, "run_started").len(), 1, "nothing was read from storage");
}

#[test]
fn when_everybody_dies_with_the_coordinator_the_run_goes_on_from_its_newest_checkpoint() {
    let bench = Bench::new();
    let arguments = ["--workers", "2", "--set", "elastic.timeout=2s"];
    let mut run = Watched::start(&bench, "run", &arguments);
    run.wait_for("a checkpoint", is("checkpoint"));
    let mut all: Vec<i32> = run.workers().into_values().collect();
    all.push(coordinator_of(&mut run));
    all.iter().for_each(|&pid| run.signal(pid, Signal::STOP));
    all.iter().for_each(|&pid| run.signal(pid, Signal::KILL));
    // Not by its place among the events: the file goes back with the run.
    let resumed = run.wait_for("the run from storage", |event| {
        is("run_started")(event) && event["resumed_from"].as_u64() > Some(0)
    });
    assert!(resumed["resumed_from"].as_u64() >= Some(4), "{resumed}");
    let events = run.stop();
    assert_no_trace(&bench, &events);
}

/// A process of a run that nobody supervises.
struct Process {
    child: Child,
    said: PathBuf,
    printed: PathBuf,
}

impl Process {
    fn start(bench: &Bench, name: &str, arguments: &[&str]) -> Self {
        let (said, printed) = (bench.path(&format!("{name}.said")), bench.path(&format!("{name}.events")));
        let mut command = bench.command();
        command.args(arguments).stdin(Stdio::null());
        command.stdout(fs::File::create(&printed).unwrap()).stderr(fs::File::create(&said).unwrap());
        Self { child: command.spawn().unwrap(), said, printed }
    }

    fn coordinator(bench: &Bench, name: &str) -> Self {
        let command =
            ["coordinator", "recipe.toml", "--out", "run", "--token-file", "token", "--workers", "2"];
        Self::start(bench, name, &command)
    }

    fn worker(bench: &Bench, name: &str) -> Self {
        Self::start(bench, name, &["worker", "--token-file", "token", "--device", "cpu"])
    }

    fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.printed).unwrap();
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[track_caller]
    fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_until(what, || self.events().into_iter().find(&wanted))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
    }

    #[track_caller]
    fn ends_with(&mut self, code: i32) {
        let status = wait_until("its end", || self.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(code), "{}", self.said());
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.said.display(), self.said());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn wait_until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + LONG;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < until, "{what} never came");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Far more steps than are ever run, and a timeout that is waited for.
fn stopped_bench() -> Bench {
    let recipe = common::RECIPE.replace("steps = 8", "steps = 100000").replace("20s", "2s");
    Bench::with(&recipe)
}

#[test]
fn a_coordinator_that_comes_back_after_another_took_over_is_refused() {
    let bench = stopped_bench();
    let mut first = Process::coordinator(&bench, "first");
    first.wait_for("the first coordinator", is("listening"));
    wait_until("the token", || bench.path("token").is_file().then_some(()));
    fs::copy(bench.path("token"), bench.path("old-token")).unwrap();
    let mut workers = ["a", "b"].map(|name| Process::worker(&bench, name));
    first.wait_for("step 5", |event| is("step")(event) && event["step"] == 5);
    first.signal(Signal::STOP);
    // The same command: it finds the secret in the run's folder.
    let mut second = Process::coordinator(&bench, "second");
    let took_over = second.wait_for("the take-over", is("took_over"));
    assert_eq!((&took_over["incarnation"], &took_over["returned"]), (&Value::from(2), &Value::from(2)));
    let step = took_over["step"].as_u64().unwrap();
    first.signal(Signal::CONT);
    first.ends_with(3);
    assert!(first.said().contains("another coordinator, incarnation 2"), "{}", first.said());
    assert_eq!(first.events().last().unwrap()["event"], "superseded");
    second.wait_for("steps under the second", |event| event["step"].as_u64() >= Some(step + 3));
    second.signal(Signal::TERM);
    second.ends_with(130);
    workers.iter_mut().for_each(|worker| worker.ends_with(0));
    let events = [first.events(), second.events()].concat();
    assert!(kinds(&events, "worker_lost").is_empty());
    assert_no_trace(&bench, &events);
}

#[test]
fn who_joins_a_stale_coordinator_leaves_it() {
    let bench = stopped_bench();
    let mut first = Process::coordinator(&bench, "first");
    first.wait_for("the first coordinator", is("listening"));
    wait_until("the token", || bench.path("token").is_file().then_some(()));
    fs::copy(bench.path("token"), bench.path("old-token")).unwrap();
    // Its lease is taken while it looks elsewhere; nobody has told it yet.
    first.signal(Signal::STOP);
    let mut second = Process::coordinator(&bench, "second");
    second.wait_for("the second coordinator", is("listening"));
    let old = ["worker", "--token-file", "old-token", "--device", "cpu"];
    let mut worker = Process::start(&bench, "late", &old);
    first.signal(Signal::CONT);
    worker.ends_with(3);
    first.ends_with(3);
    assert!(kinds(&first.events(), "ring_formed").is_empty(), "a stale coordinator forms no ring");
    second.signal(Signal::TERM);
    second.ends_with(3);
    assert!(second.said().contains("stopped before training began"), "{}", second.said());
}
