//! The data plane, as far as membership sees it: links between neighbours, and the commit point of a step.
//!
//! A step's total exists once every rank of the ring has contributed, and reaches each rank in its own time; so ranks
//! are at s or s + 1.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::protocol::Formation;

use crate::sabotage::Sabotage;
use crate::sim::{Happening, Sim};
use crate::worker::{Seat, Stage};

/// How long a total takes to a rank.
const TOTAL_DELAY: std::ops::RangeInclusive<Duration> = Duration::ZERO..=Duration::from_millis(50);
/// How long a neighbour's death takes to be noticed on the links.
const NOTICE_DELAY: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_millis(1_500);

/// What all ranks agreed on at a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Total {
    /// How often each micro-batch was counted.
    pub(crate) counts: Vec<u32>,
    /// Whether some rank was asked to stop.
    pub(crate) stop: bool,
}

/// The links of one generation.
#[derive(Debug)]
pub(crate) struct Ring {
    /// By rank.
    places: Vec<WorkerId>,
    /// Ranks that call their neighbours, or did.
    calling: BTreeSet<u32>,
    /// Ranks whose links come up.
    up: BTreeSet<u32>,
    /// By step and rank: micro-batches, and whether to stop.
    contributions: BTreeMap<u64, BTreeMap<u32, (Vec<u32>, bool)>>,
    totals: BTreeMap<u64, Total>,
}

impl Ring {
    fn new(formation: &Formation) -> Self {
        Self {
            places: formation.places.iter().map(|place| place.worker).collect(),
            calling: BTreeSet::new(),
            up: BTreeSet::new(),
            contributions: BTreeMap::new(),
            totals: BTreeMap::new(),
        }
    }

    fn neighbours(&self, rank: u32) -> [u32; 2] {
        let size = self.places.len() as u32;
        [(rank + size - 1) % size, (rank + 1) % size]
    }

    /// Ranks whose neighbours both call, and that were not told so yet.
    fn newly_up(&mut self) -> Vec<u32> {
        let both = |rank: &u32| self.neighbours(*rank).iter().all(|other| self.calling.contains(other));
        let ready: Vec<u32> =
            self.calling.iter().copied().filter(|rank| !self.up.contains(rank)).filter(both).collect();
        self.up.extend(&ready);
        ready
    }

    pub(crate) fn total(&self, step: u64) -> Option<&Total> {
        self.totals.get(&step)
    }
}

impl Sim {
    /// A worker calls its neighbours; links come up where both ends call.
    pub(crate) fn call_neighbours(&mut self, id: WorkerId, formation: &Formation, rank: u32) {
        let ring = self.rings.entry(formation.generation).or_insert_with(|| Ring::new(formation));
        ring.calling.insert(rank);
        let up = ring.newly_up();
        let up: Vec<WorkerId> = up.iter().map(|&rank| ring.places[rank as usize]).collect();
        for other in up {
            if other == id || self.worker(other).stage == Stage::Linking {
                self.link_soon(other);
            }
        }
    }

    /// A rank's part of a commit; with the last one the total is there.
    pub(crate) fn contribute(&mut self, seat: &Seat, step: u64, stop: bool) {
        let generation = seat.formation.generation;
        let micro_batches = self.setup.micro_batches as usize;
        let missing_max = usize::from(self.sabotage == Some(Sabotage::HastyCommit));
        let Some(ring) = self.rings.get_mut(&generation) else { return };
        let contributions = ring.contributions.entry(step).or_default();
        let share = seat.formation.places[seat.rank as usize].micro_batches.clone();
        contributions.insert(seat.rank, (share, stop));
        if contributions.len() + missing_max < ring.places.len() {
            return;
        }
        let mut counts = vec![u32::from(missing_max > 0); micro_batches];
        let shares = contributions.values().flat_map(|(share, _)| share).filter(|_| missing_max == 0);
        shares.for_each(|&index| counts[index as usize] += 1);
        let stop = contributions.values().any(|(_, stop)| *stop);
        let waiting: Vec<WorkerId> = contributions.keys().map(|&rank| ring.places[rank as usize]).collect();
        ring.totals.entry(step).or_insert(Total { counts, stop });
        for other in waiting {
            let takes = self.rng.duration(&TOTAL_DELAY);
            self.schedule_in(takes, Happening::Total(other, generation, step));
        }
    }

    /// A worker's links are gone: its neighbours will notice.
    pub(crate) fn ring_breaks_at(&mut self, id: WorkerId) {
        let Some(seat) = self.worker(id).seat.as_ref() else { return };
        let (generation, rank) = (seat.formation.generation, seat.rank);
        let Some(ring) = self.rings.get(&generation) else { return };
        let neighbours = ring.neighbours(rank).map(|other| ring.places[other as usize]);
        for other in neighbours.into_iter().filter(|&other| other != id) {
            let takes = self.rng.duration(&NOTICE_DELAY);
            self.schedule_in(takes, Happening::Broken(other, generation, rank));
        }
    }

    /// The link from this worker to the next rank breaks; each end thinks the other lost. Returns who they are.
    pub(crate) fn cut_link(&mut self, id: WorkerId) -> Option<[WorkerId; 2]> {
        let seat = self.worker(id).seat.clone()?;
        let ring = self.rings.get(&seat.formation.generation)?;
        let [_, next] = ring.neighbours(seat.rank);
        let other = ring.places[next as usize];
        if other == id {
            return None;
        }
        for (worker, lost) in [(id, next), (other, seat.rank)] {
            let takes = self.rng.duration(&NOTICE_DELAY);
            self.schedule_in(takes, Happening::Broken(worker, seat.formation.generation, lost));
        }
        Some([id, other])
    }
}
