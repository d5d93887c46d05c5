//! Names of things on the wire.

use std::fmt;

use rkyv::{Archive, Deserialize, Serialize};

/// A worker of a run, in the order of admission from 0; never given twice.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
)]
pub struct WorkerId(pub u64);

impl WorkerId {
    /// The DNS name in its certificate, by which peers know it.
    pub fn dns_name(self) -> String {
        format!("worker-{}.mattock", self.0)
    }

    /// The worker that a certificate's DNS name stands for.
    pub fn from_dns_name(name: &str) -> Option<Self> {
        name.strip_prefix("worker-")?.strip_suffix(".mattock")?.parse().ok().map(Self)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {}", self.0)
    }
}
