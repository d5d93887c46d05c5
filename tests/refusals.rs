//! Input that cannot be used: exit code 2, nothing started, and an error that says what is wrong and where.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Bench, RECIPE};

/// Runs the recipe with one line replaced; it must be refused with an error that holds all of `said`.
#[track_caller]
fn refused(from: &str, to: &str, said: &[&str]) {
    assert!(RECIPE.contains(from), "the recipe has no line '{from}'");
    refused_with(&Bench::with(&RECIPE.replace(from, to)), &[], said);
}

#[track_caller]
fn refused_with(bench: &Bench, arguments: &[&str], said: &[&str]) {
    let run = bench.train("run", arguments);
    assert_eq!(run.code, Some(2), "{}", run.errors);
    for words in said {
        assert!(run.errors.contains(words), "no {words:?} in\n{}", run.errors);
    }
    assert!(!run.errors.contains("panicked"), "{}", run.errors);
    assert!(!run.out.join("events.jsonl").exists(), "nothing was started");
}

#[test]
fn a_missing_recipe() {
    let bench = Bench::new();
    let output = bench.command().args(["train", "no-such.toml"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("no-such.toml"), "{errors}");
}

#[test]
fn an_unknown_key() {
    refused("weight_decay = 0.1", "weight_decai = 0.1", &["weight_decai", "weight_decay", "recipe.toml"]);
}

#[test]
fn a_wrong_type() {
    refused("layers = 2", "layers = \"two\"", &["layers", "recipe.toml"]);
}

#[test]
fn a_glob_that_matches_nothing() {
    refused("corpus/*.txt", "corpus/*.nothing", &["corpus/*.nothing"]);
}

#[test]
fn a_batch_that_micro_batches_do_not_divide() {
    refused("micro = 2", "micro = 3", &["batch.size", "batch.micro"]);
}

#[test]
fn a_bucket_that_refuses() {
    // Nothing listens on port 1: the store cannot be reached, whatever the credentials.
    let bench = Bench::with(&RECIPE.replace("every = 4", "to = \"s3://bucket/prefix\"\nevery = 4"));
    let output = bench
        .command()
        .args(["train", "recipe.toml", "--out", "run", "--workers", "1"])
        .env("AWS_ENDPOINT", "http://127.0.0.1:1")
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "nobody")
        .env("AWS_SECRET_ACCESS_KEY", "nothing")
        .env("AWS_REGION", "us-east-1")
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("s3://bucket/prefix"), "{errors}");
    assert!(!bench.path("run").join("events.jsonl").exists(), "nothing was started");
}

#[test]
fn a_checkpoint_of_another_model() {
    let bench = Bench::with(&RECIPE.replace("steps = 8", "steps = 3"));
    bench.train("run", &["--workers", "1"]).done();
    let run = bench.train("run", &["--workers", "1", "--resume", "--set", "model.dim=64"]);
    assert_eq!(run.code, Some(2), "{}", run.errors);
    assert!(run.errors.contains("model.dim"), "{}", run.errors);
}

#[test]
fn nothing_to_resume() {
    let bench = Bench::new();
    refused_with(&bench, &["--workers", "1", "--resume"], &["run"]);
}
