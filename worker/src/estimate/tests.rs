//! Estimates against what is counted by hand, and against each other.

use std::time::Duration;

use proptest::prelude::*;

use super::memory::PROGRAM;
use super::*;
use crate::params::Space;
use crate::plan::{self, AdamW, Batch, Bits, NonFinite, Parallel, Reduce, Schedule};
use crate::task::Activations;

const SHARDS: [Shard; 3] = [Shard::None, Shard::Optimizer, Shard::Full];

fn plan(shard: Shard, buddies: bool) -> Plan {
    Plan {
        name: "toy".into(),
        seed: 5,
        model: plan::Table::new(),
        data: plan::Table::new(),
        recompute: false,
        batch: Batch { size: 12, micro: 2 },
        optimizer: AdamW {
            lr: 0.01,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip: None,
            schedule: Schedule::Constant { warmup: 0 },
        },
        steps: 5,
        reduce: Reduce { sum: Sum::Exact, bits: Bits::B32, auto: false, nonfinite: NonFinite::Stop },
        parallel: Parallel { shard, buddies },
        checkpoint: plan::Checkpoint { to: String::new(), every: 0, keep: 1, keep_every: 0, memory: 1 << 20 },
        elastic: plan::Elastic { min_workers: 1, max_workers: 8, timeout: Duration::from_secs(10), audit: 0 },
    }
}

/// Buckets of so many chunks of 4,096.
fn outline(chunks: &[usize]) -> Outline {
    let space = Space::of_lengths(&chunks.iter().map(|chunks| chunks * 4096).collect::<Vec<_>>());
    let activations = Some(vec![Activations { kept: 1000, output: 100 }; chunks.len()]);
    Outline { space, tokens_per_sample: 8, activations }
}

fn line(estimate: &Estimate, what: &str) -> u64 {
    estimate.memory.iter().filter(|line| line.what == what).map(|line| line.bytes).sum()
}

#[test]
fn undivided_state_is_the_same_for_any_number_of_workers() {
    let outline = outline(&[2, 2]);
    for workers in [1, 4] {
        let estimate = Estimate::new(&outline, &plan(Shard::None, true), workers);
        let n = 4 * 4096;
        // Of the state and on the device; two moments; decoded, and twice the largest block's.
        assert_eq!(estimate.bytes(Kind::Parameters), 8 * n);
        assert_eq!(estimate.bytes(Kind::Optimizer), 8 * n);
        assert_eq!(estimate.bytes(Kind::Gradients), 4 * n + 2 * 4 * n / 2);
        // Both samples of both blocks.
        assert_eq!(estimate.bytes(Kind::Activations), 2 * 2 * 1100);
        assert_eq!(line(&estimate, "sums, as they leave") + line(&estimate, "sums, as they arrive"), 8 * n);
        assert_eq!(line(&estimate, "bounds of sums"), 8 * n / 256);
        assert_eq!(estimate.checkpoint_bytes, 12 * n + 2 * n / 256);
        // With a gradient, and a block as it is drawn.
        assert_eq!(estimate.start_bytes, PROGRAM + 16 * n + 8 * n / 2);
    }
}

#[test]
fn divided_state_is_a_part_and_a_copy() {
    let (outline, n) = (outline(&[4, 4]), 8 * 4096);
    let with = Estimate::new(&outline, &plan(Shard::Optimizer, true), 4);
    assert_eq!(line(&with, "own first and second moments"), 8 * n / 4);
    assert_eq!(line(&with, "copy of another worker's shard"), 12 * n / 4);
    assert_eq!(with.bytes(Kind::Parameters), n + 4 * n + 4 * n);
    let without = Estimate::new(&outline, &plan(Shard::Optimizer, false), 4);
    assert_eq!(without.bytes(Kind::Optimizer), 8 * n / 4);
    assert_eq!(with.memory_bytes - without.memory_bytes, (12 + 4) * n / 4 + 4 * 4 * n / 8);
    let start = |estimate: &Estimate| estimate.start_bytes - PROGRAM;
    assert_eq!((start(&with), start(&without)), ((2 * 16 + 16) * n / 4, (16 + 16) * n / 4));
    // Of all parameters there are the block that is computed, and the one that comes.
    let full = Estimate::new(&outline, &plan(Shard::Full, false), 4);
    assert_eq!(full.bytes(Kind::Parameters), n + 4 * n / 2 + 4 * n / 2);
    assert_eq!(line(&full, "own sums"), 4 * n / 4);
    assert_eq!(full.bytes(Kind::Activations), 2 * (2 * 100 + 1000));
}

#[test]
fn what_is_sent_is_a_rings() {
    let (outline, n) = (outline(&[4, 4]), 8 * 4096);
    let wire = |shard, bits| {
        let mut plan = plan(shard, true);
        plan.reduce.bits = bits;
        Estimate::new(&outline, &plan, 4).wire
    };
    let none = wire(Shard::None, Bits::B32);
    assert_eq!((none.sums, none.bounds), (2 * 4 * n * 3 / 4, 2 * 4 * n / 256 * 3 / 4));
    assert_eq!((none.parameters, none.copies), (0, 0));
    assert_eq!(wire(Shard::None, Bits::B8).sums * 4, none.sums);
    let optimizer = wire(Shard::Optimizer, Bits::B32);
    assert_eq!((optimizer.parameters, optimizer.sums), (4 * n * 3 / 4, 4 * n * 3 / 4));
    assert_eq!(optimizer.copies, 4 * n / 4);
    // Six micro-batches are two rounds; the last block is gathered once in each.
    let full = wire(Shard::Full, Bits::B32);
    assert_eq!(full.parameters, 2 * (4 * n + 2 * n) * 3 / 4);
    assert_eq!(full.sums, 2 * 4 * n * 3 / 4);
    let alone = Estimate::new(&outline, &plan(Shard::Full, true), 1);
    assert_eq!(alone.wire.total(), 0);
}

#[test]
fn times_follow_from_rates() {
    let outline = outline(&[4, 4]);
    for (shard, passes) in [(Shard::None, 6.0), (Shard::Full, 8.0)] {
        let estimate = Estimate::new(&outline, &plan(shard, true), 4);
        // Two micro-batches of two samples of 8 tokens.
        assert_eq!(estimate.flops, passes * 8.0 * 4096.0 * 32.0);
        let rates =
            Rates { flops: Some(estimate.flops), link: Some(estimate.wire.total() as f64), store: None };
        let times = Times::new(&estimate, shard, &rates);
        assert_eq!((times.compute, times.exchange, times.checkpoint), (Some(1.0), Some(1.0), None));
        let (hidden, step) = (times.hidden.unwrap(), times.step.unwrap());
        assert!(hidden > 0.0 && hidden < 1.0 && (step - (2.0 - hidden)).abs() < 1e-9, "{times:?}");
        assert_eq!(Times::new(&estimate, shard, &Rates::default()), Times::default());
    }
}

#[test]
fn the_way_out_fits_and_the_plan_did_not() {
    let outline = outline(&[8; 16]);
    let plan = plan(Shard::None, true);
    let whole = Estimate::new(&outline, &plan, 2).peak_bytes();
    assert_eq!(way(&outline, &plan, 2, whole).map(|way| (way.shard, way.workers)), Some((Shard::None, 2)));
    let limit = PROGRAM + (whole - PROGRAM) * 9 / 10;
    let way_out = way(&outline, &plan, 2, limit).unwrap();
    let parallel = Parallel { shard: way_out.shard, buddies: way_out.buddies };
    let other = Plan { parallel, batch: Batch { micro: way_out.micro, ..plan.batch }, ..plan.clone() };
    assert_eq!(Estimate::new(&outline, &other, way_out.workers).peak_bytes(), way_out.bytes);
    assert!(way_out.bytes <= limit && way_out.bytes < whole);
    // Nobody does without three blocks' parameters.
    assert_eq!(way(&outline, &plan, 2, PROGRAM + 3 * 4 * 8 * 4096), None);
}

#[test]
fn what_is_divided_shrinks_with_the_number_of_workers() {
    let outline = outline(&[64; 8]);
    let bytes = |shard, workers| Estimate::new(&outline, &plan(shard, true), workers).bytes(Kind::Optimizer);
    for shard in [Shard::Optimizer, Shard::Full] {
        assert_eq!(bytes(shard, 16) * 8, bytes(shard, 2));
    }
    assert_eq!(bytes(Shard::None, 16), bytes(Shard::None, 2));
}

proptest! {
    #[test]
    fn more_workers_never_need_more_but_for_whole_chunks(
        chunks in proptest::collection::vec(1usize..400, 1..9),
        workers in 1u32..40,
        buddies: bool,
    ) {
        let outline = outline(&chunks);
        // A rank's part of each bucket is whole chunks: two more, or fewer, than an even share.
        let slack = 2 * chunks.len() as u64 * 4096;
        // A second copy is there from two workers on.
        let workers = workers.max(2);
        for shard in SHARDS {
            let of = |workers| Estimate::new(&outline, &plan(shard, buddies), workers);
            let (few, many) = (of(workers), of(2 * workers));
            // No line has more than 12 bytes of an element, and fewer than 12 lines are divided.
            let most = few.memory_bytes + 12 * 12 * slack;
            prop_assert!(many.memory_bytes <= most, "{:?}: {:?}, then {:?}", shard, few, many);
            let even = outline.space.len() as u64 / u64::from(workers);
            let held = [("own first and second moments", 8), ("copy of another worker's shard", 12)];
            for (what, width) in held {
                let share = if shard == Shard::None { outline.space.len() as u64 } else { even + slack };
                prop_assert!(line(&few, what) <= width * share, "{:?}: {} of {:?}", shard, what, few);
            }
        }
    }
}
