//! Between training and the coordinator's recall: what this worker holds, told at once and true from then on.
//!
//! The listening thread answers a recall while training computes. What it has told must stay true, so from that moment
//! nothing more is begun and no state is written:
//!
//! ```text
//! training   begin(m) ── compute ── end(m) ── begin(m') ── ... ── commit ══ write, report ══ reported
//! listener              freeze: done, running ──> Held                      (waits until reported)
//! ```
//!
//! Where the coordinator itself is gone, nobody recalls anything: [`drain`](Gate::drain) lets the step that is under way be
//! finished, lets nothing be begun after it, and then ends the ring as a recall would.
//!
//! It also sees how far training is, and whether it works or waits for others: a process may be alive whose device is not.
//!
//! # Invariants
//! 1. After [`freeze`](Gate::freeze) of a generation, `begin` and `commit` in it fail.
//! 2. A state whose step was told is written, and its step reported, before it is told.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mattock_coordinator::protocol::{Holding, Pulse};

/// The ring is over; what was held has been told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ring was recalled")]
pub struct Recalled;

/// What is held, and whether it may still change.
#[derive(Debug, Default)]
pub struct Gate {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    /// Steps done, if there is a state.
    step: Option<u64>,
    done: BTreeSet<u32>,
    running: Option<u32>,
    /// Hash of the state, where it is known.
    state_hash: Option<u64>,
    /// Hash of the parameters that the next step is computed with, once it is.
    basis: Option<u64>,
    /// Hash of the gradient that ranks differ in, as this one computes it.
    audit: Option<u64>,
    /// The ring that training is in.
    generation: u64,
    /// The newest that was recalled.
    recalled: Option<u64>,
    /// The newest in which no other step may be begun.
    draining: Option<u64>,
    /// A step is committed, but not yet reported.
    writing: bool,
    /// Training takes part in the ring, and has not given it up.
    inside: bool,
    work: Work,
}

/// Pieces of work, one after the other.
#[derive(Debug, Default, Clone, Copy)]
struct Work {
    /// How many have begun or ended.
    pieces: u64,
    /// When the one that is under way has begun; nothing while others are waited for.
    since: Option<Instant>,
    slowest: Duration,
}

impl Work {
    /// A piece ends, and another begins, or it is others' turn.
    fn turn(&mut self, busy: bool) {
        let now = Instant::now();
        if let Some(since) = self.since {
            self.slowest = self.slowest.max(now - since);
        }
        self.pieces += 1;
        self.since = busy.then_some(now);
    }
}

impl Progress {
    /// Whether something of the next step is done in this ring, or the last one is being written.
    fn is_within_step(&self, generation: u64) -> bool {
        let begun = self.running.is_some() || !self.done.is_empty();
        self.generation == generation && (self.writing || self.inside && begun)
    }

    fn forget_hashes(&mut self) {
        (self.state_hash, self.basis, self.audit) = (None, None, None);
    }

    fn check(&self) -> Result<(), Recalled> {
        let over = self.recalled.is_some_and(|recalled| recalled >= self.generation);
        if over { Err(Recalled) } else { Ok(()) }
    }
}

impl Gate {
    /// Holds a state, if any, and is in no ring yet.
    pub(crate) fn ready(&self, step: Option<u64>) {
        let mut progress = self.lock();
        (progress.step, progress.running) = (step, None);
        progress.done.clear();
        progress.forget_hashes();
    }

    /// The state has this hash, where that is known.
    pub(crate) fn holds_state(&self, hash: Option<u64>) {
        self.lock().state_hash = hash;
    }

    /// Ranks differ in a micro-batch's gradient; this one computes it with this hash.
    pub(crate) fn audited(&self, hash: u64) {
        self.lock().audit = Some(hash);
    }

    /// The next step is computed with parameters of this hash.
    pub(crate) fn computes_with(&self, basis: u64) {
        self.lock().basis = Some(basis);
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this ring is over.
    pub fn is_recalled(&self, generation: u64) -> bool {
        self.lock().recalled.is_some_and(|recalled| recalled >= generation)
    }

    /// Ends a ring, and says what is held; waits while a step is being written.
    pub fn freeze(&self, generation: u64) -> Holding {
        let mut progress = self.lock();
        progress.recalled = progress.recalled.max(Some(generation));
        self.changed.notify_all();
        while progress.writing {
            progress = self.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
        let Progress { step, ref done, running, state_hash, basis, audit, .. } = *progress;
        Holding { step, done: done.iter().copied().collect(), running, state_hash, basis, audit }
    }

    /// Waits for the end of a ring, for `limit` at most.
    pub(crate) fn await_recall(&self, generation: u64, limit: Duration) {
        let is_whole = |progress: &mut Progress| progress.recalled < Some(generation);
        // How long it took, or whether it came, the next piece of work that is begun says.
        let _ = self.changed.wait_timeout_while(self.lock(), limit, is_whole);
    }

    /// Ends a ring after the step that is under way, or where that takes longer than `limit`, as it is; says what is held.
    pub fn drain(&self, generation: u64, limit: Duration) -> Holding {
        let mut progress = self.lock();
        progress.draining = progress.draining.max(Some(generation));
        let until = Instant::now() + limit;
        while progress.recalled < Some(generation) && progress.is_within_step(generation) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(progress, left);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(progress);
        self.freeze(generation)
    }

    /// Enters a ring, holding this of the next step.
    pub(crate) fn open(
        &self,
        generation: u64,
        step: u64,
        done: impl IntoIterator<Item = u32>,
    ) -> Result<(), Recalled> {
        let mut progress = self.lock();
        progress.generation = generation;
        progress.check()?;
        (progress.step, progress.done, progress.running) = (Some(step), done.into_iter().collect(), None);
        // They may be those of another step: this ring's are told when they are known.
        progress.forget_hashes();
        progress.inside = true;
        progress.work.turn(true);
        Ok(())
    }

    /// Enters a ring without a state: what there was is overwritten by that of others.
    pub(crate) fn open_empty(&self, generation: u64) -> Result<(), Recalled> {
        let mut progress = self.lock();
        progress.generation = generation;
        progress.check()?;
        (progress.step, progress.running) = (None, None);
        progress.done.clear();
        progress.forget_hashes();
        Ok(())
    }

    /// A micro-batch is begun.
    pub(crate) fn begin(&self, index: u32) -> Result<(), Recalled> {
        let mut progress = self.lock();
        progress.check()?;
        let drains = progress.draining >= Some(progress.generation);
        if drains && !progress.is_within_step(progress.generation) {
            return Err(Recalled);
        }
        progress.running = Some(index);
        progress.work.turn(true);
        Ok(())
    }

    /// It is added up.
    pub(crate) fn end(&self, index: u32) {
        let mut progress = self.lock();
        progress.running = None;
        progress.done.insert(index);
        progress.work.turn(true);
    }

    /// Training takes no part in the ring any more, whatever has ended that.
    pub(crate) fn leave(&self) {
        self.lock().inside = false;
        self.reported();
    }

    /// Another piece of work is begun, of a step that is done as a whole or not at all.
    pub(crate) fn proceed(&self) -> Result<(), Recalled> {
        let mut progress = self.lock();
        progress.check()?;
        progress.work.turn(true);
        Ok(())
    }

    /// It is the others' turn: training waits for them.
    pub(crate) fn wait(&self) {
        self.lock().work.turn(false);
    }

    /// How far training is.
    pub fn pulse(&self) -> Pulse {
        let Work { pieces, since, slowest } = self.lock().work;
        Pulse { progress: pieces, busy: since.is_some(), slowest_ms: slowest.as_millis() as u64 }
    }

    /// The state is going to be that after `step`.
    pub(crate) fn commit(&self, step: u64) -> Result<(), Recalled> {
        let mut progress = self.lock();
        progress.check()?;
        progress.step = Some(step);
        progress.done.clear();
        progress.forget_hashes();
        progress.writing = true;
        progress.work.turn(true);
        Ok(())
    }

    /// It is, and the coordinator was told.
    pub(crate) fn reported(&self) {
        let mut progress = self.lock();
        progress.writing = false;
        if progress.draining >= Some(progress.generation) {
            progress.recalled = progress.recalled.max(progress.draining);
        }
        progress.work.turn(true);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn holding(step: u64, done: &[u32], running: Option<u32>) -> Holding {
        Holding { step: Some(step), done: done.to_vec(), running, ..Holding::default() }
    }

    #[test]
    fn what_was_told_stays_true() {
        let gate = Gate::default();
        gate.open(1, 7, []).unwrap();
        gate.begin(3).unwrap();
        gate.end(3);
        gate.begin(4).unwrap();
        assert_eq!(gate.freeze(1), holding(7, &[3], Some(4)));
        gate.end(4);
        assert_eq!(gate.begin(5), Err(Recalled));
        assert_eq!(gate.commit(8), Err(Recalled));
        assert_eq!(gate.freeze(1), holding(7, &[3, 4], None), "what was running is done now");
        gate.open(2, 7, [3, 4]).unwrap();
        gate.begin(5).unwrap();
    }

    #[test]
    fn hashes_are_those_of_the_state_that_is_told() {
        let gate = Gate::default();
        gate.open(1, 7, []).unwrap();
        gate.holds_state(Some(5));
        gate.computes_with(6);
        gate.audited(4);
        let told = Holding { state_hash: Some(5), basis: Some(6), audit: Some(4), ..Holding::at(7) };
        assert_eq!(gate.freeze(0), told);
        gate.commit(8).unwrap();
        gate.holds_state(Some(9));
        gate.reported();
        assert_eq!(gate.freeze(1), Holding { state_hash: Some(9), ..Holding::at(8) });
        gate.open(2, 8, []).unwrap();
        gate.computes_with(1);
        gate.open(3, 9, []).unwrap();
        assert_eq!(gate.freeze(3), Holding::at(9), "another's state, of which nothing is known yet");
        gate.open_empty(4).unwrap();
        assert_eq!(gate.freeze(4), Holding::default());
    }

    #[test]
    fn a_step_under_way_is_finished_and_none_begun_after_it() {
        let gate = Arc::new(Gate::default());
        gate.open(1, 7, []).unwrap();
        gate.begin(3).unwrap();
        let drained = {
            let gate = Arc::clone(&gate);
            thread::spawn(move || gate.drain(1, Duration::from_secs(60)))
        };
        while gate.lock().draining.is_none() {
            thread::yield_now();
        }
        gate.end(3);
        gate.begin(4).unwrap();
        gate.end(4);
        gate.commit(8).unwrap();
        gate.reported();
        assert_eq!(drained.join().unwrap(), holding(8, &[], None));
        assert_eq!(gate.begin(3), Err(Recalled));
        assert_eq!(gate.commit(9), Err(Recalled));
    }

    #[test]
    fn between_two_steps_a_ring_ends_at_once_and_a_step_that_cannot_end_as_it_is() {
        let gate = Gate::default();
        gate.open(1, 7, []).unwrap();
        assert_eq!(gate.drain(1, Duration::from_secs(60)), holding(7, &[], None));
        assert_eq!(gate.begin(3), Err(Recalled));
        gate.open(2, 7, []).unwrap();
        gate.begin(3).unwrap();
        gate.end(3);
        assert_eq!(gate.drain(2, Duration::from_millis(1)), holding(7, &[3], None));
        assert_eq!(gate.begin(4), Err(Recalled));
        gate.open(3, 7, [3]).unwrap();
        gate.begin(4).unwrap();
    }

    #[test]
    fn who_has_given_up_a_ring_is_not_waited_for() {
        let gate = Gate::default();
        gate.open(1, 7, []).unwrap();
        gate.begin(3).unwrap();
        gate.end(3);
        gate.leave();
        assert_eq!(gate.drain(1, Duration::from_secs(3600)), holding(7, &[3], None));
    }

    #[test]
    fn work_is_told_from_waiting() {
        let gate = Gate::default();
        assert_eq!(gate.pulse(), Pulse::default());
        gate.open(1, 7, []).unwrap();
        gate.begin(3).unwrap();
        thread::sleep(Duration::from_millis(20));
        let computing = gate.pulse();
        assert!(computing.busy);
        gate.end(3);
        gate.wait();
        let waiting = gate.pulse();
        assert!(!waiting.busy && waiting.progress > computing.progress && waiting.slowest_ms >= 20);
        thread::sleep(Duration::from_millis(50));
        gate.commit(8).unwrap();
        assert!(gate.pulse().busy && gate.pulse().slowest_ms < 20 + 50, "waiting is no work");
    }

    #[test]
    fn a_recall_that_is_quicker_than_training_counts() {
        let gate = Gate::default();
        gate.freeze(2);
        assert_eq!(gate.open(2, 7, []), Err(Recalled));
        assert_eq!(gate.open_empty(2), Err(Recalled));
        assert!(gate.is_recalled(1) && gate.is_recalled(2) && !gate.is_recalled(3));
        gate.open(3, 7, []).unwrap();
    }

    #[test]
    fn a_state_that_comes_from_others_is_none_until_it_is_there() {
        let gate = Gate::default();
        gate.open(1, 6, [2]).unwrap();
        gate.open_empty(2).unwrap();
        assert_eq!(gate.freeze(2), Holding::default());
    }

    #[test]
    fn a_step_is_told_only_once_it_is_reported() {
        let gate = Arc::new(Gate::default());
        gate.open(1, 7, [0, 1]).unwrap();
        gate.commit(8).unwrap();
        let (told, answer) = mpsc::channel();
        let asked = Arc::clone(&gate);
        let listener = thread::spawn(move || told.send(asked.freeze(1)).unwrap());
        while !gate.is_recalled(1) {
            thread::yield_now();
        }
        assert!(answer.try_recv().is_err(), "the report is not out yet");
        gate.reported();
        assert_eq!(answer.recv().unwrap(), holding(8, &[], None));
        listener.join().unwrap();
    }
}
