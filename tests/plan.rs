//! What a plan says, beside what real workers take.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::Bench;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(300);
/// Some 6 million parameters: their state is a large part of what a worker takes.
const LARGE: [&str; 4] = ["--set", "model.dim=512", "--set", "batch.size=4"];

fn plan(bench: &Bench, arguments: &[&str]) -> (Option<i32>, Value) {
    let output = bench.command().args(["plan", "recipe.toml", "--json"]).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}")))
}

#[test]
fn a_plan_needs_no_text_and_what_it_proposes_fits() {
    let bench = Bench::new();
    fs::remove_dir_all(bench.path("corpus")).unwrap();
    let (code, first) = plan(&bench, &["--workers", "3"]);
    assert_eq!((code, &first["fits"]), (Some(0), &Value::Null));
    let peak = first["peak_bytes"].as_u64().unwrap();
    let limit = format!("{}", peak - 1);
    let (code, tight) = plan(&bench, &["--workers", "3", "--memory", &limit]);
    assert_eq!((code, tight["fits"].as_bool()), (Some(2), Some(false)), "{tight}");
    let way = &tight["would_fit"];
    let set = |key: &str, value: &Value| format!("{key}={}", value.to_string().replace('"', ""));
    let sets = [
        set("parallel.shard", &way["shard"]),
        set("parallel.buddies", &way["buddies"]),
        set("batch.micro", &way["micro"]),
    ];
    let mut arguments = vec!["--memory", &limit, "--workers"];
    let workers = way["workers"].to_string();
    arguments.push(&workers);
    sets.iter().for_each(|set| arguments.extend(["--set", set]));
    let (code, other) = plan(&bench, &arguments);
    assert_eq!((code, other["fits"].as_bool()), (Some(0), Some(true)), "{other}");
}

/// The most memory that a worker of a run took until its third step, in bytes, for each of two.
fn peaks(bench: &Bench, shard: &str) -> Vec<u64> {
    let mut command = bench.command();
    command.args(["train", "recipe.toml", "--out", shard, "--workers", "2", "--set", "train.steps=100000"]);
    command.args(LARGE).args(["--set", &format!("parallel.shard={shard}")]);
    let mut train = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for_steps(bench, shard, &mut train);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", train.id())).unwrap();
    let workers = children.split_whitespace().filter(|pid| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split('\0').nth(1) == Some("worker")
    });
    let peaks = workers.map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    });
    let peaks = peaks.collect();
    kill_process(Pid::from_raw(train.id() as i32).unwrap(), Signal::TERM).unwrap();
    train.wait().unwrap();
    peaks
}

fn wait_for_steps(bench: &Bench, out: &str, train: &mut Child) {
    let deadline = Instant::now() + LONG;
    while !bench.path(out).join("events.jsonl").exists() || common::steps(&bench.path(out)).len() < 3 {
        assert!(train.try_wait().unwrap().is_none(), "the run has ended");
        assert!(Instant::now() < deadline, "no third step within {LONG:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_worker_takes_at_least_the_state_of_its_plan() {
    let bench = Bench::new();
    for shard in ["none", "full"] {
        let set = format!("parallel.shard={shard}");
        let (_, plan) = plan(&bench, &[&LARGE[..], &["--set", &set]].concat());
        let lines = plan["estimate"]["memory"].as_array().unwrap();
        let state = lines.iter().filter(|line| {
            let what = line["what"].as_str().unwrap();
            what.starts_with("own parameters") && !what.contains("way") || line["kind"] == "optimizer"
        });
        let state: u64 = state.map(|line| line["bytes"].as_u64().unwrap()).sum();
        let peaks = peaks(&bench, shard);
        println!("{shard}: state {state}, in all {}, measured {peaks:?}", plan["peak_bytes"]);
        assert_eq!(peaks.len(), 2, "the run has two workers");
        assert!(state > 0 && peaks.iter().all(|&peak| state <= peak), "{shard}: {state} of {peaks:?}");
    }
}

#[test]
fn workers_send_what_their_plan_says() {
    let bench = Bench::new();
    // Parameters are gathered, gradients scattered, and handed on to buddies; or they are reduced for all.
    let divided = ["all-gather", "all-reduce", "reduce-scatter"];
    for (sets, operations) in [
        (&[][..], &["all-reduce"][..]),
        (&["parallel.shard=optimizer"], &[&divided[..], &["shift"]].concat()),
        (&["parallel.shard=full"], &[&divided[..], &["shift"]].concat()),
        (&["parallel.shard=full", "parallel.buddies=false", "reduce.bits=16"], &divided),
        (&["reduce.bits=12"], &["all-reduce"]),
    ] {
        let mut arguments = vec!["--workers", "3", "--set", "model.dim=128", "--set", "train.steps=4"];
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        let (_, plan) = plan(&bench, &arguments);
        let told = plan["wire_bytes"].as_f64().unwrap();
        arguments.extend(["--transport", "quic", "--overwrite"]);
        let run = bench.train("run", &arguments).done();
        // Blocks of sums that follow in 64 bits are not part of a plan, nor is a run's first step, which measures.
        let steps: Vec<Value> =
            run.steps().into_iter().skip(1).filter(|step| step["wide_blocks"] == 0).collect();
        assert!(!steps.is_empty(), "{sets:?}: every step had wide blocks");
        for rank in steps.iter().flat_map(|step| step["ranks"].as_array().unwrap()) {
            let sent = rank["tx_bytes"].as_f64().unwrap();
            // Parts of ranks differ by chunks; frames and the commit are not counted.
            assert!((sent - told).abs() <= 0.04 * told, "{sets:?}: a plan of {told}, sent {sent}");
            let by_operation = rank["sent"].as_object().unwrap();
            assert_eq!(by_operation.keys().collect::<Vec<_>>(), operations, "{sets:?}");
            let sum: u64 = by_operation.values().filter_map(Value::as_u64).sum();
            assert_eq!(Some(sum), rank["tx_bytes"].as_u64(), "{sets:?}");
        }
    }
}
