//! Names of positions: which process of how many, in which incarnation of the ring.

use std::fmt;
use std::num::NonZeroU32;

/// A process's place in the ring, from 0 to the world size less one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rank(pub u32);

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How many ranks take part; at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorldSize(NonZeroU32);

impl WorldSize {
    /// `None` for zero: an empty group does not exist.
    pub fn new(ranks: u32) -> Option<Self> {
        NonZeroU32::new(ranks).map(Self)
    }

    /// The number of ranks.
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for WorldSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One incarnation of the ring. Generations only grow: bytes of an older one are never mixed into a newer one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
