//! The one idea, shown with real processes: the number of workers leaves no trace in the result.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Bench, RECIPE, Run};

/// The recipe with some lines replaced or, under `[table]`, added.
fn recipe(changes: &[(&str, &str)]) -> String {
    changes.iter().fold(RECIPE.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the recipe has no line '{from}'");
        text.replace(from, to)
    })
}

/// Blocks of sums that needed 64 bits, step by step.
fn wide_blocks(run: &Run) -> Vec<u64> {
    run.steps().iter().map(|step| step["wide_blocks"].as_u64().unwrap()).collect()
}

/// Every number of workers gives the same losses and hashes, step by step, for both exact accumulators, over shared memory
/// and over QUIC.
fn assert_same_bits(recipe: &str, workers: &[&str]) {
    let bench = Bench::with(recipe);
    let reference = bench.train("exact64", &["--workers", "1", "--set", "reduce.sum=exact64"]).done().curve();
    assert!(reference.len() > 2);
    for count in workers {
        for transport in ["shm", "quic"] {
            let out = format!("{transport}-{count}");
            let run = bench.train(&out, &["--workers", count, "--transport", transport]).done();
            assert_eq!(run.curve(), reference, "{count} workers over {transport}");
        }
    }
}

#[test]
fn any_number_of_workers_gives_the_same_bits() {
    // M = 7 on 3 workers, a context that is no power of two, and more workers than a step has room for work.
    assert_same_bits(RECIPE, &["1", "2", "3", "5"]);
}

#[test]
fn sharded_state_gives_the_same_bits() {
    for (shard, bits, buddies) in
        [("optimizer", 32, true), ("optimizer", 12, false), ("full", 32, true), ("full", 16, false)]
    {
        let tables = format!(
            "[parallel]\nshard = \"{shard}\"\nbuddies = {buddies}\n\n[reduce]\nbits = {bits}\n\n[checkpoint]"
        );
        let bench = Bench::with(&recipe(&[("[checkpoint]", &tables)]));
        let arguments = ["--workers", "1", "--set", "parallel.shard=none"];
        let reference = bench.train("whole", &arguments).done();
        for (workers, transport) in [("1", "shm"), ("2", "quic"), ("3", "shm"), ("5", "quic")] {
            let out = format!("{transport}-{workers}");
            let run = bench.train(&out, &["--workers", workers, "--transport", transport]).done();
            assert_eq!(run.curve(), reference.curve(), "{shard} on {workers} over {transport}");
            assert_eq!(run.hash(), reference.hash());
            assert_divided(&run, &reference);
            assert_eq!(run.summary["held_out_loss"], reference.summary["held_out_loss"]);
        }
    }
}

/// Each moment is held once among the ranks, beside copies.
fn assert_divided(run: &Run, reference: &Run) {
    let held = |run: &Run, kind: &str| -> Vec<u64> {
        let step = run.steps().pop().unwrap();
        let ranks = step["ranks"].as_array().unwrap().iter();
        ranks.map(|rank| rank["held"][kind].as_u64().unwrap_or(0)).collect()
    };
    let (all, parts) = (held(reference, "moments")[0], held(run, "moments"));
    assert_eq!(parts.iter().sum::<u64>(), all, "{parts:?}");
    assert!(parts.len() == 1 || parts.iter().all(|&part| part < all), "{parts:?}");
}

/// Of the changes of a recipe: sums of fewer bits.
fn in_bits(bits: u32) -> (&'static str, String) {
    ("[checkpoint]", format!("[reduce]\nbits = {bits}\n\n[checkpoint]"))
}

#[test]
fn sums_of_fewer_bits_give_the_same_bits() {
    for (bits, workers) in
        [(8, &["1", "2", "3", "5", "7"][..]), (12, &["2", "7"]), (16, &["3"]), (24, &["1", "5"])]
    {
        let (line, instead) = in_bits(bits);
        assert_same_bits(&recipe(&[(line, &*instead)]), workers);
    }
}

#[test]
fn sums_of_fewer_bits_that_jump_give_the_same_bits() {
    let (line, instead) = in_bits(8);
    let changes =
        [(line, &*instead), ("lr = 3e-3", "lr = 0.5"), ("clip = 1.0\n", ""), ("warmup = 2", "warmup = 0")];
    assert_same_bits(&recipe(&changes), &["2", "3"]);
}

#[test]
fn sums_of_fewer_bits_are_other_sums_and_train_as_well() {
    let bench = Bench::with(&recipe(&[("steps = 8", "steps = 60")]));
    let losses = [32, 24, 16, 12, 8].map(|bits| {
        let set = format!("reduce.bits={bits}");
        let run = bench.train(&format!("bits-{bits}"), &["--workers", "1", "--set", &set]).done();
        let last = run.steps().split_off(50);
        (run.hash(), last.iter().map(|step| step["loss"].as_f64().unwrap()).sum::<f64>() / 10.0)
    });
    println!("hash and mean loss of the last ten steps, in 32, 24, 16, 12 and 8 bits: {losses:?}");
    let (hash, loss) = &losses[0];
    for ((other_hash, other), tolerance) in losses[1..].iter().zip([0.01, 0.01, 0.02, 0.1]) {
        assert_ne!(other_hash, hash);
        assert!((other - loss).abs() < tolerance * loss, "{losses:?}");
    }
}

#[test]
fn more_workers_than_micro_batches_give_the_same_bits() {
    assert_same_bits(&recipe(&[("micro = 2", "micro = 7")]), &["3"]);
}

#[test]
fn dropout_gives_the_same_bits() {
    assert_same_bits(&recipe(&[("context = 24", "context = 24\ndropout = 0.2\ntied = false")]), &["2", "3"]);
}

#[test]
fn a_learning_rate_that_makes_the_loss_jump_gives_the_same_bits() {
    // Without warm-up and clipping the gradients jump by orders of magnitude: blocks need more than 32 bits.
    let wild = recipe(&[("lr = 3e-3", "lr = 0.5"), ("clip = 1.0\n", ""), ("warmup = 2", "warmup = 0")]);
    assert_same_bits(&wild, &["2", "3"]);
}

#[test]
fn a_token_first_seen_late_gives_the_same_bits() {
    // An untied embedding learns nothing of a byte that no sample had: its block expects tiny sums until one has it.
    let bench =
        Bench::with(&recipe(&[("context = 24", "context = 24\ntied = false"), ("corpus/*.txt", "*/*.txt")]));
    bench.write("late/word.txt", &"\u{1}\u{2}\u{3}".repeat(20));
    let wide = bench.train("wide", &["--workers", "1", "--set", "reduce.sum=exact64"]).done();
    for workers in ["1", "2", "3"] {
        let run = bench.train(&format!("run-{workers}"), &["--workers", workers]).done();
        assert_eq!(run.curve(), wide.curve(), "{workers} workers");
        let blocks = wide_blocks(&run);
        assert_eq!(blocks, wide_blocks(&wide));
        // The first step's exponents come from one micro-batch, so that it too may have wide blocks.
        assert!(blocks[1..4].iter().all(|&blocks| blocks == 0), "{blocks:?}");
        assert!(blocks[4..].iter().any(|&blocks| blocks > 0), "{blocks:?}");
    }
}

#[test]
fn plain_sums_differ_where_exact_ones_do_not() {
    // Shows that the comparison can fail: three ranks add floats in another order than one.
    let bench = Bench::new();
    let one = bench.train("one", &["--workers", "1", "--set", "reduce.sum=f32"]).done();
    let three = bench.train("three", &["--workers", "3", "--set", "reduce.sum=f32"]).done();
    assert_ne!(one.hash(), three.hash());
    let again = bench.train("again", &["--workers", "3", "--set", "reduce.sum=f32"]).done();
    assert_eq!(three.hash(), again.hash(), "for one world size it is deterministic");
}

#[test]
fn each_micro_batch_is_computed_by_one_rank() {
    let bench = Bench::new();
    for step in bench.train("three", &["--workers", "3"]).done().steps() {
        let ranks = step["ranks"].as_array().unwrap();
        assert_eq!(ranks.len(), 3);
        let indices = ranks.iter().flat_map(|rank| rank["micro_batches"].as_array().unwrap().clone());
        let mut indices: Vec<u64> = indices.map(|index| index.as_u64().unwrap()).collect();
        indices.sort_unstable();
        assert_eq!(indices, (0..7).collect::<Vec<u64>>());
    }
}

#[test]
fn a_rank_sends_what_a_ring_must_and_hardly_more() {
    let large =
        recipe(&[("dim = 32", "dim = 128"), ("layers = 2", "layers = 6"), ("steps = 8", "steps = 3")]);
    let bench = Bench::with(&large);
    let (both, quic) = (&["quic", "shm"][..], &["quic"][..]);
    for (sum, bits, width, transports) in [
        ("exact", 32, 4.0, both),
        ("exact64", 32, 8.0, both),
        ("exact", 24, 3.0, both),
        ("exact", 16, 2.0, quic),
        ("exact", 12, 1.5, quic),
        ("exact", 8, 1.0, quic),
    ] {
        for transport in transports {
            let out = format!("{sum}-{bits}-{transport}");
            let sets = [format!("reduce.sum={sum}"), format!("reduce.bits={bits}")];
            let arguments =
                ["--workers", "3", "--transport", transport, "--set", &sets[0], "--set", &sets[1]];
            let run = bench.train(&out, &arguments).done();
            let last = run.steps().pop().unwrap();
            // Beside the sums a bound for every 256 elements, and 64-bit sums of wide blocks.
            let wide = if sum == "exact" { last["wide_blocks"].as_f64().unwrap() } else { 0.0 };
            let bound = if sum == "exact" { 4.0 } else { 8.0 } / 256.0;
            let parameters = run.summary["parameters"].as_f64().unwrap();
            let ideal = 2.0 * 2.0 / 3.0 * ((width + bound) * parameters + wide * 257.0 * 8.0);
            for rank in last["ranks"].as_array().unwrap() {
                let sent = rank["tx_bytes"].as_f64().unwrap();
                assert!(
                    sent >= 0.99 * ideal && sent <= 1.015 * ideal,
                    "{sum} in {bits} bits over {transport}: {sent} of {ideal}"
                );
            }
        }
    }
}
