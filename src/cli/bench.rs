//! `mattock bench`: how fast this machine, or these machines, reduce.

use std::io::Write;
use std::num::NonZeroU32;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use mattock_collectives::{Congestion, Shape, TransportChoice};
use mattock_data::Cutting;
use mattock_data::config::parse_size;

use super::bench_coordinator::{CrowdArgs, FLEET_EXAMPLES, FleetArgs};
use crate::bench::{self, DataWork, Launch, Operation, Sample, Work};
use crate::exit::{EXIT_CODES, Exit, Failure};

const EXAMPLES: &str = "\
Examples:
  mattock bench allreduce --ranks 2 --in-place
  mattock bench allreduce --ranks 4 --transport quic --min 1MiB --max 64MiB --json
  mattock bench allreduce --ranks 2 --via 'ip netns exec dt{}' --bind '10.99.0.{}'
";

const LINKS_EXAMPLES: &str = "\
Examples:
  mattock bench links --ranks 3 --via 'ssh host{}' --bind '10.0.0.{}'
  mattock bench allreduce --ranks 3 --via 'ssh host{}' --bind '10.0.0.{}' --order auto
";

const DATA_EXAMPLES: &str = "\
Examples:
  mattock bench data --to s3://bucket/bench
  mattock bench data --to /tmp/bench-data --size 4GiB --shard 16MiB
";

/// Another order must be predicted to be faster by this factor.
const WORTH_IT: f64 = 1.1;
/// Payloads that take so long say how fast a link is.
const LONG_ENOUGH: Duration = Duration::from_millis(200);

/// Measure collectives between processes
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub action: BenchAction,
}

/// What `mattock bench` measures.
#[derive(Debug, Subcommand)]
pub enum BenchAction {
    /// Sums over all ranks, verified
    #[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
    Allreduce(AllReduceArgs),
    /// Each rank receives its part of the sum
    #[command(after_help = EXIT_CODES)]
    Reducescatter(ReduceScatterArgs),
    /// Everybody receives everybody's part
    #[command(after_help = EXIT_CODES)]
    Allgather(RunArgs),
    /// Everybody receives rank 0's input
    #[command(after_help = EXIT_CODES)]
    Broadcast(RunArgs),
    /// Rank 0 receives the sum
    #[command(after_help = EXIT_CODES)]
    Reduce(RunArgs),
    /// Rank 0 receives everybody's part
    #[command(after_help = EXIT_CODES)]
    Gather(RunArgs),
    /// Each rank receives its part of rank 0's input
    #[command(after_help = EXIT_CODES)]
    Scatter(RunArgs),
    /// Each rank receives its part of everybody's input
    #[command(after_help = EXIT_CODES)]
    Alltoall(RunArgs),
    /// Each rank sends a message to the next one, and receives that of the one before
    #[command(after_help = EXIT_CODES)]
    Sendreceive(RunArgs),
    /// Latency and bandwidth between all ranks, and the order that suits them
    #[command(after_help = format!("{LINKS_EXAMPLES}\n{EXIT_CODES}"))]
    Links(LinksArgs),
    /// Make a dataset, publish it, and read it as training does, through a cache of a tenth of it
    #[command(after_help = format!("{DATA_EXAMPLES}\n{EXIT_CODES}"))]
    Data(DataBenchArgs),
    /// A real coordinator under many workers that only talk to it: its processor time and memory
    #[command(after_help = EXIT_CODES)]
    Coordinator(CrowdArgs),
    /// A fleet of thousands over weeks, simulated, with workers that are lost at random: goodput, and the coordinator's load
    #[command(after_help = format!("{FLEET_EXAMPLES}\n{EXIT_CODES}"))]
    Fleet(FleetArgs),
    /// Many workers that only talk: reads what to do from standard input
    #[command(hide = true)]
    Crowd,
    /// One rank: reads what to do from standard input
    #[command(hide = true)]
    Rank,
}

/// Arguments of `mattock bench allreduce`.
#[derive(Debug, Args)]
pub struct AllReduceArgs {
    /// What to sum
    #[arg(long, value_name = "SUM", default_value = "f32")]
    pub sum: Operation,
    /// Results replace inputs
    #[arg(long)]
    pub in_place: bool,
    /// How it is measured.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Arguments of `mattock bench reducescatter`.
#[derive(Debug, Args)]
pub struct ReduceScatterArgs {
    /// Results replace inputs
    #[arg(long)]
    pub in_place: bool,
    /// How it is measured.
    #[command(flatten)]
    pub run: RunArgs,
}

/// How an operation is measured.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Smallest payload
    #[arg(long, value_name = "SIZE", default_value = "4B", value_parser = parse_size)]
    pub min: u64,
    /// Largest payload
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_size)]
    pub max: u64,
    /// From one payload to the next
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u64).range(2..))]
    pub factor: u64,
    /// Measurements of each payload; their median counts
    #[arg(long, value_name = "N", default_value = "10", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Which rank is next to which: given, or auto, which measures all links first, crosses slow ones least, and predicts
    /// how long sums take
    #[arg(long, value_name = "ORDER", default_value = "given")]
    pub order: Order,
    /// Where and how ranks run.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// Print one JSON object per payload
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `mattock bench links`.
#[derive(Debug, Args)]
pub struct LinksArgs {
    /// Payload of the all-reduce to plan
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_size)]
    pub bytes: u64,
    /// How long a payload takes at least that says how fast a link is
    #[arg(long, value_name = "MILLISECONDS", default_value_t = LONG_ENOUGH.as_millis() as u64, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub probe: u64,
    /// Where and how ranks run.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Which rank is next to which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// By number
    Given,
    /// As is best for the links between them
    Auto,
}

/// Arguments of `mattock bench data`. The shape of samples and steps is the quickstart's, unless told otherwise.
#[derive(Debug, Args)]
pub struct DataBenchArgs {
    /// Where the set is published: a folder, file:// or s3://bucket/prefix; it is left there
    #[arg(long, value_name = "URL")]
    pub to: String,
    /// Size of the set
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub size: u64,
    /// Size of a shard
    #[arg(long, value_name = "SIZE", default_value = "4MiB", value_parser = parse_size)]
    pub shard: u64,
    /// Shards that are shuffled together
    #[arg(long, value_name = "SHARDS", default_value = "8")]
    pub window: u64,
    /// Tokens of a sample
    #[arg(long, value_name = "TOKENS", default_value = "128", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
    /// Samples of a step
    #[arg(long, value_name = "SAMPLES", default_value = "32")]
    pub batch: NonZeroU32,
    /// Samples of a micro-batch
    #[arg(long, value_name = "SAMPLES", default_value = "4")]
    pub micro: NonZeroU32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Where and how ranks run.
#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Processes to start
    #[arg(long, value_name = "N", default_value = "2")]
    pub ranks: NonZeroU32,
    /// What carries the bytes: auto (shared memory within hosts, QUIC between), quic or shm
    #[arg(long, value_name = "TRANSPORT", default_value = "auto")]
    pub transport: TransportChoice,
    /// Ranks on each host: {} below is then the host's number from 1, not the rank's
    #[arg(long, value_name = "N", default_value = "1")]
    pub per_host: NonZeroU32,
    /// How ranks are arranged: ring, or line, which leaves the link from the last to the first out of sums
    #[arg(long, value_name = "SHAPE", default_value = "ring", value_parser = shape)]
    pub shape: Shape,
    /// Starts each rank by this command, {} being its number from 1: 'ssh host{}', say
    #[arg(long, value_name = "COMMAND")]
    pub via: Option<String>,
    /// The address at which a rank listens, {} being its number from 1
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub bind: String,
    /// How fast to send between hosts: steady, bbr or cubic
    #[arg(long, value_name = "CONTROL", default_value_t)]
    pub congestion: Congestion,
    /// How long nothing may move
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
}

/// Runs `mattock bench`; `out` is standard output.
///
/// # Errors
/// Bad input where sizes or addresses make no sense; a failed run where a rank fails or a sum is wrong.
pub fn run(args: &BenchArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    match &args.action {
        BenchAction::Allreduce(AllReduceArgs { sum: Operation::Copy, in_place: true, .. }) => {
            Err(Failure::bad_input(anyhow::anyhow!("--sum copy has two buffers: leave --in-place out")))
        }
        BenchAction::Allreduce(args) => measure(&args.run, args.sum, args.in_place, out),
        BenchAction::Reducescatter(args) => measure(&args.run, Operation::ReduceScatter, args.in_place, out),
        BenchAction::Allgather(args) => measure(args, Operation::AllGather, false, out),
        BenchAction::Broadcast(args) => measure(args, Operation::Broadcast, false, out),
        BenchAction::Reduce(args) => measure(args, Operation::Reduce, false, out),
        BenchAction::Gather(args) => measure(args, Operation::Gather, false, out),
        BenchAction::Scatter(args) => measure(args, Operation::Scatter, false, out),
        BenchAction::Alltoall(args) => measure(args, Operation::AllToAll, false, out),
        BenchAction::Sendreceive(args) => measure(args, Operation::SendReceive, false, out),
        BenchAction::Links(args) => survey(args, out),
        BenchAction::Data(args) => stream(args, out),
        BenchAction::Coordinator(args) => args.run(out),
        BenchAction::Fleet(args) => args.run(out),
        BenchAction::Crowd => bench::serve_crowd(out).map(|()| Exit::Done).map_err(Failure::run),
        BenchAction::Rank => bench::serve_rank(out).map(|()| Exit::Done),
    }
}

fn measure(
    args: &RunArgs,
    operation: Operation,
    in_place: bool,
    out: &mut impl Write,
) -> Result<Exit, Failure> {
    let work = Work { operation, sizes: args.sizes()?, runs: args.runs, in_place };
    let mut launch = args.launch.launch();
    let mut survey = None;
    if args.order == Order::Auto && launch.ranks > 1 {
        let known = bench::survey(&launch, LONG_ENOUGH, args.max)?;
        let plan = &known.plan;
        let chosen = match launch.shape {
            Shape::Line => &plan.line,
            // What is less may be chance.
            Shape::Ring if plan.ring.seconds * WORTH_IT < plan.given.seconds => &plan.ring,
            Shape::Ring => &plan.given,
        };
        eprintln!("{plan}\nranks are numbered in the order of {chosen}");
        launch.places = chosen.order.iter().map(|rank| rank.0).collect();
        survey = Some((chosen.order.clone(), known));
    }
    let predicted_us = |sample: &Sample| {
        let shape =
            [Shape::Ring, Shape::Line].into_iter().find(|shape| shape.to_string() == sample.algorithm)?;
        let (order, known) = survey.as_ref().filter(|_| operation.reduces_for_all())?;
        known.predict_us(shape, order, sample.bytes)
    };
    let mut errors = 0;
    if !args.json {
        writeln!(out, "{}", Sample::HEADING).map_err(Failure::internal)?;
    }
    bench::measure(&launch, &work, |sample| {
        errors += sample.errors;
        let sample = Sample { predicted_us: predicted_us(sample), ..sample.clone() };
        match args.json {
            true => sample.json().and_then(|line| writeln!(out, "{line}")),
            false => writeln!(out, "{sample}"),
        }
        .and_then(|()| out.flush())
    })?;
    match errors {
        0 => Ok(Exit::Done),
        _ => Err(Failure::run(anyhow::anyhow!("{errors} elements of the results are wrong; this is a bug"))),
    }
}

fn survey(args: &LinksArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let long_enough = Duration::from_millis(args.probe);
    let survey = bench::survey(&args.launch.launch(), long_enough, args.bytes)?;
    match args.json {
        true => writeln!(out, "{}", survey.json()),
        false => writeln!(out, "{survey}"),
    }
    .map_err(Failure::internal)?;
    Ok(Exit::Done)
}

fn stream(args: &DataBenchArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let (size, micro) = (args.batch.get(), args.micro.get());
    if size % micro != 0 {
        let problem = anyhow::anyhow!("--batch {size} is no multiple of --micro {micro}");
        return Err(Failure::bad_input(problem));
    }
    let work = DataWork {
        url: args.to.clone(),
        bytes: args.size,
        cutting: Cutting { shard_bytes: args.shard, window: args.window },
        cache_bytes: args.size / 10,
        context: args.context as usize,
        size,
        micro,
    };
    let scratch = crate::cache::folder().join(format!("bench-{}", std::process::id()));
    let measured = bench::measure_data(&work, &scratch);
    // Of a failed measurement.
    let _ = std::fs::remove_dir_all(&scratch);
    let sample = measured.map_err(Failure::run)?;
    match args.json {
        true => writeln!(out, "{}", sample.json().map_err(Failure::internal)?),
        false => writeln!(out, "{sample}"),
    }
    .map_err(Failure::internal)?;
    Ok(Exit::Done)
}

fn shape(text: &str) -> Result<Shape, String> {
    let known = [Shape::Ring, Shape::Line].into_iter().find(|shape| shape.to_string() == text);
    known.ok_or_else(|| format!("'{text}' is no shape: ring and line are"))
}

impl LaunchArgs {
    /// Ranks at the places of their numbers.
    fn launch(&self) -> Launch {
        Launch {
            ranks: self.ranks.get(),
            transport: self.transport,
            congestion: self.congestion,
            places: (0..self.ranks.get()).collect(),
            per_host: self.per_host.get(),
            shape: self.shape,
            via: self.via.clone(),
            bind: self.bind.clone(),
            timeout: Duration::from_secs(self.timeout),
        }
    }
}

impl RunArgs {
    /// Payloads in bytes, whole elements.
    fn sizes(&self) -> Result<Vec<u64>, Failure> {
        let next = |size: &u64| size.checked_mul(self.factor).filter(|&next| next <= self.max);
        match self.min {
            0 => Err(Failure::bad_input(anyhow::anyhow!("--min 0 has no elements: 4B is the least"))),
            min if min % 4 != 0 => {
                Err(Failure::bad_input(anyhow::anyhow!("--min {min} is no multiple of an element's 4 bytes")))
            }
            min if min > self.max => {
                Err(Failure::bad_input(anyhow::anyhow!("--min {min} is above --max {}", self.max)))
            }
            min => Ok(std::iter::successors(Some(min), next).collect()),
        }
    }
}
