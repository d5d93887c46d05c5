//! A run that stops and goes on, on any number of workers, ends with the bits of one that never stopped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::{Bench, RECIPE, steps};

/// Far more steps than are ever run.
const ENDLESS: &str = "train.steps=100000";

/// The newest checkpoint folder of a run whose checkpoints lie in its own folder.
fn checkpoint(bench: &Bench, out: &str, step: u64) -> PathBuf {
    let checkpoints = fs::read_dir(bench.path(out).join("checkpoints")).unwrap();
    let mut found = checkpoints.map(|entry| entry.unwrap().path());
    let digits = |path: &PathBuf| -> Option<u64> {
        let name = path.file_name()?.to_str()?;
        name.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    found.find(|path| path.is_dir() && digits(path) == Some(step)).unwrap()
}

#[test]
fn resumed_on_another_number_of_workers_it_ends_with_the_same_bits() {
    let bench = Bench::new();
    let whole = bench.train("whole", &["--workers", "2"]).done().hash();
    for (out, workers) in [("one", "1"), ("three", "3")] {
        bench.train(out, &["--workers", "2"]).done();
        let resumed = bench.train(out, &["--workers", workers, "--resume=4"]).done();
        assert_eq!(resumed.hash(), whole, "resumed at step 4 on {workers} workers");
        assert_eq!(resumed.steps().last().unwrap()["world_size"].to_string(), workers);
    }
}

/// Some divisions of a state among workers; with `MATTOCK_ALL_DIVISIONS` set all of up to four.
fn divisions(some: [(&'static str, u32); 3]) -> Vec<(&'static str, u32)> {
    match std::env::var_os("MATTOCK_ALL_DIVISIONS") {
        Some(_) => ["none", "optimizer", "full"]
            .into_iter()
            .flat_map(|shard| (1..=4).map(move |n| (shard, n)))
            .collect(),
        None => some.to_vec(),
    }
}

#[test]
fn what_was_saved_in_one_division_goes_on_in_any_other() {
    let bench = Bench::new();
    let whole = bench.train("whole", &["--workers", "1"]).done().hash();
    let run = |out: &str, (shard, workers): (&str, u32), resume: &[&str]| {
        let (workers, shard) = (workers.to_string(), format!("parallel.shard={shard}"));
        let arguments = ["--workers", &workers, "--set", &shard];
        bench.train(out, &[&arguments, resume].concat()).done()
    };
    for saved in divisions([("none", 2), ("optimizer", 3), ("full", 3)]) {
        let out = format!("{}-{}", saved.0, saved.1);
        run(&out, saved, &[]);
        for resumed in divisions([("none", 3), ("optimizer", 2), ("full", 4)]) {
            let hash = run(&out, resumed, &["--resume=4"]).hash();
            assert_eq!(hash, whole, "saved as {saved:?}, resumed as {resumed:?}");
        }
    }
}

#[test]
fn sums_of_fewer_bits_go_on_with_the_same_bits() {
    let bench = Bench::with(&RECIPE.replace("[checkpoint]", "[reduce]\nbits = 8\n\n[checkpoint]"));
    let whole = bench.train("whole", &["--workers", "1"]).done().hash();
    bench.train("three", &["--workers", "2"]).done();
    assert_eq!(bench.train("three", &["--workers", "3", "--resume=4"]).done().hash(), whole);
    // Other bits are another result, but no other run: exponents and bounds are the same.
    let finer = bench.train("three", &["--workers", "1", "--resume=4", "--set", "reduce.bits=16"]).done();
    assert_ne!(finer.hash(), whole);
    assert!(finer.errors.contains("resumed with another recipe: reduce.bits: 8 -> 16"), "{}", finer.errors);
}

/// Starts an endless run, sends `signal` to the launcher after a few steps, waits for its end.
fn interrupted(signal: &str) {
    let bench = Bench::new();
    let mut command = bench.command();
    command.args(["train", "recipe.toml", "--out", "run", "--workers", "2", "--set", ENDLESS]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    for line in lines.by_ref() {
        said.push_str(&line);
        said.push('\n');
        if line.starts_with("step ") {
            break;
        }
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    for line in lines {
        said.push_str(&line);
        said.push('\n');
    }
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    assert!(said.contains("to go on:") && said.contains("--resume"), "{said}");
    // The last committed step is in the checkpoint: nothing of what was done is lost.
    let last = steps(&bench.path("run")).pop().unwrap()["step"].as_u64().unwrap();
    assert!(checkpoint(&bench, "run", last).is_dir());
    let further = format!("train.steps={}", last + 2);
    let resumed = bench.train("run", &["--workers", "3", "--resume", "--set", &further]).done();
    assert_eq!(resumed.steps().last().unwrap()["step"].as_u64(), Some(last + 2));
}

#[test]
fn sigterm_ends_a_run_with_a_checkpoint_to_go_on_from() {
    interrupted("-TERM");
}

#[test]
fn ctrl_c_ends_a_run_with_a_checkpoint_to_go_on_from() {
    interrupted("-INT");
}

#[test]
fn a_corrupt_checkpoint_is_passed_over_for_the_one_before_and_the_run_says_so() {
    let bench = Bench::new();
    let whole = bench.train("whole", &["--workers", "2"]).done().hash();
    // Where state is divided, a flaw is found by a rank that reads its part, in the ring, and the others must hear of it.
    for (shard, workers) in [("none", "1"), ("optimizer", "3"), ("full", "3"), ("full", "1")] {
        let out = format!("{shard}-{workers}");
        let shard = format!("parallel.shard={shard}");
        bench.train(&out, &["--workers", "2", "--set", &shard]).done();
        let newest = checkpoint(&bench, &out, 8);
        let mut pieces: Vec<PathBuf> =
            fs::read_dir(&newest).unwrap().map(|entry| entry.unwrap().path()).collect();
        pieces.sort();
        pieces.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        let mut bytes = fs::read(&pieces[0]).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&pieces[0], bytes).unwrap();
        let resumed = bench.train(&out, &["--workers", workers, "--resume", "--set", &shard]).done();
        assert_eq!(resumed.hash(), whole, "{out}: resumed at step 4");
        assert!(resumed.errors.contains("resumed after 4"), "{out}: {}", resumed.errors);
        let said = |line: &str| line.contains("passed over") && line.contains("corrupt");
        assert!(resumed.errors.lines().any(said), "no word of the corrupt checkpoint:\n{}", resumed.errors);
    }
}

#[test]
fn a_folder_that_holds_another_run_is_refused_with_both_ways_on() {
    let bench = Bench::with(&RECIPE.replace("steps = 8", "steps = 3"));
    let first = bench.train("run", &["--workers", "1"]).done().hash();
    let refused = bench.train("run", &["--workers", "1"]);
    assert_eq!(refused.code, Some(2), "{}", refused.errors);
    assert!(
        refused.errors.contains("--resume") && refused.errors.contains("--overwrite"),
        "{}",
        refused.errors
    );
    let again = bench.train("run", &["--workers", "1", "--overwrite"]).done();
    assert_eq!(again.hash(), first);
}
