//! Faults on purpose, for tests: what processes and networks do not show by themselves.
//!
//! `MATTOCK_FAULTS=flip:2:5` lets a bit of worker 2's parameters flip before step 5; `slow:2:900` lets it say that a micro-batch
//! takes it 900 microseconds, whatever it does; with `wrong:2:5` its gradients are wrong from step 5 on. With `buckets:2:5` it dies
//! in step 5 when some of its buckets have been sent to be summed and others have not, with `summed:2:5` when all have been summed
//! and the step is not committed, with `committed:2:5` when it is committed and not written, and with `updating:2:5` while it is
//! written. Several are told apart by commas. Only builds with debug assertions look there.

use mattock_coordinator::WorkerId;

const VARIABLE: &str = "MATTOCK_FAULTS";

/// A moment of a step at which a process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Some buckets have been sent to be summed, and others have not.
    Buckets,
    /// All are summed, and this rank has not contributed to the commit.
    Summed,
    /// The step is committed, and this rank has not written it.
    Committed,
    /// A part of what this rank holds is written.
    Updating,
}

/// When in a step this process dies, if it does.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Death(Option<Moment>);

impl Death {
    /// This moment has come.
    pub(crate) fn at(self, moment: Moment) {
        if self.0 == Some(moment) {
            std::process::abort();
        }
    }
}

/// What happens to one worker.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Faults {
    /// A bit of its parameters flips before this step.
    flip: Option<u64>,
    /// It dies in this step.
    death: Option<(u64, Moment)>,
    /// Its gradients are wrong from this step on.
    pub(crate) wrong: Option<u64>,
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
            let moment = match kind {
                "buckets" => Some(Moment::Buckets),
                "summed" => Some(Moment::Summed),
                "committed" => Some(Moment::Committed),
                "updating" => Some(Moment::Updating),
                _ => None,
            };
            if let (Some(moment), &[id, step]) = (moment, &numbers[..])
                && id == worker.0
            {
                faults.death = Some((step, moment));
            }
            match (kind, &numbers[..]) {
                ("slow", &[id, micros]) if id == worker.0 => faults.micros = u32::try_from(micros).ok(),
                ("wrong", &[id, step]) if id == worker.0 => faults.wrong = Some(step),
                ("flip", &[id, step]) if id == worker.0 => faults.flip = Some(step),
                _ => {}
            }
        }
        faults
    }

    /// When in this step it dies, if it does.
    pub(crate) fn death(&self, step: u64) -> Death {
        Death(self.death.filter(|(at, _)| *at == step).map(|(_, moment)| moment))
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
        let dies = Faults::read("summed:2:5", WorkerId(2));
        assert_eq!((dies.death(5), dies.death(4)), (Death(Some(Moment::Summed)), Death(None)));
        assert_eq!(Faults::read("flip:2:5", WorkerId(4)), Faults::default());
        assert_eq!(Faults::read("flip:2,flop:2:5,:", WorkerId(2)), Faults::default());
    }
}
