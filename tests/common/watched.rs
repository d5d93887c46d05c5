//! A run that is watched by its events, and held against one to which nothing happened.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use mattock::chaos::events::{Events, of_kind};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::Bench;

/// Longer than anything here takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// Far more steps than are ever run: a run ends when the test has seen what it waits for.
const ENDLESS: &str = "train.steps=100000";

/// A run that is watched by its events.
pub(crate) struct Watched {
    pub(crate) child: Child,
    pub(crate) out: PathBuf,
    events: Events,
}

impl Watched {
    pub(crate) fn start(bench: &Bench, out: &str, arguments: &[&str]) -> Self {
        Self::start_with(bench, out, arguments, &[])
    }

    /// With these variables in its environment.
    pub(crate) fn start_with(
        bench: &Bench,
        out: &str,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut command = bench.command();
        command.envs(variables.iter().copied());
        command.args(["train", "recipe.toml", "--out", out, "--set", ENDLESS]).args(arguments);
        let errors = fs::File::create(bench.path(&format!("{out}.errors"))).unwrap();
        let child = command.stdout(Stdio::null()).stderr(errors).spawn().unwrap();
        Self { child, events: Events::of(&bench.path(out)), out: bench.path(out) }
    }

    pub(crate) fn read(&mut self) -> Vec<Value> {
        self.events.read().unwrap().to_vec()
    }

    /// Waits for an event; all that were read before count too.
    pub(crate) fn wait_for(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait_after(0, what, wanted)
    }

    /// Waits for an event after the first `seen` ones.
    pub(crate) fn wait_after(&mut self, seen: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
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

    pub(crate) fn wait_for_step(&mut self, step: u64) {
        self.wait_for(&format!("step {step}"), |event| event["event"] == "step" && event["step"] == step);
    }

    /// Waits for a step of a ring of this size, after the first `seen` events.
    pub(crate) fn wait_for_world(&mut self, seen: usize, world: u64) {
        self.wait_after(seen, &format!("a step of {world}"), |event| {
            event["event"] == "step" && event["world_size"] == world
        });
    }

    /// Process ids by worker.
    pub(crate) fn workers(&mut self) -> BTreeMap<u64, i32> {
        let events = self.read();
        let joined = events.iter().filter(|event| event["event"] == "worker_joined");
        let ids =
            joined.map(|event| (event["worker"].as_u64().unwrap(), event["pid"].as_i64().unwrap() as i32));
        ids.collect()
    }

    pub(crate) fn signal(&self, pid: i32, signal: Signal) {
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    pub(crate) fn errors(&self) -> String {
        fs::read_to_string(self.out.with_extension("errors")).unwrap_or_default()
    }

    /// Lets the run do a few steps more, and stops it in order.
    pub(crate) fn stop(mut self) -> Vec<Value> {
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
    pub(crate) fn end(&mut self) -> Option<i32> {
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

pub(crate) fn kinds<'a>(events: &'a [Value], kind: &'a str) -> Vec<&'a Value> {
    of_kind(events, kind).collect()
}

/// Losses and hashes are those of a run to which nothing happens, and every micro-batch of every step was counted once.
#[track_caller]
pub(crate) fn assert_no_trace(bench: &Bench, events: &[Value]) {
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
pub(crate) fn steps(events: &[Value]) -> BTreeMap<u64, &Value> {
    kinds(events, "step").into_iter().map(|step| (step["step"].as_u64().unwrap(), step)).collect()
}
