//! What must hold in every run, one file each.

use std::time::Duration;

use crate::facts::{Fact, Setup, Violation};

mod admission;
mod coverage;
mod fence;
mod finality;
mod generations;
mod ledger;
mod liveness;
mod lockstep;
mod one_ring;
mod outcome;
mod recalled;
mod state;
mod timers;

/// Something that must hold; it remembers what it needs of the facts so far.
pub(crate) trait Invariant {
    /// In a word or two.
    fn name(&self) -> &'static str;

    /// Takes in a fact; says what is wrong, if so.
    fn observe(&mut self, now: Duration, fact: &Fact<'_>) -> Result<(), String>;
}

/// All of them.
pub(crate) struct Invariants(Vec<Box<dyn Invariant>>);

impl Invariants {
    /// For a run of these figures.
    pub(crate) fn new(setup: &Setup) -> Self {
        Self(vec![
            Box::new(admission::Admission::new(setup)),
            Box::new(one_ring::OneRing::default()),
            Box::new(generations::Generations::default()),
            Box::new(recalled::Recalled::default()),
            Box::new(fence::Fence::default()),
            Box::new(coverage::Coverage::new(setup)),
            Box::new(state::States::new(setup)),
            Box::new(lockstep::Lockstep::default()),
            Box::new(ledger::Ledger::default()),
            Box::new(outcome::Truth::new(setup)),
            Box::new(finality::Finality::default()),
            Box::new(timers::Timers),
            Box::new(liveness::Liveness::default()),
        ])
    }

    /// Holds a fact against all.
    pub(crate) fn observe(&mut self, now: Duration, fact: &Fact<'_>) -> Result<(), Violation> {
        for invariant in &mut self.0 {
            invariant.observe(now, fact).map_err(|text| Violation {
                at: now,
                invariant: invariant.name(),
                text,
            })?;
        }
        Ok(())
    }
}

/// Fails with a text where a condition does not hold.
macro_rules! demand {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}

pub(crate) use demand;
