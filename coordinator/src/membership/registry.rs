//! The coordinator's half: from workers that come and go to rings.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::assign::assigned;
use crate::ids::WorkerId;
use crate::protocol::{Failure, Finish, Formation, Place};

/// A lost link is told by both its ends, and by the neighbours of whoever left because of it: for this part of a timeout
/// the accused may speak for itself, or its death be confirmed, before it is called lost.
const HEARING: u32 = 20;

/// What a registry must know of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// M of the recipe.
    pub micro_batches: u32,
    /// Workers to wait for before the first ring.
    pub expected: u32,
    /// No more than this are admitted.
    pub max_workers: u32,
    /// How long a silent worker is waited for.
    pub timeout: Duration,
    /// Whether workers with different fingerprints may train together.
    pub mixed: bool,
}

impl Config {
    /// Workers of the first ring: no more are waited for than are admitted.
    fn quorum(&self) -> usize {
        self.expected.min(self.max_workers) as usize
    }
}

/// A worker that wants to take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Where ring neighbours reach it.
    pub address: String,
    /// Binary, device and processor features.
    pub fingerprint: String,
}

/// What happens to a registry.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A worker said hello.
    Joined(WorkerId, Candidate),
    /// Anything was heard of a worker.
    Heard(WorkerId),
    /// A worker has loaded its state.
    Ready(WorkerId, u64),
    /// A worker's links of this generation are up.
    Linked(WorkerId, u64),
    /// A worker is done.
    Finished(WorkerId, Finish),
    /// A worker cannot go on.
    Failed(WorkerId, Failure),
    /// A worker's process or connection is gone.
    Lost(WorkerId, String),
    /// A process that should have become a worker ended before it did.
    Abandoned {
        /// How it ended.
        cause: String,
        /// Whether it said that the user's input is at fault.
        bad_input: bool,
    },
    /// The user wants to stop.
    StopRequested,
    /// Time has passed.
    Tick,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Completed(Finish),
    /// Stopped on request, after a checkpoint.
    Stopped(Finish),
    /// The user's input is at fault.
    BadInput,
    /// A worker was lost.
    WorkerLost(WorkerId),
    /// Something else.
    Failed,
}

/// What the driver does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Let the worker in.
    Admit(WorkerId),
    /// Send it away.
    Refuse(WorkerId, String),
    /// Give a ring to all its members.
    Form(Formation),
    /// Tell all members of the ring to train.
    Start(Formation),
    /// Ask all members to stop after a step.
    Stop,
    /// The run is over: tell everybody.
    End(Outcome, String),
}

/// Where the run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for workers.
    Gathering,
    /// Members link up.
    Forming,
    /// Members train.
    Running,
    /// Over.
    Ended,
}

#[derive(Debug, Clone)]
struct Worker {
    candidate: Candidate,
    heard: Instant,
    /// Steps done, once its state is loaded.
    ready: Option<u64>,
    finish: Option<Finish>,
}

/// The coordinator's half of membership.
#[derive(Debug, Clone)]
pub struct Registry {
    config: Config,
    phase: Phase,
    now: Instant,
    workers: BTreeMap<WorkerId, Worker>,
    generation: u64,
    formation: Option<Formation>,
    linked: BTreeSet<WorkerId>,
    /// Who says of whom that it is gone, and how it puts it.
    accusations: BTreeMap<WorkerId, (WorkerId, String)>,
    /// Until when the accused are heard.
    hearing: Option<Instant>,
    stop: bool,
}

impl Registry {
    /// A run without workers.
    pub fn new(config: Config, now: Instant) -> Self {
        let (workers, linked) = (BTreeMap::new(), BTreeSet::new());
        Self {
            config,
            phase: Phase::Gathering,
            now,
            workers,
            generation: 0,
            formation: None,
            linked,
            accusations: BTreeMap::new(),
            hearing: None,
            stop: false,
        }
    }

    /// Where the run is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The ring there is.
    pub fn formation(&self) -> Option<&Formation> {
        self.formation.as_ref()
    }

    /// Workers, with how long ago each was heard of.
    pub fn workers(&self) -> impl Iterator<Item = (WorkerId, Duration)> {
        self.workers.iter().map(|(id, worker)| (*id, self.now - worker.heard))
    }

    /// When [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        let awaited = self.workers.values().filter(|worker| worker.finish.is_none());
        let silent = awaited.map(|worker| worker.heard + self.config.timeout);
        silent.chain(self.hearing).min().filter(|_| self.phase != Phase::Ended)
    }

    /// Takes in one event, then decides once: every way to a ring, and to the end, passes through here.
    ///
    /// # Panics
    /// Where time runs backward.
    pub fn step(&mut self, now: Instant, event: Event, actions: &mut Vec<Action>) {
        assert!(now >= self.now, "time runs forward");
        self.now = now;
        if self.phase == Phase::Ended {
            return;
        }
        self.absorb(event, actions);
        self.notice_silence(actions);
        self.close_hearing(actions);
        match self.phase {
            Phase::Gathering if self.stop => {
                self.end(Outcome::Failed, "stopped before training began", actions)
            }
            Phase::Gathering if self.all_ready() => self.form(actions),
            Phase::Forming if self.all_linked() => self.start(actions),
            Phase::Running if self.all_finished() => self.finish(actions),
            Phase::Gathering | Phase::Forming | Phase::Running | Phase::Ended => {}
        }
    }

    fn absorb(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Joined(id, candidate) => self.join(id, candidate, actions),
            Event::Heard(id) => self.hear(id),
            Event::Ready(id, step) => {
                self.hear(id);
                if let Some(worker) = self.workers.get_mut(&id) {
                    worker.ready = Some(step);
                }
            }
            Event::Linked(id, generation) => {
                self.hear(id);
                if self.phase == Phase::Forming && generation == self.generation && self.is_member(id) {
                    self.linked.insert(id);
                }
            }
            Event::Finished(id, finish) => {
                self.hear(id);
                // Who has not trained is not done, whatever he says: he would not be missed any more.
                if let Some(worker) = self.workers.get_mut(&id).filter(|_| self.phase == Phase::Running) {
                    worker.finish = Some(finish);
                }
            }
            Event::Failed(id, failure) => self.fail(id, &failure, actions),
            Event::Lost(id, cause) => self.lose(id, &cause, actions),
            Event::Abandoned { cause, bad_input } if matches!(self.phase, Phase::Gathering) => {
                let outcome = if bad_input { Outcome::BadInput } else { Outcome::Failed };
                self.end(outcome, &format!("a worker ended before it joined: {cause}"), actions);
            }
            Event::StopRequested => {
                if !std::mem::replace(&mut self.stop, true) && self.phase != Phase::Gathering {
                    actions.push(Action::Stop);
                }
            }
            Event::Abandoned { .. } | Event::Tick => {}
        }
    }

    fn hear(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.heard = self.now;
        }
    }

    fn is_member(&self, id: WorkerId) -> bool {
        self.formation.iter().flat_map(|formation| &formation.places).any(|place| place.worker == id)
    }

    fn join(&mut self, id: WorkerId, candidate: Candidate, actions: &mut Vec<Action>) {
        if self.workers.contains_key(&id) {
            return;
        }
        if let Some(reason) = self.objection(&candidate) {
            actions.push(Action::Refuse(id, reason));
            return;
        }
        self.workers.insert(id, Worker { candidate, heard: self.now, ready: None, finish: None });
        actions.push(Action::Admit(id));
    }

    /// Why a worker may not take part, if so.
    fn objection(&self, candidate: &Candidate) -> Option<String> {
        let limit = self.config.quorum();
        if self.phase != Phase::Gathering {
            return Some("the run is under way: workers cannot join a running one yet".to_owned());
        }
        if self.workers.len() >= limit {
            return Some(format!(
                "the run has its {limit} workers: raise --workers or [elastic] max_workers"
            ));
        }
        let first = &self.workers.values().next()?.candidate.fingerprint;
        (!self.config.mixed && *first != candidate.fingerprint).then(|| {
            format!(
                "this worker's binary or device ({}) is not the run's ({first}), so its results would have other \
                 bits: use one binary and kind of device, or start the run with --mixed",
                candidate.fingerprint
            )
        })
    }

    fn all_ready(&self) -> bool {
        let ready = |worker: &Worker| worker.ready.is_some();
        self.workers.len() >= self.config.quorum() && self.workers.values().all(ready)
    }

    fn form(&mut self, actions: &mut Vec<Action>) {
        let steps: BTreeSet<u64> = self.workers.values().filter_map(|worker| worker.ready).collect();
        if steps.len() > 1 {
            let reason = format!(
                "workers start from different steps {steps:?}: another run writes the same checkpoints"
            );
            return self.end(Outcome::Failed, &reason, actions);
        }
        self.generation += 1;
        let ranks = self.workers.len() as u32;
        let place = |(rank, (id, worker)): (u32, (&WorkerId, &Worker))| Place {
            worker: *id,
            address: worker.candidate.address.clone(),
            micro_batches: assigned(self.config.micro_batches, ranks, rank).collect(),
        };
        let places = (0..).zip(&self.workers).map(place).collect();
        let step = steps.into_iter().next().unwrap_or(0);
        let formation = Formation { generation: self.generation, step, places };
        self.linked.clear();
        self.phase = Phase::Forming;
        self.formation = Some(formation.clone());
        actions.push(Action::Form(formation));
    }

    fn all_linked(&self) -> bool {
        self.linked.len() == self.workers.len()
    }

    fn start(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Running;
        actions.extend(self.formation.clone().map(Action::Start));
        if self.stop {
            actions.push(Action::Stop);
        }
    }

    fn all_finished(&self) -> bool {
        self.workers.values().all(|worker| worker.finish.is_some())
    }

    fn finish(&mut self, actions: &mut Vec<Action>) {
        let finishes: Vec<&Finish> =
            self.workers.values().filter_map(|worker| worker.finish.as_ref()).collect();
        let Some(mut finish) = finishes.first().map(|&first| first.clone()) else { return };
        if let Some(other) = finishes.iter().find(|other| other.state_hash != finish.state_hash) {
            let (a, b) = (finish.state_hash, other.state_hash);
            let reason = format!("workers ended with different states: {a:016x} and {b:016x}");
            return self.end(Outcome::Failed, &reason, actions);
        }
        finish.held_out_loss = finishes.iter().find_map(|finish| finish.held_out_loss);
        match finish.completed {
            true => self.end(Outcome::Completed(finish), "all steps are done", actions),
            false => self.end(Outcome::Stopped(finish), "stopped on request", actions),
        }
    }

    fn notice_silence(&mut self, actions: &mut Vec<Action>) {
        let timeout = self.config.timeout;
        // Who is done may be silent.
        let silent = |worker: &Worker| worker.finish.is_none() && self.now >= worker.heard + timeout;
        let gone: Vec<WorkerId> =
            self.workers.iter().filter(|(_, worker)| silent(worker)).map(|(id, _)| *id).collect();
        for id in gone {
            self.lose(id, &format!("nothing was heard of it for {timeout:?}"), actions);
        }
    }

    /// A worker says that it cannot go on, for its own reason or because it lost a neighbour.
    fn fail(&mut self, id: WorkerId, failure: &Failure, actions: &mut Vec<Action>) {
        if !self.workers.contains_key(&id) {
            return;
        }
        let places = self.formation.iter().flat_map(|formation| &formation.places);
        let lost = failure.lost_rank.and_then(|rank| places.map(|place| place.worker).nth(rank as usize));
        if let Some(lost) = lost.filter(|&lost| lost != id) {
            self.accusations.insert(id, (lost, failure.text.clone()));
            self.hearing.get_or_insert(self.now + self.config.timeout / HEARING);
            return;
        }
        let outcome = if failure.bad_input { Outcome::BadInput } else { Outcome::Failed };
        self.end(outcome, &format!("{id}: {}", failure.text), actions);
    }

    /// Where nothing better was heard, the accused is lost; but one that accuses another in turn only left because of it.
    fn close_hearing(&mut self, actions: &mut Vec<Action>) {
        if self.hearing.is_none_or(|until| until > self.now) {
            return;
        }
        self.hearing = None;
        let mut accusations = std::mem::take(&mut self.accusations);
        let mut next = accusations.pop_first();
        while let Some((accuser, (lost, text))) = next {
            next = accusations.remove_entry(&lost);
            if next.is_none() {
                self.end(Outcome::WorkerLost(lost), &format!("{accuser}: {text}"), actions);
            }
        }
    }

    /// A worker is gone. Nobody takes its place yet, so the run is over, unless it was done.
    fn lose(&mut self, id: WorkerId, cause: &str, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(&id) else { return };
        let when = match self.phase {
            Phase::Running if worker.finish.is_some() => return,
            Phase::Running => format!("in generation {}", self.generation),
            Phase::Gathering | Phase::Forming | Phase::Ended => "before training began".to_owned(),
        };
        self.end(Outcome::WorkerLost(id), &format!("{id} was lost {when}: {cause}"), actions);
    }

    fn end(&mut self, outcome: Outcome, reason: &str, actions: &mut Vec<Action>) {
        if self.phase == Phase::Ended {
            return;
        }
        self.phase = Phase::Ended;
        actions.push(Action::End(outcome, reason.to_owned()));
    }
}

#[cfg(test)]
mod tests;
