//! Progress and summary of scripted events.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Event, Mode, Progress, RunEnded, RunOutcome, Summary};

const MB: u64 = 1_000_000;

/// A step of 1,000 tokens on two ranks, each 0.9 s computing and 0.1 s exchanging 50 MB.
fn step(number: u64) -> Event {
    let rank = |rank: u32| {
        json!({ "rank": rank, "worker": "w", "micro_batches": [rank], "tx_bytes": 50 * MB, "rx_bytes": 50 * MB,
            "seconds": { "compute": 0.9, "exchange": 0.1 } })
    };
    event(json!({ "event": "step", "step": number, "loss": 1.0 / number as f64, "grad_norm": 1.0, "lr": 1e-3,
        "state_hash": format!("{number:016x}"), "tokens": 1000, "world_size": 2, "generation": 1,
        "ranks": [rank(0), rank(1)] }))
}

fn event(json: serde_json::Value) -> Event {
    serde_json::from_value(json).unwrap()
}

/// What a run of `steps` steps, one a second, shows; and its progress.
fn shown(mode: Mode, steps: u64) -> (String, Progress<Vec<u8>>, Instant) {
    let start = Instant::now();
    let mut progress = Progress::new(Vec::new(), mode, start);
    let started = event(json!({ "event": "run_started", "steps": steps }));
    progress.absorb(start, &started).unwrap();
    let mut now = start;
    for number in 1..=steps {
        now = start + Duration::from_secs(number);
        progress.absorb(now, &step(number)).unwrap();
    }
    let checkpoint = json!({ "event": "checkpoint", "step": steps, "url": "file:///c" });
    progress.absorb(now, &event(checkpoint)).unwrap();
    progress.absorb(now, &event(json!({ "event": "run_ended" }))).unwrap();
    (String::from_utf8(progress.out.clone()).unwrap(), progress, now)
}

#[test]
fn plain_lines_show_the_first_and_the_last_step_and_some_between() {
    let (text, ..) = shown(Mode::Plain, 9);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert_eq!(lines[0], "run of 9 steps");
    assert!(lines[1].starts_with("step 1/9  loss 1.0000  - tokens/s"), "{text}");
    assert_eq!(lines[2], "step 6/9  loss 0.1667  1000 tokens/s  ring 0.50 GB/s  2 workers  0:03 left");
    assert!(lines[3].starts_with("step 9/9"), "{text}");
    assert_eq!(lines[4], "checkpoint after step 9: file:///c");
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[test]
fn the_live_line_stays_on_one_line_and_within_the_terminal() {
    let (text, ..) = shown(Mode::Live { columns: 40 }, 9);
    let drawn: Vec<&str> = text.split("\r\x1b[2K").filter(|line| line.starts_with("step")).collect();
    assert!(drawn.len() >= 9, "{text:?}");
    assert!(drawn.iter().all(|line| line.trim_end().chars().count() < 40), "{drawn:?}");
    assert_eq!(
        text.lines().count(),
        3,
        "only the start, the checkpoint and the end break the line: {text:?}"
    );
    assert!(text.ends_with('\n'));
}

#[test]
fn a_slow_worker_is_named_until_the_ring_is_another() {
    let (now, status) = (Instant::now(), |progress: &Progress<Vec<u8>>| super::status(progress.meter()));
    let mut progress = Progress::new(Vec::new(), Mode::Plain, now);
    let share = |worker: u32, before: u32, after: u32, ms: f64| json!({ "worker": worker, "before": before, "after": after, "ms": ms });
    let shares = [share(0, 2, 3, 1.0), share(2, 3, 1, 4.0)];
    let slow =
        json!({ "event": "rebalanced", "generation": 1, "step": 4, "median_ms": 1.5, "shares": shares });
    progress.absorb(now, &event(slow)).unwrap();
    progress.absorb(now, &step(5)).unwrap();
    assert!(status(&progress).contains("2 workers (slow: 2)  "), "{}", status(&progress));
    let formed = json!({ "event": "ring_formed", "generation": 2, "world_size": 2 });
    progress.absorb(now, &event(formed)).unwrap();
    assert!(!status(&progress).contains("slow"));
    let said = String::from_utf8(progress.out).unwrap();
    let line =
        "worker 2 has 1 micro-batches of a step instead of 3: one takes it 4.0 ms; the median is 1.5 ms";
    assert!(said.lines().any(|said| said == line), "{said}");
}

#[test]
fn the_window_forgets_what_is_long_ago() {
    let (_, mut progress, now) = shown(Mode::Plain, 5);
    for second in 0..40 {
        progress.absorb(now + Duration::from_millis(500 * (second + 1)), &step(6 + second)).unwrap();
    }
    let rate = progress.meter().tokens_per_second().unwrap();
    assert!((rate - 2000.0).abs() < 1.0, "{rate}");
}

#[test]
fn the_json_object_has_the_keys_of_the_contract() {
    let (_, progress, now) = shown(Mode::Plain, 4);
    let ended =
        event(json!({ "event": "run_ended", "unigram_loss": 3.5, "held_out_loss": 0.5, "parameters": 7 }));
    let Event::RunEnded(ended) = ended else { panic!("{ended:?}") };
    let summary = Summary::new(progress.meter(), &ended, now);
    assert_eq!(
        serde_json::to_value(&summary).unwrap(),
        json!({ "steps": 4, "final_loss": 0.25, "unigram_loss": 3.5, "held_out_loss": 0.5,
            "parameters": 7, "state_hash": "0000000000000004", "tokens_per_second": 1000.0, "goodput": 1.0, "world_size": 2,
            "checkpoints": ["file:///c"] })
    );
}

#[test]
fn the_block_at_the_end_says_where_the_time_went() {
    let (_, progress, now) = shown(Mode::Plain, 4);
    let ended = RunEnded { unigram_loss: Some(3.5), ..RunEnded::default() };
    let text = Summary::new(progress.meter(), &ended, now).to_text(Path::new("runs/a"));
    for said in [
        "final loss  0.2500 (unigram 3.5000)",
        "step time  compute 90.0%, exchange 10.0%",
        "checkpoints  1, the newest file:///c",
        "state hash  0000000000000004",
        "folder  runs/a",
    ] {
        assert!(text.contains(said), "no {said:?} in\n{text}");
    }
}

#[test]
fn what_rings_and_repeated_steps_cost_is_no_goodput() {
    let (_, mut progress, now) = shown(Mode::Plain, 5);
    let at = |second: f64| now + Duration::from_secs_f64(second);
    let recalled = event(json!({ "event": "ring_recalled", "generation": 1, "reason": "lost" }));
    progress.absorb(at(0.5), &recalled).unwrap();
    progress.absorb(at(3.0), &step(6)).unwrap();
    assert_eq!(progress.meter().goodput(), Some(1.0 - 2.0 / 7.0), "two of three seconds were no step");
    progress
        .absorb(at(4.0), &event(json!({ "event": "run_started", "steps": 9, "resumed_from": 4 })))
        .unwrap();
    (5..=7).for_each(|number| progress.absorb(at(number as f64), &step(number)).unwrap());
    let lost = 2.0 + 2.0 + 1.0;
    let goodput = progress.meter().goodput().unwrap();
    assert!((goodput - (1.0 - lost / 11.0)).abs() < 1e-9, "{goodput}: 5 and 6 were done again");
}

#[test]
fn a_run_without_a_step_has_a_summary_too() {
    let now = Instant::now();
    let progress = Progress::new(Vec::new(), Mode::Plain, now);
    let summary = Summary::new(progress.meter(), &RunEnded::default(), now);
    assert_eq!((summary.steps, summary.final_loss, summary.state_hash.as_ref()), (0, None, None));
    assert!(summary.to_text(Path::new("d")).contains("step time  -"));
}

#[test]
fn events_of_a_newer_coordinator_are_skipped() {
    assert_eq!(event(json!({ "event": "eclipse", "of": "the sun" })), Event::Unknown);
    assert_eq!(
        event(json!({ "event": "worker_lost", "worker": 3, "reason": "killed", "rank": 1 })),
        Event::WorkerLost { worker: "3".into(), reason: "killed".into() }
    );
    let failed = event(json!({ "event": "run_ended", "outcome": "failed", "error": "lost" }));
    assert!(matches!(failed, Event::RunEnded(RunEnded { outcome: RunOutcome::Failed, .. })));
}

#[test]
fn a_loss_that_json_cannot_say_is_not_a_number() {
    let mut step = serde_json::to_value(json!({ "event": "step", "step": 1, "loss": null, "state_hash": "0",
        "tokens": 1, "world_size": 1 }))
    .unwrap();
    assert!(matches!(event(step.clone()), Event::Step(step) if step.loss.is_nan()));
    step["loss"] = json!(1);
    assert!(matches!(event(step), Event::Step(step) if step.loss == 1.0));
}
