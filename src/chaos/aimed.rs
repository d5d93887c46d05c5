//! One death at the worst moments of a step, in a run of any kind: a pure function of a seed.
//!
//! All kinds come to the same bits, so that one undisturbed run is what all are held against, whatever a seed draws: how state is
//! divided, whether another holds each part too, among how many workers, and who dies when.

use std::fmt;
use std::time::Duration;

use mattock_data::keys::Stream;
use mattock_worker::plan::Shard;

use super::audit::{Death, Moment};
use super::schedule::{Fault, Kind};

/// What is fixed for all seeds; where nothing is, a seed draws it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Fixed {
    /// How the state is divided.
    pub shard: Option<Shard>,
    /// Whether each part has a second holder.
    pub buddies: Option<bool>,
    /// Workers.
    pub workers: Option<u32>,
}

/// One run, and who dies in it when.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Aim {
    /// How the state is divided.
    pub shard: Shard,
    /// Whether each part has a second holder.
    pub buddies: bool,
    /// Workers.
    pub workers: u32,
    /// Who dies.
    pub death: Death,
}

/// Steps at the end of a run in which nobody dies.
const CALM: u64 = 2;
/// A run in which somebody dies has so many steps at least.
pub const STEPS_MIN: u64 = 2 * (1 + CALM);

const SHARDS: [Shard; 3] = [Shard::None, Shard::Optimizer, Shard::Full];
const MOMENTS: [Moment; 5] =
    [Moment::Any, Moment::Buckets, Moment::Summed, Moment::Committed, Moment::Updating];
/// Where nothing else is said, a run has one worker to so many.
const WORKERS_MAX: u32 = 4;

/// What a seed aims at, in a run of so many steps. A dozen seeds in a row divide the state in each way among each number of workers;
/// sixty do so at each moment.
pub fn aim(seed: u64, fixed: Fixed, steps: u64) -> Aim {
    let mut draw = Stream::new(seed);
    let mut below = |bound: u64| (draw.uniform() * bound as f64) as u64;
    let turn = |kinds: u64, each: u64| (seed / each % kinds) as usize;
    let workers = fixed.workers.unwrap_or(1 + turn(WORKERS_MAX.into(), 3) as u32);
    let moment = MOMENTS[turn(5, 1)];
    // Killed from outside, it dies some time later, in which the run must not end.
    let last = if moment == Moment::Any { steps / 2 } else { steps.saturating_sub(CALM) };
    Aim {
        shard: fixed.shard.unwrap_or(SHARDS[turn(3, 1)]),
        buddies: fixed.buddies.unwrap_or(below(2) == 0),
        workers,
        death: Death { worker: below(workers.into()), step: 1 + below(last.max(1)), moment },
    }
}

/// The kill from outside, up to so long after its step, where that is the moment.
pub fn kill(seed: u64, aim: &Aim, delay_max: Duration) -> Option<Fault> {
    let Death { worker, step, moment } = aim.death;
    // All of the first workers are there.
    let victim = (worker as f64 + 0.5) / f64::from(aim.workers);
    let delay = delay_max.mul_f64(Stream::new(!seed).uniform());
    (moment == Moment::Any).then_some(Fault { after_step: step, delay, kind: Kind::Kill, victim })
}

impl Aim {
    /// What is laid over the recipe.
    pub fn sets(&self) -> [String; 2] {
        [format!("parallel.shard={}", name(self.shard)), format!("parallel.buddies={}", self.buddies)]
    }

    /// Whether others have all that the dead one had.
    pub fn is_held(&self) -> bool {
        self.workers > 1 && (self.shard == Shard::None || self.buddies)
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shard, buddies, workers, death } = self;
        let buddies = if *buddies { "with" } else { "without" };
        write!(f, "{workers} workers, shard {}, {buddies} buddies; {death}", name(*shard))
    }
}

/// As recipes write it.
fn name(shard: Shard) -> &'static str {
    match shard {
        Shard::None => "none",
        Shard::Optimizer => "optimizer",
        Shard::Full => "full",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_dozen_seeds_have_each_sharding_among_each_number_of_workers_and_all_moments() {
        for first in [0, 1, 100, 1001] {
            let aims: Vec<Aim> = (first..first + 12).map(|seed| aim(seed, Fixed::default(), 60)).collect();
            let kinds: BTreeSet<_> = aims.iter().map(|aim| (name(aim.shard), aim.workers)).collect();
            let moments: BTreeSet<_> = aims.iter().map(|aim| format!("{:?}", aim.death.moment)).collect();
            assert_eq!((kinds.len(), moments.len()), (12, 5), "{aims:?}");
        }
        let sixty = (1..=60).map(|seed| aim(seed, Fixed::default(), 60));
        let all: BTreeSet<_> =
            sixty.map(|aim| format!("{} {} {:?}", name(aim.shard), aim.workers, aim.death.moment)).collect();
        assert_eq!(all.len(), 60);
    }

    #[test]
    fn a_seed_is_an_aim_that_the_run_reaches() {
        let (mut buddies, mut steps, mut victims) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for seed in 0..200 {
            let it = aim(seed, Fixed::default(), 10);
            assert_eq!(it, aim(seed, Fixed::default(), 10));
            let last = if it.death.moment == Moment::Any { 5 } else { 8 };
            assert!((1..=last).contains(&it.death.step), "{it}");
            assert!(it.death.worker < it.workers.into(), "{it}");
            buddies.insert(it.buddies);
            steps.insert(it.death.step);
            victims.insert(it.death.worker);
        }
        assert_eq!((buddies.len(), steps.len(), victims.len()), (2, 8, 4));
    }

    #[test]
    fn a_kill_from_outside_strikes_whom_it_is_aimed_at() {
        let aims = (0..60).map(|seed| (seed, aim(seed, Fixed::default(), 60)));
        let kills = aims.filter_map(|(seed, aim)| Some((aim, kill(seed, &aim, Duration::from_millis(30))?)));
        let kills: Vec<(Aim, Fault)> = kills.collect();
        assert_eq!(kills.len(), 12);
        for (aim, kill) in kills {
            assert_eq!((aim.death.moment, kill.kind), (Moment::Any, Kind::Kill));
            assert_eq!((kill.victim * f64::from(aim.workers)) as u64, aim.death.worker);
            assert!(kill.after_step == aim.death.step && kill.delay <= Duration::from_millis(30));
        }
    }

    #[test]
    fn what_is_fixed_is_not_drawn() {
        let fixed = Fixed { shard: Some(Shard::Full), buddies: Some(true), workers: Some(2) };
        for seed in 0..20 {
            let it = aim(seed, fixed, STEPS_MIN);
            assert_eq!((it.shard, it.buddies, it.workers, it.is_held()), (Shard::Full, true, 2, true));
            assert_eq!(it.sets(), ["parallel.shard=full", "parallel.buddies=true"]);
            assert!(!Aim { buddies: false, ..it }.is_held() && !Aim { workers: 1, ..it }.is_held());
        }
    }
}
