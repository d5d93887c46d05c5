//! Where a step's time goes: every moment of a worker's step is given to exactly one phase.

use std::time::Instant;

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reading samples.
    Data,
    /// Forward and backward.
    Compute,
    /// Rounding gradients into the accumulators.
    Round,
    /// Waiting for the sums.
    Exchange,
    /// Decoding the sums, norm, update and state hash.
    Update,
    /// Copying state for a checkpoint.
    Checkpoint,
    /// From the end of a ring to the start of the next.
    Recovery,
    /// Giving the state to ranks that have none.
    Transfer,
    /// All else.
    Other,
}

impl Phase {
    /// All of them, in the order of a step.
    pub const ALL: [Self; 9] = [
        Self::Data,
        Self::Compute,
        Self::Round,
        Self::Exchange,
        Self::Update,
        Self::Checkpoint,
        Self::Recovery,
        Self::Transfer,
        Self::Other,
    ];

    /// As in `events.jsonl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Compute => "compute",
            Self::Round => "round",
            Self::Exchange => "exchange",
            Self::Update => "update",
            Self::Checkpoint => "checkpoint",
            Self::Recovery => "recovery",
            Self::Transfer => "transfer",
            Self::Other => "other",
        }
    }
}

/// A stopwatch that always runs for one phase.
#[derive(Debug)]
pub struct Clock {
    since: Instant,
    phase: Phase,
    seconds: [f64; Phase::ALL.len()],
}

impl Clock {
    /// Starts with [`Phase::Other`].
    pub fn start() -> Self {
        Self { since: Instant::now(), phase: Phase::Other, seconds: [0.0; Phase::ALL.len()] }
    }

    /// Ends the running phase and starts another; returns the one that ended.
    pub fn enter(&mut self, phase: Phase) -> Phase {
        let now = Instant::now();
        self.seconds[self.phase as usize] += (now - self.since).as_secs_f64();
        self.since = now;
        std::mem::replace(&mut self.phase, phase)
    }

    /// Seconds of this worker's own work on micro-batches since the start or the last lap.
    pub fn own_work(&mut self) -> f64 {
        let phase = self.enter(Phase::Other);
        self.enter(phase);
        self.seconds[Phase::Data as usize] + self.seconds[Phase::Compute as usize]
    }

    /// Seconds of each phase since the start or the last call, with the phase's name.
    pub fn lap(&mut self) -> Vec<(String, f64)> {
        self.enter(Phase::Other);
        let seconds = std::mem::take(&mut self.seconds);
        Phase::ALL.iter().zip(seconds).map(|(phase, seconds)| (phase.name().to_owned(), seconds)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lap_names_every_phase_and_starts_afresh() {
        let mut clock = Clock::start();
        assert_eq!(clock.enter(Phase::Compute), Phase::Other);
        let lap = clock.lap();
        assert_eq!(lap.len(), Phase::ALL.len());
        assert!(lap.iter().any(|(name, seconds)| name == "compute" && *seconds >= 0.0));
        assert_eq!(clock.phase, Phase::Other);
    }
}
