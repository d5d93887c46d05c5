//! `mattock doctor`: one line for each check, and exit code 2 where something has to be mended.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::Bench;
use serde_json::Value;

/// What doctor says: exit code, and each check's verdict and words.
fn doctor(bench: &Bench, arguments: &[&str]) -> (Option<i32>, Vec<Value>) {
    let output = bench
        .command()
        .args(["doctor", "--json"])
        .args(arguments)
        .env("AWS_ENDPOINT", "http://127.0.0.1:1")
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "nobody")
        .env("AWS_SECRET_ACCESS_KEY", "nothing")
        .env("AWS_REGION", "us-east-1")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    (output.status.code(), said.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

fn check<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    checks.iter().find(|check| check["check"] == name).unwrap()
}

#[test]
fn a_folder_for_checkpoints_is_looked_at_and_left_empty() {
    let bench = Bench::new();
    let (code, checks) = doctor(&bench, &["--checkpoints", "there"]);
    assert_eq!(code, Some(0), "{checks:?}");
    for name in ["checkpoints", "create-only put", "clock"] {
        assert_eq!(check(&checks, name)["verdict"], "ok", "{name}");
    }
    assert_eq!(std::fs::read_dir(bench.path("there")).unwrap().count(), 0);
}

#[test]
fn a_bucket_that_cannot_be_reached_fails_and_says_what_to_look_at() {
    let (code, checks) = doctor(&Bench::new(), &["--checkpoints", "s3://bucket/prefix"]);
    assert_eq!(code, Some(2), "{checks:?}");
    let bucket = check(&checks, "checkpoints");
    assert_eq!(bucket["verdict"], "fail");
    assert!(bucket["mend"].as_str().unwrap().contains("credentials"), "{bucket}");
    // What was looked at before is told all the same.
    assert_eq!(check(&checks, "shared memory")["verdict"], "ok");
}

#[test]
fn a_coordinator_without_a_token_is_bad_input() {
    let (code, checks) = doctor(&Bench::new(), &["--coordinator", "127.0.0.1:1"]);
    assert_eq!((code, checks.len()), (Some(2), 0));
}
