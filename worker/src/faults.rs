//! Faults on purpose, for tests: what processes and networks do not show by themselves.
//!
//! `MATTOCK_FAULTS=flip:2:5` lets a bit of worker 2's parameters flip before step 5; `slow:2:900` lets it say that a micro-batch
//! takes it 900 microseconds, whatever it does; with `wrong:2:5` its gradients are wrong from step 5 on; with `apart:2` it is on a
//! machine of its own. Several are told apart by commas. Only builds with debug assertions look there.

use mattock_coordinator::WorkerId;

const VARIABLE: &str = "MATTOCK_FAULTS";

/// What happens to one worker.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Faults {
    /// A bit of its parameters flips before this step.
    flip: Option<u64>,
    /// Its gradients are wrong from this step on.
    pub(crate) wrong: Option<u64>,
    /// The number of a machine on which nobody else is.
    pub(crate) machine: Option<i64>,
    /// A micro-batch is said to take it so many microseconds.
    pub(crate) micros: Option<u32>,
}

impl Faults {
    /// Those that the environment has for this worker.
    pub(crate) fn of(worker: WorkerId) -> Self {
        match std::env::var(VARIABLE) {
            Ok(text) if cfg!(debug_assertions) => Self::read(&text, worker),
            _ => Self::default(),
        }
    }

    fn read(text: &str, worker: WorkerId) -> Self {
        let mut faults = Self::default();
        for fault in text.split(',') {
            let (kind, numbers) = fault.split_once(':').unwrap_or((fault, ""));
            let numbers: Vec<u64> = numbers.split(':').filter_map(|number| number.parse().ok()).collect();
            match (kind, &numbers[..]) {
                ("slow", &[id, micros]) if id == worker.0 => faults.micros = u32::try_from(micros).ok(),
                ("apart", &[id]) if id == worker.0 => faults.machine = i64::try_from(id).ok(),
                ("wrong", &[id, step]) if id == worker.0 => faults.wrong = Some(step),
                ("flip", &[id, step]) if id == worker.0 => faults.flip = Some(step),
                _ => {}
            }
        }
        faults
    }

    /// Whether a bit flips before this step; once.
    pub(crate) fn flips(&mut self, step: u64) -> bool {
        self.flip.take_if(|flip| *flip == step).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_one_workers_and_happens_once() {
        let mut faults = Faults::read("flip:2:5,flip:3:6", WorkerId(2));
        assert!(!faults.flips(4) && faults.flips(5) && !faults.flips(5));
        assert_eq!(Faults::read("flip:2:5,slow:4:900", WorkerId(4)).micros, Some(900));
        assert_eq!(Faults::read("flip:2:5", WorkerId(4)), Faults::default());
        assert_eq!(Faults::read("flip:2,flop:2:5,:", WorkerId(2)), Faults::default());
    }
}
