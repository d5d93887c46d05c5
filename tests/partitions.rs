//! Ways between hosts that are cut and heal leave no trace in a run, and what heals within the timeout costs no ring: real
//! processes on hosts that are network namespaces. Needs root; where it may not, it says so and skips.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::Bench;
use mattock::chaos::hosts::Hosts;

#[test]
fn partitions_leave_no_trace() {
    if let Some(obstacle) = Hosts::obstacle() {
        let skipped = format!("skipped: {obstacle}");
        assert!(std::env::var_os("MATTOCK_TEST_NO_SKIP").is_none(), "{skipped}");
        return eprintln!("{skipped}");
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
