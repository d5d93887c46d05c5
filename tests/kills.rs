//! A rank that is killed in the middle of collectives is missed at once, by everybody, and leaves nothing behind, over shared
//! memory as over QUIC. `MATTOCK_KILLS` says how many are killed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RANKS: usize = 3;
/// Far below the ranks' own timeout: who ends within this has not waited for that.
const PATIENCE: Duration = Duration::from_secs(60);

/// A measurement that goes on for longer than any test, on three ranks.
fn start(transport: &str, payloads: [&str; 6]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mattock"));
    command.args(["bench", "allreduce", "--transport", transport, "--timeout", "3600", "--json"]);
    command.args(["--ranks", &RANKS.to_string(), "--min", "4B"]).args(payloads);
    command.env_remove("RUST_LOG").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn wait_until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The processes of the ranks, once all are as they should be.
fn ranks_of(parent: &Child, ready: impl Fn(u32) -> bool) -> Vec<u32> {
    let children = format!("/proc/{0}/task/{0}/children", parent.id());
    wait_until("three ranks are ready", || {
        let listed = fs::read_to_string(&children).ok()?;
        let ranks: Vec<u32> = listed.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        (ranks.len() == RANKS && ranks.iter().all(|&rank| ready(rank))).then_some(ranks)
    })
}

/// How many boards a process has mapped.
fn boards_of(process: u32) -> usize {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    maps.lines().filter(|line| line.contains("mattock-board")).count()
}

fn kills() -> u64 {
    std::env::var("MATTOCK_KILLS").map_or(20, |kills| kills.parse().unwrap())
}

/// Kills any rank, at any moment of any payload: the others say whom they lost, and that its process has ended.
fn kill_one(kill: u64, parent: Child, ranks: &[u32]) {
    let random = (kill + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::thread::sleep(Duration::from_micros(random % 150_000));
    let victim = (random >> 32) as usize % RANKS;
    assert!(Command::new("kill").args(["-9", &ranks[victim].to_string()]).status().unwrap().success());
    let output = wait_for(parent);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "kill {kill}: {said}");
    // Who learns of it from another survivor names that one, and repeats what it says.
    let survivors = said
        .lines()
        .filter(|line| line.starts_with("error:") && line.contains(&format!("lost rank {victim}")))
        .count();
    assert_eq!(survivors, RANKS - 1, "kill {kill} of rank {victim}: {said}");
    assert!(said.contains("process has ended"), "kill {kill}: {said}");
}

/// The timeout is an hour: only the dead rank's host can have said so.
#[cfg(target_os = "linux")]
#[test]
fn survivors_of_a_kill_over_quic_say_whom_they_lost() {
    for kill in 0..kills().div_ceil(4) {
        // The first payload's result says that all are linked; the second and last one is large.
        let mut parent = start("quic", ["--max", "256MiB", "--factor", "67108864", "--runs", "20"]);
        let mut results = BufReader::new(parent.stdout.take().unwrap());
        results.read_line(&mut String::new()).unwrap();
        let ranks = ranks_of(&parent, |_| true);
        let rest = std::thread::spawn(move || std::io::copy(&mut results, &mut std::io::sink()));
        kill_one(kill, parent, &ranks);
        rest.join().unwrap().unwrap();
    }
}

#[test]
fn survivors_of_a_kill_say_whom_they_lost() {
    for kill in 0..kills() {
        let parent = start("shm", ["--max", "1GiB", "--factor", "16", "--runs", "1000"]);
        let ranks = ranks_of(&parent, |rank| boards_of(rank) == RANKS);
        kill_one(kill, parent, &ranks);
    }
    let left: Vec<_> = fs::read_dir("/dev/shm").into_iter().flatten().flatten().collect();
    assert!(!left.iter().any(|file| file.file_name().to_string_lossy().contains("mattock")), "{left:?}");
}

fn wait_for(mut parent: Child) -> std::process::Output {
    wait_until("the measurement ends", || parent.try_wait().unwrap());
    parent.wait_with_output().unwrap()
}
