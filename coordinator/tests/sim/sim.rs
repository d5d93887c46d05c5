//! The simulated world: a clock, and a queue of what happens next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::{Duration, Instant};

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Outcome, Phase};

use crate::coordinator::Coordinator;
use crate::facts::{Cause, Fact, Setup, Violation};
use crate::faults::Plight;
use crate::invariants::Invariants;
use crate::network::Network;
use crate::ring::Ring;
use crate::rng::Rng;
use crate::sabotage::Sabotage;
use crate::seeds::trace;
use crate::state::State;
use crate::swarm::{Kind, Swarm, TIMEOUT};
use crate::worker::Worker;

/// A run that needs more than this has lost its way: time does not pass any more.
const HAPPENINGS_MAX: u64 = 200_000;
/// How often somebody looks whether the run still lacks workers, once faults have stopped.
const RESTOCK: Duration = Duration::from_secs(1);

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Happening {
    /// A parcel reaches the coordinator, over a worker's connection of this number.
    Upward(WorkerId, u64),
    /// A parcel reaches a worker, over its connection of this number.
    Downward(WorkerId, u64),
    /// What a worker was doing is done, unless it has turned to something else since.
    Wake(WorkerId, u64),
    /// A worker's thread says that it is alive.
    Heartbeat(WorkerId),
    /// The total of a step reaches a worker.
    Total(WorkerId, u64, u64),
    /// The state of a ring's source reaches a worker.
    Transferred(WorkerId, u64),
    /// A checkpoint that a worker writes is whole; it is that of this step, with this hash.
    Durable(WorkerId, u64, u64),
    /// A worker learns that it has lost its ring neighbour, of this generation and rank.
    Broken(WorkerId, u64, u32),
    /// A pause ends.
    Resume(WorkerId),
    /// The launcher learns that a process has ended.
    Exited(WorkerId),
    /// The coordinator's timer.
    Tick,
    /// Another coordinator takes the lease.
    Succeed,
    /// A coordinator looks whether its lease is still the highest.
    Watch(u64),
    /// A worker without a coordinator looks for another.
    Look(WorkerId),
    /// A worker without a coordinator has waited long enough for its step.
    HoldNow(WorkerId),
    /// The coordinator has waited long enough for workers to leave.
    Dismiss,
    /// Something goes wrong.
    Fault(Kind),
    /// Somebody starts the workers that are missing.
    Restock,
}

/// A run under simulation.
pub(crate) struct Sim {
    pub(crate) swarm: Swarm,
    pub(crate) setup: Setup,
    pub(crate) rng: Rng,
    pub(crate) now: Duration,
    pub(crate) origin: Instant,
    pub(crate) coordinator: Coordinator,
    /// One that was there before, and does not know yet that another has taken over.
    pub(crate) stale: Option<Coordinator>,
    /// The highest lease.
    pub(crate) lease: u64,
    /// The newest step that is on record.
    pub(crate) on_record: Option<u64>,
    /// Whether the user has asked for a stop: the launcher tells it each coordinator.
    pub(crate) stop_asked: bool,
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    pub(crate) network: Network,
    pub(crate) rings: BTreeMap<u64, Ring>,
    /// Lines between ring neighbours that carry nothing.
    pub(crate) cuts: BTreeSet<(WorkerId, WorkerId)>,
    /// Checkpoints, by step.
    pub(crate) storage: BTreeMap<u64, State>,
    /// States of a run of one process, by step.
    serial: Vec<State>,
    pub(crate) sabotage: Option<Sabotage>,
    /// What this run went through, for tests of the simulator itself.
    pub(crate) plights: BTreeSet<Plight>,
    /// Whether the launcher started the first workers, and hears of their exits.
    pub(crate) local: bool,
    /// Whether it starts others in the place of those that end.
    pub(crate) respawn: bool,
    pub(crate) calm: bool,
    /// What workers have been at that takes much longer than usual.
    pub(crate) slow_work: Duration,
    /// Of the first worker that was let in: all others must have the same.
    pub(crate) fingerprint: Option<&'static str>,
    queue: BinaryHeap<Reverse<(Duration, u64, Happening)>>,
    scheduled: u64,
    happened: u64,
    invariants: Invariants,
    violation: Option<Violation>,
}

impl Sim {
    /// A run as `seed` draws it from the swarm.
    pub(crate) fn new(seed: u64, swarm: Swarm) -> Self {
        let mut rng = Rng::new(seed);
        let expected = rng.number(&swarm.workers) as u32;
        let steps = rng.number(&swarm.steps);
        // Now and then there is nothing left to do, or more is asked for than the recipe lets in.
        let start = if rng.chance(20) { rng.number(&(0..=steps)) } else { 0 };
        let max_workers = match rng.chance(10) {
            true => (expected - 1).max(1),
            false => expected + rng.number(&(0..=2)) as u32,
        };
        let micro_batches = rng.number(&swarm.micro_batches) as u32;
        let least = rng.number(&(1..=u64::from(expected.min(max_workers))));
        let setup = Setup {
            expected,
            min_workers: if rng.chance(60) { 1 } else { least as u32 },
            max_workers,
            micro_batches,
            steps,
            start,
            checkpoint_every: rng.number(&(1..=4)),
            mixed: rng.chance(20),
            divided: seed % 5 < 2,
        };
        let serial: Vec<State> = (0..=steps + 1).map(|step| State::serial(micro_batches, step)).collect();
        // Only the origin: what follows depends on differences alone.
        let origin = Instant::now();
        let mut sim = Self {
            coordinator: Coordinator::new(&setup, origin),
            stale: None,
            lease: 1,
            on_record: None,
            stop_asked: false,
            invariants: Invariants::new(&setup),
            local: rng.chance(60),
            respawn: rng.chance(80),
            swarm,
            setup,
            rng,
            now: Duration::ZERO,
            origin,
            workers: BTreeMap::new(),
            network: Network::default(),
            rings: BTreeMap::new(),
            cuts: BTreeSet::new(),
            storage: BTreeMap::from([(start, serial[start as usize])]),
            serial,
            sabotage: None,
            plights: BTreeSet::new(),
            calm: false,
            slow_work: Duration::ZERO,
            fingerprint: None,
            queue: BinaryHeap::new(),
            scheduled: 0,
            happened: 0,
            violation: None,
        };
        trace(|| format!("seed {seed}: {:?}, local: {}, respawn: {}", sim.setup, sim.local, sim.respawn));
        sim.populate();
        sim
    }

    fn populate(&mut self) {
        let local = self.local;
        for _ in 0..self.setup.quorum() {
            self.boot("home", local);
        }
        let kinds: Vec<Kind> = match self.swarm.kinds.len() {
            0 => Vec::new(),
            // Few kinds at a time, so that each gets its chance.
            count => (0..self.rng.number(&(1..=4)))
                .map(|_| self.swarm.kinds[self.rng.number(&(0..=count as u64 - 1)) as usize])
                .collect(),
        };
        for _ in 0..self.rng.number(&self.swarm.faults.clone()) {
            let at = self.rng.duration(&self.swarm.fault_times.clone());
            if let Some(kind) = self.rng.pick(&kinds) {
                self.schedule(at, Happening::Fault(kind));
            }
        }
    }

    /// What one process alone would have after so many steps.
    pub(crate) fn serial(&self, step: u64) -> State {
        self.serial[step as usize]
    }

    /// A checkpoint is whole in a while, if the worker lives.
    pub(crate) fn save_soon(&mut self, id: WorkerId, state: State) {
        let takes = self.rng.duration(&(Duration::ZERO..=Duration::from_millis(500)));
        self.schedule_in(takes, Happening::Durable(id, state.step, state.hash));
    }

    /// A checkpoint is whole.
    pub(crate) fn save(&mut self, id: WorkerId, state: State) {
        trace(|| format!("{:?} {id} has saved step {}", self.now, state.step));
        self.observe(&Fact::Saved(state));
        self.storage.insert(state.step, state);
    }

    /// Lets something happen at a time.
    pub(crate) fn schedule(&mut self, at: Duration, happening: Happening) {
        self.scheduled += 1;
        self.queue.push(Reverse((at.max(self.now), self.scheduled, happening)));
    }

    /// Lets something happen in a while.
    pub(crate) fn schedule_in(&mut self, delay: Duration, happening: Happening) {
        self.schedule(self.now + delay, happening);
    }

    /// Holds a fact against all invariants.
    pub(crate) fn observe(&mut self, fact: &Fact<'_>) {
        if self.violation.is_none() {
            self.violation = self.invariants.observe(self.now, fact).err();
        }
    }

    /// Notes why the run may end early.
    pub(crate) fn cause(&mut self, cause: Cause) {
        self.observe(&Fact::Caused(cause));
    }

    /// Where the run is.
    pub(crate) fn phase(&self) -> Phase {
        self.coordinator.registry.phase()
    }

    /// How the run ended.
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.coordinator.end.as_ref().map(|(outcome, _)| outcome)
    }

    /// Runs until `done` holds, or `until` at the latest; whether it holds.
    pub(crate) fn run_until(
        &mut self,
        until: Duration,
        done: impl Fn(&Self) -> bool,
    ) -> Result<bool, Violation> {
        loop {
            if let Some(violation) = self.violation.clone() {
                return Err(violation);
            }
            if done(self) {
                return Ok(true);
            }
            match self.queue.peek() {
                Some(Reverse((at, ..))) if *at <= until => self.advance()?,
                _ => {
                    self.now = self.now.max(until);
                    return Ok(false);
                }
            }
        }
    }

    /// Runs for a while.
    pub(crate) fn run_for(&mut self, duration: Duration) -> Result<(), Violation> {
        self.run_until(self.now + duration, |_| false).map(|_| ())
    }

    fn advance(&mut self) -> Result<(), Violation> {
        let Some(Reverse((at, _, happening))) = self.queue.pop() else { return Ok(()) };
        self.now = at;
        self.happened += 1;
        if self.happened > HAPPENINGS_MAX {
            let text = format!("{HAPPENINGS_MAX} things have happened, and it goes on: {happening:?}");
            return Err(Violation { at, invariant: "progress", text });
        }
        match happening {
            Happening::Upward(worker, number) => self.coordinator_receives(worker, number),
            Happening::Succeed => self.succeed(),
            Happening::Watch(incarnation) => self.watch_lease(incarnation),
            Happening::Exited(worker) => self.launcher_notices(worker),
            Happening::Tick => self.coordinator_ticks(),
            Happening::Dismiss => self.coordinator_dismisses(),
            Happening::Fault(kind) => self.strike(kind),
            Happening::Restock => self.restock(),
            Happening::Resume(worker) => self.resume(worker),
            Happening::Downward(worker, _)
            | Happening::Look(worker)
            | Happening::HoldNow(worker)
            | Happening::Wake(worker, _)
            | Happening::Heartbeat(worker)
            | Happening::Total(worker, ..)
            | Happening::Transferred(worker, _)
            | Happening::Durable(worker, ..)
            | Happening::Broken(worker, ..) => self.happens_to(worker, happening),
        }
        Ok(())
    }

    /// Something happens to a worker, now or when it is awake again.
    fn happens_to(&mut self, id: WorkerId, happening: Happening) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.is_gone() || worker.frozen {
            return;
        }
        if worker.paused_until.is_some() {
            return worker.deferred.push(happening);
        }
        match happening {
            Happening::Downward(_, number) => self.worker_receives(id, number),
            Happening::Look(_) => self.look_for_coordinator(id),
            Happening::HoldNow(_) => self.hold_now(id),
            Happening::Wake(_, token) => self.worker_wakes(id, token),
            Happening::Heartbeat(_) => self.worker_beats(id),
            Happening::Total(_, generation, step) => self.worker_commits(id, generation, step),
            Happening::Transferred(_, generation) => self.worker_has_state(id, generation),
            Happening::Durable(_, step, hash) => self.save(id, State { step, hash }),
            Happening::Broken(_, generation, rank) => self.worker_loses_neighbour(id, generation, rank),
            _ => {}
        }
    }

    /// From here on nothing goes wrong: pauses, stalls and cuts end, missing workers are started.
    pub(crate) fn stop_faults(&mut self) {
        trace(|| format!("{:?} faults stop", self.now));
        self.calm = true;
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        for id in ids {
            self.worker(id).paused_until = Some(self.now);
            self.resume(id);
            self.worker(id).deaf = false;
            self.listen(id);
        }
        self.heal_network();
        self.heal_rings();
        self.schedule(self.now, Happening::Restock);
        if self.coordinator.dead {
            self.schedule(self.now, Happening::Succeed);
        }
        self.observe(&Fact::FaultsStopped);
    }

    /// What waited for a paused worker happens now, unless it was paused for longer meanwhile.
    fn resume(&mut self, id: WorkerId) {
        let now = self.now;
        let worker = self.worker(id);
        if worker.paused_until.is_none_or(|until| until > now) {
            return;
        }
        worker.paused_until = None;
        let deferred = std::mem::take(&mut worker.deferred);
        deferred.into_iter().for_each(|happening| self.schedule(now, happening));
    }

    /// Starts what the run lacks.
    fn restock(&mut self) {
        if self.phase() == Phase::Ended {
            return;
        }
        let first = self.coordinator.registry.workers().next();
        let first = first.and_then(|(id, _)| self.workers.get(&id)).map(|worker| worker.fingerprint);
        let kind = self.fingerprint.or(first);
        let comes = |worker: &&Worker| (worker.is_coming() || worker.comes_back()) && !worker.frozen;
        let coming = self.workers.values().filter(comes);
        let coming = coming.filter(|worker| kind.is_none_or(|kind| kind == worker.fingerprint)).count();
        let there = self.coordinator.registry.workers().count();
        let missing = self.setup.quorum().saturating_sub(coming + there);
        for _ in 0..missing {
            self.boot(kind.unwrap_or("home"), false);
        }
        self.schedule_in(RESTOCK, Happening::Restock);
    }

    /// How long the work takes, once nothing goes wrong: all steps by one worker, and the last checkpoint to a far store.
    fn work(&self) -> Duration {
        let step = Duration::from_millis(30) * self.setup.micro_batches + Duration::from_millis(100);
        let slow = self.workers.values().filter(|worker| worker.slow && !worker.is_gone()).count() as u32;
        step * self.setup.steps as u32 + Duration::from_secs(15) + self.slow_work + 3 * TIMEOUT * slow
    }

    /// Stops faults and demands that the run ends within three timeouts and the time of its work; then watches a while longer.
    pub(crate) fn settle(&mut self) -> Result<(), Violation> {
        self.stop_faults();
        self.run_until(self.now + 3 * TIMEOUT + self.work(), |sim| sim.phase() == Phase::Ended)?;
        self.observe(&Fact::TimeIsUp);
        self.run_for(TIMEOUT + TIMEOUT / 4)
    }
}
