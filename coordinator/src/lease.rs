//! Who coordinates a run: numbered records beside its checkpoints, created once and never changed. The highest holds.
//!
//! ```text
//! take     newest = 3 ──create 4──> ours: incarnation 4        (somebody else's: look again)
//! watch    newest above own?  ──> somebody has taken over: exit, and tell workers nothing
//! find     the worker's side: where is the coordinator above the one that is gone?
//! ```
//!
//! Nothing is renewed by a clock: two hosts' clocks never have to agree. Whoever is told to take over does, and wins; who
//! was there before notices, at the latest before it forms another ring. The store is the arbiter of the order.
//!
//! # Invariants
//! 1. An incarnation is one coordinator's.
//! 2. A lease names the authority whose certificates its coordinator has: a record of another attempt at the same run, or of
//!    another run in the same place, is no successor.
//!
//! Deliberately absent: keys and secrets, and any consensus of our own.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Version of a record's form.
const FORMAT: u32 = 1;
/// How often a number is tried for before somebody else has it each time.
const TRIES_MAX: u32 = 16;
/// How many records are looked through for the last one of the same authority.
const LOOK_BACK_MAX: u64 = 64;
/// Numbers (of workers, of rings) that each incarnation of an attempt has for itself.
const NUMBERS: u64 = 1_000_000;

/// Where leases are kept. Calls block, within limits of their own.
pub trait LeaseStore: fmt::Debug + Send + Sync {
    /// The highest record above `after`, if there is one.
    ///
    /// # Errors
    /// Where the store fails.
    fn newest(&self, after: u64) -> Result<Option<(u64, Vec<u8>)>, LeaseError>;

    /// One record, if it is there.
    ///
    /// # Errors
    /// Where the store fails.
    fn read(&self, number: u64) -> Result<Option<Vec<u8>>, LeaseError>;

    /// Creates a record, unless there is one of that number; whether it is this one.
    ///
    /// # Errors
    /// Where the store fails, or cannot decide between two writers.
    fn create(&self, number: u64, record: &[u8]) -> Result<bool, LeaseError>;
}

/// Why a lease could not be had or found.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseError {
    /// The store fails, in its own words.
    #[error("{0}")]
    Store(String),
    /// A record that cannot be understood.
    #[error(
        "the lease record {number} cannot be read ({reason}): was it written by another version of Mattock?"
    )]
    Malformed {
        /// Its number.
        number: u64,
        /// What is wrong.
        reason: String,
    },
    /// Others were quicker, again and again.
    #[error(
        "{TRIES_MAX} times in a row somebody else took the lease first: how many coordinators does this run have?"
    )]
    Crowded,
}

/// A coordinator's claim to a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    mattock_lease: u32,
    /// The record's number: a coordinator with a higher one takes the place of those with lower ones.
    pub incarnation: u64,
    /// The run's id.
    pub run: String,
    /// How many coordinators of this authority there were before.
    pub before: u64,
    /// Where workers reach it.
    pub address: SocketAddr,
    /// Fingerprint of the authority's certificate.
    pub authority: String,
    /// So that a writer knows its own record.
    nonce: String,
}

/// A coordinator that wants a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The run's id.
    pub run: String,
    /// Where workers reach it.
    pub address: SocketAddr,
    /// The authority's certificate, DER.
    pub authority: Vec<u8>,
    /// Drawn by nobody else.
    pub nonce: String,
}

impl Lease {
    /// Takes the lease from whoever has it.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn take(store: &dyn LeaseStore, claim: &Claim) -> Result<Self, LeaseError> {
        let authority = fingerprint(&claim.authority);
        for _ in 0..TRIES_MAX {
            let newest = store.newest(0)?.map_or(0, |(number, _)| number);
            let before = count_before(store, newest, &authority)?;
            let lease = Self {
                mattock_lease: FORMAT,
                incarnation: newest + 1,
                run: claim.run.clone(),
                before,
                address: claim.address,
                authority: authority.clone(),
                nonce: claim.nonce.clone(),
            };
            let record = serde_json::to_vec(&lease).map_err(|error| LeaseError::Store(error.to_string()))?;
            if store.create(lease.incarnation, &record)? {
                return Ok(lease);
            }
        }
        Err(LeaseError::Crowded)
    }

    /// The highest lease above an incarnation, if there is one.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn above(store: &dyn LeaseStore, incarnation: u64) -> Result<Option<Self>, LeaseError> {
        let found = store.newest(incarnation)?;
        found.map(|(number, record)| Self::parse(number, &record)).transpose()
    }

    /// Whether its coordinator has this authority, a certificate in DER: only then it is one of the same attempt.
    pub fn is_of(&self, authority: &[u8]) -> bool {
        self.authority == fingerprint(authority)
    }

    /// Whether it took over from another coordinator.
    pub fn is_successor(&self) -> bool {
        self.before > 0
    }

    /// Numbers from here on were given by no coordinator before it.
    pub(crate) fn first_number(&self) -> u64 {
        self.before.saturating_mul(NUMBERS)
    }

    fn parse(number: u64, record: &[u8]) -> Result<Self, LeaseError> {
        let malformed = |reason: String| LeaseError::Malformed { number, reason };
        let lease: Self = serde_json::from_slice(record).map_err(|error| malformed(error.to_string()))?;
        match (lease.mattock_lease, lease.incarnation == number) {
            (FORMAT, true) => Ok(lease),
            (FORMAT, false) => Err(malformed(format!("it says that it is number {}", lease.incarnation))),
            (other, _) => Err(malformed(format!("it has version {other}"))),
        }
    }
}

/// How many coordinators of this authority there were up to record `newest`.
fn count_before(store: &dyn LeaseStore, newest: u64, authority: &str) -> Result<u64, LeaseError> {
    for number in (1..=newest).rev().take(LOOK_BACK_MAX as usize) {
        let Some(record) = store.read(number)? else { continue };
        // One that nobody understands is of another version, and so of another attempt.
        if let Ok(lease) = Lease::parse(number, &record)
            && lease.authority == authority
        {
            return Ok(lease.before + 1);
        }
    }
    Ok(0)
}

fn fingerprint(authority: &[u8]) -> String {
    blake3::hash(authority).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// A store in memory, in which somebody else may be quicker a number of times.
    #[derive(Debug, Default)]
    struct Memory {
        records: Mutex<BTreeMap<u64, Vec<u8>>>,
        quicker: Mutex<u32>,
    }

    impl LeaseStore for Memory {
        fn newest(&self, after: u64) -> Result<Option<(u64, Vec<u8>)>, LeaseError> {
            let records = self.records.lock().unwrap();
            Ok(records.range(after + 1..).next_back().map(|(number, record)| (*number, record.clone())))
        }

        fn read(&self, number: u64) -> Result<Option<Vec<u8>>, LeaseError> {
            Ok(self.records.lock().unwrap().get(&number).cloned())
        }

        fn create(&self, number: u64, record: &[u8]) -> Result<bool, LeaseError> {
            let mut quicker = self.quicker.lock().unwrap();
            let mut records = self.records.lock().unwrap();
            if *quicker > 0 {
                *quicker -= 1;
                records.insert(number, b"somebody else".to_vec());
            }
            Ok(records.entry(number).or_insert_with(|| record.to_vec()) == record)
        }
    }

    fn claim(authority: &str) -> Claim {
        Claim {
            run: "run".into(),
            address: "10.0.0.1:4433".parse().unwrap(),
            authority: authority.into(),
            nonce: "x".into(),
        }
    }

    #[test]
    fn each_coordinator_has_an_incarnation_of_its_own_and_finds_those_above() {
        let store = Memory::default();
        let first = Lease::take(&store, &claim("a")).unwrap();
        assert_eq!((first.incarnation, first.is_successor(), first.first_number()), (1, false, 0));
        assert_eq!(Lease::above(&store, 0), Ok(Some(first.clone())));
        assert_eq!(Lease::above(&store, first.incarnation), Ok(None));
        let second = Lease::take(&store, &claim("a")).unwrap();
        assert_eq!((second.incarnation, second.before), (2, 1));
        assert!(second.is_of(b"a") && !second.is_of(b"b") && second.first_number() > 0);
        assert_eq!(Lease::above(&store, first.incarnation), Ok(Some(second)));
    }

    #[test]
    fn another_authority_succeeds_nobody_and_is_not_counted() {
        let store = Memory::default();
        Lease::take(&store, &claim("a")).unwrap();
        let other = Lease::take(&store, &claim("b")).unwrap();
        assert_eq!((other.incarnation, other.is_successor()), (2, false));
        let again = Lease::take(&store, &claim("a")).unwrap();
        assert_eq!((again.incarnation, again.before), (3, 1));
    }

    #[test]
    fn who_is_too_slow_takes_the_next_number() {
        let store = Memory { quicker: Mutex::new(3), ..Memory::default() };
        let lease = Lease::take(&store, &claim("a")).unwrap();
        assert_eq!((lease.incarnation, lease.before), (4, 0));
        *store.quicker.lock().unwrap() = u32::MAX;
        assert_eq!(Lease::take(&store, &claim("a")), Err(LeaseError::Crowded));
    }

    #[test]
    fn a_record_that_nobody_understands_is_an_error_and_no_lease() {
        let store = Memory::default();
        let lease = Lease::take(&store, &claim("a")).unwrap();
        let text = serde_json::to_string(&lease).unwrap();
        for (record, said) in [
            ("{", "EOF"),
            (&text.replace("\"mattock_lease\":1", "\"mattock_lease\":9"), "version 9"),
            (&text, "says that it is number 1"),
        ] {
            store.records.lock().unwrap().insert(5, record.as_bytes().to_vec());
            let error = Lease::above(&store, 1).unwrap_err().to_string();
            assert!(error.contains("record 5") && error.contains(said), "{error}");
        }
    }

    #[test]
    fn the_form_of_a_record_is_pinned_and_holds_no_secret() {
        let store = Memory::default();
        Lease::take(&store, &claim("a")).unwrap();
        let record = String::from_utf8(store.read(1).unwrap().unwrap()).unwrap();
        let authority = fingerprint(b"a");
        assert_eq!(
            record,
            format!(
                r#"{{"mattock_lease":1,"incarnation":1,"run":"run","before":0,"address":"10.0.0.1:4433","authority":"{authority}","nonce":"x"}}"#
            )
        );
    }
}
