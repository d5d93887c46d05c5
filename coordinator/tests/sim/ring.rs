//! The data plane, as far as membership sees it: links between neighbours, the transfer of a state, and the commit point
//! of a step.
//!
//! A step's total exists once every rank of the ring has contributed, and reaches each rank in its own time, or never, if
//! the ring breaks meanwhile; so ranks are at s or s + 1.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::protocol::Formation;

use crate::sabotage::Sabotage;
use crate::sim::{Happening, Sim};
use crate::state::State;
use crate::worker::{Seat, Stage};

/// How long a total takes to a rank.
const TOTAL_DELAY: std::ops::RangeInclusive<Duration> = Duration::ZERO..=Duration::from_millis(50);
/// How long a state takes to a rank.
const TRANSFER_DELAY: std::ops::RangeInclusive<Duration> = Duration::ZERO..=Duration::from_millis(200);
/// How long a neighbour's death takes to be noticed on the links, at most.
pub(crate) const NOTICE_DELAY_MAX: Duration = Duration::from_millis(1_500);
const NOTICE_DELAY: std::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=NOTICE_DELAY_MAX;

/// What a rank contributes to a commit.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Micro-batches that it has counted.
    pub(crate) counted: BTreeSet<u32>,
    /// The sum of their gradients.
    pub(crate) sum: u64,
    /// The state that they are of.
    pub(crate) basis: State,
    /// Whether it was asked to stop.
    pub(crate) stop: bool,
}

/// What all ranks agreed on at a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Total {
    /// How often each micro-batch was counted.
    pub(crate) counts: Vec<u32>,
    pub(crate) sum: u64,
    /// Whether all ranks started from the same state.
    pub(crate) same: bool,
    /// Whether some rank was asked to stop.
    pub(crate) stop: bool,
}

/// The links of one generation.
#[derive(Debug)]
pub(crate) struct Ring {
    /// By rank.
    places: Vec<WorkerId>,
    source: Option<u32>,
    /// Ranks that call their neighbours, or did.
    calling: BTreeSet<u32>,
    /// Ranks whose links come up.
    up: BTreeSet<u32>,
    /// Ranks that take part in the transfer of the state.
    transferring: BTreeSet<u32>,
    /// The source's state.
    pub(crate) offered: Option<State>,
    /// By step and rank.
    contributions: BTreeMap<u64, BTreeMap<u32, Part>>,
    totals: BTreeMap<u64, Total>,
}

impl Ring {
    fn new(formation: &Formation) -> Self {
        Self {
            places: formation.places.iter().map(|place| place.worker).collect(),
            source: formation.source,
            calling: BTreeSet::new(),
            up: BTreeSet::new(),
            transferring: BTreeSet::new(),
            offered: None,
            contributions: BTreeMap::new(),
            totals: BTreeMap::new(),
        }
    }

    fn neighbours(&self, rank: u32) -> [u32; 2] {
        let size = self.places.len() as u32;
        [(rank + size - 1) % size, (rank + 1) % size]
    }

    /// Ranks whose neighbours both call, over lines that are not cut, and that were not told so yet.
    fn newly_up(&mut self, cuts: &BTreeSet<(WorkerId, WorkerId)>) -> Vec<u32> {
        let holds = |a: u32, b: u32| {
            let place = |rank: u32| self.places.get(rank as usize).copied();
            // Who was told of another ring than the rest calls somebody who is not there.
            let Some((a, b)) = place(a).zip(place(b)) else { return false };
            !cuts.contains(&(a, b)) && !cuts.contains(&(b, a))
        };
        let reaches = |rank: u32, other: u32| self.calling.contains(&other) && holds(rank, other);
        let both = |rank: &u32| self.neighbours(*rank).into_iter().all(|other| reaches(*rank, other));
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
        self.links_come_up(id, formation.generation);
    }

    fn links_come_up(&mut self, caller: WorkerId, generation: u64) {
        let Some(ring) = self.rings.get_mut(&generation) else { return };
        let up = ring.newly_up(&self.cuts);
        let up: Vec<WorkerId> = up.iter().map(|&rank| ring.places[rank as usize]).collect();
        for other in up {
            let worker = self.worker(other);
            let links = worker.stage == Stage::Linking && worker.generation() == Some(generation);
            if other == caller || links {
                self.link_soon(other);
            }
        }
    }

    /// Lines that were cut carry again: whoever still calls gets through.
    pub(crate) fn heal_rings(&mut self) {
        self.cuts.clear();
        let newest = self.rings.last_key_value().map(|(generation, ring)| (*generation, ring.places[0]));
        if let Some((generation, any)) = newest {
            self.links_come_up(any, generation);
        }
    }

    /// A rank's part in the broadcast of the state; with the last one it is under way to all.
    pub(crate) fn take_part_in_transfer(&mut self, id: WorkerId, seat: &Seat) {
        let (generation, state) = (seat.formation.generation, self.worker(id).state);
        let Some(ring) = self.rings.get_mut(&generation) else { return };
        if ring.source == Some(seat.rank) {
            ring.offered = Some(state);
        }
        ring.transferring.insert(seat.rank);
        if ring.transferring.len() == ring.places.len() {
            for other in ring.places.clone() {
                let takes = self.rng.duration(&TRANSFER_DELAY);
                self.schedule_in(takes, Happening::Transferred(other, generation));
            }
        }
    }

    /// A rank's part of a commit; with the last one the total is there.
    pub(crate) fn contribute(&mut self, seat: &Seat, step: u64, part: Part) {
        let generation = seat.formation.generation;
        let micro_batches = self.setup.micro_batches;
        let hasty = self.sabotage == Some(Sabotage::HastyCommit);
        let everything = hasty.then(|| self.serial(step - 1).sum(0..micro_batches));
        let Some(ring) = self.rings.get_mut(&generation) else { return };
        let contributions = ring.contributions.entry(step).or_default();
        contributions.insert(seat.rank, part);
        if contributions.len() + usize::from(hasty) < ring.places.len() {
            return;
        }
        let mut counts = vec![u32::from(hasty); micro_batches as usize];
        let counted = contributions.values().flat_map(|part| &part.counted).filter(|_| !hasty);
        counted.for_each(|&index| counts[index as usize] += 1);
        let sum = contributions.values().fold(0u64, |sum, part| sum.wrapping_add(part.sum));
        let stop = contributions.values().any(|part| part.stop);
        let basis = contributions.values().next().map(|part| part.basis);
        let same = contributions.values().all(|part| Some(part.basis) == basis);
        let waiting: Vec<WorkerId> = contributions.keys().map(|&rank| ring.places[rank as usize]).collect();
        ring.totals.entry(step).or_insert(Total {
            counts,
            sum: everything.unwrap_or(sum),
            same: same || hasty,
            stop,
        });
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

    /// The link from this worker to the next rank breaks: both ends, or one of them, think the other lost. Returns who they
    /// are.
    pub(crate) fn cut_link(&mut self, id: WorkerId, one_way: bool) -> Option<[WorkerId; 2]> {
        let seat = self.worker(id).seat.clone()?;
        let ring = self.rings.get(&seat.formation.generation)?;
        let [_, next] = ring.neighbours(seat.rank);
        let other = ring.places[next as usize];
        if other == id {
            return None;
        }
        for (worker, lost) in [(id, next), (other, seat.rank)].into_iter().skip(usize::from(one_way)) {
            let takes = self.rng.duration(&NOTICE_DELAY);
            self.schedule_in(takes, Happening::Broken(worker, seat.formation.generation, lost));
        }
        Some([id, other])
    }
}
