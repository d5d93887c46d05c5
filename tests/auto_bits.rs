//! A recipe that leaves the bits of its sums open: the first ring chooses, and whatever comes later has what it chose. Real processes;
//! that two of them are not on one host, and compute so fast that any link is slow, they are told.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;

use common::watched::{Watched, assert_no_trace};
use common::{Bench, RECIPE, Run};
use rustix::process::Signal;
use serde_json::Value;

const AUTO: [&str; 2] = ["--set", "reduce.bits=auto"];
/// Two workers on hosts of their own, whose micro-batches take a microsecond.
const FAR: (&str, &str) = ("MATTOCK_FAULTS", "apart:0,apart:1,slow:0:1,slow:1:1");
/// What they choose: fewer bits are for those who ask for them.
const CHOSEN: &str = "reduce.bits=12";

fn auto<'a>(workers: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--workers", workers, "--transport", "quic"], &AUTO[..], more].concat()
}

/// A run of two workers that are told to be far from each other.
fn far(bench: &Bench, out: &str, more: &[&str]) -> Run {
    let mut command = bench.command();
    command.env(FAR.0, FAR.1).args(["train", "recipe.toml", "--json", "--out", out]).args(auto("2", more));
    Run::read(&command.output().unwrap(), bench.path(out)).done()
}

/// What is kept of choices beside a run's checkpoints, the newest last.
fn records(out: &Path) -> Vec<Value> {
    let found = fs::read_dir(out.join("checkpoints/bits")).unwrap();
    let mut paths: Vec<_> = found.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap()).collect()
}

#[test]
fn on_one_host_all_bits_are_kept() {
    let bench = Bench::new();
    let exact = bench.train("exact", &["--workers", "1"]).done();
    for (workers, why) in [("1", "there is one worker"), ("2", "all workers share a host")] {
        let run = bench.train(workers, &auto(workers, &[])).done();
        assert_eq!(run.curve(), exact.curve(), "on {workers}");
        assert!(run.errors.contains(&format!("reduce.bits = \"auto\": 32 bits: {why}")), "{}", run.errors);
        let [record] = &records(&run.out)[..] else { panic!("one choice") };
        assert_eq!(record["bits"], 32);
    }
}

#[test]
fn what_was_chosen_holds_for_all_that_comes_later() {
    let bench = Bench::new();
    let twelve = bench.train("twelve", &["--workers", "1", "--set", CHOSEN]).done();
    for (shard, resumed_on) in [("none", "1"), ("optimizer", "3"), ("full", "1")] {
        let shard = format!("parallel.shard={shard}");
        let run = far(&bench, &shard, &["--set", &shard]);
        assert_eq!(run.curve(), twelve.curve(), "{shard}");
        assert!(run.errors.contains("reduce.bits = \"auto\": 12 bits: the sums take"), "{}", run.errors);
        // On one host, where it would choose otherwise.
        let resumed = bench.train(&shard, &auto(resumed_on, &["--resume=4", "--set", &shard])).done();
        assert_eq!(resumed.hash(), twelve.hash(), "{shard}");
        let said = "reduce.bits = \"auto\": 12 bits, as this run's record says";
        assert!(resumed.errors.contains(said), "{}", resumed.errors);
        assert_eq!(records(&run.out).len(), 1, "{shard}");
    }
    // Another run in the same place makes a choice of its own.
    let other = bench.train("parallel.shard=none", &auto("1", &["--overwrite"])).done();
    let bits: Vec<u64> = records(&other.out).iter().map(|record| record["bits"].as_u64().unwrap()).collect();
    assert_eq!(bits, [12, 32]);
}

#[test]
fn workers_that_are_killed_and_join_round_as_the_others_do() {
    let bench = Bench::with(&RECIPE.replace("[checkpoint]", "[reduce]\nbits = 12\n\n[checkpoint]"));
    let mut run = Watched::start_with(&bench, "run", &auto("2", &[]), &[FAR]);
    run.wait_for_step(5);
    // The first rank, then all.
    for victims in [&[0][..], &[1, 2]] {
        let (seen, workers) = (run.read().len(), run.workers());
        victims.iter().for_each(|victim| run.signal(workers[victim], Signal::KILL));
        run.wait_for_world(seen, 2);
    }
    let out = run.out.clone();
    let events = run.stop();
    assert_eq!(records(&out).len(), 1);
    assert_no_trace(&bench, &events);
}

#[test]
fn a_choice_that_cannot_be_read_is_not_made_again() {
    let bench = Bench::new();
    let run = far(&bench, "run", &[]);
    fs::write(run.out.join("checkpoints/bits/00000001"), "{").unwrap();
    let resumed = bench.train("run", &auto("1", &["--resume=4"]));
    assert_ne!(resumed.code, Some(0));
    assert!(resumed.errors.contains("bits/00000001, which says how many bits"), "{}", resumed.errors);
}
