//! What a simulated fleet came to.

use std::fmt;

use serde::Serialize;

use super::desk::Load;
use super::world::World;
use super::{Fleet, SECONDS_PER_DAY};

const SECONDS_PER_HOUR: f64 = 3600.0;
/// Of a page, where the system says how many are resident.
const PAGE_BYTES: u64 = 4096;

/// What a simulated fleet came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Report {
    /// Workers.
    pub(crate) workers: u32,
    /// Days on the wall clock.
    pub(crate) days: f64,
    /// Hours of them that were simulated in full; in the others nothing but steps happened.
    pub(crate) simulated_hours: f64,
    /// Workers that were lost.
    pub(crate) interruptions: u64,
    /// Rings formed since the run trained.
    pub(crate) rings: u64,
    /// Time that the steps done would have taken undisturbed, over time on the wall clock.
    pub(crate) goodput: f64,
    /// Seconds for each interruption in which nobody trained, joining included.
    pub(crate) standing_seconds: f64,
    /// Messages of workers in a second, while nothing happens.
    pub(crate) messages_per_second: f64,
    /// The coordinator's processor seconds in an hour in which nothing happens,
    pub(crate) cpu_seconds_per_quiet_hour: f64,
    /// for a change of rings,
    pub(crate) cpu_seconds_per_ring: f64,
    /// and in an hour of the whole run.
    pub(crate) cpu_seconds_per_hour: f64,
    /// The longest that decisions about what arrived within ten milliseconds took.
    pub(crate) longest_decision_ms: f64,
    /// What one worker is sent of a ring.
    pub(crate) ring_bytes: usize,
    /// Memory that the simulation took, workers included.
    pub(crate) memory_bytes: u64,
    #[serde(skip)]
    pub(super) quiet: Load,
    #[serde(skip)]
    pub(super) quiet_seconds: f64,
    #[serde(skip)]
    pub(super) changes: Load,
    #[serde(skip)]
    step_seconds: f64,
}

impl Report {
    pub(super) fn of(fleet: &Fleet) -> Self {
        let step_seconds = fleet.step.as_secs_f64();
        Self { workers: fleet.workers, step_seconds, ..Self::default() }
    }

    pub(super) fn close(&mut self, world: &World<'_>, resident_before: u64) {
        let wall = world.wall().as_secs_f64();
        let simulated = wall - world.skipped.as_secs_f64();
        self.days = wall / SECONDS_PER_DAY;
        self.simulated_hours = simulated / SECONDS_PER_HOUR;
        self.goodput = world.steps * self.step_seconds / wall;
        self.standing_seconds = world.standing.as_secs_f64() / self.interruptions.max(1) as f64;
        self.rings = self.changes.rings;
        self.messages_per_second = self.quiet.received as f64 / self.quiet_seconds;
        let quiet_cpu = self.quiet.cpu.as_secs_f64() / self.quiet_seconds;
        self.cpu_seconds_per_quiet_hour = quiet_cpu * SECONDS_PER_HOUR;
        let changes = self.changes.cpu_of_changes.as_secs_f64();
        self.cpu_seconds_per_ring = changes / self.rings.max(1) as f64;
        self.cpu_seconds_per_hour = (changes + wall * quiet_cpu) / (wall / SECONDS_PER_HOUR);
        self.longest_decision_ms = world.desk.longest.as_secs_f64() * 1e3;
        self.ring_bytes = world.desk.ring_bytes;
        self.memory_bytes = resident_bytes().saturating_sub(resident_before);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String| writeln!(f, "{name:>34}  {value}");
        row("workers", self.workers.to_string())?;
        let skipped = 24.0 * self.days - self.simulated_hours;
        row(
            "time",
            format!(
                "{:.1} days; {:.1} hours in full, {skipped:.0} hours of steps skipped",
                self.days, self.simulated_hours
            ),
        )?;
        row("interruptions", format!("{}, {} rings", self.interruptions, self.rings))?;
        row("goodput", format!("{:.2}%", 100.0 * self.goodput))?;
        row("standing still", format!("{:.1} s for each interruption", self.standing_seconds))?;
        row("messages of workers", format!("{:.0} a second", self.messages_per_second))?;
        row(
            "coordinator's processor time",
            format!(
                "{:.1} s in an hour ({:.1} s in a quiet one, {:.2} s for a ring)",
                self.cpu_seconds_per_hour, self.cpu_seconds_per_quiet_hour, self.cpu_seconds_per_ring
            ),
        )?;
        row("longest decision", format!("{:.1} ms", self.longest_decision_ms))?;
        row("a ring, as one worker is told it", format!("{} bytes", self.ring_bytes))?;
        row(
            "memory",
            format!("{:.0} MiB, the simulated workers included", self.memory_bytes as f64 / 1048576.0),
        )
    }
}

/// Bytes of this process that are in memory; 0 where the system does not say.
pub(super) fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::simulate;
    use super::*;

    fn fleet(rate: f64, seed: u64) -> Fleet {
        Fleet {
            workers: 24,
            days: 2.0,
            rate,
            seed,
            timeout: Duration::from_secs(10),
            step: Duration::from_secs(10),
            share: 2,
            replace: Duration::from_secs(300),
            transfer: Duration::from_secs(20),
            link: Duration::from_secs(2),
        }
    }

    #[test]
    fn a_fleet_to_which_nothing_happens_loses_nothing() {
        let report = simulate(&fleet(1e-9, 1)).unwrap();
        assert_eq!((report.interruptions, report.rings), (0, 0));
        assert!((report.goodput - 1.0).abs() < 1e-3, "{report:?}");
        assert!(report.messages_per_second > 24.0 * 0.8, "{report:?}");
    }

    #[test]
    fn interruptions_cost_what_they_must_and_the_same_seed_the_same() {
        for seed in 1..4 {
            let report = simulate(&fleet(0.5, seed)).unwrap();
            assert!(
                report.interruptions > 5 && report.rings >= report.interruptions,
                "seed {seed}: {report:?}"
            );
            let least = report.interruptions as f64 * 20.0 / (report.days * SECONDS_PER_DAY);
            assert!(report.goodput < 1.0 - least && report.goodput > 0.5, "seed {seed}: {report:?}");
            let again = simulate(&fleet(0.5, seed)).unwrap();
            assert_eq!((again.goodput, again.rings), (report.goodput, report.rings), "seed {seed}");
        }
    }
}
