//! One command line on several machines: processes with the variables of each launcher, a shared folder between them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::Bench;
use mattock::chaos::events::Events;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(120);
/// Far more steps than are ever run: a run ends when the test has seen what it waits for.
const ENDLESS: [&str; 2] = ["--set", "train.steps=100000"];

/// `mattock train` on one of several machines.
struct Node {
    child: Child,
    said: PathBuf,
}

impl Node {
    fn start(bench: &Bench, name: &str, variables: &[(&str, &str)], arguments: &[&str]) -> Self {
        let said = bench.path(&format!("{name}.said"));
        let mut command = bench.command();
        command.args(["train", "recipe.toml", "--out", "run", "--listen", "127.0.0.1:0", "--workers", "1"]);
        command.args(arguments).envs(variables.iter().copied());
        command.stdout(Stdio::null()).stderr(fs::File::create(&said).unwrap());
        Self { child: command.spawn().unwrap(), said }
    }

    /// Nodes 0 and 1 of two, by flags.
    fn pair(bench: &Bench, arguments: &[&str]) -> [Self; 2] {
        ["0", "1"].map(|rank| Self::by_flags(bench, rank, arguments))
    }

    fn by_flags(bench: &Bench, rank: &str, arguments: &[&str]) -> Self {
        let place = ["--nodes", "2", "--node-rank", rank];
        Self::start(bench, &format!("node{rank}"), &[], &[&place, arguments].concat())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }

    #[track_caller]
    fn wait_to_say(&mut self, words: &str) {
        wait_until(&format!("{words:?}"), || self.said().contains(words).then_some(()));
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
    }

    #[track_caller]
    fn ends_with(&mut self, code: i32) {
        let status = wait_until("its end", || self.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(code), "{}", self.said());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.said.display(), self.said());
        }
        // Its children die with it.
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
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The events of the run in `out`, as they come.
struct Run(Events);

impl Run {
    fn of(bench: &Bench, out: &str) -> Self {
        Self(Events::of(&bench.path(out)))
    }

    fn read(&mut self) -> Vec<Value> {
        self.0.read().unwrap().to_vec()
    }

    #[track_caller]
    fn wait_after(&mut self, seen: usize, what: &str, wanted: impl Fn(&Value) -> bool) {
        wait_until(what, || self.read().iter().skip(seen).any(&wanted).then_some(()));
    }

    #[track_caller]
    fn wait_for_world(&mut self, seen: usize, world: u64) {
        self.wait_after(seen, &format!("a step of {world}"), |event| {
            event["world_size"] == world && is_step(event)
        });
    }

    fn count(&mut self, kind: &str) -> usize {
        self.read().iter().filter(|event| event["event"] == kind).count()
    }
}

fn is_step(event: &Value) -> bool {
    event["event"] == "step"
}

/// The steps of the run have the state hashes of one on one machine to which nothing happened.
#[track_caller]
fn assert_no_trace(bench: &Bench) {
    let disturbed: Vec<Value> = Run::of(bench, "run").read().into_iter().filter(is_step).collect();
    let last = disturbed.iter().filter_map(|step| step["step"].as_u64()).max().unwrap();
    let mut alone = bench.command();
    alone.args(["train", "recipe.toml", "--out", "whole", "--workers", "1"]).args(ENDLESS);
    let mut alone = alone.stderr(Stdio::null()).spawn().unwrap();
    let mut whole = Run::of(bench, "whole");
    whole.wait_after(0, &format!("step {last}"), |event| is_step(event) && event["step"] == last);
    alone.kill().unwrap();
    alone.wait().unwrap();
    let undisturbed = whole.read();
    for step in disturbed {
        let expected =
            undisturbed.iter().find(|other| is_step(other) && other["step"] == step["step"]).unwrap();
        assert_eq!(step["state_hash"], expected["state_hash"], "step {}", step["step"]);
    }
}

#[test]
fn each_launchers_variables_make_two_machines_one_run() {
    let bench = Bench::new();
    let one = bench.train("one", &["--workers", "2"]).done().hash();
    let launchers: [(&str, &[(&str, &str)]); 4] = [
        ("torchrun", &[("GROUP_RANK", "@"), ("GROUP_WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1")]),
        ("Slurm", &[("SLURM_PROCID", "@"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_STEP_NUM_NODES", "2")]),
        ("Kubernetes", &[("JOB_COMPLETION_INDEX", "@"), ("MATTOCK_NODES", "2")]),
        ("MPI", &[("OMPI_COMM_WORLD_RANK", "@"), ("OMPI_COMM_WORLD_SIZE", "2")]),
    ];
    for (launcher, variables) in launchers {
        let of = |rank: &'static str| -> Vec<(&str, &str)> {
            variables.iter().map(|&(name, value)| (name, if value == "@" { rank } else { value })).collect()
        };
        // Who follows may be first.
        let mut nodes = ["1", "0"]
            .map(|rank| Node::start(&bench, &format!("{launcher}{rank}"), &of(rank), &["--overwrite"]));
        nodes.iter_mut().for_each(|node| node.ends_with(0));
        assert!(nodes[1].said().contains(&format!("node 0 of 2 ({launcher} says")), "{}", nodes[1].said());
        let events = Run::of(&bench, "run").read();
        let ended = events.iter().find(|event| event["event"] == "run_ended").unwrap();
        assert_eq!(ended["state_hash"], one.as_str(), "{launcher}");
        assert!(
            events.iter().filter(|event| is_step(event)).all(|step| step["world_size"] == 2),
            "{launcher}"
        );
    }
}

#[test]
fn a_machine_that_is_lost_makes_the_run_smaller_and_joins_again_when_it_is_back() {
    let bench = Bench::new();
    let [mut first, second] = Node::pair(&bench, &ENDLESS);
    let mut run = Run::of(&bench, "run");
    run.wait_for_world(0, 2);
    let seen = run.read().len();
    drop(second);
    run.wait_for_world(seen, 1);
    let seen = run.read().len();
    let mut again = Node::by_flags(&bench, "1", &ENDLESS);
    run.wait_for_world(seen, 2);
    first.signal(Signal::TERM);
    first.ends_with(130);
    again.ends_with(130);
    assert_eq!(run.count("run_started"), 1, "nothing was read from storage");
    assert_no_trace(&bench);
}

#[test]
fn a_machine_starts_its_dead_workers_again() {
    let bench = Bench::new();
    let [first, second] = Node::pair(&bench, &ENDLESS);
    let mut run = Run::of(&bench, "run");
    run.wait_for_world(0, 2);
    let children = format!("/proc/{0}/task/{0}/children", second.child.id());
    let worker: i32 = fs::read_to_string(children).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(worker).unwrap(), Signal::KILL).unwrap();
    run.wait_after(0, "another worker", |event| event["event"] == "worker_joined" && event["worker"] == 2);
    let seen = run.read().len();
    run.wait_for_world(seen, 2);
    drop((first, second));
    assert_no_trace(&bench);
}

#[test]
fn a_coordinator_that_dies_costs_the_other_machines_nothing() {
    let bench = Bench::new();
    let [mut first, mut second] = Node::pair(&bench, &ENDLESS);
    let mut run = Run::of(&bench, "run");
    run.wait_for_world(0, 2);
    let events = run.read();
    let listening = events.iter().rfind(|event| event["event"] == "listening").unwrap();
    kill_process(Pid::from_raw(listening["pid"].as_i64().unwrap() as i32).unwrap(), Signal::KILL).unwrap();
    run.wait_after(0, "the take-over", |event| event["event"] == "took_over" && event["returned"] == 2);
    let seen = run.read().len();
    run.wait_for_world(seen, 2);
    // The other machine's workers are replaced as before, with what the new coordinator wrote.
    let children = format!("/proc/{0}/task/{0}/children", second.child.id());
    let worker: i32 = fs::read_to_string(children).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(worker).unwrap(), Signal::KILL).unwrap();
    run.wait_after(seen, "another worker", |event| event["event"] == "worker_joined");
    let seen = run.read().len();
    run.wait_for_world(seen, 2);
    first.signal(Signal::TERM);
    first.ends_with(130);
    second.ends_with(130);
    assert_eq!(run.count("run_started"), 1, "nothing was read from storage");
    assert_no_trace(&bench);
}

#[test]
fn a_machine_that_is_told_to_leaves_and_the_run_goes_on() {
    let bench = Bench::new();
    let [mut first, mut second] = Node::pair(&bench, &ENDLESS);
    let mut run = Run::of(&bench, "run");
    run.wait_for_world(0, 2);
    second.signal(Signal::TERM);
    second.ends_with(130);
    let seen = run.read().len();
    run.wait_for_world(seen, 1);
    assert_eq!((run.count("worker_left"), run.count("worker_lost")), (1, 0));
    // Slurm's notice, and what comes of a time limit after it.
    first.signal(Signal::USR1);
    first.signal(Signal::TERM);
    first.ends_with(130);
    let last =
        run.read().iter().filter(|event| is_step(event)).filter_map(|step| step["step"].as_u64()).max();
    let checkpoint = format!("run/checkpoints/step-{:08}/manifest.json", last.unwrap());
    assert!(bench.path(&checkpoint).is_file(), "{}", first.said());
    assert_no_trace(&bench);
}

/// The one command line of a job that is started again as it is.
#[test]
fn a_job_that_was_killed_goes_on_when_it_is_started_again() {
    let bench = Bench::new();
    let arguments = [&ENDLESS[..], &["--resume-if-any"]].concat();
    let pair = Node::pair(&bench, &arguments);
    let mut run = Run::of(&bench, "run");
    run.wait_after(0, "a checkpoint", |event| event["event"] == "checkpoint");
    drop(pair);
    assert!(bench.path("run/token").is_file(), "a killed run leaves its token");
    // Who follows is first, and finds the token of the run that is dead.
    let mut second = Node::by_flags(&bench, "1", &arguments);
    second.wait_to_say("starting workers");
    let mut first = Node::by_flags(&bench, "0", &arguments);
    let resumed =
        |event: &Value| event["event"] == "run_started" && event["resumed_from"].as_u64() >= Some(4);
    run.wait_after(0, "the resumed run", resumed);
    let seen = run.read().iter().position(resumed).unwrap();
    run.wait_for_world(seen, 2);
    first.signal(Signal::TERM);
    first.ends_with(130);
    second.ends_with(130);
    assert!(!bench.path("run/token").exists());
    assert_no_trace(&bench);
}

#[test]
fn machines_do_not_wait_for_each_other_for_ever() {
    let bench = Bench::new();
    let mut second = Node::by_flags(&bench, "1", &["--wait", "1"]);
    second.ends_with(3);
    let said = second.said();
    assert!(said.contains("no run to join within 1s") && said.contains("run/token"), "{said}");
    assert!(!bench.path("run").exists(), "the folder belongs to node 0");
    let mut first = Node::by_flags(&bench, "0", &["--wait", "1"]);
    first.ends_with(3);
    let said = first.said();
    assert!(
        said.contains("workers of the other machines did not come in time") && said.contains("--wait"),
        "{said}"
    );
}

#[test]
fn a_run_that_fails_ends_on_every_machine() {
    let bench = Bench::new();
    // Workers hold what they have for some timeouts: another coordinator might come.
    let arguments = [&ENDLESS[..], &["--no-respawn", "--set", "elastic.timeout=2s"]].concat();
    let [first, mut second] = Node::pair(&bench, &arguments);
    let mut run = Run::of(&bench, "run");
    run.wait_for_world(0, 2);
    drop(first);
    second.ends_with(3);
    assert!(second.said().contains("error:"), "{}", second.said());
}

#[test]
fn launchers_that_disagree_start_nothing() {
    let bench = Bench::new();
    let variables = [
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_STEP_NUM_NODES", "2"),
        ("OMPI_COMM_WORLD_RANK", "0"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
    ];
    let mut node = Node::start(&bench, "node", &variables, &[]);
    node.ends_with(2);
    let said = node.said();
    assert!(said.contains("SLURM_PROCID=1") && said.contains("OMPI_COMM_WORLD_RANK=0"), "{said}");
    assert!(!bench.path("run").exists());
}
