//! One rank of a measurement.

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use mattock_collectives::{
    Buffer, Generation, Group, GroupConfig, Identity, Node, NodeConfig, Rank, Reduction, Ring, RingSpec,
    SaturatingSum, Sum, WorldSize, copy_past_caches,
};
use mattock_coordinator::WorkerId;

use super::{Assignment, Operation, Sample};
use crate::exit::Failure;
use crate::launch;

/// One measurement repeats the operation for about this long.
const RUN_SECONDS: f64 = 0.05;
/// Repetitions are no more than this.
const REPEATS_MAX: f64 = 5000.0;
/// Values of the inputs repeat after so many elements.
const PERIOD: usize = 97;
/// Elements that share a bound.
const BLOCK: usize = 256;

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
        let sample =
            measure(&group, assignment.work.operation, bytes, assignment.work.runs).inspect_err(|_| {
                let history: String = group.history().iter().map(|record| format!("  {record}\n")).collect();
                eprint!("{history}");
            })?;
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
    let nonsense = |error: String| anyhow!(error);
    let transport = assignment.transport.parse().map_err(nonsense)?;
    let congestion = assignment.congestion.parse().map_err(nonsense)?;
    let group = GroupConfig { timeout: Duration::from_secs(assignment.timeout_s), ..GroupConfig::default() };
    Ok(Node::start(NodeConfig {
        group,
        transport,
        congestion,
        ..NodeConfig::new(identity, SocketAddr::new(*bind, 0))
    })?)
}

fn spec(assignment: &Assignment, addresses: &[SocketAddr]) -> anyhow::Result<RingSpec> {
    let world = WorldSize::new(assignment.ranks).context("a group has members")?;
    let ring = Ring::new(Rank(assignment.rank), world, Generation(0)).context("a rank is within its ring")?;
    let name = |rank: Rank| WorkerId(rank.0.into()).dns_name();
    let next = *addresses.get(ring.next().0 as usize).context("an address is missing")?;
    Ok(RingSpec { ring, next: (next, name(ring.next())), prev: name(ring.prev()) })
}

/// Measures one payload on all ranks.
fn measure(group: &Group, operation: Operation, bytes: u64, runs: u32) -> anyhow::Result<Sample> {
    let (ranks, rank) = (group.ring().world_size().get(), group.ring().rank().0);
    let count = bytes as usize / size_of::<f32>();
    let (seconds, errors) = match operation {
        Operation::F32 => {
            let mut floats = Summing::<Sum<f32>>::new(group, count, |i| element(i, rank) as f32);
            let seconds = slowest(group, runs, || floats.reduce(group))?;
            (seconds, wrong(&floats.output, |i| expected(i, ranks) as f32))
        }
        Operation::Exact => {
            let mut integers = Summing::<Sum<i32>>::new(group, count, |i| element(i, rank) as i32);
            let mut bounds =
                Summing::<SaturatingSum>::new(group, count.div_ceil(BLOCK), |i| element(i, rank));
            let both = || integers.reduce(group).and_then(|()| bounds.reduce(group));
            let seconds = slowest(group, runs, both)?;
            let errors = wrong(&integers.output, |i| expected(i, ranks) as i32);
            (seconds, errors + wrong(&bounds.output, |i| expected(i, ranks)))
        }
        Operation::Copy => {
            let (input, mut output) = (vec![1u8; bytes as usize], vec![0u8; bytes as usize]);
            let copy = || {
                copy_past_caches(std::hint::black_box(&input), &mut output);
                Ok(())
            };
            let seconds = slowest(group, runs, copy)?;
            (seconds, wrong(&output, |_| 1))
        }
    };
    let errors = group.all_reduce_now::<SaturatingSum>(Arc::new(vec![errors].into()), Buffer::default())?[0];
    let algbw = bytes as f64 / seconds / 1e9;
    let (transport, algorithm) = match operation {
        Operation::Copy => ("none".into(), "copy".into()),
        _ => (group.transport().to_string(), group.algorithm(bytes as usize).into()),
    };
    Ok(Sample {
        bytes,
        count: count as u64,
        element: operation.element().into(),
        time_us: seconds * 1e6,
        algbw,
        busbw: algbw * 2.0 * f64::from(ranks - 1) / f64::from(ranks),
        errors: errors.into(),
        transport,
        algorithm,
        ranks,
        runs,
    })
}

/// An all-reduce that is repeated.
struct Summing<R: Reduction> {
    input: Arc<Buffer<R::Element>>,
    output: Buffer<R::Element>,
}

impl<R: Reduction> Summing<R> {
    fn new(group: &Group, count: usize, value: impl Fn(usize) -> R::Element) -> Self {
        let mut input = group.buffer(count);
        input.iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
        Self { input: Arc::new(input), output: group.buffer(count) }
    }

    fn reduce(&mut self, group: &Group) -> anyhow::Result<()> {
        let output = std::mem::take(&mut self.output);
        self.output = group.all_reduce_now::<R>(Arc::clone(&self.input), output)?;
        Ok(())
    }
}

/// Seconds that the slowest rank takes for the work: the median over runs.
fn slowest(group: &Group, runs: u32, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    // Once to warm up, then to see how long it takes.
    timed(group, 1, &mut work)?;
    let first = timed(group, 1, &mut work)?;
    let repeats = (RUN_SECONDS / first).clamp(1.0, REPEATS_MAX).ceil() as u32;
    let mut seconds =
        (0..runs).map(|_| timed(group, repeats, &mut work)).collect::<anyhow::Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Seconds for one of several repetitions, as the slowest rank sees it.
fn timed(group: &Group, repeats: u32, work: &mut impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    group.barrier_now()?;
    let start = Instant::now();
    (0..repeats).try_for_each(|_| work())?;
    let own = start.elapsed().as_secs_f64() / f64::from(repeats);
    let ranks = group.ring().world_size().get() as usize;
    let all = group.all_gather::<f64>(Arc::new(vec![own].into()), ranks, Buffer::default()).wait()?;
    Ok(all.iter().copied().fold(0.0, f64::max))
}

/// A rank's element: small enough for sums to be exact in f32.
fn element(i: usize, rank: u32) -> u32 {
    (i % PERIOD) as u32 + rank
}

/// The sum of all ranks' elements.
fn expected(i: usize, ranks: u32) -> u32 {
    element(i, 0) * ranks + ranks * (ranks - 1) / 2
}

/// Elements that are not what they must be.
fn wrong<E: PartialEq + Copy>(output: &[E], expected: impl Fn(usize) -> E) -> u32 {
    output.iter().enumerate().filter(|&(i, &x)| x != expected(i)).count() as u32
}
