//! What goes wrong, and when: a pure function of a seed.

use std::time::Duration;

use mattock_data::keys::Stream;

use super::audit::Flip;

/// What happens to a worker, the coordinator, or the run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT after this part of the timeout: it must not be noticed.
    Pause(f64),
    /// SIGSTOP for good: it is given up after the timeout.
    Freeze,
    /// SIGTERM: it leaves.
    Leave,
    /// Another worker joins.
    Join,
    /// SIGKILL to all workers at once.
    KillAll,
    /// SIGKILL to the coordinator: another takes over.
    Coordinator,
    /// SIGSTOP to the coordinator: it is killed for its silence, and another takes over.
    CoordinatorHangs,
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fault {
    /// It strikes once this step is done,
    pub after_step: u64,
    /// and this much later.
    pub delay: Duration,
    /// What.
    pub kind: Kind,
    /// To whom: the worker at this part of the list of those that are there, by id.
    pub victim: f64,
}

/// What a schedule is drawn from.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Steps of the run.
    pub steps: u64,
    /// Nothing goes wrong before this step is done, which is the first or a later one.
    pub first: u64,
    /// How many faults.
    pub faults: usize,
    /// Faults strike up to so long after a step.
    pub delay_max: Duration,
}

/// Steps at the end of a run in which nothing more goes wrong.
const CALM: u64 = 2;
/// Steps among the first of a run of which one begins with memory that has failed.
const FLIPS: u64 = 3;
/// A run with such a step and faults after it has so many steps at least.
pub const FLIP_STEPS_MIN: u64 = 2 + FLIPS + CALM;

/// The faults of a seed, in the order of steps.
pub fn schedule(seed: u64, limits: Limits) -> Vec<Fault> {
    let mut draw = Stream::new(seed);
    let last = limits.steps.saturating_sub(CALM).max(limits.first);
    let mut fault = || Fault {
        after_step: limits.first + (draw.uniform() * (last + 1 - limits.first) as f64) as u64,
        delay: limits.delay_max.mul_f64(draw.uniform()),
        kind: kind(draw.uniform(), draw.uniform()),
        victim: draw.uniform(),
    };
    let mut faults: Vec<Fault> = (0..limits.faults).map(|_| fault()).collect();
    faults.sort_by_key(|fault| (fault.after_step, fault.delay));
    faults
}

/// The bit that flips by a seed, in the memory of one of so many workers: so early that all of them are there, for a majority
/// must say who is right. A fault of [`schedule`] comes later.
pub fn flip(seed: u64, workers: u64) -> Flip {
    let mut draw = Stream::new(seed);
    let mut below = |bound: u64| (draw.uniform() * bound as f64) as u64;
    Flip { worker: below(workers), step: 2 + below(FLIPS) }
}

fn kind(which: f64, part: f64) -> Kind {
    match which {
        which if which < 0.30 => Kind::Kill,
        which if which < 0.41 => Kind::Coordinator,
        which if which < 0.45 => Kind::CoordinatorHangs,
        which if which < 0.60 => Kind::Pause(part / 3.0),
        which if which < 0.68 => Kind::Freeze,
        which if which < 0.80 => Kind::Leave,
        which if which < 0.96 => Kind::Join,
        _ => Kind::KillAll,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { steps: 50, first: 1, faults: 12, delay_max: Duration::from_millis(100) };

    #[test]
    fn a_seed_is_a_schedule_and_all_kinds_come() {
        let mut kinds = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let faults = schedule(seed, LIMITS);
            assert_eq!(faults, schedule(seed, LIMITS));
            assert_eq!(faults.len(), 12);
            assert!(faults.is_sorted_by_key(|fault| fault.after_step));
            assert!(faults.iter().all(|fault| (1..=48).contains(&fault.after_step)));
            let names = faults.iter().map(|fault| format!("{:?}", fault.kind));
            kinds.extend(names.map(|name| name.split('(').next().unwrap().to_owned()));
        }
        assert_eq!(kinds.len(), 8, "{kinds:?}");
        assert_ne!(schedule(1, LIMITS), schedule(2, LIMITS));
    }

    #[test]
    fn a_short_run_has_its_faults_too() {
        let faults = schedule(3, Limits { steps: 1, ..LIMITS });
        assert!(faults.iter().all(|fault| fault.after_step == 1));
    }

    #[test]
    fn memory_fails_before_anything_else_does() {
        let mut all = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let flip = flip(seed, 3);
            all.insert((flip.worker, flip.step));
            let faults = schedule(seed, Limits { steps: FLIP_STEPS_MIN, first: flip.step, ..LIMITS });
            assert!(faults.iter().all(|fault| (flip.step..=5).contains(&fault.after_step)), "{faults:?}");
        }
        assert_eq!(all.len(), 9, "each of three workers, before each of three steps: {all:?}");
    }
}
