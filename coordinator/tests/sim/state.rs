//! What training does to a state, as far as bits matter: a pure function of the state before and of which micro-batches
//! were added up, so that one that is missing, or counted twice, changes every hash from there on.

use std::collections::BTreeSet;

use mattock_coordinator::protocol::Holding;

/// A model's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State {
    /// Steps done.
    pub(crate) step: u64,
    pub(crate) hash: u64,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl State {
    /// Before the first step.
    pub(crate) const INITIAL: Self = Self { step: 0, hash: 0x9e37_79b9_7f4a_7c15 };

    /// What one process alone would have after `step` steps of so many micro-batches.
    pub(crate) fn serial(micro_batches: u32, step: u64) -> Self {
        (0..step).fold(Self::INITIAL, |state, _| state.next(state.sum(0..micro_batches)))
    }

    /// The sum of these micro-batches' gradients.
    pub(crate) fn sum(self, micro_batches: impl IntoIterator<Item = u32>) -> u64 {
        let gradient = |index: u32| mix(self.hash ^ mix(u64::from(index) + 1));
        micro_batches.into_iter().map(gradient).fold(0, u64::wrapping_add)
    }

    /// The update.
    pub(crate) fn next(self, sum: u64) -> Self {
        Self { step: self.step + 1, hash: mix(self.hash.rotate_left(17) ^ sum) }
    }

    /// The loss that a step ended with, by the same reasoning.
    pub(crate) fn loss(self) -> f64 {
        1.0 / ((self.hash >> 12) + 1) as f64
    }
}

/// What worker/src/gate.rs is, without threads: who would wait there is told to.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    step: Option<u64>,
    done: BTreeSet<u32>,
    running: Option<u32>,
    generation: u64,
    recalled: Option<u64>,
    draining: Option<u64>,
    writing: bool,
    inside: bool,
    /// It lets through what it should not.
    pub(crate) broken: bool,
}

impl Gate {
    fn passes(&self) -> bool {
        self.broken || self.recalled.is_none_or(|recalled| recalled < self.generation)
    }

    pub(crate) fn ready(&mut self, step: Option<u64>) {
        (self.step, self.running) = (step, None);
        self.done.clear();
    }

    pub(crate) fn is_recalled(&self, generation: u64) -> bool {
        self.recalled.is_some_and(|recalled| recalled >= generation)
    }

    /// Ends a ring; what is held, unless a step is being written.
    pub(crate) fn freeze(&mut self, generation: u64) -> Option<Holding> {
        self.recalled = self.recalled.max(Some(generation));
        let done = self.done.iter().copied().collect();
        (!self.writing).then_some(Holding {
            step: self.step,
            done,
            running: self.running,
            ..Holding::default()
        })
    }

    fn is_within_step(&self) -> bool {
        let begun = self.running.is_some() || !self.done.is_empty();
        self.writing || self.inside && begun
    }

    /// Lets nothing be begun in a ring after the step that is under way; whether there is none.
    pub(crate) fn drain(&mut self, generation: u64) -> bool {
        self.draining = self.draining.max(Some(generation));
        self.generation != generation || !self.is_within_step()
    }

    /// Training takes no part in the ring any more.
    pub(crate) fn leave(&mut self) {
        self.inside = false;
        self.reported();
    }

    pub(crate) fn open(&mut self, generation: u64, step: u64, done: &BTreeSet<u32>) -> bool {
        self.generation = generation;
        let passes = self.passes();
        if passes {
            (self.step, self.done, self.running) = (Some(step), done.clone(), None);
            self.inside = true;
        }
        passes
    }

    pub(crate) fn open_empty(&mut self, generation: u64) -> bool {
        self.generation = generation;
        let passes = self.passes();
        if passes {
            self.ready(None);
        }
        passes
    }

    pub(crate) fn begin(&mut self, index: u32) -> bool {
        let drained = self.draining >= Some(self.generation) && !self.is_within_step();
        let passes = self.passes() && (self.broken || !drained);
        if passes {
            self.running = Some(index);
        }
        passes
    }

    pub(crate) fn end(&mut self, index: u32) {
        self.running = None;
        self.done.insert(index);
    }

    pub(crate) fn commit(&mut self, step: u64) -> bool {
        let passes = self.passes();
        if passes {
            self.step = Some(step);
            self.done.clear();
            self.writing = true;
        }
        passes
    }

    pub(crate) fn reported(&mut self) {
        self.writing = false;
        if self.draining >= Some(self.generation) {
            self.recalled = self.recalled.max(self.draining);
        }
    }
}
