//! The ring as one of its members sees it: everybody sends to the next rank and receives from the previous one.

use std::fmt;
use std::sync::Arc;

use crate::{Generation, Rank, WorldSize};

/// How ranks on several hosts are arranged for all-reduces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Shape {
    /// Each sends to the next, and the last to the first; where some share a host, host by host.
    #[default]
    Ring = 0,
    /// Each reduces into the next, and the last one's result comes back the same way: nothing crosses the link from the last to
    /// the first. Two ranks, and ranks that all share a host, do without.
    Line = 1,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Ring { "ring" } else { "line" })
    }
}

/// A rank's place in one generation of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    rank: Rank,
    world_size: WorldSize,
    generation: Generation,
    shape: Shape,
}

impl Ring {
    /// `None` where the rank is not below the world size.
    pub fn new(rank: Rank, world_size: WorldSize, generation: Generation) -> Option<Self> {
        let shape = Shape::default();
        (rank.0 < world_size.get()).then_some(Self { rank, world_size, generation, shape })
    }

    /// The same place in a ring of this shape, which all ranks must give it.
    pub fn shaped(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// How it is used.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// This member's rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks the ring has.
    pub fn world_size(&self) -> WorldSize {
        self.world_size
    }

    /// Which incarnation of the ring this is.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The rank this one sends to.
    pub fn next(&self) -> Rank {
        self.plus(self.rank, 1)
    }

    /// The rank this one receives from.
    pub fn prev(&self) -> Rank {
        self.minus(self.rank, 1)
    }

    /// The same members in the reverse order.
    pub(crate) fn reverse(&self) -> (Self, Members) {
        let names: Vec<Rank> = (0..self.world_size.get()).rev().map(Rank).collect();
        let rank = Rank(self.world_size.get() - 1 - self.rank.0);
        (Self { rank, ..*self }, Members::of(&names))
    }

    /// `rank` moved forward by `hops`, around the ring.
    pub(crate) fn plus(&self, rank: Rank, hops: u32) -> Rank {
        let sum = u64::from(rank.0) + u64::from(hops);
        Rank((sum % u64::from(self.world_size.get())) as u32)
    }

    /// `rank` moved backward by `hops`, around the ring.
    pub(crate) fn minus(&self, rank: Rank, hops: u32) -> Rank {
        let n = self.world_size.get();
        self.plus(rank, n - hops % n)
    }
}

/// What the ranks of a ring are called in the group that they are a part of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Members {
    /// By rank of the part; `None` where the part is the whole.
    names: Option<Arc<[Rank]>>,
}

impl Members {
    /// A part of these ranks.
    pub(crate) fn of(names: &[Rank]) -> Self {
        Self { names: Some(names.into()) }
    }

    /// The group's name for a rank of the part.
    pub(crate) fn name(&self, rank: Rank) -> Rank {
        self.names.as_ref().and_then(|names| names.get(rank.0 as usize).copied()).unwrap_or(rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_wrap_around() {
        let size = WorldSize::new(3).unwrap();
        let ring = |rank| Ring::new(Rank(rank), size, Generation(0)).unwrap();
        assert_eq!((ring(0).prev(), ring(0).next()), (Rank(2), Rank(1)));
        assert_eq!((ring(2).prev(), ring(2).next()), (Rank(1), Rank(0)));
        assert_eq!(ring(1).minus(Rank(1), 5), Rank(2));
    }

    #[test]
    fn a_rank_outside_the_world_has_no_ring() {
        assert_eq!(Ring::new(Rank(3), WorldSize::new(3).unwrap(), Generation(0)), None);
    }
}
