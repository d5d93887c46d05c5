//! What the repository shows to newcomers runs: the examples, and the quickstart on the text that it promises.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A built example, beside the program.
fn example(name: &str) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_mattock"));
    let path = program.with_file_name("examples").join(name);
    assert!(path.is_file(), "{} is not built: run `cargo build --examples` first", path.display());
    Command::new(path)
}

#[track_caller]
fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn two_processes_sum_without_a_coordinator() {
    let said = succeeded(&example("ring").output().unwrap());
    assert_eq!(said.lines().filter(|line| line.starts_with("all-reduce ")).count(), 5, "{said}");
}

#[test]
fn a_model_of_ones_own_is_trained_by_the_same_machinery() {
    let folder = tempfile::tempdir().unwrap();
    let hash = |workers: &str| {
        let output = example("digits")
            .args(["train", root("examples/digits.toml").to_str().unwrap(), "--json"])
            .args(["--workers", workers, "--out", workers])
            .current_dir(folder.path())
            .output()
            .unwrap();
        let summary: serde_json::Value = serde_json::from_str(&succeeded(&output)).unwrap();
        let loss = summary["final_loss"].as_f64().unwrap();
        assert!(loss < 1.0, "ten digits are guessed with a loss of 2.3, learnt with far less: {loss}");
        summary["state_hash"].as_str().unwrap().to_owned()
    };
    assert_eq!(hash("1"), hash("2"));
}

/// Every crate that the quickstart's globs name, as (name, version).
fn crates_of(recipe: &str) -> Vec<(String, String)> {
    let globs = recipe.split("registry/src/*/").skip(1);
    let folders = globs.map(|glob| glob.split('/').next().unwrap());
    let parts = folders.map(|folder| folder.rsplit_once('-').unwrap());
    parts.map(|(name, version)| (name.to_owned(), version.to_owned())).collect()
}

#[test]
fn the_quickstart_reads_crates_that_the_lock_file_names() {
    let recipe = fs::read_to_string(root("configs/quickstart.toml")).unwrap();
    let lock = fs::read_to_string(root("Cargo.lock")).unwrap();
    let crates = crates_of(&recipe);
    assert!(!crates.is_empty());
    for (name, version) in crates {
        let entry = format!("name = \"{name}\"\nversion = \"{version}\"\n");
        assert!(lock.contains(&entry), "Cargo.lock has no {name} {version}: mend configs/quickstart.toml");
    }
}
