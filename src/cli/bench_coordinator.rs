//! `mattock bench coordinator` and `mattock bench fleet`: what the control plane takes.

use std::io::Write;
use std::num::NonZeroU32;
use std::time::Duration;

use clap::Args;

use crate::bench::{Crowd, CrowdSample, Fleet, FleetReport, measure_crowd, simulate};
use crate::exit::{Exit, Failure};

const MIB: f64 = 1024.0 * 1024.0;

pub(super) const FLEET_EXAMPLES: &str = "\
Interruptions come at the rate of Llama 3's training (419 unexpected ones in 54 days on 16,384 GPUs), unless told otherwise:
60% are processes that end, 30% hosts that fall silent, 10% devices that hang. Between them, while nothing but steps
happens, time is skipped: one such minute is simulated in full and stands for all. The network is not simulated.

Examples:
  mattock bench fleet
  mattock bench fleet --workers 16384 --days 7 --step 20 --seed 3 --json
";

/// Arguments of `mattock bench coordinator`.
#[derive(Debug, Args)]
pub struct CrowdArgs {
    /// Workers
    #[arg(long, value_name = "N", default_value = "1000", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub workers: u32,
    /// Workers of one client process
    #[arg(long, value_name = "N", default_value = "250")]
    pub each: NonZeroU32,
    /// How long it is measured
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// The recipe's timeout; pulses come eight times in it
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=600))]
    pub timeout: u64,
    /// From one step to the next
    #[arg(long, value_name = "MILLISECONDS", default_value = "5000", value_parser = clap::value_parser!(u64).range(10..))]
    pub step: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `mattock bench fleet`.
#[derive(Debug, Args)]
pub struct FleetArgs {
    /// Workers
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u32).range(2..=100_000))]
    pub workers: u32,
    /// Days on the wall clock
    #[arg(long, value_name = "DAYS", default_value = "54")]
    pub days: f64,
    /// Interruptions in 54 days on 16,384 workers
    #[arg(long, value_name = "N", default_value = "419")]
    pub interruptions: f64,
    /// Draws when, who and how
    #[arg(long, value_name = "SEED", default_value = "1")]
    pub seed: u64,
    /// The recipe's timeout
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=600))]
    pub timeout: u64,
    /// A step of the whole fleet
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub step: u64,
    /// Micro-batches of each worker in a step
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub share: u32,
    /// From a loss until another worker joins in its place
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    pub replace: u64,
    /// How long it takes to give the state to one who joins, while all wait
    #[arg(long, value_name = "SECONDS", default_value = "20")]
    pub transfer: u64,
    /// The longest that a worker takes to link up with its neighbours
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u64).range(1..))]
    pub link: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl CrowdArgs {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<Exit, Failure> {
        let crowd = Crowd {
            workers: NonZeroU32::new(self.workers).unwrap_or(NonZeroU32::MIN),
            each: self.each,
            window: Duration::from_secs(self.seconds),
            timeout: Duration::from_secs(self.timeout),
            step: Duration::from_millis(self.step),
        };
        let sample = measure_crowd(&crowd).map_err(Failure::run)?;
        let text = if self.json { json(&sample)? } else { text(&sample) };
        writeln!(out, "{text}").map_err(Failure::internal)?;
        Ok(Exit::Done)
    }
}

impl FleetArgs {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<Exit, Failure> {
        if !(0.001..=10_000.0).contains(&self.days) || !(0.0..=1e9).contains(&self.interruptions) {
            let problem = "--days must be 0.001 to 10000, and --interruptions 0 to 1000000000";
            return Err(Failure::bad_input(anyhow::anyhow!(problem)));
        }
        let fleet = Fleet {
            workers: self.workers,
            days: self.days,
            rate: self.interruptions.max(1e-9) / (54.0 * 16_384.0),
            seed: self.seed,
            timeout: Duration::from_secs(self.timeout),
            step: Duration::from_secs(self.step),
            share: self.share,
            replace: Duration::from_secs(self.replace),
            transfer: Duration::from_secs(self.transfer),
            link: Duration::from_secs(self.link),
        };
        let report: FleetReport = simulate(&fleet)
            .map_err(|error| Failure::run(anyhow::anyhow!("the simulated run fails: {error}")))?;
        let text = if self.json { json(&report)? } else { report.to_string().trim_end().to_owned() };
        writeln!(out, "{text}").map_err(Failure::internal)?;
        Ok(Exit::Done)
    }
}

fn json(what: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string(what).map_err(Failure::internal)
}

fn text(sample: &CrowdSample) -> String {
    format!(
        "{} workers, all in one ring after {:.1} s: {:.0} messages and {:.2} steps a second; the coordinator takes {:.1}% of a \
         core, {:.0} MiB ({:.0} MiB at most)",
        sample.workers,
        sample.gathered_seconds,
        sample.messages_per_second,
        sample.steps_per_second,
        100.0 * sample.cpu,
        sample.resident_bytes as f64 / MIB,
        sample.peak_bytes as f64 / MIB
    )
}
