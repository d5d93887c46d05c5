//! What runs must live through, and what they must end with.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Event, Outcome, Phase};

use crate::facts::Violation;
use crate::faults::Plight;
use crate::ring::NOTICE_DELAY_MAX;
use crate::sabotage::Sabotage;
use crate::seeds::{for_each_seed, for_each_seed_of, traced};
use crate::sim::Sim;
use crate::swarm::{DELAY_MAX, HEARTBEATS, Kind, Swarm, TIMEOUT};
use crate::worker::Stage;

/// More than a simulated run takes, if nothing goes wrong.
const WHOLE_RUN: Duration = Duration::from_secs(25);
/// How long it takes from ring to ring, where somebody tells of the reason: seven messages, a micro-batch and links.
const NEXT_RING: Duration = Duration::from_secs(2);
/// So long a ring of divided state waits for somebody who comes in another's place.
const ARRIVAL: Duration = Duration::from_secs(2);

impl Sim {
    /// Lets a run go on until it trains; whether it did before it ended.
    fn run_until_training(&mut self) -> Result<bool, Violation> {
        self.run_until(WHOLE_RUN, |sim| matches!(sim.phase(), Phase::Running | Phase::Ended))?;
        Ok(self.phase() == Phase::Running)
    }

    fn has_completed(&self) -> bool {
        matches!(self.outcome(), Some(Outcome::Completed(_)))
    }

    /// Whether it ended because places were lost too often: then somebody has to look.
    fn was_given_up(&self) -> bool {
        let Some((outcome, reason)) = &self.coordinator.end else { return false };
        let lost = matches!(outcome, Outcome::WorkerLost(_)) || reason.contains("ended before it joined");
        lost && self.local
    }

    fn generation(&self) -> u64 {
        self.coordinator.registry.formation().map_or(0, |ring| ring.generation)
    }

    fn ring_size(&self) -> usize {
        self.coordinator.registry.formation().map_or(0, |ring| ring.places.len())
    }
}

/// Without faults every run completes, however long its messages take.
#[test]
fn a_calm_run_completes() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm::calm());
        sim.run_until(WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        sim.settle()
    });
}

/// Anything happens to workers, at any moment: the run completes, with the bits of one process alone.
#[test]
fn whatever_happens_to_workers_the_run_completes() {
    let seen: Mutex<BTreeSet<Plight>> = Mutex::default();
    let all = for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm::deadly());
        sim.respawn = true;
        sim.run_until(Duration::from_secs(5), |sim| sim.phase() == Phase::Ended)?;
        sim.settle()?;
        assert!(sim.has_completed() || sim.was_given_up(), "{:?}", sim.coordinator.end);
        seen.lock().unwrap().append(&mut sim.plights);
        Ok(())
    });
    if all {
        let seen = seen.into_inner().unwrap();
        for kind in Kind::SURVIVED {
            assert!(seen.iter().any(|plight| plight.0 == kind), "{kind:?} never happened");
        }
        for stage in STAGES {
            assert!(seen.contains(&(Kind::Kill, Some(stage))), "nobody was killed while {stage:?}");
        }
    }
}

/// The same in long runs, of which a fault may hit what an earlier one has left.
#[test]
fn whatever_happens_again_and_again_the_run_completes() {
    for_each_seed_of(8, |seed| {
        let long = Duration::ZERO..=Duration::from_secs(40);
        let swarm = Swarm { workers: 2..=6, micro_batches: 4..=24, steps: 100..=200, ..Swarm::deadly() };
        let mut sim = Sim::new(seed, Swarm { faults: 5..=30, fault_times: long, ..swarm });
        sim.respawn = true;
        sim.run_until(Duration::from_secs(45), |sim| sim.phase() == Phase::Ended)?;
        sim.settle()?;
        assert!(sim.has_completed() || sim.was_given_up(), "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// The same in large rings.
#[test]
fn whatever_happens_to_many_workers_the_run_completes() {
    for_each_seed_of(20, |seed| {
        let mut sim =
            Sim::new(seed, Swarm { workers: 9..=64, steps: 1..=4, faults: 1..=12, ..Swarm::deadly() });
        sim.respawn = true;
        sim.run_until(Duration::from_secs(5), |sim| sim.phase() == Phase::Ended)?;
        sim.settle()?;
        assert!(sim.has_completed() || sim.was_given_up(), "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// Anything goes wrong at any moment, and the user and the disks do what they do; the run ends soon and says truly why.
#[test]
fn whatever_happens_the_run_ends_and_says_why() {
    let seen: Mutex<BTreeSet<Kind>> = Mutex::default();
    let ends: Mutex<BTreeSet<&str>> = Mutex::default();
    let all = for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm::lossy());
        sim.run_until(Duration::from_secs(5), |sim| sim.phase() == Phase::Ended)?;
        sim.settle()?;
        seen.lock().unwrap().extend(sim.plights.iter().map(|plight| plight.0));
        ends.lock().unwrap().extend(sim.outcome().map(name));
        Ok(())
    });
    if all {
        let (seen, ends) = (seen.into_inner().unwrap(), ends.into_inner().unwrap());
        assert_eq!(ends.len(), 5, "too few ways to end: {ends:?}");
        assert_eq!(seen, Kind::ALL.into_iter().collect(), "some kinds never happened");
    }
}

/// All that a live worker may be at, for as long as it matters to others.
const STAGES: [Stage; 10] = [
    Stage::Booting,
    Stage::Joining,
    Stage::Loading,
    Stage::Idle,
    Stage::Linking,
    Stage::Transferring,
    Stage::Computing,
    Stage::Exchanging,
    Stage::Writing,
    Stage::Finishing,
];

fn name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Completed(_) => "completed",
        Outcome::Stopped(_) => "stopped",
        Outcome::BadInput => "bad input",
        Outcome::WorkerLost(_) => "worker lost",
        Outcome::Failed => "failed",
    }
}

/// Short pauses and stalls, repeated joins and reports, and messages that mean nothing cost a run nothing: its first ring
/// is its last.
#[test]
fn what_is_bearable_is_borne() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm::bearable());
        sim.run_until(2 * WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        assert_eq!(sim.generation(), 1);
        sim.settle()
    });
}

/// A process that dies while the run trains costs one new ring, soon, where its parent lives
/// on the same host; the one in its place takes part before long.
#[test]
fn a_death_in_training_costs_little() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 30..=60, workers: 2..=8, ..Swarm::calm() });
        (sim.local, sim.respawn) = (true, true);
        sim.workers.values_mut().for_each(|worker| worker.local = true);
        if !sim.run_until_training()? || sim.setup.steps - sim.setup.start < 20 {
            return Ok(());
        }
        let into = sim.rng.duration(&(Duration::ZERO..=Duration::from_millis(500)));
        sim.run_for(into)?;
        let ids: Vec<_> = sim.workers.keys().copied().collect();
        let (victim, size) = (sim.rng.pick(&ids).unwrap(), ids.len());
        if size == 1 || sim.phase() != Phase::Running || size <= sim.setup.min_workers as usize {
            return Ok(());
        }
        sim.kill(victim);
        let goes_on = |sim: &Sim| sim.generation() == 2 && sim.phase() == Phase::Running;
        let waits = if sim.setup.divided { ARRIVAL } else { Duration::ZERO };
        let limit = sim.now + waits + NEXT_RING;
        assert!(sim.run_until(limit, goes_on)?, "{:?} of {}", sim.phase(), sim.generation());
        let whole = |sim: &Sim| sim.ring_size() == size || sim.phase() == Phase::Ended;
        sim.run_until(sim.now + WHOLE_RUN, whole)?;
        assert_eq!(sim.ring_size(), size, "the dead one was not replaced");
        sim.settle()?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// A host that falls silent while the run trains is lost after one timeout, and not much earlier; the others go on.
#[test]
fn a_silent_host_is_given_one_timeout() {
    for_each_seed_of(20, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 300..=300, workers: 2..=4, ..Swarm::calm() });
        if !sim.run_until_training()? || sim.setup.start > 0 || sim.setup.quorum() < 2 {
            return Ok(());
        }
        let ids: Vec<_> = sim.workers.keys().copied().collect();
        let victim = sim.rng.pick(&ids).unwrap();
        sim.cause(crate::facts::Cause::Trouble(victim));
        sim.worker(victim).frozen = true;
        let frozen = sim.now;
        let lost = |sim: &Sim| sim.phase() != Phase::Running;
        sim.run_until(frozen + 2 * TIMEOUT, lost)?;
        let took = sim.now - frozen;
        assert!(took <= TIMEOUT + DELAY_MAX, "noticed after {took:?}");
        assert!(took + TIMEOUT / HEARTBEATS >= TIMEOUT, "given up after {took:?}");
        sim.settle()?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// A death of which nobody tells but the neighbours in the ring costs the time in which they notice, and a hearing, but not
/// the timeout.
#[test]
fn a_death_that_only_neighbours_notice_costs_no_timeout() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 60..=60, workers: 2..=8, ..Swarm::calm() });
        sim.workers.values_mut().for_each(|worker| worker.local = false);
        let survived = |sim: &Sim| sim.ring_size() > sim.setup.min_workers as usize && sim.ring_size() > 1;
        if !sim.run_until_training()? || sim.setup.steps - sim.setup.start < 30 || !survived(&sim) {
            return Ok(());
        }
        let (ids, size): (Vec<_>, _) = (sim.workers.keys().copied().collect(), sim.ring_size());
        let victim = sim.rng.pick(&ids).unwrap();
        sim.kill(victim);
        let goes_on = |sim: &Sim| sim.ring_size() == size - 1 && sim.phase() == Phase::Running;
        let limit = NOTICE_DELAY_MAX + TIMEOUT / 20 + NEXT_RING;
        assert!(sim.run_until(sim.now + limit, goes_on)?, "{:?} of {}", sim.phase(), sim.generation());
        sim.settle()?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// One link that breaks, seen from both its ends or from one, costs a ring and no worker.
#[test]
fn a_link_that_breaks_costs_no_worker() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 30..=60, workers: 2..=8, ..Swarm::calm() });
        if !sim.run_until_training()? {
            return Ok(());
        }
        let kind = if sim.rng.chance(50) { Kind::CutRing } else { Kind::CutRingOneWay };
        sim.strike(kind);
        sim.run_until(sim.now + 2 * WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        assert!(sim.generation() <= 2, "{} rings", sim.generation());
        sim.settle()
    });
}

/// A bit that flips in one of three or more workers' memory costs that worker its place, and the run nothing else: it is found
/// before anything of it counts.
#[test]
fn a_bit_that_flips_is_found_and_leaves_no_trace() {
    for_each_seed_of(2, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 10..=60, workers: 3..=8, ..Swarm::calm() });
        (sim.local, sim.respawn) = (true, true);
        sim.workers.values_mut().for_each(|worker| worker.local = true);
        if sim.setup.quorum() < 3 || !sim.run_until_training()? {
            return Ok(());
        }
        let into = sim.rng.duration(&(Duration::ZERO..=Duration::from_secs(2)));
        sim.run_for(into)?;
        let victim = sim.flip();
        sim.run_until(sim.now + 3 * WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        assert!(sim.has_completed(), "{victim:?}: {:?}", sim.coordinator.end);
        let there = |id: &WorkerId| sim.coordinator.registry.workers().any(|(other, _)| other == *id);
        assert!(victim.is_none_or(|victim| !there(&victim)), "{victim:?} is still there");
        sim.settle()
    });
}

/// A stop ends all ranks after the same step, or before training if that is where it came.
#[test]
fn a_stop_ends_all_ranks_at_one_step() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm::calm());
        let at = sim.rng.duration(&sim.swarm.fault_times.clone());
        sim.run_for(at)?;
        let before = sim.phase();
        sim.strike(Kind::Stop);
        sim.run_until(sim.now + WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        match (before, sim.outcome()) {
            (Phase::Gathering, Some(Outcome::Failed)) => {}
            (Phase::Forming | Phase::Running, Some(Outcome::Stopped(_) | Outcome::Completed(_))) => {}
            (Phase::Ended, Some(Outcome::Completed(_))) => {}
            other => panic!("stopped: {other:?}"),
        }
        sim.settle()
    });
}

/// Who comes when the run is under way takes part, if it fits in and there is room for it.
#[test]
fn who_comes_late_takes_part() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 60..=60, workers: 1..=4, ..Swarm::calm() });
        sim.run_until(WHOLE_RUN, |sim| sim.phase() != Phase::Gathering)?;
        let size = sim.ring_size();
        let fingerprint = if sim.rng.chance(80) { "home" } else { "elsewhere" };
        let fits = fingerprint == "home" || sim.setup.mixed;
        let taken = fits && (sim.setup.max_workers as usize) > size;
        let late = sim.surplus(fingerprint);
        let there = |sim: &Sim| sim.ring_size() > size && sim.phase() == Phase::Running;
        sim.run_until(sim.now + 2 * WHOLE_RUN, |sim| there(sim) || sim.phase() == Phase::Ended)?;
        // Where there is little left to do, it comes too late.
        let comes_in_time = sim.setup.steps - sim.setup.start > 50;
        assert!(!comes_in_time || taken == (sim.ring_size() > size), "{:?}", sim.coordinator.end);
        let is_in = sim.workers[&late].member.is_some();
        assert!(is_in == taken || taken && !comes_in_time, "{:?}", sim.coordinator.end);
        sim.settle()?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// Who is told to leave is let go soon, with the others going on; or, where too few would be left, the run stops.
#[test]
fn who_leaves_keeps_nobody_waiting() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 60..=60, workers: 2..=6, ..Swarm::calm() });
        if !sim.run_until_training()? || sim.setup.steps - sim.setup.start < 20 {
            return Ok(());
        }
        let size = sim.ring_size();
        sim.strike(Kind::Leave);
        let stays = size > sim.setup.min_workers as usize;
        if stays {
            let smaller = |sim: &Sim| sim.ring_size() == size - 1 && sim.phase() == Phase::Running;
            assert!(sim.run_until(sim.now + NEXT_RING, smaller)?, "{:?}", sim.phase());
        }
        sim.respawn = false;
        sim.settle()?;
        let ended_well =
            if stays { sim.has_completed() } else { !matches!(sim.outcome(), Some(Outcome::Failed)) };
        assert!(ended_well, "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// Everybody dies at once: those in their places resume from the newest checkpoint, to the same bits.
#[test]
fn when_everybody_dies_the_run_resumes() {
    for_each_seed_of(4, |seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 10..=30, workers: 1..=5, ..Swarm::calm() });
        if !sim.run_until_training()? {
            return Ok(());
        }
        let into = sim.rng.duration(&(Duration::ZERO..=Duration::from_secs(2)));
        sim.run_for(into)?;
        sim.respawn = true;
        let ids: Vec<_> = sim.workers.values().filter(|worker| !worker.is_gone()).map(|w| w.id).collect();
        ids.into_iter().for_each(|id| sim.kill(id));
        sim.settle()?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        Ok(())
    });
}

/// Coordinators die and are usurped, at any moment and again and again: no worker is lost, nothing is read from storage, and
/// the run completes with the bits of one process alone.
#[test]
fn coordinators_that_die_cost_no_worker() {
    for_each_seed_of(4, |seed| {
        let kinds = vec![Kind::CoordinatorDies, Kind::Usurp];
        let long = Duration::ZERO..=Duration::from_secs(60);
        let swarm = Swarm { kinds, faults: 1..=6, fault_times: long, ..Swarm::calm() };
        let mut sim = Sim::new(seed, Swarm { steps: 30..=200, workers: 2..=8, ..swarm });
        if !sim.run_until_training()? {
            return Ok(());
        }
        // Who had just joined a coordinator that was usurped before it formed a ring is another's to start again.
        if sim.workers.values().any(|worker| worker.is_gone()) {
            return Ok(());
        }
        // Invariants see to it that nobody is called lost to whom nothing happened.
        let workers = sim.workers.len();
        // Until all have come back to the last coordinator: a run that still waited for them would be given another worker.
        sim.run_until(Duration::from_secs(120), |sim| sim.phase() == Phase::Ended)?;
        sim.settle()?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        assert_eq!(sim.workers.len(), workers, "somebody was replaced");
        Ok(())
    });
}

/// The same seed is the same run, to the last message.
#[test]
fn a_seed_fixes_everything() {
    let scenario = |seed| {
        let mut sim = Sim::new(seed, Swarm::lossy());
        sim.run_until(Duration::from_secs(5), |sim| sim.phase() == Phase::Ended)?;
        sim.settle()
    };
    for seed in 0..20 {
        let (first, second) = (traced(seed, scenario), traced(seed, scenario));
        assert!(first.0.len() > 10, "seed {seed} has hardly a trace: {:?}", first.0);
        assert_eq!(first, second, "seed {seed}");
    }
    assert_ne!(traced(1, scenario).0[1..], traced(2, scenario).0[1..]);
}

/// Each coordinator that is wrong on purpose is caught, by the invariant that is there for it.
#[test]
fn every_invariant_can_fail() {
    for (sabotage, invariant) in Sabotage::ALL {
        let mut noticed = BTreeSet::new();
        let caught = (0..400).any(|seed| {
            let mut sim = Sim::new(seed, Swarm { workers: 2..=6, ..Swarm::lossy() });
            sim.sabotage = Some(sabotage);
            let ended = sim
                .run_until(Duration::from_secs(5), |sim| sim.phase() == Phase::Ended)
                .and_then(|_| sim.settle());
            let Err(violation) = ended else { return false };
            noticed.insert(violation.invariant);
            violation.invariant == invariant
        });
        assert!(caught, "{sabotage:?} goes unnoticed by {invariant:?}; noticed by {noticed:?}");
    }
}

/// Time that runs backward is a bug of the driver, and said to be one.
#[test]
#[should_panic(expected = "time runs forward")]
fn time_runs_forward() {
    let mut sim = Sim::new(0, Swarm::calm());
    sim.now = Duration::from_secs(1);
    sim.decide(Event::Tick);
    sim.now = Duration::ZERO;
    sim.decide(Event::Tick);
}
