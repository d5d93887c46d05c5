//! A rank that is killed in the middle of collectives over shared memory is missed at once, by everybody, and leaves
//! nothing behind. `MATTOCK_KILLS` says how many are killed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RANKS: usize = 3;
/// Far below the ranks' own timeout: who ends within this has not waited for that.
const PATIENCE: Duration = Duration::from_secs(60);

/// A measurement that goes on for longer than any test, on three ranks.
fn start() -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mattock"));
    command.args(["bench", "allreduce", "--transport", "shm", "--timeout", "3600", "--json"]);
    command.args([
        "--ranks",
        &RANKS.to_string(),
        "--min",
        "4B",
        "--max",
        "1GiB",
        "--factor",
        "16",
        "--runs",
        "1000",
    ]);
    command.env_remove("RUST_LOG").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
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

/// The processes of the ranks, once all share memory.
fn ranks_of(parent: &Child) -> Vec<u32> {
    let children = format!("/proc/{0}/task/{0}/children", parent.id());
    wait_until("three ranks share memory", || {
        let listed = fs::read_to_string(&children).ok()?;
        let ranks: Vec<u32> = listed.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        (ranks.len() == RANKS && ranks.iter().all(|&rank| boards_of(rank) == RANKS)).then_some(ranks)
    })
}

/// How many boards a process has mapped.
fn boards_of(process: u32) -> usize {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    maps.lines().filter(|line| line.contains("mattock-board")).count()
}

#[test]
fn survivors_of_a_kill_say_whom_they_lost() {
    let kills: u64 = std::env::var("MATTOCK_KILLS").map_or(20, |kills| kills.parse().unwrap());
    for kill in 0..kills {
        let parent = start();
        let ranks = ranks_of(&parent);
        // Any rank, at any moment of any payload.
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
    let left: Vec<_> = fs::read_dir("/dev/shm").into_iter().flatten().flatten().collect();
    assert!(!left.iter().any(|file| file.file_name().to_string_lossy().contains("mattock")), "{left:?}");
}

fn wait_for(mut parent: Child) -> std::process::Output {
    wait_until("the measurement ends", || parent.try_wait().unwrap());
    parent.wait_with_output().unwrap()
}
