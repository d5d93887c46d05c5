//! A worker's memory, line by line, each with the place in the code that allocates it.

use std::collections::BTreeSet;

use mattock_exact::{BLOCK, packed_bytes};
use serde::Serialize;

use super::has_exponents;
use crate::params::Space;
use crate::partition::ShardMap;
use crate::plan::{Bits, Plan, Shard, Sum};
use crate::task::Outline;

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Parameters, wherever they lie.
    Parameters,
    /// Moments, and what a second copy of another's shard has.
    Optimizer,
    /// Gradients as floats.
    Gradients,
    /// What forward leaves for backward.
    Activations,
    /// Sums, and what travels.
    Buffers,
    /// What a worker takes that has no model to speak of.
    Program,
}

impl Kind {
    /// All of them, as they are shown.
    pub const ALL: [Self; 6] =
        [Self::Parameters, Self::Optimizer, Self::Gradients, Self::Activations, Self::Buffers, Self::Program];
}

/// A stretch of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What it is for.
    pub kind: Kind,
    /// What it holds, in words.
    pub what: &'static str,
    /// Whether it lies on the device, where that has memory of its own.
    pub on_device: bool,
    /// How much.
    pub bytes: u64,
}

const OWN: &str = "own parameters";
const MOMENTS: &str = "own first and second moments";
const COPY: &str = "copy of another worker's shard";
const GRADIENT: &str = "own gradient, decoded";
const COPIED_GRADIENT: &str = "another worker's gradient";

/// Measured by `scripts/bench-shard` on Linux: resident, with code. A device's driver has more.
pub(super) const PROGRAM: u64 = 48 << 20;

/// Sizes in elements, of one rank.
struct Sizes {
    all: u64,
    /// The rank's own part, and that of the rank whose copy it holds.
    own: u64,
    before: u64,
    /// The largest bucket, and the rank's largest part of one.
    bucket: u64,
    part: u64,
    /// Of all lengths that buckets have, the largest three together.
    lengths: u64,
    world: u64,
}

/// Where lines are written down.
struct Lines(Vec<Line>);

impl Lines {
    fn host(&mut self, kind: Kind, what: &'static str, bytes: u64) {
        self.push(Line { kind, what, on_device: false, bytes });
    }

    fn device(&mut self, kind: Kind, what: &'static str, bytes: u64) {
        self.push(Line { kind, what, on_device: true, bytes });
    }

    fn push(&mut self, line: Line) {
        if line.bytes > 0 {
            self.0.push(line);
        }
    }
}

/// What a rank has of the state, with gradients.
pub(super) fn state(lines: &[Line]) -> u64 {
    let held = [OWN, MOMENTS, COPY, GRADIENT, COPIED_GRADIENT];
    lines.iter().filter(|line| held.contains(&line.what)).map(|line| line.bytes).sum()
}

/// Elements of the largest block.
pub(super) fn largest(space: &Space) -> u64 {
    space.buckets().iter().map(|bucket| bucket.len() as u64).max().unwrap_or(0)
}

/// Of the rank that has most: its memory in a step, and how much it has at the end, while the last checkpoint is written and the
/// held-out loss measured.
pub(super) fn fullest(outline: &Outline, plan: &Plan, world: u32) -> (Vec<Line>, u64) {
    let buckets = outline.space.buckets();
    let map = ShardMap::new(buckets, world);
    let totals = map.totals();
    let divided = plan.parallel.shard != Shard::None;
    let bucket = largest(&outline.space);
    let lengths: BTreeSet<u64> = buckets.iter().map(|range| range.len() as u64).collect();
    let lengths = lengths.into_iter().rev().take(3).sum();
    let all = outline.space.len() as u64;
    let of_rank = |rank: u32| {
        if !divided {
            return Sizes { all, own: all, before: 0, bucket, part: bucket, lengths, world: world.into() };
        }
        let copies = plan.parallel.buddies && world > 1;
        let before = if copies { totals[((rank + world - 1) % world) as usize] as u64 } else { 0 };
        let part = map.parts(rank).iter().map(ExactSizeIterator::len).max().unwrap_or(0) as u64;
        Sizes { all, own: totals[rank as usize] as u64, before, bucket, part, lengths, world: world.into() }
    };
    // All ranks of undivided state are alike.
    let ranks = if divided { world } else { 1 };
    let of_rank = (0..ranks).map(of_rank).map(|sizes| (lines(&sizes, outline, plan), end(&sizes, plan)));
    of_rank.max_by_key(|(lines, _)| lines.iter().map(|line| line.bytes).sum::<u64>()).unwrap_or_default()
}

fn lines(sizes: &Sizes, outline: &Outline, plan: &Plan) -> Vec<Line> {
    let mut lines = Lines(Vec::new());
    parameters(&mut lines, sizes, plan.parallel.shard);
    gradients(&mut lines, sizes, plan.parallel.shard);
    activations(&mut lines, outline, plan);
    match (plan.parallel.shard, plan.reduce.sum) {
        (Shard::Full, _) => sums_of_rounds(&mut lines, sizes, plan.reduce.bits),
        (_, sum) => sums(&mut lines, sizes, sum, plan.reduce.bits),
    }
    exponents(&mut lines, sizes, plan);
    lines.host(Kind::Program, "code, threads and sockets", PROGRAM);
    if plan.checkpoint.every > 0 {
        checkpoint(&mut lines, sizes, plan);
    }
    lines.0
}

/// State, what the last checkpoint is written from beside it, and what evaluation needs: see `Trainer::rest`.
fn end(sizes: &Sizes, plan: &Plan) -> u64 {
    let &Sizes { all, own, before, bucket, world, .. } = sizes;
    let share = all.div_ceil(world);
    let (kept, copy, evaluated) = match plan.parallel.shard {
        Shard::None => {
            let mut lines = Lines(Vec::new());
            gradients(&mut lines, sizes, Shard::None);
            sums(&mut lines, sizes, plan.reduce.sum, plan.reduce.bits);
            (lines.0.iter().map(|line| line.bytes).sum(), 12 * share, 4 * all)
        }
        // Moments are lent to the writer; parameters are gathered in whole tensors.
        Shard::Optimizer => {
            let mut lines = Lines(Vec::new());
            sums(&mut lines, sizes, plan.reduce.sum, plan.reduce.bits);
            (lines.0.iter().map(|line| line.bytes).sum(), 4 * share, 8 * all)
        }
        Shard::Full => (0, 4 * share, 8 * bucket),
    };
    PROGRAM + 12 * (own + before) + kept + copy + evaluated + plan.checkpoint.memory.min(copy)
}

/// Parameters and moments.
fn parameters(lines: &mut Lines, sizes: &Sizes, shard: Shard) {
    let &Sizes { all, own, before, bucket, .. } = sizes;
    // `State::parameters`, `first` and `second` of `Trainer::state`.
    lines.host(Kind::Parameters, OWN, 4 * own);
    lines.host(Kind::Optimizer, MOMENTS, 8 * own);
    // `Copied::state` of `trainer/sharding.rs`.
    lines.host(Kind::Optimizer, COPY, 12 * before);
    match shard {
        // `attach` of `params/visit.rs`, for all of `Trainer::blocks`.
        Shard::None => lines.device(Kind::Parameters, "the model", 4 * all),
        Shard::Optimizer => {
            lines.device(Kind::Parameters, "the model", 4 * all);
            // `Sharding::replica`, and `Sharding::inputs`, from which it is gathered.
            lines.host(Kind::Parameters, "parameters, gathered", 4 * all);
            lines.host(Kind::Buffers, "own parameters, on their way", 4 * own);
        }
        Shard::Full => {
            // `Round::arrive` of `trainer/blocks.rs`: one block on the device, while the next one's come where its own came.
            lines.device(Kind::Parameters, "the block that is computed", 4 * bucket);
            lines.host(Kind::Parameters, "the next block, gathered", 4 * bucket);
            // `Gathers::begin`, twice: others may still read the one before.
            lines.host(Kind::Buffers, "own parameters, on their way", 2 * 4 * sizes.part);
        }
    }
}

fn gradients(lines: &mut Lines, sizes: &Sizes, shard: Shard) {
    // `Trainer::gradient`; `ShardSum::finish` decodes in the place of its sums.
    if shard != Shard::Full {
        lines.host(Kind::Gradients, GRADIENT, 4 * sizes.own);
    }
    // `Copied::gradient`, and two buckets that `Trainer::hand_on` sends and receives.
    lines.host(Kind::Gradients, COPIED_GRADIENT, 4 * sizes.before);
    if sizes.before > 0 {
        lines.host(Kind::Buffers, "gradients of two blocks, on their way", 4 * 4 * sizes.part);
    }
    // Burn's, until `collect_gradients` of `params/visit.rs` has them in `Trainer::scratch`: a graph is a block.
    lines.device(Kind::Gradients, "the largest block's", 4 * sizes.bucket);
    lines.host(Kind::Gradients, "the same, on the host", 4 * sizes.bucket);
}

fn activations(lines: &mut Lines, outline: &Outline, plan: &Plan) {
    let Some(blocks) = &outline.activations else { return };
    let outputs: u64 = blocks.iter().map(|block| block.output).sum();
    let kept = blocks.iter().map(|block| block.kept);
    let samples = u64::from(plan.batch.micro);
    // `gradients.rs` keeps every block's graph, or like `Kept::inputs` of `trainer/blocks.rs` just inputs, and one graph at a time.
    let (what, kept) = match plan.recompute || plan.parallel.shard == Shard::Full {
        true => ("inputs of all blocks, the rest of one", kept.max().unwrap_or(0)),
        false => ("of all blocks", kept.sum()),
    };
    lines.device(Kind::Activations, what, (outputs + kept) * samples);
}

/// Sums that leave once a step.
fn sums(lines: &mut Lines, sizes: &Sizes, sum: Sum, bits: Bits) {
    let &Sizes { all, own, .. } = sizes;
    let bounds = 8 * all / BLOCK as u64;
    let packed = |elements: u64| packed_bytes(elements as usize, bits) as u64;
    match sum {
        Sum::Exact => {
            // `Tally::bounds` of `exact/src/accumulator.rs`.
            lines.host(Kind::Buffers, "bounds of sums", bounds);
            // `Wire` of `sum/wire.rs`: the words are what travels, or are packed beside.
            if bits != Bits::B32 {
                lines.host(Kind::Buffers, "sums, in 32 bits", 4 * all);
            }
            // `Flight::input` and `output` of `sum/flight.rs`.
            lines.host(Kind::Buffers, "sums, as they leave", packed(all));
            lines.host(Kind::Buffers, "sums, as they arrive", packed(own));
        }
        Sum::Exact64 => {
            lines.host(Kind::Buffers, "bounds of sums", bounds);
            lines.host(Kind::Buffers, "sums, as they leave", 8 * all);
            lines.host(Kind::Buffers, "sums, as they arrive", 8 * own);
        }
        // `Bucket::sums` of `sum/plain.rs`, and its flight.
        Sum::F32 | Sum::Bf16 => {
            let width = if sum == Sum::F32 { 4 } else { 2 };
            lines.host(Kind::Buffers, "sums, as floats", 4 * all);
            lines.host(Kind::Buffers, "sums, as they leave", width * all);
            lines.host(Kind::Buffers, "sums, as they arrive", width * own);
        }
    }
}

/// Sums that leave with every micro-batch: `ShardSum` of `sum/sharded.rs`.
fn sums_of_rounds(lines: &mut Lines, sizes: &Sizes, bits: Bits) {
    let &Sizes { all, own, lengths, world, .. } = sizes;
    let packed = |elements: u64| packed_bytes(elements as usize, bits) as u64;
    // `ShardSum::sums` and `bounds`.
    lines.host(Kind::Buffers, "own sums", 4 * own);
    lines.host(Kind::Buffers, "bounds of sums", 8 * all / BLOCK as u64);
    // `UnderWay`, and `ShardSum::spare`: one of each length; links may hold on to one more for a moment.
    let words = if bits == Bits::B32 { 0 } else { 4 * lengths };
    lines.host(Kind::Buffers, "words of a block", words + packed(lengths) + 8 * lengths / BLOCK as u64);
    // Their `Flight::output`.
    lines.host(
        Kind::Buffers,
        "words, as they arrive",
        packed(lengths.div_ceil(world).next_multiple_of(BLOCK as u64)),
    );
}

/// `State::exponents` and `Trainer::exponents`.
fn exponents(lines: &mut Lines, sizes: &Sizes, plan: &Plan) {
    if has_exponents(plan) {
        lines.host(Kind::Buffers, "block exponents", 2 * 2 * sizes.all / BLOCK as u64);
    }
}

fn checkpoint(lines: &mut Lines, sizes: &Sizes, plan: &Plan) {
    let &Sizes { all, own, world, .. } = sizes;
    // The snapshot that `Saver::save` hands over, or the `Part` of `Trainer::part`; then what uploads hold.
    let copy = match plan.parallel.shard {
        Shard::None => 12 * all.div_ceil(world),
        Shard::Optimizer | Shard::Full => 4 * all.div_ceil(world) + 8 * own,
    };
    lines.host(Kind::Buffers, "copy of a checkpoint's share", copy);
    lines.host(Kind::Buffers, "uploads, at most", plan.checkpoint.memory.min(copy));
}
