//! Real child processes under the supervisor: shells that listen, end, hang or die.

use std::io::{BufRead, BufReader};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;

use super::{Deadlines, Ended, LaunchError, Line, LocalRun, Program, Role};

const LISTENS: &str = r#"echo '{"event":"listening","address":"127.0.0.1:4433"}'"#;
/// Prints as events what it is told, until told what the first argument matches.
const ECHOES_UNTIL: &str =
    r#"until_told() { while read -r line; do echo "$line"; case "$line" in $1) return;; esac; done; }"#;
/// So long that a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);
const PATIENT: Deadlines = Deadlines { start: LONG, gather: None, stop: LONG, silence: LONG, exit: LONG };

fn sh(script: &str) -> Program {
    Program { path: PathBuf::from("/bin/sh"), args: vec!["-c".into(), script.into()], env: Vec::new() }
}

/// What a run came to: how it ended, its events, and what was said on standard error.
struct Outcome {
    ended: Result<Ended, LaunchError>,
    events: Vec<String>,
    said: Vec<(Role, String)>,
}

/// As [`supervise_restarting`], and starts no coordinator again.
async fn supervise(
    coordinator: &str,
    workers: &[&str],
    deadlines: Deadlines,
    stops: (&str, usize),
) -> Outcome {
    supervise_restarting(0, coordinator, workers, deadlines, stops).await
}

/// Supervises scripts, and starts no worker again; a line that contains `stop_on` makes the user press Ctrl-C `presses` times.
async fn supervise_restarting(
    restarts: u32,
    coordinator: &str,
    workers: &[&str],
    deadlines: Deadlines,
    (stop_on, presses): (&str, usize),
) -> Outcome {
    let scripts: Vec<String> = workers.iter().map(ToString::to_string).collect();
    let run = LocalRun {
        coordinator: sh(&format!("{ECHOES_UNTIL}\n{coordinator}")),
        workers: NonZeroU32::new(workers.len() as u32).unwrap(),
        worker: Box::new(move |number, listening| {
            sh(&scripts[number as usize]).with_env("COORDINATOR", listening.address.to_string())
        }),
        respawn: false,
        restarts,
        deadlines,
    };
    let (sender, stops) = mpsc::channel(2);
    let (mut events, mut said) = (Vec::new(), Vec::new());
    let ended = run
        .supervise(stops, |line| {
            let text = match line {
                Line::Event(text) | Line::Said(_, text) => text,
            };
            if text.contains(stop_on) {
                (0..presses).for_each(|_| sender.try_send(()).unwrap());
            }
            match line {
                Line::Event(event) => events.push(event.to_owned()),
                Line::Said(role, line) => said.push((role, line.to_owned())),
            }
        })
        .await;
    Outcome { ended, events, said }
}

/// A coordinator that is killed once it was told of a worker's end and has done step 7, and what the next one does.
fn dies_then(next: &str) -> String {
    let step = r#"echo '{"event":"step","step":7,"ranks":[]}'"#;
    format!(
        "if [ \"$1\" = 7 ]; then echo \"\\\"$0 $*\\\"\"; {next}; else {LISTENS}; until_told '*exited*'; {step}; kill -9 $$; fi"
    )
}

const NEVER: (&str, usize) = ("never said", 0);

#[tokio::test]
async fn workers_start_once_the_coordinator_listens_and_their_exit_is_told_at_once() {
    let coordinator = format!("{LISTENS}; until_told '*exited*'; echo '{{\"event\":\"run_ended\"}}'");
    let outcome = supervise(&coordinator, &["echo at $COORDINATOR >&2; exit 7"], PATIENT, NEVER).await;
    let ended = outcome.ended.unwrap();
    assert!(ended.coordinator.success() && ended.killed.is_none() && !ended.stopped);
    assert_eq!(ended.workers[0].unwrap().code(), Some(7));
    assert!(outcome.events[1].contains("exit status: 7"), "{:?}", outcome.events);
    assert_eq!(outcome.events[2], r#"{"event":"run_ended"}"#);
    assert_eq!(outcome.said, [(Role::Worker(0), "at 127.0.0.1:4433".to_owned())]);
}

#[tokio::test]
async fn a_killed_worker_is_told_with_the_signal_while_the_others_live() {
    let coordinator = format!("{LISTENS}; until_told '*exited*'");
    let outcome = supervise(&coordinator, &["kill -9 $$", "cat"], PATIENT, NEVER).await;
    assert!(outcome.events[1].contains("signal: 9"), "{:?}", outcome.events);
    let ended = outcome.ended.unwrap();
    assert!(ended.killed.is_none(), "the end of standard input ended the other: {ended:?}");
    assert!(ended.workers[1].unwrap().success());
}

/// Supervises one worker that is started again, under a coordinator that says `after` once it was told of that many exits. The file
/// that `OVER` names is there as soon as the supervisor has heard that the run is ending.
async fn respawned(worker: &str, after: usize, coordinator: &str) -> Vec<serde_json::Value> {
    let told = "until_told '*exited*'; ".repeat(after);
    let folder = tempfile::tempdir().unwrap();
    let over = folder.path().join("over");
    let run = LocalRun {
        coordinator: sh(&format!("{ECHOES_UNTIL}\n{LISTENS}; {told} {coordinator}")),
        workers: NonZeroU32::MIN,
        worker: {
            let (worker, over) = (worker.to_owned(), over.display().to_string());
            Box::new(move |_, _| sh(&worker).with_env("OVER", over.clone()))
        },
        respawn: true,
        restarts: 0,
        deadlines: PATIENT,
    };
    let (_keep, stops) = mpsc::channel(1);
    let mut exits = Vec::new();
    let ended = run.supervise(stops, |line| {
        if let Line::Event(text) = line {
            let event: serde_json::Value = serde_json::from_str(text).unwrap();
            exits.extend(event.get("exited").cloned());
            if event["event"] == "run_ending" {
                std::fs::write(&over, "").unwrap();
            }
        }
    });
    ended.await.unwrap();
    exits
}

#[tokio::test]
async fn a_worker_that_dies_is_replaced_until_it_is_hopeless() {
    let replaced = |exits: Vec<serde_json::Value>| {
        exits.iter().map(|exit| exit["replaced"].as_bool().unwrap()).collect::<Vec<bool>>()
    };
    assert_eq!(replaced(respawned("exit 3", 4, "").await), [true, true, true, false]);
    assert_eq!(replaced(respawned("exit 2", 1, "").await), [false], "bad input stays bad");
    assert_eq!(replaced(respawned("exit 0", 1, "").await), [false], "it was done");
}

#[tokio::test]
async fn nobody_is_started_once_the_run_is_over() {
    let takes_part = r#"until_told '*exited*'; echo '{"event":"run_ending"}'; until_told '*exited*';"#;
    // The second one does not end before the supervisor has heard of the run's end.
    let worker =
        r#"[ -e "$OVER.first" ] && until [ -e "$OVER" ]; do sleep 0.01; done; : > "$OVER.first"; exit 3"#;
    let exits = respawned(worker, 0, takes_part).await;
    assert_eq!(exits.len(), 2);
    assert_eq!(exits[0]["replaced"], true);
    assert_eq!(exits[1]["replaced"], false, "the run is over");
}

#[tokio::test]
async fn a_worker_that_is_called_lost_is_killed_if_it_is_still_there() {
    let coordinator = format!(
        "{LISTENS}; echo running; read -r pid < \"$PIDS\"; echo '{{\"event\":\"worker_joined\",\"worker\":5,\"pid\":'$pid'}}'; \
         echo '{{\"event\":\"worker_lost\",\"worker\":5}}'; until_told '*exited*'"
    );
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pid");
    assert!(std::process::Command::new("mkfifo").arg(&pids).status().unwrap().success());
    let coordinator = format!("PIDS='{}'; {coordinator}", pids.display());
    let worker = format!("echo $$ > '{}'; exec sleep 600", pids.display());
    let outcome = supervise(&coordinator, &[&worker], PATIENT, NEVER).await;
    let said = outcome.events.last().unwrap();
    assert!(said.contains("signal: 9"), "{:?}", outcome.events);
}

#[tokio::test]
async fn ctrl_c_stops_the_run_in_order() {
    let coordinator = format!("{LISTENS}; echo running; until_told '*stop*'; exit 0");
    let outcome = supervise(&coordinator, &["cat", "cat"], PATIENT, ("running", 1)).await;
    assert_eq!(outcome.events[2], r#"{"stop":true}"#);
    let ended = outcome.ended.unwrap();
    assert!(ended.stopped && ended.killed.is_none(), "{ended:?}");
    assert!(ended.workers.iter().flatten().all(std::process::ExitStatus::success));
}

#[tokio::test]
async fn ctrl_c_twice_kills() {
    let coordinator = format!("{LISTENS}; echo running; exec sleep 600");
    let ended = supervise(&coordinator, &["exec sleep 600"], PATIENT, ("running", 2)).await.ended.unwrap();
    assert_eq!(ended.killed, Some("a second signal"));
    assert!(!ended.coordinator.success() && !ended.workers[0].unwrap().success());
}

#[tokio::test]
async fn a_run_that_does_not_stop_in_time_is_killed() {
    let deadlines = Deadlines { stop: SHORT, ..PATIENT };
    let coordinator = format!("{LISTENS}; echo running; exec sleep 600");
    let ended = supervise(&coordinator, &["exec sleep 600"], deadlines, ("running", 1)).await.ended.unwrap();
    assert_eq!(ended.killed, Some("the run did not stop in time"));
}

#[tokio::test]
async fn workers_that_outlive_the_coordinator_are_killed() {
    let deadlines = Deadlines { exit: SHORT, ..PATIENT };
    let ended = supervise(LISTENS, &["exec sleep 600"], deadlines, NEVER).await.ended.unwrap();
    assert_eq!(ended.killed, Some("workers did not end after the coordinator"));
    assert!(ended.coordinator.success());
}

#[tokio::test]
async fn a_coordinator_that_outlives_the_workers_is_killed() {
    let deadlines = Deadlines { exit: SHORT, ..PATIENT };
    let coordinator = format!("{LISTENS}; exec sleep 600");
    let ended = supervise(&coordinator, &["exit 0"], deadlines, NEVER).await.ended.unwrap();
    assert_eq!(ended.killed, Some("the coordinator did not end after the last worker"));
}

/// All workers of here have left, and one that was started elsewhere goes on, for longer than the end of a run takes.
#[tokio::test]
async fn a_run_that_others_go_on_with_is_not_ended() {
    let deadlines = Deadlines { exit: SHORT, ..PATIENT };
    let joined = r#"echo '{"event":"worker_joined","worker":7,"host":"another","pid":1}'"#;
    let later = format!("sleep {}", 3.0 * SHORT.as_secs_f32());
    let told = format!("{LISTENS}; {joined}; until_told '*exited*'; {later}");
    let coordinator = format!("{told}; echo '{{\"event\":\"run_ended\"}}'");
    let ended = supervise(&coordinator, &["exit 0"], deadlines, NEVER).await.ended.unwrap();
    assert!(ended.killed.is_none() && ended.coordinator.success(), "{ended:?}");
    // Nobody is left when that one is gone, too.
    let lost = r#"echo '{"event":"worker_lost","worker":7}'; exec sleep 600"#;
    let ended = supervise(&format!("{told}; {lost}"), &["exit 0"], deadlines, NEVER).await.ended.unwrap();
    assert_eq!(ended.killed, Some("the coordinator did not end after the last worker"));
}

#[tokio::test]
async fn a_coordinator_that_ends_before_it_listens_is_reported_with_its_last_words() {
    let outcome = supervise("echo no such data >&2; exit 2", &["exit 0"], PATIENT, NEVER).await;
    let message = outcome.ended.unwrap_err().to_string();
    assert!(message.contains("exit status: 2\nno such data"), "{message}");
}

#[tokio::test]
async fn a_coordinator_that_never_listens_is_killed() {
    let deadlines = Deadlines { start: SHORT, ..PATIENT };
    let message =
        supervise("exec sleep 600", &["exit 0"], deadlines, NEVER).await.ended.unwrap_err().to_string();
    assert!(message.contains("did not come to listen in time"), "{message}");
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let run = LocalRun {
        coordinator: Program { path: "/nowhere/mattock".into(), ..sh("") },
        workers: NonZeroU32::MIN,
        worker: Box::new(|_, _| sh("")),
        respawn: false,
        restarts: 0,
        deadlines: PATIENT,
    };
    let (_keep, stops) = mpsc::channel(1);
    let message = run.supervise(stops, |_| {}).await.unwrap_err().to_string();
    assert!(message.contains("cannot start coordinator (/nowhere/mattock)"), "{message}");
}

#[tokio::test]
async fn a_worker_that_cannot_be_started_ends_the_others() {
    let run = LocalRun {
        coordinator: sh(&format!("{LISTENS}; exec sleep 600")),
        workers: NonZeroU32::new(2).unwrap(),
        worker: Box::new(|number, _| match number {
            0 => sh("exec sleep 600"),
            _ => Program { path: "/nowhere/mattock".into(), ..sh("") },
        }),
        respawn: false,
        restarts: 0,
        deadlines: PATIENT,
    };
    let (_keep, stops) = mpsc::channel(1);
    let message = run.supervise(stops, |_| {}).await.unwrap_err().to_string();
    assert!(message.contains("cannot start worker 1"), "{message}");
}

#[tokio::test]
async fn what_a_worker_says_without_end_is_cut() {
    let coordinator = format!("{LISTENS}; until_told '*exited*'");
    let chatty = "head -c 100000 /dev/zero | tr '\\0' x >&2; echo >&2; echo done >&2";
    let outcome = supervise(&coordinator, &[chatty], PATIENT, NEVER).await;
    let lengths: Vec<usize> = outcome.said.iter().map(|(_, line)| line.len()).collect();
    assert_eq!(lengths, [4096 + " ...".len(), "done".len()]);
}

#[test]
fn cores_are_shared_and_every_worker_has_one() {
    let share = |cores, workers| super::share(cores, NonZeroU32::new(workers).unwrap());
    assert_eq!([share(8, 2), share(8, 3), share(2, 5), share(1, 1)], [4, 2, 1, 1]);
}

/// What the claim below runs in another process; alone it does nothing.
#[test]
fn child_of_the_next() {
    if std::env::var_os(super::PARENT).is_some() {
        super::die_with_parent().unwrap();
        println!("tied");
        std::thread::sleep(LONG);
        println!("outlived");
    }
}

#[test]
fn a_child_does_not_outlive_a_killed_parent() {
    let script = r#"MATTOCK_PARENT=$$ "$0" --exact launch::tests::child_of_the_next --nocapture & wait"#;
    let mut parent = std::process::Command::new("/bin/sh")
        .args(["-c".as_ref(), script.as_ref(), std::env::current_exe().unwrap().as_os_str()])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with("tied")));
    parent.kill().unwrap();
    parent.wait().unwrap();
    // The pipe ends when the last process that holds it has ended.
    assert!(!lines.any(|line| line.contains("outlived")));
}

#[tokio::test]
async fn a_coordinator_that_dies_is_started_again_with_what_only_the_launcher_knows() {
    let coordinator = dies_then(&format!("{LISTENS}; echo '{{\"event\":\"run_ended\"}}'"));
    let outcome = supervise_restarting(5, &coordinator, &["exit 7"], PATIENT, NEVER).await;
    let ended = outcome.ended.unwrap();
    assert!(ended.coordinator.success() && ended.killed.is_none(), "{ended:?}");
    let told = "\"--recorded 7 --port 4433\"";
    assert!(outcome.events.iter().any(|event| event == told), "{:?}", outcome.events);
    let said =
        |(role, line): &(Role, String)| *role == Role::Coordinator && line.contains("it has died (signal: 9");
    assert!(outcome.said.iter().any(said), "{:?}", outcome.said);
}

#[tokio::test]
async fn a_coordinator_that_dies_again_and_again_is_given_up() {
    let outcome = supervise_restarting(2, &dies_then("kill -9 $$"), &["exit 7"], PATIENT, NEVER).await;
    let ended = outcome.ended.unwrap();
    assert!(!ended.coordinator.success(), "{ended:?}");
    let tries = outcome.events.iter().filter(|event| event.contains("--recorded 7")).count();
    assert_eq!(tries, 2, "{:?}", outcome.events);
}
