//! What a rank had in the ring before, kept until the ring that it is in commits a step.
//!
//! Ranks get their parts of a divided state one by one. Where a ring breaks meanwhile, one may have all that it needs, and another
//! lacks what the first has just given up. A commit shows that all have contributed to it, and so that all have their parts: only
//! then is given up what was held before. Arrays that are held as before are shared, so that keeping them takes no memory.

use std::ops::Range;

use mattock_kernels::TrainBackend;

use super::Trainer;
use super::sharding::Sharding;
use crate::origin::Origin;
use crate::partition::{ShardMap, Stretches};
use crate::state::State;
use crate::task::Task;

/// What a rank had.
pub(super) enum Former {
    /// All of it, where it lies.
    Origin(Origin),
    /// Shards of a ring, or, of a ring of one, everything.
    Held {
        /// The place among shards.
        place: Place,
        own: (Stretches, State),
        copy: Option<(Stretches, State)>,
    },
}

/// A rank's place among shards, and whether it has a copy of the shard before its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) rank: u32,
    pub(super) world: u32,
    pub(super) copy: bool,
}

impl Place {
    /// Its ranges of the flat space.
    pub(super) fn ranges(self, buckets: &[Range<usize>]) -> Vec<Range<usize>> {
        let map = ShardMap::new(buckets, self.world);
        let rank = self.rank.min(self.world.saturating_sub(1));
        let mut ranges = map.parts(rank);
        if self.copy {
            ranges.extend(map.parts((rank + map.world() - 1) % map.world()));
        }
        ranges
    }
}

impl<B: TrainBackend, T: Task> Trainer<'_, B, T> {
    /// Where this rank is among shards; rank 0 of 1 where it has all, or nothing.
    pub(super) fn place(&self) -> Place {
        let sharding = self.sharding.as_ref();
        let seat = sharding.and_then(|sharding| sharding.seat.as_ref());
        Place {
            rank: seat.map_or(0, |seat| seat.rank),
            world: seat.map_or(1, |seat| seat.map.world()),
            copy: sharding.is_some_and(|sharding| sharding.copy.is_some()),
        }
    }

    /// Where it was.
    pub(super) fn former_place(&self) -> Option<Place> {
        match self.sharding.as_ref()?.former.as_ref()? {
            Former::Held { place, .. } => Some(*place),
            Former::Origin(_) => None,
        }
    }

    /// A state of which parts were read, and no step done, lies where it lay.
    pub(super) fn go_back_to_origin(&mut self) {
        // Who has contributed to a commit may have to write the step yet.
        let Some(sharding) = self.sharding.as_mut().filter(|_| self.pending.is_none()) else { return };
        let Some(Former::Origin(origin)) =
            sharding.former.take_if(|former| matches!(former, Former::Origin(_)))
        else {
            return;
        };
        (sharding.seat, sharding.copy) = (None, None);
        self.origin = Some(origin);
        let exponents = std::mem::take(&mut self.state.exponents);
        self.state = State { exponents, ..State::blank(self.state.step, 0) };
        self.own = Stretches::new(vec![0..0; self.space.buckets().len()]);
    }

    /// All that this rank has of the state, by parts, which may overlap.
    pub(super) fn parts_held(&self) -> impl Iterator<Item = (&Stretches, &State)> + Clone {
        let sharding = self.sharding.as_ref();
        let copy = sharding.and_then(|sharding| sharding.copy.as_ref());
        let former = match sharding.and_then(|sharding| sharding.former.as_ref()) {
            Some(Former::Held { own, copy, .. }) => [Some(own), copy.as_ref()],
            _ => [None, None],
        };
        let former = former.into_iter().flatten().map(|(held, state)| (held, state));
        std::iter::once((&self.own, &self.state))
            .chain(copy.map(|copy| (&copy.held, &copy.state)))
            .chain(former)
    }

    /// Keeps what it has, for the ring that it goes into has not shown yet that it can do without.
    pub(super) fn keep_former(&mut self) {
        let place = self.place();
        let Some(sharding) = &mut self.sharding else { return };
        // What was held at the last commit is kept, not what a ring without one has made of it.
        if sharding.former.is_some() {
            return;
        }
        sharding.former = Some(match self.origin.take() {
            Some(origin) => Former::Origin(origin),
            None => Former::Held {
                place,
                own: (self.own.clone(), self.state.clone()),
                copy: sharding.copy.as_ref().map(|copy| (copy.held.clone(), copy.state.clone())),
            },
        });
    }
}

impl Sharding {
    /// All ranks have their parts.
    pub(super) fn forget_former(&mut self) {
        self.former = None;
    }
}
