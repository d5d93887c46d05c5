//! `mattock bench` between processes: every operation, over both transports, gives what it must.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mattock"));
    command.arg("bench").args(arguments).env_remove("RUST_LOG").output().unwrap()
}

/// Samples of an operation between three processes.
fn samples(operation: &[&str], transport: &str) -> Vec<Value> {
    let size = ["--min", "12B", "--max", "192KiB", "--factor", "128", "--runs", "1"];
    let output = bench(&[operation, &["--ranks", "3", "--transport", transport, "--json"], &size].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{operation:?} over {transport}: {said}");
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_operation_is_right_between_processes() {
    let operations =
        ["allreduce", "reducescatter", "allgather", "broadcast", "reduce", "gather", "scatter", "alltoall"];
    for operation in operations.into_iter().chain(["sendreceive"]) {
        for (transport, named) in [("shm", "shared memory"), ("quic", "QUIC")] {
            let samples = samples(&[operation], transport);
            assert_eq!(samples.len(), 3, "{operation} over {transport}");
            for sample in samples {
                assert_eq!(sample["errors"], 0, "{operation}: {sample}");
                assert_eq!(sample["transport"], named, "{operation}: {sample}");
                assert!(sample["time_us"].as_f64().unwrap() > 0.0 && sample["bytes"].as_u64().unwrap() >= 12);
            }
        }
    }
}

#[test]
fn results_in_place_and_means_are_right() {
    for operation in [
        &["allreduce", "--in-place"][..],
        &["allreduce", "--in-place", "--sum", "exact"],
        &["allreduce", "--sum", "mean"],
        &["reducescatter", "--in-place"],
    ] {
        for transport in ["shm", "quic"] {
            for sample in samples(operation, transport) {
                assert_eq!(sample["errors"], 0, "{operation:?} over {transport}: {sample}");
                assert_eq!(sample["in_place"], operation.contains(&"--in-place"), "{operation:?}: {sample}");
            }
        }
    }
}

#[test]
fn a_line_is_right() {
    let samples = samples(&["allreduce", "--shape", "line"], "quic");
    assert!(
        samples.iter().all(|sample| sample["errors"] == 0 && sample["algorithm"] == "line"),
        "{samples:?}"
    );
    let output = bench(&["allreduce", "--shape", "circle"]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ring and line are"), "{said}");
}

#[test]
fn the_trainers_sums_are_right() {
    let output =
        bench(&["allreduce", "--sum", "exact", "--min", "64KiB", "--max", "64KiB", "--runs", "1", "--json"]);
    let sample: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&sample["errors"], &sample["type"]), (&0.into(), &"i32".into()), "{sample}");
}

/// Every pair is measured, and a plan made of it. What the plan is depends on the machine.
#[test]
fn links_are_measured_both_ways() {
    for (transport, named) in [("auto", "shared memory"), ("quic", "QUIC")] {
        let output = bench(&["links", "--ranks", "3", "--transport", transport, "--probe", "5", "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let survey: Value = serde_json::from_slice(&output.stdout).unwrap();
        let links = survey["links"].as_array().unwrap();
        let pairs: Vec<_> = links.iter().map(|link| (link["from"].as_u64(), link["to"].as_u64())).collect();
        let wanted = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)];
        assert_eq!(pairs, wanted.map(|(from, to)| (Some(from), Some(to))));
        for link in links {
            assert_eq!(link["transport"], named);
            assert!(
                link["latency_us"].as_f64().unwrap() > 0.0 && link["bandwidth_GBps"].as_f64().unwrap() > 0.0
            );
        }
        assert_eq!(survey["ring"]["order"].as_array().unwrap().len(), 3);
        assert!(survey["reason"].as_str().unwrap().contains("slowest link"), "{survey}");
    }
}

#[test]
fn an_order_is_found_before_the_measurement() {
    let size = ["--min", "64KiB", "--max", "64KiB", "--runs", "1", "--json"];
    let output = bench(
        &[&["allreduce", "--ranks", "3", "--order", "auto", "--transport", "quic"], &size[..]].concat(),
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("numbered in the order of ring 0 > "), "{said}");
    let sample: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(sample["errors"], 0, "{sample}");
    assert!(sample["predicted_us"].as_f64().unwrap() > 0.0, "{sample}");
}

#[test]
fn one_rank_has_no_links() {
    let output = bench(&["links", "--ranks", "1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no links"));
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    for (arguments, said) in [
        (["--min", "3B"], "no multiple"),
        (["--min", "2GiB"], "above --max"),
        (["--min", "0"], "no elements"),
        (["--bind", "nowhere"], "nowhere"),
        (["--sum=copy", "--in-place"], "two buffers"),
    ] {
        let output = bench(&[&["allreduce"], &arguments[..]].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains(said), "{errors}");
    }
}

#[test]
fn a_set_made_on_the_spot_streams_whole_through_a_cache_of_a_tenth() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("set").display().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_mattock"))
        .args(["bench", "data", "--to", &place, "--size", "8MiB", "--shard", "32KiB", "--json"])
        .env("MATTOCK_CACHE", folder.path().join("cache"))
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let sample: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |key: &str| sample[key].as_f64().unwrap();
    assert_eq!((number("set_bytes"), number("shards")), (8_388_608.0, 256.0));
    assert!(number("cache_held_bytes") <= number("cache_bytes") && number("cache_held_bytes") > 0.0);
    // Leftover and tail of an epoch are read by everybody.
    assert!((0.99..1.1).contains(&number("read_by_one")), "{sample}");
    assert!((0.49..0.65).contains(&number("read_by_one_of_two")), "{sample}");
    assert_eq!(number("same_steps"), 1000.0);
}

#[test]
fn a_coordinator_under_real_connections_is_measured() {
    let sizes = ["--workers", "12", "--each", "5", "--seconds", "2", "--step", "100", "--timeout", "20"];
    let output = bench(&[&["coordinator", "--json"][..], &sizes].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let sample: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(sample["workers"], 12);
    let number = |key: &str| sample[key].as_f64().unwrap();
    assert!(
        number("steps_per_second") > 0.0 && number("messages_per_second") > number("steps_per_second"),
        "{sample}"
    );
    assert!(number("peak_bytes") >= number("resident_bytes") && number("resident_bytes") > 0.0, "{sample}");
}

#[test]
fn a_simulated_fleet_is_told_of_and_its_seed_fixes_it() {
    let fleet = |seed: &str| -> Value {
        let sizes = ["--workers", "16", "--days", "2", "--interruptions", "500000", "--seed", seed, "--json"];
        let output = bench(&[&["fleet"][..], &sizes].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (first, again, other) = (fleet("1"), fleet("1"), fleet("2"));
    assert!(first["interruptions"].as_u64().unwrap() > 0, "{first}");
    assert_eq!((&first["goodput"], &first["rings"]), (&again["goodput"], &again["rings"]));
    assert_ne!(first["goodput"], other["goodput"]);
}
