//! From a coordinator that has died to the one that takes over.
//!
//! The worker looks beside the checkpoints for the highest lease, and comes back to its coordinator with the certificate
//! that it has. A coordinator with a lower incarnation than the highest that was seen is stale, whatever it says; one with
//! another authority leads another attempt, of which this worker is no part.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use mattock_coordinator::lease::{Lease, LeaseStore};
use mattock_coordinator::protocol::{About, Return};
use mattock_coordinator::{Client, JoinError, Passport};

/// Timeouts that a worker holds what it has for another coordinator.
const HOLD: u32 = 10;
/// Looks for another coordinator within a timeout,
const LOOKS: u32 = 40;
/// but not more often, nor more rarely than this.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// A coordinator that took over must answer within this part of a timeout.
const PATIENCE: u32 = 4;
/// One that was silent before, and may be back, sooner; and it is asked only at every so many looks.
const PATIENCE_AGAIN: u32 = 20;
const AGAIN: u32 = 5;
/// Who was refused so often is not wanted; once it may have been for a connection that had not ended yet.
const REFUSALS_MAX: u32 = 3;

/// What a worker needs to find the next coordinator, and to come back to it.
#[derive(Debug)]
pub(crate) struct Succession {
    pub(crate) passport: Passport,
    pub(crate) about: About,
    pub(crate) leases: Arc<dyn LeaseStore>,
}

impl Succession {
    /// A coordinator above this incarnation, if there is one. Where storage does not say, nobody is known.
    pub(crate) fn above(&self, incarnation: u64) -> Option<Lease> {
        Lease::above(&*self.leases, incarnation).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot see whether another coordinator has taken over");
            None
        })
    }

    /// Waits for a coordinator in the place of the one of incarnation `seen`, and comes back to it. Gives up, in words, after
    /// some timeouts of `limit`, or when `dismissed`.
    pub(crate) fn come_back(
        &self,
        seen: u64,
        limit: Duration,
        dismissed: &AtomicBool,
    ) -> Result<Client, String> {
        let pause = (limit / LOOKS).clamp(PAUSES.0, PAUSES.1);
        let until = Instant::now() + HOLD * limit;
        let (mut last, mut refusals) = ("nobody has taken its place".to_owned(), 0);
        for look in 1.. {
            if dismissed.load(Ordering::Relaxed) {
                return Err("this worker ends".to_owned());
            }
            match self.try_once(seen, look, limit) {
                Ok(Some(client)) => return Ok(client),
                Ok(None) => {}
                Err(Failed::Hopeless(reason)) => return Err(reason),
                Err(Failed::Refused(reason)) => {
                    refusals += 1;
                    if refusals >= REFUSALS_MAX {
                        return Err(reason);
                    }
                    last = reason;
                }
                Err(Failed::Other(reason)) => last = reason,
            }
            if Instant::now() >= until {
                break;
            }
            sleep(pause);
        }
        Err(format!(
            "the coordinator is gone, and within {:?} no other came in its place ({last}): start the same command again, \
             or resume the run from its newest checkpoint",
            HOLD * limit
        ))
    }

    fn try_once(&self, seen: u64, look: u32, limit: Duration) -> Result<Option<Client>, Failed> {
        let lease = Lease::above(&*self.leases, seen.saturating_sub(1));
        let Some(lease) = lease.map_err(|error| Failed::Other(error.to_string()))? else { return Ok(None) };
        if !lease.is_of(self.passport.authority()) {
            return Err(Failed::Hopeless(format!(
                "another attempt at the run has begun, with a coordinator at {}: this worker's state is not its",
                lease.address
            )));
        }
        let patience = match lease.incarnation > seen {
            true => limit / PATIENCE,
            false if look.is_multiple_of(AGAIN) => limit / PATIENCE_AGAIN,
            false => return Ok(None),
        };
        let back = Return { about: self.about.clone(), incarnation: lease.incarnation };
        match self.passport.come_back(lease.address, back, patience) {
            Ok(client) if client.incarnation() < lease.incarnation => {
                let stale = client.incarnation();
                client.close();
                Err(Failed::Other(format!("a stale coordinator of incarnation {stale} answered")))
            }
            Ok(client) => Ok(Some(client)),
            Err(JoinError::Refused(reason)) => Err(Failed::Refused(reason)),
            Err(error) => Err(Failed::Other(error.to_string())),
        }
    }
}

/// Why a look did not lead back.
enum Failed {
    /// It never will.
    Hopeless(String),
    /// The coordinator says no.
    Refused(String),
    /// It may yet.
    Other(String),
}
