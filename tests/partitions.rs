//! Ways between hosts that are cut and heal leave no trace in a run, and what heals within the timeout costs no ring: real
//! processes on hosts that are network namespaces. Needs root; where it may not, it says so and skips.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::Bench;
use mattock::chaos::hosts::Hosts;
use rustix::process::{Pid, Signal, kill_process};

/// Whether there can be hosts; where not, that is said.
fn can_be_divided() -> bool {
    let Some(obstacle) = Hosts::obstacle() else { return true };
    let skipped = format!("skipped: {obstacle}");
    assert!(std::env::var_os("MATTOCK_TEST_NO_SKIP").is_none(), "{skipped}");
    eprintln!("{skipped}");
    false
}

/// Ctrl-C takes down what was set up, before the program ends.
#[test]
fn a_run_that_is_stopped_leaves_no_hosts() {
    if !can_be_divided() {
        return;
    }
    let bench = Bench::new();
    let mut command = bench.command();
    command.args(["chaos", "recipe.toml", "--partitions", "--workers", "2"]).stderr(Stdio::null());
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let names = format!("mt{}", child.id());
    let hosts = || {
        let listed = Command::new("ip").args(["netns", "list"]).output().unwrap();
        String::from_utf8_lossy(&listed.stdout).lines().filter(|line| line.starts_with(&names)).count()
    };
    let until = Instant::now() + Duration::from_secs(60);
    while hosts() == 0 {
        assert!(Instant::now() < until, "no hosts came");
        assert_eq!(child.try_wait().unwrap(), None, "it ended before there was a host");
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_raw(child.id().cast_signed()).unwrap(), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(hosts(), 0);
}

#[test]
fn partitions_leave_no_trace() {
    if !can_be_divided() {
        return;
    }
    let bench = Bench::new();
    let chaos = ["chaos", "recipe.toml", "--partitions", "--set", "elastic.timeout=4s", "--seeds", "2"];
    let output = bench.command().args(chaos).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}\n{errors}");
    for seed in 1..=2 {
        assert!(said.contains(&format!("seed {seed}: 6 cuts, 1 rings while they healed in time")), "{said}");
    }
}
