//! A run of thousands of workers over weeks, simulated: how much of the time is training, and what the coordinator has to do.
//!
//! ```text
//! interruptions drawn from a seed ──> world ──encoded messages──> desk: the coordinator's own registry, ledger and wire format
//!                                       ^                          │
//!                                       └────────decisions─────────┘        processor time is taken around the desk alone
//! ```
//!
//! # Quiet time is skipped
//! Once a ring has done some steps, nothing but pulses and reports comes until somebody is lost or joins. One such stretch
//! is simulated in full, and measured. Of the others the clock of the registry knows nothing: the wall clock goes on, steps
//! are counted by their length, and messages and processor time by what was measured. Every change of rings is simulated in
//! full, message by message.
//!
//! Deliberately absent: the network. Encryption, datagrams and the system's part in them are measured with real connections,
//! by `mattock bench coordinator`.

mod desk;
mod report;
mod world;

use std::time::Duration;

pub(crate) use self::report::Report;
use self::world::{Landmark, World};

/// What is simulated.
#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    /// Workers.
    pub(crate) workers: u32,
    /// Days of wall time.
    pub(crate) days: f64,
    /// Interruptions of each worker in a day.
    pub(crate) rate: f64,
    /// Draws when, who and how.
    pub(crate) seed: u64,
    /// The recipe's.
    pub(crate) timeout: Duration,
    /// A step of the whole fleet.
    pub(crate) step: Duration,
    /// Micro-batches of each worker in a step.
    pub(crate) share: u32,
    /// From a loss until another worker joins in its place.
    pub(crate) replace: Duration,
    /// How long it takes to give the state to one who joins; all wait for it.
    pub(crate) transfer: Duration,
    /// The longest that a worker takes to link up with its neighbours.
    pub(crate) link: Duration,
}

/// Steps that a ring must have done before nothing more is expected of it.
const CALM_STEPS: u64 = 2;
/// The quiet stretch that is measured.
const MEASURED: Duration = Duration::from_secs(60);
/// A change of rings must be over by then, or the simulation has lost its way.
const CHANGE_MAX: Duration = Duration::from_secs(24 * 3600);
const SECONDS_PER_DAY: f64 = 86_400.0;

/// Simulates a fleet.
///
/// # Errors
/// Where its messages are too long, or it comes to no end.
pub(crate) fn simulate(fleet: &Fleet) -> Result<Report, String> {
    let before = report::resident_bytes();
    let mut world = World::new(fleet);
    let mut report = Report::of(fleet);
    calm_down(&mut world, None)?;
    let start = world.load();
    world.run_until(world.now() + MEASURED, |_| false)?;
    report.quiet = world.load() - start;
    report.quiet_seconds = MEASURED.as_secs_f64();
    world.start_the_wall_clock();

    let end = Duration::from_secs_f64(fleet.days * SECONDS_PER_DAY);
    let started = world.load();
    world.expect_interruption();
    while world.wall() < end {
        let due = world.next_landmark().min(end);
        if calm_down(&mut world, Some(due))? {
            world.skip_to(due)?;
        }
        match world.take_landmark() {
            Some(Landmark::Interruption) if world.wall() < end => {
                report.interruptions += 1;
                world.interrupt();
                world.expect_interruption();
            }
            Some(Landmark::Replacement) => world.join(),
            _ => {}
        }
    }
    report.changes = world.load() - started;
    report.close(&world, before);
    Ok(report)
}

/// Simulates until the ring is calm, or the wall clock is there; whether it is calm.
fn calm_down(world: &mut World, due: Option<Duration>) -> Result<bool, String> {
    let until = match due {
        Some(due) => world.now() + due.saturating_sub(world.wall()),
        None => world.now() + CHANGE_MAX,
    };
    let calm = world.run_until(until.min(world.now() + CHANGE_MAX), |world| world.is_calm(CALM_STEPS))?;
    match calm || due.is_some_and(|due| world.wall() >= due) {
        true => Ok(calm),
        false => Err(format!("the fleet does not train after {CHANGE_MAX:?}: {}", world.state())),
    }
}
