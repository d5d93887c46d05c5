//! Collectives between processes, measured and verified.
//!
//! ```text
//!   this process                      N times `mattock bench rank`
//!   identity, work  -- stdin line -->  binds
//!        <-- stdout line, its address --
//!   all addresses   -- stdin line -->  joins, measures
//!        <-- rank 0: a line a sample --
//! ```
//!
//! Where links are to be measured, every rank writes a line a round, and waits for one before the next.

mod crowd;
mod data;
mod fleet;
mod links;
mod pair;
mod rank;
mod tournament;
mod work;

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow};
use mattock_collectives::{Congestion, Shape, TransportChoice};
use mattock_coordinator::WorkerId;
use mattock_coordinator::identity::{Authority, Request};
use serde::{Deserialize, Serialize};

use crate::exit::Failure;

pub(crate) use crowd::{Crowd, CrowdSample, measure_crowd, serve_crowd};
pub(crate) use data::{DataWork, measure_data};
pub(crate) use fleet::{Fleet, Report as FleetReport, simulate};
pub(crate) use links::survey;
pub(crate) use rank::serve_rank;

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Work {
    /// What is repeated.
    pub(crate) operation: Operation,
    /// Payloads in bytes.
    pub(crate) sizes: Vec<u64>,
    /// Measurements of each.
    pub(crate) runs: u32,
    /// Whether results replace inputs.
    pub(crate) in_place: bool,
}

/// What is repeated and timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Sums of f32 over all ranks
    F32,
    /// Means of f32 over all ranks
    Mean,
    /// The trainer's exact sums: i32, and a bound for every 256 elements
    Exact,
    /// No exchange: every rank copies its input, as fast as memory allows
    Copy,
    /// Each rank receives its part of the sum
    #[value(skip)]
    ReduceScatter,
    /// Everybody receives everybody's part
    #[value(skip)]
    AllGather,
    /// Everybody receives rank 0's input
    #[value(skip)]
    Broadcast,
    /// Rank 0 receives the sum
    #[value(skip)]
    Reduce,
    /// Rank 0 receives everybody's part
    #[value(skip)]
    Gather,
    /// Each rank receives its part of rank 0's input
    #[value(skip)]
    Scatter,
    /// Each rank receives its part of everybody's input
    #[value(skip)]
    AllToAll,
    /// Each rank sends a message to the next one, and receives that of the one before
    #[value(skip)]
    SendReceive,
}

impl Operation {
    /// Whether it is an all-reduce of so many bytes, and nothing beside.
    pub(crate) fn reduces_for_all(self) -> bool {
        matches!(self, Self::F32 | Self::Mean)
    }

    /// Of the elements.
    fn element(self) -> &'static str {
        match self {
            Self::Exact => "i32",
            _ => "f32",
        }
    }

    /// Elements of a payload of about so many bytes: parts for all ranks, where it is cut into parts.
    fn count(self, bytes: u64, ranks: u32) -> u64 {
        let (count, ranks) = (bytes / size_of::<f32>() as u64, u64::from(ranks));
        match self {
            Self::F32 | Self::Mean | Self::Exact | Self::Copy => count,
            Self::Broadcast | Self::Reduce | Self::SendReceive => count,
            _ => (count / ranks).max(1) * ranks,
        }
    }

    /// What of the payload crosses a rank's link, as nccl-tests count it.
    fn bus_factor(self, ranks: u32) -> f64 {
        let others = f64::from(ranks - 1) / f64::from(ranks);
        match self {
            Self::F32 | Self::Mean | Self::Exact => 2.0 * others,
            Self::Copy | Self::Broadcast | Self::Reduce | Self::SendReceive => 1.0,
            Self::ReduceScatter | Self::AllGather | Self::Gather | Self::Scatter | Self::AllToAll => others,
        }
    }
}

/// What ranks are started for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Task {
    /// To measure an operation.
    Operation(Work),
    /// To measure the links between them.
    Links {
        /// By payloads that take at least so long.
        long_enough: Duration,
    },
}

/// Where and how ranks are started.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    /// Processes.
    pub(crate) ranks: u32,
    /// What carries the bytes.
    pub(crate) transport: TransportChoice,
    /// How fast to send between hosts.
    pub(crate) congestion: Congestion,
    /// Each rank's place, by rank.
    pub(crate) places: Vec<u32>,
    /// So many places are on one host, for which `{}` stands below, counted from 1.
    pub(crate) per_host: u32,
    /// How the ranks are arranged.
    pub(crate) shape: Shape,
    /// The command before the program's own.
    pub(crate) via: Option<String>,
    /// Where ranks listen.
    pub(crate) bind: String,
    /// How long nothing may move.
    pub(crate) timeout: Duration,
}

/// One payload's measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Payload.
    pub(crate) bytes: u64,
    /// Elements.
    pub(crate) count: u64,
    /// Of the elements.
    #[serde(rename = "type")]
    pub(crate) element: String,
    /// Median over runs of the slowest rank's time for one operation.
    pub(crate) time_us: f64,
    /// What the links were predicted to need for it, where they were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) predicted_us: Option<f64>,
    /// Payload over time.
    #[serde(rename = "algbw_GBps")]
    pub(crate) algbw: f64,
    /// Bytes that each rank has to send over time: what the links carry.
    #[serde(rename = "busbw_GBps")]
    pub(crate) busbw: f64,
    /// Elements of the result, over all ranks, that are wrong.
    pub(crate) errors: u64,
    /// What carried the bytes.
    pub(crate) transport: String,
    /// How they were reduced.
    pub(crate) algorithm: String,
    /// Processes.
    pub(crate) ranks: u32,
    /// Measurements.
    pub(crate) runs: u32,
    /// Whether the results replaced the inputs.
    pub(crate) in_place: bool,
}

impl Sample {
    /// Above the columns.
    pub(crate) const HEADING: &'static str = "     bytes        count  type      time us  predicted us  algbw GB/s  busbw GB/s  errors  transport      algorithm";

    /// As one line.
    pub(crate) fn json(&self) -> io::Result<String> {
        Ok(serde_json::to_string(self)?)
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, count, element, time_us, algbw, busbw, errors, transport, algorithm, .. } = self;
        let predicted = self.predicted_us.map_or_else(|| "-".into(), |us| format!("{us:.2}"));
        write!(
            f,
            "{bytes:>10} {count:>12}  {element:<5} {time_us:>11.2} {predicted:>13} {algbw:>11.3} {busbw:>11.3} {errors:>7}"
        )?;
        write!(f, "  {transport:<13}  {algorithm}")
    }
}

/// A rank's first line.
#[derive(Debug, Serialize, Deserialize)]
struct Assignment {
    rank: u32,
    ranks: u32,
    certificate: Vec<u8>,
    key: Vec<u8>,
    authority: Vec<u8>,
    bind: IpAddr,
    transport: String,
    congestion: String,
    is_line: bool,
    timeout_s: u64,
    task: Task,
}

/// Measures an operation; `sink` receives a sample for each payload.
///
/// # Errors
/// Bad input where an address is none; a failed run where a rank fails.
pub(crate) fn measure(
    launch: &Launch,
    work: &Work,
    mut sink: impl FnMut(&Sample) -> io::Result<()>,
) -> Result<(), Failure> {
    let mut ranks = launch.start(&Task::Operation(work.clone()))?;
    let outcome = ranks.run(&mut sink);
    ranks.end(outcome)
}

impl Launch {
    fn start(&self, task: &Task) -> Result<Ranks, Failure> {
        let authority = Authority::new("bench").map_err(Failure::internal)?;
        let mut ranks = Ranks(Vec::new());
        for rank in 0..self.ranks {
            let assignment = self.assignment(&authority, rank, task)?;
            ranks.0.push(RankProcess::start(self.command(rank)?, &assignment).map_err(Failure::run)?);
        }
        Ok(ranks)
    }

    fn assignment(&self, authority: &Authority, rank: u32, task: &Task) -> Result<Assignment, Failure> {
        let (worker, request) = (WorkerId(rank.into()), Request::new().map_err(Failure::internal)?);
        let certificate = authority.sign(worker, request.der()).map_err(Failure::internal)?;
        let identity = request.into_identity(worker, certificate, authority.certificate().to_vec());
        let bind = self.numbered(&self.bind, rank);
        let bind = bind.parse().map_err(|error| Failure::bad_input(anyhow!("--bind {bind}: {error}")))?;
        Ok(Assignment {
            rank,
            ranks: self.ranks,
            certificate: identity.certificate,
            key: identity.key,
            authority: identity.authority,
            bind,
            transport: self.transport.to_string(),
            congestion: self.congestion.to_string(),
            is_line: self.shape == Shape::Line,
            timeout_s: self.timeout.as_secs(),
            task: task.clone(),
        })
    }

    fn command(&self, rank: u32) -> Result<Command, Failure> {
        let program = std::env::current_exe().map_err(Failure::internal)?;
        let via = self.via.as_ref().map(|via| self.numbered(via, rank)).unwrap_or_default();
        let mut words = via.split_whitespace();
        let mut command = match words.next() {
            None => Command::new(program),
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(program);
                command
            }
        };
        command.args(["bench", "rank"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        Ok(command)
    }

    fn numbered(&self, template: &str, rank: u32) -> String {
        let place = self.places.get(rank as usize).copied().unwrap_or(rank);
        template.replace("{}", &(place / self.per_host + 1).to_string())
    }
}

/// All ranks; killed where they are let go of.
struct Ranks(Vec<RankProcess>);

struct RankProcess {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl RankProcess {
    fn start(mut command: Command, assignment: &Assignment) -> anyhow::Result<Self> {
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let lines = BufReader::new(child.stdout.take().context("a rank has no standard output")?);
        let mut rank = Self { child, lines };
        rank.tell(&serde_json::to_string(assignment)?)?;
        Ok(rank)
    }

    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.child.stdin.as_mut().context("a rank has no standard input")?;
        writeln!(stdin, "{line}").context("a rank has ended")
    }

    /// `None` at the end.
    fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        Ok((self.lines.read_line(&mut line)? > 0).then_some(line))
    }
}

impl Ranks {
    /// Hears where all listen, and tells all.
    fn introduce(&mut self) -> anyhow::Result<()> {
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for rank in &mut self.0 {
            let line = rank.line()?.context("a rank has ended before it listened")?;
            addresses.push(serde_json::from_str(&line)?);
        }
        let addresses = serde_json::to_string(&addresses)?;
        self.0.iter_mut().try_for_each(|rank| rank.tell(&addresses))
    }

    fn run(&mut self, sink: &mut impl FnMut(&Sample) -> io::Result<()>) -> anyhow::Result<()> {
        self.introduce()?;
        while let Some(line) = self.0[0].line()? {
            sink(&serde_json::from_str(&line)?)?;
        }
        Ok(())
    }

    /// Waits for all, whose own words are on standard error.
    fn end<T>(mut self, outcome: anyhow::Result<T>) -> Result<T, Failure> {
        if outcome.is_err() {
            self.0.iter_mut().for_each(|rank| drop(rank.child.kill()));
        }
        let mut failed = Vec::new();
        for (number, rank) in self.0.iter_mut().enumerate() {
            let status = rank.child.wait().map_err(Failure::internal)?;
            if !status.success() {
                failed.push(format!("rank {number}: {status}"));
            }
        }
        let outcome = outcome.map_err(Failure::run)?;
        match failed.is_empty() {
            true => Ok(outcome),
            false => Err(Failure::run(anyhow!("ranks have failed: {}", failed.join(", ")))),
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.0 {
            // Who has ended already cannot be killed.
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}
