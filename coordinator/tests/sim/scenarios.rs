//! What runs must live through, and what they must end with.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use mattock_coordinator::membership::{Event, Outcome, Phase};

use crate::facts::Violation;
use crate::faults::Plight;
use crate::sabotage::Sabotage;
use crate::seeds::{for_each_seed, traced};
use crate::sim::Sim;
use crate::swarm::{DELAY_MAX, HEARTBEATS, Kind, Swarm, TIMEOUT};
use crate::worker::Stage;

/// More than a simulated run takes, if nothing goes wrong.
const WHOLE_RUN: Duration = Duration::from_secs(25);
/// How long a dead process may go unnoticed.
const NOTICED: Duration = Duration::from_secs(1);

impl Sim {
    /// Lets a run go on until it trains; whether it did before it ended.
    fn run_until_training(&mut self) -> Result<bool, Violation> {
        self.run_until(WHOLE_RUN, |sim| matches!(sim.phase(), Phase::Running | Phase::Ended))?;
        Ok(self.phase() == Phase::Running)
    }

    fn has_completed(&self) -> bool {
        matches!(self.outcome(), Some(Outcome::Completed(_)))
    }
}

/// Without faults every run completes, however long its messages take.
#[test]
fn a_calm_run_completes() {
    for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm::calm());
        sim.run_until(WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        sim.settle()
    });
}

/// Anything goes wrong at any moment; the invariants hold, and the run ends soon and says truly why.
#[test]
fn whatever_happens_the_run_ends_and_says_why() {
    let seen: Mutex<BTreeSet<Plight>> = Mutex::default();
    let ends: Mutex<BTreeSet<&str>> = Mutex::default();
    let all = for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm::lossy());
        sim.run_until(Duration::from_secs(5), |sim| sim.phase() == Phase::Ended)?;
        sim.settle()?;
        seen.lock().unwrap().append(&mut sim.plights);
        ends.lock().unwrap().extend(sim.outcome().map(name));
        Ok(())
    });
    if all {
        let (seen, ends) = (seen.into_inner().unwrap(), ends.into_inner().unwrap());
        assert_eq!(ends.len(), 5, "too few ways to end: {ends:?}");
        for kind in Kind::ALL {
            assert!(seen.iter().any(|plight| plight.0 == kind), "{kind:?} never happened");
        }
        for stage in STAGES {
            assert!(seen.contains(&(Kind::Kill, Some(stage))), "nobody was killed while {stage:?}");
        }
    }
}

/// All that a live worker may be at.
const STAGES: [Stage; 9] = [
    Stage::Booting,
    Stage::Joining,
    Stage::Loading,
    Stage::Idle,
    Stage::Linking,
    Stage::Computing,
    Stage::Exchanging,
    Stage::Finishing,
    Stage::Leaving,
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

/// Short pauses and stalls, repeated joins and reports, and messages that mean nothing cost a run nothing.
#[test]
fn what_is_bearable_is_borne() {
    for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm::bearable());
        sim.run_until(2 * WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        sim.settle()
    });
}

/// A process that dies while the run trains ends it within a second, where its parent lives on the same host.
#[test]
fn a_death_in_training_is_told_at_once() {
    for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 30..=60, ..Swarm::calm() });
        if !sim.local || !sim.run_until_training()? {
            return Ok(());
        }
        let into = sim.rng.duration(&(Duration::ZERO..=Duration::from_secs(1)));
        sim.run_for(into)?;
        let training: Vec<_> = sim.workers.values().filter(|worker| !worker.finished).collect();
        let Some(victim) = sim.rng.pick(&training.iter().map(|worker| worker.id).collect::<Vec<_>>()) else {
            return Ok(());
        };
        sim.kill(victim);
        sim.run_until(sim.now + NOTICED, |sim| sim.phase() == Phase::Ended)?;
        assert_eq!(sim.outcome(), Some(&Outcome::WorkerLost(victim)), "{:?}", sim.coordinator.end);
        sim.settle()
    });
}

/// A host that falls silent while the run trains ends it within one timeout, and not much earlier.
#[test]
fn a_silent_host_is_given_one_timeout() {
    for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm { steps: 300..=300, workers: 1..=4, ..Swarm::calm() });
        if !sim.run_until_training()? {
            return Ok(());
        }
        let ids: Vec<_> = sim.workers.keys().copied().collect();
        let victim = sim.rng.pick(&ids).unwrap();
        sim.cause(crate::facts::Cause::Trouble(victim));
        sim.worker(victim).frozen = true;
        let frozen = sim.now;
        sim.run_until(frozen + 2 * TIMEOUT, |sim| sim.phase() == Phase::Ended)?;
        assert_eq!(sim.outcome(), Some(&Outcome::WorkerLost(victim)), "{:?}", sim.coordinator.end);
        let took = sim.now - frozen;
        assert!(took <= TIMEOUT + DELAY_MAX, "noticed after {took:?}");
        assert!(took + TIMEOUT / HEARTBEATS >= TIMEOUT, "given up after {took:?}");
        sim.settle()
    });
}

/// A stop ends all ranks after the same step, or before training if that is where it came.
#[test]
fn a_stop_ends_all_ranks_at_one_step() {
    for_each_seed(|seed| {
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

/// Who comes when the run is under way is refused, and nobody is disturbed.
#[test]
fn who_comes_late_is_refused() {
    for_each_seed(|seed| {
        let mut sim = Sim::new(seed, Swarm::calm());
        sim.run_until(WHOLE_RUN, |sim| sim.phase() != Phase::Gathering)?;
        let fingerprint = if sim.rng.chance(50) { "home" } else { "elsewhere" };
        let late = sim.surplus(fingerprint);
        sim.run_until(sim.now + WHOLE_RUN, |sim| sim.phase() == Phase::Ended)?;
        assert!(sim.has_completed(), "{:?}", sim.coordinator.end);
        assert!(sim.workers[&late].member.is_none(), "it was welcomed");
        sim.settle()
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
        let caught = (0..400).any(|seed| {
            let mut sim = Sim::new(seed, Swarm { workers: 2..=6, ..Swarm::lossy() });
            sim.sabotage = Some(sabotage);
            let ended = sim
                .run_until(Duration::from_secs(5), |sim| sim.phase() == Phase::Ended)
                .and_then(|_| sim.settle());
            ended.is_err_and(|violation| violation.invariant == invariant)
        });
        assert!(caught, "{sabotage:?} goes unnoticed");
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
