//! The fleet: workers that say what real ones say, when they would, and that are lost at random.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use mattock_coordinator::membership::Config;
use mattock_coordinator::protocol::{About, Break, Formation, FromWorker, Holding, Pulse, StepReport};
use mattock_coordinator::{WorkerId, wire};
use mattock_data::keys::Stream;

use super::super::crowd::report;
use super::desk::{Decision, Desk, Load, Said};
use super::{Fleet, SECONDS_PER_DAY};

/// Messages that arrive within it are taken in together, each at its own time; answers take at least as long.
const SLICE: Duration = Duration::from_millis(10);
/// Pulses within a timeout.
const PULSES: u32 = 8;
/// A worker answers within it.
const ANSWER: Duration = Duration::from_millis(50);
/// Ranks report a step within it.
const REPORT: Duration = Duration::from_millis(100);
/// A launcher notices within it that a process has ended.
const NOTICE: Duration = Duration::from_millis(100);
/// How long one who joins takes until it may be put into a ring.
const LOAD: Duration = Duration::from_secs(5);

/// What the wall clock brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Landmark {
    /// Somebody is lost.
    Interruption,
    /// Another joins in the place of one who was lost.
    Replacement,
}

/// What happens next.
enum What {
    Beat(WorkerId),
    Say(WorkerId, Box<FromWorker>),
    Exit(WorkerId),
    /// A ring may commit the step after so many.
    StepEnds(u64, u64),
}

struct Due {
    at: Duration,
    number: u64,
    what: What,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A worker.
struct Worker {
    /// Its host is gone, or its process.
    dead: bool,
    /// Its training stands still.
    stuck: bool,
    progress: u64,
    /// It starts with the run's first state.
    first: bool,
}

/// The newest ring.
struct Ring {
    formation: Formation,
    /// Steps done.
    step: u64,
    /// Since when the next one is computed; none where it does not train.
    since: Option<Duration>,
    /// When the last step was committed.
    committed: Duration,
    /// Steps done in this ring.
    own_steps: u64,
    /// One of its members was lost.
    broken: bool,
}

/// The fleet, and the coordinator's desk.
pub(super) struct World<'a> {
    fleet: &'a Fleet,
    draw: Stream,
    origin: Instant,
    now: Duration,
    /// The simulated time at which the wall clock was started,
    started: Duration,
    /// and what was skipped since.
    pub(super) skipped: Duration,
    /// How long nobody trained.
    pub(super) standing: Duration,
    /// Steps done since the wall clock was started, those included that were skipped.
    pub(super) steps: f64,
    queue: BinaryHeap<Reverse<Due>>,
    scheduled: u64,
    landmarks: BinaryHeap<Reverse<(Duration, Landmark)>>,
    workers: BTreeMap<WorkerId, Worker>,
    booted: u64,
    ring: Option<Ring>,
    pub(super) desk: Desk,
}

impl<'a> World<'a> {
    pub(super) fn new(fleet: &'a Fleet) -> Self {
        let config = Config {
            micro_batches: fleet.workers * fleet.share,
            expected: fleet.workers,
            min_workers: 1,
            max_workers: fleet.workers * 2,
            timeout: fleet.timeout,
            mixed: false,
            divided: false,
        };
        let origin = Instant::now();
        let mut world = Self {
            fleet,
            draw: Stream::new(fleet.seed),
            origin,
            now: Duration::ZERO,
            started: Duration::ZERO,
            skipped: Duration::ZERO,
            standing: Duration::ZERO,
            steps: 0.0,
            queue: BinaryHeap::new(),
            scheduled: 0,
            landmarks: BinaryHeap::new(),
            workers: BTreeMap::new(),
            booted: 0,
            ring: None,
            desk: Desk::new(config, origin),
        };
        (0..fleet.workers).for_each(|_| world.boot(true));
        world
    }

    pub(super) fn now(&self) -> Duration {
        self.now
    }

    pub(super) fn load(&self) -> Load {
        self.desk.load
    }

    pub(super) fn wall(&self) -> Duration {
        self.now - self.started + self.skipped
    }

    pub(super) fn start_the_wall_clock(&mut self) {
        (self.started, self.standing, self.steps) = (self.now, Duration::ZERO, 0.0);
    }

    /// Where it is, for an error.
    pub(super) fn state(&self) -> String {
        self.desk.phase()
    }

    /// Whether a ring that all are in has done so many steps.
    pub(super) fn is_calm(&self, steps: u64) -> bool {
        let Some(ring) = self.ring.as_ref().filter(|ring| ring.trains() && ring.own_steps >= steps) else {
            return false;
        };
        self.workers.values().filter(|worker| !worker.dead).count() == ring.formation.places.len()
    }

    pub(super) fn next_landmark(&self) -> Duration {
        self.landmarks.peek().map_or(Duration::MAX, |Reverse((at, _))| *at)
    }

    pub(super) fn take_landmark(&mut self) -> Option<Landmark> {
        if self.next_landmark() > self.wall() {
            return None;
        }
        self.landmarks.pop().map(|Reverse((_, landmark))| landmark)
    }

    /// The next interruption comes whenever it comes: intervals are exponential.
    pub(super) fn expect_interruption(&mut self) {
        let per_second = f64::from(self.fleet.workers) * self.fleet.rate / SECONDS_PER_DAY;
        let wait = -(1.0 - self.draw.uniform()).ln() / per_second;
        let at = self.wall() + Duration::from_secs_f64(wait.min(1e9));
        self.landmarks.push(Reverse((at, Landmark::Interruption)));
    }

    /// Lets the wall clock go on until `due`; the last part of it, less than a step, is simulated, so that what comes then may
    /// come at any moment of a step.
    ///
    /// # Errors
    /// See [`World::run_until`].
    pub(super) fn skip_to(&mut self, due: Duration) -> Result<(), String> {
        let step = self.step_time();
        let rest = due.saturating_sub(self.wall());
        let simulated = step.mul_f64(self.draw.uniform()).min(rest);
        self.skipped += rest - simulated;
        self.steps += (rest - simulated).as_secs_f64() / step.as_secs_f64();
        self.run_until(self.now + simulated, |_| false).map(|_| ())
    }

    /// Simulates until `done`, or `until` at the latest; whether it is done.
    ///
    /// # Errors
    /// Where the run would end.
    pub(super) fn run_until(
        &mut self,
        until: Duration,
        done: impl Fn(&Self) -> bool,
    ) -> Result<bool, String> {
        while !done(self) {
            if self.now >= until {
                return Ok(false);
            }
            let end = (self.now + SLICE).min(until);
            if !self.ring.as_ref().is_some_and(|ring| ring.trains() && ring.since <= Some(self.now)) {
                self.standing += end - self.now;
            }
            let mut said = Vec::new();
            while self.queue.peek().is_some_and(|Reverse(due)| due.at <= end) {
                let Some(Reverse(Due { at, what, .. })) = self.queue.pop() else { break };
                self.now = self.now.max(at);
                said.extend(self.happen(what)?.map(|said| (self.origin + self.now, said)));
            }
            self.now = end;
            if self.desk.deadline().is_some_and(|deadline| deadline <= self.origin + end) {
                said.push((self.origin + end, Said::Tick));
            }
            for decision in self.desk.take_in(&said)? {
                self.obey(decision);
            }
        }
        Ok(true)
    }

    /// Somebody of the ring is lost: his process, his host, or his device. The shares are round numbers, near what Llama 3's
    /// report tells of causes.
    pub(super) fn interrupt(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let rank = (self.draw.uniform() * ring.formation.places.len() as f64) as usize;
        ring.broken = true;
        let places = &ring.formation.places;
        let (id, count, generation) = (places[rank].worker, places.len(), ring.formation.generation);
        let neighbours = [places[(rank + 1) % count].worker, places[(rank + count - 1) % count].worker];
        let kind = self.draw.uniform();
        let worker = self.workers.get_mut(&id);
        match kind {
            kind if kind < 0.6 => {
                worker.into_iter().for_each(|worker| worker.dead = true);
                self.later(NOTICE, What::Exit(id));
            }
            kind if kind < 0.9 => {
                worker.into_iter().for_each(|worker| worker.dead = true);
                for neighbour in neighbours {
                    let text = "a link fell silent".to_owned();
                    let broken = Break { generation, lost_rank: Some(rank as u32), text };
                    self.later(
                        self.fleet.timeout,
                        What::Say(neighbour, Box::new(FromWorker::Broken(broken))),
                    );
                }
            }
            _ => worker.into_iter().for_each(|worker| worker.stuck = true),
        }
        self.landmarks.push(Reverse((self.wall() + self.fleet.replace, Landmark::Replacement)));
    }

    pub(super) fn join(&mut self) {
        self.boot(false);
    }

    fn boot(&mut self, first: bool) {
        let id = WorkerId(self.booted);
        self.booted += 1;
        self.workers.insert(id, Worker { dead: false, stuck: false, progress: 0, first });
        let about = About {
            pid: id.0 as u32,
            host: format!("host-{}", id.0 / 8),
            address: format!("10.{}.{}.{}:40000", id.0 >> 16 & 255, id.0 >> 8 & 255, id.0 & 255),
            fingerprint: "one binary, one kind of device".to_owned(),
        };
        let soon = self.within(Duration::from_secs(1));
        self.later(soon, What::Say(id, Box::new(FromWorker::Hello(about))));
    }

    fn within(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.draw.uniform())
    }

    fn later(&mut self, wait: Duration, what: What) {
        self.scheduled += 1;
        self.queue.push(Reverse(Due { at: self.now + wait, number: self.scheduled, what }));
    }

    /// A step takes as long as whoever has most to do in it.
    fn step_time(&self) -> Duration {
        let most =
            self.ring.as_ref().map_or(self.fleet.share as usize, |ring| ring.most(ring.formation.step + 1));
        self.micro_batch() * most as u32
    }

    fn micro_batch(&self) -> Duration {
        self.fleet.step / self.fleet.share
    }

    fn is_well(&self, id: WorkerId) -> bool {
        self.workers.get(&id).is_some_and(|worker| !worker.dead)
    }

    fn happen(&mut self, what: What) -> Result<Option<Said>, String> {
        match what {
            What::Beat(id) => {
                let slowest_ms = self.micro_batch().as_millis() as u64;
                let Some(worker) = self.workers.get_mut(&id).filter(|worker| !worker.dead) else {
                    return Ok(None);
                };
                worker.progress += u64::from(!worker.stuck);
                let pulse = Pulse { progress: worker.progress, busy: true, slowest_ms };
                self.later(self.fleet.timeout / PULSES, What::Beat(id));
                encoded(id, &FromWorker::Pulse(pulse)).map(Some)
            }
            What::Say(id, message) if self.is_well(id) => encoded(id, &message).map(Some),
            What::Say(..) => Ok(None),
            What::Exit(id) => Ok(Some(Said::Exited(id))),
            What::StepEnds(generation, step) => {
                self.commit(generation, step);
                Ok(None)
            }
        }
    }

    fn commit(&mut self, generation: u64, done: u64) {
        let now = self.now;
        let Some(ring) =
            self.ring.as_mut().filter(|ring| ring.formation.generation == generation && ring.trains())
        else {
            return;
        };
        ring.step = done + 1;
        ring.own_steps += 1;
        (ring.since, ring.committed) = (Some(now), now);
        let reports: Vec<(WorkerId, StepReport)> = (0..)
            .zip(&ring.formation.places)
            .map(|(rank, place)| (place.worker, report(&ring.formation, rank, done)))
            .collect();
        let next = self.micro_batch() * ring_most(&self.ring, done + 1) as u32;
        self.steps += 1.0;
        for (worker, report) in reports {
            let soon = self.within(REPORT);
            self.later(soon, What::Say(worker, Box::new(FromWorker::Step(report))));
        }
        self.later(next, What::StepEnds(generation, done + 1));
    }

    fn obey(&mut self, decision: Decision) {
        match decision {
            Decision::Admit(id) => {
                let first = self.workers.get(&id).is_some_and(|worker| worker.first);
                let (step, longest) = if first { (Some(0), Duration::from_secs(1)) } else { (None, LOAD) };
                let (load, beat) = (self.within(longest), self.within(self.fleet.timeout / PULSES));
                self.later(load, What::Say(id, Box::new(FromWorker::Ready { step })));
                self.later(beat, What::Beat(id));
            }
            Decision::Lose(id) => drop(self.workers.remove(&id)),
            Decision::Recall { generation, members } => self.recall(generation, &members),
            Decision::Form(formation) => {
                let generation = formation.generation;
                for place in &formation.places {
                    let takes = self.fleet.link / 4 + self.within(self.fleet.link * 3 / 4);
                    self.later(takes, What::Say(place.worker, Box::new(FromWorker::Linked { generation })));
                }
                let (step, committed) = (formation.step, self.now);
                let lost = |id| self.workers.get(&id).is_none_or(|worker| worker.dead || worker.stuck);
                let broken = formation.places.iter().any(|place| lost(place.worker));
                self.ring = Some(Ring { formation, step, since: None, committed, own_steps: 0, broken });
            }
            Decision::Start(generation) => self.start(generation),
        }
    }

    fn recall(&mut self, generation: u64, members: &[WorkerId]) {
        let (now, micro_batch) = (self.now, self.micro_batch());
        let Some(ring) = &mut self.ring else { return };
        // What was reported before must have arrived.
        let earliest = (ring.committed + REPORT).saturating_sub(now);
        let computed =
            ring.since.map_or(0.0, |since| now.saturating_sub(since).div_duration_f64(micro_batch)) as usize;
        ring.since = None;
        let places = ring.formation.places.iter();
        let shares: BTreeMap<WorkerId, Vec<u32>> = places
            .map(|place| (place.worker, place.share(ring.formation.step, ring.step)))
            .map(|(worker, share)| (worker, share[..computed.min(share.len())].to_vec()))
            .collect();
        let step = Some(ring.step);
        for id in members {
            let done = shares.get(id).cloned().unwrap_or_default();
            let holding = Holding { step, done, ..Holding::default() };
            let soon = earliest + self.within(ANSWER);
            self.later(soon, What::Say(*id, Box::new(FromWorker::Held { generation, holding })));
        }
    }

    fn start(&mut self, generation: u64) {
        let (now, micro_batch, transfer) = (self.now, self.micro_batch(), self.fleet.transfer);
        let Some(ring) = self.ring.as_mut().filter(|ring| ring.formation.generation == generation) else {
            return;
        };
        let begins = if ring.formation.source.is_some() { transfer } else { Duration::ZERO };
        ring.since = Some(now + begins);
        let (done, most) = (ring.step, ring.most(ring.step));
        self.later(begins + micro_batch * most as u32, What::StepEnds(generation, done));
    }
}

impl Ring {
    /// Whether it computes, with all its members.
    fn trains(&self) -> bool {
        self.since.is_some() && !self.broken
    }

    /// The most that a rank does in the step after `done`.
    fn most(&self, done: u64) -> usize {
        let shares = self.formation.places.iter().map(|place| place.share(self.formation.step, done).len());
        shares.max().unwrap_or(0)
    }
}

fn ring_most(ring: &Option<Ring>, done: u64) -> usize {
    ring.as_ref().map_or(1, |ring| ring.most(done))
}

fn encoded(worker: WorkerId, message: &FromWorker) -> Result<Said, String> {
    let bytes = wire::encode(message).map_err(|error| error.to_string())?;
    Ok(Said::Message(worker, bytes))
}
