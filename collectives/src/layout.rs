//! Which ranks of a group share a host, and who speaks for each host: pure arithmetic, the same on all ranks.
//!
//! Hosts are in the order of their lowest ranks, which are their leaders.

use crate::rank::{Generation, Rank, WorldSize};
use crate::ring::{Members, Ring};

/// The ranks of a group, by host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Each in ascending order; none is empty.
    hosts: Vec<Vec<Rank>>,
}

/// A rank's place in a part of the group.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub(crate) ring: Ring,
    pub(crate) members: Members,
    /// The group's names for the ranks of the part.
    pub(crate) ranks: Vec<Rank>,
}

impl Layout {
    /// Ranks are on one host with the first that they are `together` with.
    pub(crate) fn of<T>(ranks: &[T], together: impl Fn(&T, &T) -> bool) -> Self {
        let mut hosts: Vec<Vec<Rank>> = Vec::new();
        for (rank, own) in (0..).map(Rank).zip(ranks) {
            let known = hosts.iter_mut().find(|host| together(&ranks[host[0].0 as usize], own));
            match known {
                Some(host) => host.push(rank),
                None => hosts.push(vec![rank]),
            }
        }
        Self { hosts }
    }

    /// How many hosts there are.
    pub(crate) fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// How many leaders there are: one for each host.
    pub(crate) fn members(&self) -> WorldSize {
        WorldSize::new(self.hosts.len() as u32).expect("a group has ranks, and they are somewhere")
    }

    /// The ranks of a host, in ascending order; those of a host that does not exist are none.
    pub(crate) fn ranks_of(&self, host: usize) -> &[Rank] {
        self.hosts.get(host).map_or(&[], Vec::as_slice)
    }

    /// Which host a rank is on; the first for one that does not exist.
    pub(crate) fn host_of(&self, rank: Rank) -> usize {
        self.hosts.iter().position(|host| host.contains(&rank)).unwrap_or(0)
    }

    /// Whether any rank shares its host with another.
    pub(crate) fn has_company(&self) -> bool {
        self.hosts.iter().any(|host| host.len() > 1)
    }

    /// A rank's place among those of its host; `None` for one that does not exist.
    pub(crate) fn within(&self, rank: Rank, generation: Generation) -> Option<Seat> {
        let host = self.hosts.iter().find(|host| host.contains(&rank))?;
        Seat::new(host.clone(), rank, generation)
    }

    /// A rank's place among the leaders; `None` for one that is none.
    pub(crate) fn between(&self, rank: Rank, generation: Generation) -> Option<Seat> {
        Seat::new(self.hosts.iter().map(|host| host[0]).collect(), rank, generation)
    }
}

impl Seat {
    fn new(ranks: Vec<Rank>, rank: Rank, generation: Generation) -> Option<Self> {
        let index = ranks.iter().position(|&member| member == rank)?;
        let ring = Ring::new(Rank(index as u32), WorldSize::new(ranks.len() as u32)?, generation)?;
        Some(Self { ring, members: Members::of(&ranks), ranks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every rank is on one host, with exactly those that say so; each host has one leader, and all have the same leaders.
        #[test]
        fn hosts_partition_the_ranks(labels in proptest::collection::vec(0u8..4, 1..12)) {
            let layout = Layout::of(&labels, |a, b| a == b);
            let mut leaders = Vec::new();
            for rank in (0..labels.len() as u32).map(Rank) {
                let seat = layout.within(rank, Generation(1)).unwrap();
                let wanted: Vec<_> = (0..labels.len())
                    .filter(|&other| labels[other] == labels[rank.0 as usize])
                    .map(|other| Rank(other as u32))
                    .collect();
                prop_assert_eq!(&seat.ranks, &wanted);
                prop_assert_eq!(seat.members.name(seat.ring.rank()), rank);
                let between = layout.between(rank, Generation(1));
                prop_assert_eq!(between.is_some(), wanted[0] == rank);
                leaders.extend(between);
            }
            prop_assert_eq!(leaders.len(), layout.hosts());
            prop_assert!(leaders.iter().all(|seat| seat.ranks == leaders[0].ranks));
            prop_assert_eq!(layout.has_company(), layout.hosts() < labels.len());
        }
    }
}
