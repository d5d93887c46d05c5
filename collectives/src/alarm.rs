//! What the parts of one group have in common: the first fault of any is the end of all.
//!
//! A group that mixes transports consists of several: a ring of all ranks, a ring of leaders, the memory of a host. Who waits in
//! one of them must not wait for what another has lost. So each part raises the alarm before it ends, and the alarm ends the
//! others for the same reason.
//!
//! # Invariants
//! 1. The first fault counts: all parts, and all their operations, report that one.
//! 2. A part that joins late, when the alarm has been raised, ends at once.
//!
//! Deliberately absent: orderly ends. Who closes a group closes its parts itself.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::fault::Fault;

/// A part of a group.
pub(crate) trait Part: Send + Sync {
    /// Ends it for this reason, if it has not ended for another. Never waits.
    fn end(&self, fault: Fault);
}

/// Ends all parts for the first fault of one.
#[derive(Default)]
pub(crate) struct Alarm {
    fault: OnceLock<Fault>,
    /// Weak: the parts hold the alarm.
    parts: Mutex<Vec<Weak<dyn Part>>>,
}

impl Alarm {
    /// Ends all parts, unless that has happened.
    pub(crate) fn raise(&self, fault: &Fault) {
        if self.fault.set(fault.clone()).is_ok() {
            let parts: Vec<_> = self.parts().iter().filter_map(Weak::upgrade).collect();
            parts.iter().for_each(|part| part.end(fault.clone()));
        }
    }

    /// From now on, the part ends with the others.
    pub(crate) fn add(&self, part: &Arc<impl Part + 'static>) {
        let weak = Arc::downgrade(part);
        self.parts().push(weak);
        if let Some(fault) = self.fault() {
            part.end(fault.clone());
        }
    }

    /// Why all have ended, if they have.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.get()
    }

    fn parts(&self) -> MutexGuard<'_, Vec<Weak<dyn Part>>> {
        // Nothing here panics while it holds the lock.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Alarm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Alarm").field("fault", &self.fault).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Part for Log {
        fn end(&self, fault: Fault) {
            self.0.lock().unwrap().push(format!("{fault:?}"));
        }
    }

    #[test]
    fn the_first_fault_ends_all_parts_also_late_ones() {
        let (alarm, early, late) = (Alarm::default(), Arc::<Log>::default(), Arc::<Log>::default());
        alarm.add(&early);
        assert!(alarm.fault().is_none());
        alarm.raise(&Fault::Cancelled { cause: "first".into() });
        alarm.raise(&Fault::Closed);
        alarm.add(&late);
        for log in [early, late] {
            let log = log.0.lock().unwrap();
            assert!(log.len() == 1 && log[0].contains("first"), "{log:?}");
        }
    }
}
