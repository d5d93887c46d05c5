//! `mattock plan`: what a run will need, before anything is spent.
//!
//! Nothing is trained, and as far as the task allows, no data is read: shapes say it all. A plan that does not fit is a result;
//! it is printed like any other, with what would fit.

use std::io::{self, Write};
use std::num::NonZeroU32;

use clap::Args;
use mattock_data::config::parse_size;
use mattock_worker::estimate::{Estimate, Kind, Rates, Times, Way, way};
use mattock_worker::plan::{Plan, Shard};
use mattock_worker::task::{Outline, Task};
use serde_json::json;

use super::parts::outline;
use super::recipe::RecipeFile;
use crate::exit::{EXIT_CODES, Exit, Failure};

const EXAMPLES: &str = "\
Examples:
  mattock plan configs/quickstart.toml --workers 4
  mattock plan configs/quickstart.toml --workers 4 --memory 64MiB
  mattock plan recipe.toml --workers 16 --memory 80GiB --link 100Gbit --flops 200T --store 1GB/s
  mattock plan recipe.toml --workers 16 --set parallel.shard=full --json

Where --memory is given and does not suffice, the plan ends with 2, as bad input does, and says what would fit.
Memory is of the host and the device together: on a CPU the two are one.
";

/// Say what a run will need of memory, links and time, and whether it fits, before anything is spent
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n{EXIT_CODES}"))]
pub struct PlanArgs {
    /// What would be trained.
    #[command(flatten)]
    pub recipe: RecipeFile,
    /// Workers in all
    #[arg(long, value_name = "N", default_value = "2")]
    pub workers: NonZeroU32,
    /// Memory of a worker, such as 80GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// What a worker sends in a second, such as 100Gbit or 2GB/s: gives the time of exchange
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub link: Option<f64>,
    /// Floating-point operations that a worker gets done in a second, such as 100T: gives the time of computation
    #[arg(long, value_name = "NUMBER", value_parser = parse_flops)]
    pub flops: Option<f64>,
    /// What a worker writes to storage in a second, such as 1GB/s: gives the time of a checkpoint
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub store: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Bytes a second, from bits (`100Gbit`) or bytes (`1GB`, `1GiB`), with or without `/s`.
fn parse_rate(text: &str) -> Result<f64, String> {
    let plain = text.strip_suffix("/s").unwrap_or(text);
    let units = [
        ("Tbit", 1.25e11),
        ("Gbit", 1.25e8),
        ("Mbit", 1.25e5),
        ("TiB", f64::from(1 << 20) * f64::from(1 << 20)),
        ("GiB", f64::from(1 << 30)),
        ("MiB", f64::from(1 << 20)),
        ("TB", 1e12),
        ("GB", 1e9),
        ("MB", 1e6),
    ];
    scaled(plain, &units).ok_or_else(|| format!("'{text}' is no rate: write 100Gbit, 500MB/s or 1GiB/s"))
}

fn parse_flops(text: &str) -> Result<f64, String> {
    let units = [("P", 1e15), ("T", 1e12), ("G", 1e9), ("", 1.0)];
    scaled(text, &units).ok_or_else(|| format!("'{text}' is no number of operations: write 500G, 100T or 1P"))
}

/// A number above 0 with one of these units.
fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    let value = number.trim_end().parse::<f64>().ok()? * unit;
    (value.is_finite() && value > 0.0).then_some(value)
}

/// Runs `mattock plan`; `out` is standard output.
///
/// # Errors
/// Bad input, where the recipe or what it names cannot be used.
pub fn run<T: Task>(args: &PlanArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let recipe = args.recipe.resolve()?;
    let shapes = outline::<T>(&recipe)?;
    let report = Report::new(args, &recipe.plan, &shapes);
    if args.json { report.json(out) } else { report.print(out) }.map_err(Failure::internal)?;
    Ok(if report.fits == Some(false) { Exit::BadInput } else { Exit::Done })
}

/// All that is printed.
struct Report<'a> {
    args: &'a PlanArgs,
    plan: &'a Plan,
    estimate: Estimate,
    times: Times,
    knows_activations: bool,
    /// Nothing where nobody has said how much memory there is.
    fits: Option<bool>,
    way: Option<Way>,
}

impl<'a> Report<'a> {
    fn new(args: &'a PlanArgs, plan: &'a Plan, shapes: &Outline) -> Self {
        let workers = args.workers.get();
        let estimate = Estimate::new(shapes, plan, workers);
        let rates = Rates { flops: args.flops, link: args.link, store: args.store };
        let fits = args.memory.map(|memory| estimate.peak_bytes() <= memory);
        let short = args.memory.filter(|_| fits == Some(false));
        Self {
            args,
            plan,
            times: Times::new(&estimate, plan.parallel.shard, &rates),
            estimate,
            knows_activations: shapes.activations.is_some(),
            fits,
            way: short.and_then(|memory| way(shapes, plan, workers, memory)),
        }
    }

    fn json(&self, out: &mut impl Write) -> io::Result<()> {
        let kinds: serde_json::Map<String, serde_json::Value> = Kind::ALL
            .into_iter()
            .map(|kind| (name(kind).to_owned(), self.estimate.bytes(kind).into()))
            .collect();
        let plan = json!({
            "name": self.plan.name,
            "shard": self.plan.parallel.shard,
            "buddies": self.plan.parallel.buddies,
            "estimate": self.estimate,
            "memory_by_kind": kinds,
            "activations_known": self.knows_activations,
            "peak_bytes": self.estimate.peak_bytes(),
            "wire_bytes": self.estimate.wire.total(),
            "seconds": self.times,
            "memory_limit": self.args.memory,
            "fits": self.fits,
            "would_fit": self.way,
        });
        writeln!(out, "{plan}")
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let (estimate, batch) = (&self.estimate, self.plan.batch);
        writeln!(
            out,
            "{}: {} parameters, {} on {} workers, {} micro-batches of {} a step",
            self.plan.name,
            estimate.parameters,
            divided(self.plan.parallel.shard, self.plan.parallel.buddies),
            estimate.workers,
            batch.micro_batches(),
            batch.micro,
        )?;
        self.print_memory(out)?;
        self.print_step(out)?;
        self.print_verdict(out)
    }

    fn print_memory(&self, out: &mut impl Write) -> io::Result<()> {
        let estimate = &self.estimate;
        writeln!(out, "\nmemory of a worker")?;
        for kind in Kind::ALL {
            if kind == Kind::Activations && !self.knows_activations {
                writeln!(out, "  {:<36} {:>11}   this task does not say", name(kind), "unknown")?;
                continue;
            }
            writeln!(out, "  {:<36} {:>11}", name(kind), size(estimate.bytes(kind)))?;
            for line in estimate.memory.iter().filter(|line| line.kind == kind) {
                let place = if line.on_device { ", on the device" } else { "" };
                writeln!(out, "    {:<34} {:>11}{place}", line.what, size(line.bytes))?;
            }
        }
        writeln!(out, "  {:<36} {:>11}", "in a step", size(estimate.memory_bytes))?;
        let at_the_end = "with the last checkpoint, and the held-out loss";
        writeln!(out, "  {:<36} {:>11}", "at the start", size(estimate.start_bytes))?;
        writeln!(out, "  {:<36} {:>11}   {at_the_end}", "at the end", size(estimate.end_bytes))
    }

    fn print_step(&self, out: &mut impl Write) -> io::Result<()> {
        let (estimate, times) = (&self.estimate, &self.times);
        let wire = &estimate.wire;
        writeln!(out, "\na step, of {} tokens", estimate.tokens_per_step)?;
        writeln!(out, "  {:<36} {:>11}", "sent by a worker", size(wire.total()))?;
        let parts = [
            ("parameters", wire.parameters),
            ("sums of gradients", wire.sums),
            ("bounds of sums", wire.bounds),
            ("gradients for copies", wire.copies),
        ];
        for (what, bytes) in parts.into_iter().filter(|(_, bytes)| *bytes > 0) {
            writeln!(out, "    {what:<34} {:>11}", size(bytes))?;
        }
        time(out, "computation", times.compute, "--flops 100T, what a worker gets done in a second")?;
        time(out, "exchange", times.exchange, "--link 100Gbit, what a worker sends in a second")?;
        if let (Some(hidden), Some(step)) = (times.hidden, times.step) {
            writeln!(out, "    {:<34} {:>11}", "hidden by computation, at best", seconds(hidden))?;
            writeln!(out, "  {:<36} {:>11}", "together, at best", seconds(step))?;
        }
        writeln!(out, "\na checkpoint")?;
        writeln!(out, "  {:<36} {:>11}", "in storage", size(estimate.checkpoint_bytes))?;
        time(out, "until it is there", times.checkpoint, "--store 1GB/s, what a worker writes in a second")
    }

    fn print_verdict(&self, out: &mut impl Write) -> io::Result<()> {
        let Some(memory) = self.args.memory else { return Ok(()) };
        let peak = self.estimate.peak_bytes();
        if !self.knows_activations {
            writeln!(out, "\nactivations are not counted in what follows")?;
        }
        if self.fits == Some(true) {
            return writeln!(out, "\nfits: a worker needs {} of {}", size(peak), size(memory));
        }
        writeln!(out, "\ndoes not fit: a worker needs {}, and has {}", size(peak), size(memory))?;
        let Some(way) = &self.way else {
            return writeln!(out, "nothing that this program can divide further would");
        };
        let mut text = format!("would fit, in {}: --workers {}", size(way.bytes), way.workers);
        if way.shard != self.plan.parallel.shard {
            text += &format!(" --set parallel.shard={}", shard_name(way.shard));
        }
        if way.buddies != self.plan.parallel.buddies && way.shard != Shard::None {
            text += &format!(" --set parallel.buddies={}", way.buddies);
        }
        if way.workers > self.plan.elastic.max_workers {
            text += &format!(" --set elastic.max_workers={}", way.workers);
        }
        if way.micro != self.plan.batch.micro {
            text += &format!(" --set batch.micro={} (which gives other bits)", way.micro);
        }
        writeln!(out, "{text}")
    }
}

fn time(out: &mut impl Write, what: &str, time: Option<f64>, flag: &str) -> io::Result<()> {
    match time {
        Some(time) => writeln!(out, "  {what:<36} {:>11}", seconds(time)),
        None => writeln!(out, "  {what:<36} {:>11}   give {flag}", "unknown"),
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Parameters => "parameters",
        Kind::Optimizer => "optimizer",
        Kind::Gradients => "gradients",
        Kind::Activations => "activations",
        Kind::Buffers => "buffers",
        Kind::Program => "program",
    }
}

fn shard_name(shard: Shard) -> &'static str {
    match shard {
        Shard::None => "none",
        Shard::Optimizer => "optimizer",
        Shard::Full => "full",
    }
}

fn divided(shard: Shard, buddies: bool) -> String {
    match (shard, buddies) {
        (Shard::None, _) => "all state".to_owned(),
        (shard, true) => format!("shard = \"{}\" with buddies", shard_name(shard)),
        (shard, false) => format!("shard = \"{}\" without buddies", shard_name(shard)),
    }
}

/// Bytes for a person.
fn size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.2} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

fn seconds(time: f64) -> String {
    if time < 1.0 { format!("{:.2} ms", time * 1e3) } else { format!("{time:.2} s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_bytes_a_second() {
        assert_eq!(parse_rate("100Gbit"), Ok(12.5e9));
        assert_eq!(parse_rate("1.5GB/s"), Ok(1.5e9));
        assert_eq!(parse_rate("2 MiB/s"), Ok(2097152.0));
        assert_eq!(parse_flops("100T"), Ok(1e14));
        for wrong in ["fast", "0GB", "-1GB", "GB", "1e999GB", "100"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
        assert!(parse_flops("-2T").is_err());
    }

    #[test]
    fn sizes_are_told_in_the_unit_that_fits() {
        assert_eq!([size(1023), size(1536), size(80 << 30)], ["1023 B", "1.50 KiB", "80.00 GiB"]);
    }
}
