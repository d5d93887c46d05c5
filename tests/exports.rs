//! What other tools read: a run's token ids as a NumPy array, and a model's initial parameters as a checkpoint.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::process::Output;

use common::Bench;

fn mattock(bench: &Bench, arguments: &[&str]) -> Output {
    bench.command().args(arguments).output().unwrap()
}

/// Bytes of the array's elements, after checking its header.
fn batches(bench: &Bench, steps: u64, set: &str) -> Vec<u8> {
    let steps = steps.to_string();
    let output = mattock(
        bench,
        &["data", "batches", "recipe.toml", "--steps", &steps, "--out", "ids.npy", "--set", set],
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = fs::read(bench.path("ids.npy")).unwrap();
    let (header, elements) = bytes.split_at(128);
    let shape = format!("'descr': '<i4', 'fortran_order': False, 'shape': ({steps}, 14, 25)");
    assert!(String::from_utf8_lossy(header).contains(&shape), "{header:?}");
    elements.to_vec()
}

#[test]
fn batches_follow_from_the_seed_and_not_from_how_they_are_cut() {
    let bench = Bench::new();
    let three = batches(&bench, 3, "seed=3");
    assert_eq!(three.len(), 3 * 14 * 25 * 4);
    assert!(batches(&bench, 2, "batch.micro=7") == three[..2 * 14 * 25 * 4]);
    assert!(batches(&bench, 3, "seed=4") != three);
    let ids: Vec<i32> = three.chunks(4).map(|id| i32::from_le_bytes(id.try_into().unwrap())).collect();
    let corpus: Vec<u8> =
        (0..4).flat_map(|file| fs::read(bench.path(&format!("corpus/{file}.txt"))).unwrap()).collect();
    let found = ids.chunks(25).filter(|row| corpus.windows(25).any(|window| same_pattern(window, row)));
    assert!(found.count() * 2 > ids.len() / 25, "rows are windows of the corpus, but for those across files");
}

/// Whether each byte stands for one id: the byte-level alphabet is a permutation of the bytes.
fn same_pattern(bytes: &[u8], ids: &[i32]) -> bool {
    let first = |index: usize| bytes.iter().position(|byte| *byte == bytes[index]);
    (0..ids.len()).all(|index| first(index) == ids.iter().position(|id| *id == ids[index]))
}

#[test]
fn the_initial_checkpoint_is_whole_and_is_never_written_over() {
    let bench = Bench::new();
    let init = || mattock(&bench, &["checkpoint", "init", "recipe.toml", "--out", "initial"]);
    let output = init();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).trim_end().ends_with("initial/step-00000000"));
    let weights = || fs::read(bench.path("initial/step-00000000/model.safetensors")).unwrap();
    let before = weights();
    assert!(mattock(&bench, &["checkpoint", "verify", "initial"]).status.success());
    let other = mattock(&bench, &["checkpoint", "init", "recipe.toml", "--out", "other", "--set", "seed=4"]);
    assert!(other.status.success());
    assert!(fs::read(bench.path("other/step-00000000/model.safetensors")).unwrap() != before);
    assert_eq!(init().status.code(), Some(2));
    assert!(weights() == before);
}
