//! The coordinator's half: from workers that come and go to rings.
//!
//! ```text
//! Gathering ──enough are free──> Forming(g) ──all linked──> Running(g) ──all finished──> Ended
//!     ^                              ^  │ a member lost,        │
//!     │ fewer than min_workers       │  │ or the ring broken    │ the same, or one comes or leaves
//!     └────────────────────────── Recalling <───────────────────┘
//! ```
//!
//! A ring that does not hold is *recalled*: each member that is left says what it holds of the step, and from that
//! moment adds nothing to it. Only when all have said so is the next ring formed, so that nobody still reads what
//! another already changes, and so that exactly what is missing is handed out.
//!
//! Who answers a recall is alive, whatever its neighbours say of it. Who was called lost and does not answer soon is
//! lost; who was not is given the timeout, whatever else is heard of it.
//!
//! A coordinator that has taken over from a dead one gathers too: those who were in the last ring come back to it.

mod arrivals;
mod ending;
mod forming;
mod losses;
mod quarantine;
mod returns;
mod scale;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::detector::{Detector, Progress};
use super::vocabulary::{Action, Candidate, Config, Event, Outcome, Phase};
use crate::ids::WorkerId;
use crate::protocol::{Finish, Formation, Holding};

/// Who was called lost must answer a recall within this part of a timeout.
const HEARING: u32 = 20;
/// And within this at least: a busy machine is no dead one.
const HEARING_MIN: Duration = Duration::from_millis(250);
/// So many rings in a row may break between workers that are alive, before one of them has to go.
const BREAKS_MAX: u32 = 3;

/// Where a worker stands.
#[derive(Debug, Clone, PartialEq)]
enum Standing {
    /// It opens its task, and loads its state.
    Loading,
    /// It may be put into a ring.
    Free(Holding),
    /// It is in the ring.
    Member,
    /// It was in the ring that is recalled, and has to say what it holds, until then at the latest.
    Recalled { until: Instant },
}

#[derive(Debug, Clone)]
struct Worker {
    candidate: Candidate,
    /// A coordinator before this one has let it in.
    came_back: bool,
    heard: Instant,
    standing: Standing,
    /// How far its training is, once it has said so.
    progress: Option<Progress>,
    finish: Option<Finish>,
    /// How it was lost after it was done, if it was.
    gone: Option<String>,
    /// Why it leaves, if it does.
    leaving: Option<String>,
}

impl Worker {
    fn held(&self) -> Option<&Holding> {
        match &self.standing {
            Standing::Free(holding) => Some(holding),
            _ => None,
        }
    }

    /// Whether it has the run's state, or is about to get it.
    fn has_state(&self) -> bool {
        match &self.standing {
            Standing::Loading => false,
            Standing::Free(holding) => holding.step.is_some(),
            Standing::Member | Standing::Recalled { .. } => true,
        }
    }
}

/// Why the ring there is must go.
#[derive(Debug, Clone, Default)]
struct Stale {
    reason: String,
    /// Who says that it does not hold, if nothing better is known.
    broken_by: Option<WorkerId>,
    /// Whom it calls lost.
    accused: Option<WorkerId>,
}

/// The coordinator's half of membership.
#[derive(Debug, Clone)]
pub struct Registry {
    config: Config,
    phase: Phase,
    now: Instant,
    workers: BTreeMap<WorkerId, Worker>,
    detector: Detector,
    generation: u64,
    formation: Option<Formation>,
    linked: BTreeSet<WorkerId>,
    stale: Option<Stale>,
    /// Rings in a row that broke between workers that are alive.
    breaks: u32,
    /// Of the workers that were let in.
    fingerprint: Option<String>,
    /// Who was lost or has left: out for good, whoever comes with that name.
    out: BTreeSet<WorkerId>,
    /// The last that was lost, and why.
    last_lost: Option<(WorkerId, String)>,
    /// How a process ended in whose place no other comes.
    abandoned: Option<String>,
    /// Whether another coordinator had the run before.
    successor: bool,
    /// Until when those are waited for who were in its last ring.
    returning: Option<Instant>,
    /// Until when a process is waited for that was started in the place of another.
    replacement: Option<Instant>,
    /// Who was told to read a divided state from storage.
    restoring: BTreeSet<WorkerId>,
    /// No silence, and no answer that is late, counts before this; later than it only where somebody was heard since.
    look_at: Option<Instant>,
    /// Somebody may have come, or want to leave, whom the ring does not know of.
    unsettled: bool,
    /// The newest beyond so many leave, as soon as it is known who is there.
    shrink_to: Option<u32>,
    /// Who leaves for that, and how many were to stay.
    sent_away: Option<(u32, BTreeSet<WorkerId>)>,
    /// Who was sent away finishes the step that is under way, until then at the latest.
    goes_at: Option<Instant>,
    stop: bool,
}

impl Registry {
    /// A run without workers.
    pub fn new(config: Config, now: Instant) -> Self {
        Self {
            detector: Detector::new(config.timeout),
            config,
            phase: Phase::Gathering,
            now,
            workers: BTreeMap::new(),
            generation: 0,
            formation: None,
            linked: BTreeSet::new(),
            stale: None,
            breaks: 0,
            fingerprint: None,
            out: BTreeSet::new(),
            last_lost: None,
            abandoned: None,
            successor: false,
            returning: None,
            replacement: None,
            restoring: BTreeSet::new(),
            look_at: None,
            unsettled: false,
            shrink_to: None,
            sent_away: None,
            goes_at: None,
            stop: false,
        }
    }

    /// Where the run is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The ring there is, or was last.
    pub fn formation(&self) -> Option<&Formation> {
        self.formation.as_ref()
    }

    /// Workers, with how long ago each was heard of.
    pub fn workers(&self) -> impl Iterator<Item = (WorkerId, Duration)> {
        self.workers.iter().map(|(id, worker)| (*id, self.now - worker.heard))
    }

    /// When [`Event::Tick`] is due: not later than anything has to be noticed, and not much earlier.
    pub fn deadline(&self) -> Option<Instant> {
        self.look_at.filter(|_| self.phase != Phase::Ended)
    }

    /// When somebody's time is over.
    fn earliest(&self) -> Option<Instant> {
        let awaited = self.workers.values().filter(|worker| worker.finish.is_none());
        let silent = awaited.map(|worker| worker.heard + self.config.timeout);
        let heard_out = self.workers.values().filter_map(|worker| match worker.standing {
            Standing::Recalled { until } => Some(until),
            _ => None,
        });
        let planned = self.returning.into_iter().chain(self.replacement).chain(self.goes_at);
        silent.chain(heard_out).chain(planned).min()
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
        // Thousands of workers say every second that they are alive: none of that may cost a look at all of them.
        let looks = is_rare(&event) || self.look_at.is_none_or(|at| now >= at);
        self.unsettled |= !is_routine(&event);
        if self.goes_at.is_some_and(|at| now >= at) {
            self.let_them_go();
        }
        self.absorb(event, actions);
        if looks {
            self.notice_silence(actions);
            self.expire_replacement();
        }
        self.shrink(actions);
        self.decide(actions);
        if looks {
            self.look_at = self.earliest();
        }
    }

    fn decide(&mut self, actions: &mut Vec<Action>) {
        let phase = self.phase;
        match phase {
            Phase::Gathering => self.gather(actions),
            Phase::Recalling => self.close_recall(actions),
            Phase::Forming | Phase::Running if self.is_stale() => self.recall(actions),
            Phase::Forming if self.all_linked() => self.start(actions),
            Phase::Running if self.all_finished() => self.finish(actions),
            Phase::Forming | Phase::Running | Phase::Ended => {}
        }
    }
}

/// What events change.
impl Registry {
    fn absorb(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Joined(id, candidate) => self.join(id, candidate, false, actions),
            Event::CameBack(id, candidate) => self.join(id, candidate, true, actions),
            Event::Past(id, ring) => self.hear_of_ring(id, ring),
            Event::Returned(id, holding) => self.take_back(id, holding),
            Event::Heard(id) => self.hear(id),
            Event::Pulse(id, pulse) => {
                self.hear(id);
                if let Some(worker) = self.workers.get_mut(&id) {
                    worker.progress = Some(self.detector.note(worker.progress, pulse, self.now));
                }
                self.notice_standstill(id, actions);
            }
            Event::Ready(id, step) => {
                self.hear(id);
                let loading = |worker: &&mut Worker| worker.standing == Standing::Loading;
                if let Some(worker) = self.workers.get_mut(&id).filter(loading) {
                    worker.standing = Standing::Free(Holding { step, ..Holding::default() });
                }
            }
            Event::Linked(id, generation) => {
                self.hear(id);
                if self.phase == Phase::Forming && generation == self.generation && self.is_member(id) {
                    self.linked.insert(id);
                }
            }
            Event::Held(id, generation, holding) => self.hold(id, generation, holding),
            Event::Broken(id, broken) => self.break_ring(id, broken),
            Event::Stepped => self.end_step(),
            Event::Disagreed(reason) if self.phase == Phase::Running => {
                self.stale.get_or_insert(Stale { reason, ..Stale::default() });
            }
            Event::Finished(id, finish) => {
                self.hear(id);
                // Who does not train is not done, whatever he says: he would not be missed any more.
                let trains = self.phase == Phase::Running && self.is_member(id);
                if let Some(worker) = self.workers.get_mut(&id).filter(|_| trains) {
                    worker.finish = Some(finish);
                }
            }
            Event::Failed(id, failure) => self.fail(id, &failure, actions),
            Event::Leaving(id, reason) => self.leave(id, reason, actions),
            Event::Lost(id, cause) => self.lose(id, &cause, actions),
            Event::Abandoned { cause, bad_input: true, .. } if !self.is_under_way() => {
                let reason = format!("a worker ended before it joined: {cause}");
                self.end(Outcome::BadInput, &reason, actions);
            }
            Event::Abandoned { cause, left, .. } => {
                if !self.has_begun() || left == 0 {
                    self.abandoned = Some(cause);
                }
            }
            Event::Replaced => self.expect_replacement(),
            Event::Shrink(workers) => self.shrink_to = Some(workers),
            Event::StopRequested => self.request_stop(actions),
            // The ring is over already, or nothing happened.
            Event::Disagreed(_) | Event::Tick => {}
        }
    }

    fn hear(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.heard = self.now;
        }
    }

    /// Whether there ever was a ring.
    fn has_begun(&self) -> bool {
        self.formation.is_some()
    }

    /// Whether somebody has the run's state.
    fn is_under_way(&self) -> bool {
        self.has_begun() && self.workers.values().any(Worker::has_state)
    }

    fn is_member(&self, id: WorkerId) -> bool {
        self.workers.get(&id).is_some_and(|worker| worker.standing == Standing::Member)
    }

    fn join(&mut self, id: WorkerId, candidate: Candidate, came_back: bool, actions: &mut Vec<Action>) {
        if self.workers.contains_key(&id) {
            return;
        }
        if let Some(reason) = self.objection(id, &candidate, came_back) {
            actions.push(Action::Refuse(id, reason));
            return;
        }
        // Who is new does not say what the run is, while others come back who have it.
        if came_back || self.returning.is_none() {
            self.settle_kind(&candidate.fingerprint, actions);
        }
        let (heard, standing) = (self.now, Standing::Loading);
        let (progress, finish, gone, leaving) = (None, None, None, None);
        let worker = Worker { candidate, came_back, heard, standing, progress, finish, gone, leaving };
        self.workers.insert(id, worker);
        actions.push(Action::Admit(id));
    }

    /// Why a worker may not take part, if so.
    fn objection(&self, id: WorkerId, candidate: &Candidate, came_back: bool) -> Option<String> {
        if self.out.contains(&id) {
            return Some(format!("{id} was lost, or has left, and others do its part: join as a new worker"));
        }
        let limit = self.config.max_workers;
        // Who was let in before has its place, whoever was quicker to come.
        let has_place = came_back && self.returning.is_some();
        if self.workers.len() >= limit as usize && !has_place {
            return Some(format!("the run has its {limit} workers: raise [elastic] max_workers"));
        }
        let first = self.fingerprint.as_ref()?;
        (!self.config.mixed && *first != candidate.fingerprint).then(|| another_kind(candidate, first))
    }

    /// A worker wants to leave. Where too few would be left to go on, the run stops in order instead.
    fn leave(&mut self, id: WorkerId, reason: String, actions: &mut Vec<Action>) {
        self.hear(id);
        self.leaves_anyway(id);
        let stays = |(other, worker): &(&WorkerId, &Worker)| **other != id && worker.leaving.is_none();
        let left = self.workers.iter().filter(stays).count();
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if self.returning.is_some() {
            // Who will be left, is known when those have come back who do.
            worker.leaving = Some(reason);
        } else if self.formation.is_none() || !worker.has_state() {
            self.release(id, reason, actions);
        } else if left < self.config.min_workers as usize {
            self.request_stop(actions);
        } else {
            worker.leaving = Some(reason);
        }
    }

    fn release(&mut self, id: WorkerId, reason: String, actions: &mut Vec<Action>) {
        self.workers.remove(&id);
        self.out.insert(id);
        actions.push(Action::Release(id, reason));
    }

    fn request_stop(&mut self, actions: &mut Vec<Action>) {
        let asked = std::mem::replace(&mut self.stop, true);
        if !asked && matches!(self.phase, Phase::Forming | Phase::Running) {
            actions.push(Action::Stop);
        }
    }

    fn hold(&mut self, id: WorkerId, generation: u64, holding: Holding) {
        self.hear(id);
        let asked = self.phase == Phase::Recalling && generation == self.generation;
        let owes = |worker: &&mut Worker| asked && matches!(worker.standing, Standing::Recalled { .. });
        if let Some(worker) = self.workers.get_mut(&id).filter(owes) {
            worker.standing = Standing::Free(holding);
        }
    }
}

/// What is decided.
impl Registry {
    /// Forms a ring of those who are there, if they are enough; else waits, or ends the run where nobody comes.
    fn gather(&mut self, actions: &mut Vec<Action>) {
        if self.is_waiting_for_returns(actions) {
            return;
        }
        if !self.has_begun() && self.stop {
            return self.end(Outcome::Failed, "stopped before training began", actions);
        }
        if let Err(reason) = self.judge(actions) {
            return self.end(Outcome::Failed, &reason, actions);
        }
        self.release_leavers(actions);
        let free = self.free();
        if free.len() >= self.needed() && !self.is_waiting_for_arrivals(free.len()) {
            return self.form(&free, actions);
        }
        match &self.abandoned {
            Some(cause) if !self.has_begun() && self.workers.len() < self.needed() => {
                let reason = format!("a worker ended before it joined: {cause}");
                self.end(Outcome::Failed, &reason, actions);
            }
            Some(_) if self.workers.is_empty() => self.end_of_the_last(actions),
            _ if self.stop && self.workers.is_empty() => {
                let reason = "stopped while it had no worker: resume from its newest checkpoint";
                self.end(Outcome::Failed, reason, actions);
            }
            _ => {}
        }
    }

    /// How many workers the next ring takes.
    fn needed(&self) -> usize {
        // Where another had the run before, those who were expected have come already, and some may be gone for good.
        match (self.has_begun() || self.successor, self.stop) {
            (false, _) => self.config.quorum(),
            // Somebody has to write the checkpoint.
            (_, true) => 1,
            (_, false) => self.config.min_workers.max(1) as usize,
        }
    }

    /// Leavers are free to go once their ring is over.
    fn release_leavers(&mut self, actions: &mut Vec<Action>) {
        self.keep_who_is_needed();
        let leaves = |worker: &Worker| worker.leaving.clone().filter(|_| worker.held().is_some());
        let leavers: Vec<(WorkerId, String)> =
            self.workers.iter().filter_map(|(id, worker)| Some((*id, leaves(worker)?))).collect();
        for (id, reason) in leavers {
            self.release(id, reason, actions);
        }
    }

    fn is_stale(&mut self) -> bool {
        if self.stale.is_some() || self.phase != Phase::Running || !self.unsettled {
            return self.stale.is_some();
        }
        // Nobody is let in to be stopped.
        let comes = |worker: &Worker| worker.held().is_some() && !self.stop;
        let leaves = |id: &WorkerId, worker: &Worker| {
            worker.leaving.is_some() && worker.standing == Standing::Member && self.may_go(id)
        };
        let done = self.workers.values().any(|worker| worker.finish.is_some());
        // Nobody is let in, or let go, when the run is all but over.
        let moves = !done && self.workers.iter().any(|(id, worker)| comes(worker) || leaves(id, worker));
        self.unsettled = moves;
        moves
    }

    /// Ends the ring there is: its members say what they hold.
    fn recall(&mut self, actions: &mut Vec<Action>) {
        let Stale { reason, broken_by, accused } =
            self.stale.take().unwrap_or_else(|| self.coming_and_going());
        self.breaks += u32::from(broken_by.is_some());
        self.phase = Phase::Recalling;
        self.goes_at = None;
        self.bury(actions);
        let mut members = Vec::new();
        for (id, worker) in &mut self.workers {
            if worker.standing == Standing::Member {
                worker.standing = Standing::Recalled { until: self.now + self.config.timeout };
                if worker.finish.take().is_some() {
                    // Until now it could be silent, and what it was at before is over.
                    (worker.heard, worker.progress) = (self.now, None);
                }
                members.push(*id);
            }
        }
        accused.into_iter().for_each(|accused| self.hear_out(accused));
        actions.push(Action::Recall { generation: self.generation, members, reason: reason.clone() });
        if let Some(id) = accused.or(broken_by).filter(|_| self.breaks > BREAKS_MAX) {
            self.breaks = 0;
            let cause = format!("{BREAKS_MAX} rings with it broke in a row; the last time, {reason}");
            self.lose(id, &cause, actions);
        }
        self.close_recall(actions);
    }

    /// Who was lost when it was done was not missed; now that the ring is recalled, it is.
    fn bury(&mut self, actions: &mut Vec<Action>) {
        let gone: Vec<(WorkerId, String)> =
            self.workers.iter().filter_map(|(id, worker)| Some((*id, worker.gone.clone()?))).collect();
        for (id, cause) in gone {
            self.workers.entry(id).and_modify(|worker| worker.finish = None);
            self.lose(id, &cause, actions);
        }
    }

    fn coming_and_going(&self) -> Stale {
        let name = |(id, worker): (&WorkerId, &Worker)| match (&worker.leaving, worker.held()) {
            (Some(reason), _) => Some(format!("{id} leaves: {reason}")),
            (None, Some(_)) => Some(format!("{id} joins")),
            (None, None) => None,
        };
        let reasons: Vec<String> = self.workers.iter().filter_map(name).collect();
        Stale { reason: reasons.join(", "), ..Stale::default() }
    }

    /// When all have said what they hold, the next ring may be formed.
    fn close_recall(&mut self, actions: &mut Vec<Action>) {
        let owes = |worker: &Worker| matches!(worker.standing, Standing::Recalled { .. });
        if self.workers.values().any(owes) {
            return;
        }
        self.phase = Phase::Gathering;
        self.gather(actions);
        if self.phase == Phase::Gathering {
            let ready = self.workers.values().filter(|worker| worker.held().is_some()).count();
            if !self.is_waiting_for_arrivals(ready) {
                actions.push(Action::Wait { ready, needed: self.needed() });
            }
        }
    }

    fn all_linked(&self) -> bool {
        // Only members are counted in.
        self.formation.as_ref().is_some_and(|formation| self.linked.len() == formation.places.len())
    }

    fn start(&mut self, actions: &mut Vec<Action>) {
        (self.phase, self.unsettled) = (Phase::Running, true);
        actions.extend(self.formation.clone().map(Action::Start));
        if self.stop {
            actions.push(Action::Stop);
        }
    }

    fn members(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values().filter(|worker| worker.standing == Standing::Member)
    }
}

/// Whether an event is one of those that never come from all workers within a short time, so that it may cost a look at all.
fn is_rare(event: &Event) -> bool {
    use Event::{Broken, Finished, Held, Linked, Past, Ready, Returned};
    !is_routine(event)
        && !matches!(
            event,
            Broken(..) | Finished(..) | Held(..) | Linked(..) | Past(..) | Ready(..) | Returned(..)
        )
}

/// Whether an event says only that the run goes on.
fn is_routine(event: &Event) -> bool {
    matches!(event, Event::Heard(_) | Event::Pulse(..) | Event::Stepped | Event::Tick)
}

/// Why a worker of another kind than the first does not fit in.
fn another_kind(candidate: &Candidate, first: &str) -> String {
    format!(
        "this worker's binary or device ({}) is not the run's ({first}), so its results would have other bits: use one \
         binary and kind of device, or start the run with --mixed",
        candidate.fingerprint
    )
}

#[cfg(test)]
mod tests;
