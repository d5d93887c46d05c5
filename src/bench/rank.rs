//! One rank of a measurement.

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use mattock_collectives::{
    Buffer, Generation, Group, GroupConfig, Identity, Node, NodeConfig, Rank, Ring, RingSpec, SaturatingSum,
    Sum, WorldSize,
};
use mattock_coordinator::WorkerId;

use super::{Assignment, Sample};
use crate::exit::Failure;
use crate::launch;

/// One measurement repeats the operation for about this long.
const RUN_SECONDS: f64 = 0.05;
/// Repetitions are no more than this.
const REPEATS_MAX: f64 = 5000.0;
/// Values of the inputs repeat after so many elements; sums of them are exact in f32.
const PERIOD: usize = 97;

/// Runs `mattock bench rank`: what to do comes from standard input, results go to `out`.
///
/// # Errors
/// A failed run, whatever it is.
pub(crate) fn serve_rank(out: &mut impl Write) -> Result<(), Failure> {
    launch::die_with_parent().map_err(Failure::internal)?;
    serve(out).map_err(Failure::run)
}

fn serve(out: &mut impl Write) -> anyhow::Result<()> {
    let mut lines = io::stdin().lock().lines();
    let mut line = || lines.next().context("the parent has ended")?.context("cannot read standard input");
    let assignment: Assignment = serde_json::from_str(&line()?)?;
    let node = start(&assignment)?;
    writeln!(out, "{}", serde_json::to_string(&node.local_addr())?)?;
    out.flush()?;
    let addresses: Vec<SocketAddr> = serde_json::from_str(&line()?)?;
    let group = node.join_ring(spec(&assignment, &addresses)?)?;
    for &bytes in &assignment.work.sizes {
        let sample = measure(&group, bytes, assignment.work.runs)?;
        if assignment.rank == 0 {
            writeln!(out, "{}", sample.json())?;
            out.flush()?;
        }
    }
    group.barrier().wait()?;
    group.close();
    Ok(())
}

fn start(assignment: &Assignment) -> anyhow::Result<Node> {
    let Assignment { certificate, key, authority, bind, .. } = assignment;
    let identity = Identity {
        certificates: vec![certificate.clone()],
        private_key: key.clone(),
        root: authority.clone(),
    };
    let transport = assignment.transport.parse().map_err(|error| anyhow!("{error}"))?;
    let group = GroupConfig { timeout: Duration::from_secs(assignment.timeout_s), ..GroupConfig::default() };
    Ok(Node::start(NodeConfig { group, transport, ..NodeConfig::new(identity, SocketAddr::new(*bind, 0)) })?)
}

fn spec(assignment: &Assignment, addresses: &[SocketAddr]) -> anyhow::Result<RingSpec> {
    let world = WorldSize::new(assignment.ranks).context("a group has members")?;
    let ring = Ring::new(Rank(assignment.rank), world, Generation(0)).context("a rank is within its ring")?;
    let name = |rank: Rank| WorkerId(rank.0.into()).dns_name();
    let next = *addresses.get(ring.next().0 as usize).context("an address is missing")?;
    Ok(RingSpec { ring, next: (next, name(ring.next())), prev: name(ring.prev()) })
}

/// Measures one payload on all ranks.
fn measure(group: &Group, bytes: u64, runs: u32) -> anyhow::Result<Sample> {
    let (ranks, count) = (group.ring().world_size().get(), bytes as usize / size_of::<f32>());
    let mut input = group.buffer::<f32>(count);
    let rank = group.ring().rank().0;
    input.iter_mut().enumerate().for_each(|(i, x)| *x = ((i % PERIOD) as u32 + rank) as f32);
    let input = Arc::new(input);
    let mut output = group.buffer::<f32>(count);
    // Once to warm up, and to see what comes out; then to see how long it takes.
    output = group.all_reduce_now::<Sum<f32>>(Arc::clone(&input), output)?;
    let errors = wrong(&output, ranks);
    let (first, mut output) = timed(group, &input, output, 1)?;
    let repeats = (RUN_SECONDS / first).clamp(1.0, REPEATS_MAX).ceil() as u32;
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let (slowest, reduced) = timed(group, &input, output, repeats)?;
        output = reduced;
        seconds.push(slowest);
    }
    let errors = Arc::new(vec![errors + wrong(&output, ranks)].into());
    let errors = group.all_reduce_now::<SaturatingSum>(errors, Buffer::default())?[0];
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let algbw = bytes as f64 / median / 1e9;
    Ok(Sample {
        bytes,
        count: count as u64,
        element: "f32".into(),
        time_us: median * 1e6,
        algbw,
        busbw: algbw * 2.0 * f64::from(ranks - 1) / f64::from(ranks),
        errors: errors.into(),
        transport: group.transport().to_string(),
        algorithm: group.algorithm(bytes as usize).into(),
        ranks,
        runs,
    })
}

/// Seconds for one of several all-reduces, as the slowest rank sees it; and the result.
fn timed(
    group: &Group,
    input: &Arc<Buffer<f32>>,
    mut output: Buffer<f32>,
    repeats: u32,
) -> anyhow::Result<(f64, Buffer<f32>)> {
    group.barrier_now()?;
    let start = Instant::now();
    for _ in 0..repeats {
        output = group.all_reduce_now::<Sum<f32>>(Arc::clone(input), output)?;
    }
    let own = start.elapsed().as_secs_f64() / f64::from(repeats);
    let ranks = group.ring().world_size().get() as usize;
    let all = group.all_gather::<f64>(Arc::new(vec![own].into()), ranks, Buffer::default()).wait()?;
    Ok((all.iter().copied().fold(0.0, f64::max), output))
}

/// Elements that are not what they must be.
fn wrong(output: &[f32], ranks: u32) -> u32 {
    let offset = ranks * (ranks - 1) / 2;
    let expected = |i: usize| ((i % PERIOD) as u32 * ranks + offset) as f32;
    output.iter().enumerate().filter(|&(i, &x)| x != expected(i)).count() as u32
}
