//! An order of samples with locality: few shards at a time, and none of it depends on the number of workers.
//!
//! A set that is streamed does not fit its cache. In a fully random order every sample would lie in another shard, and
//! each would have to be fetched for a few hundred bytes; fetching just those bytes is a request per sample, thousands a
//! second for a small model. So shards are permuted, and samples are permuted within a few shards at a time.
//!
//! ```text
//! a step       | micro-batches of lane 0 | of lane 1 | .. | of lane L - 1 |      L divides M, and is at most W
//! a lane       | W / L shards, shuffled | the next W / L shards | ..             of the epoch's permuted shards
//! an epoch     | head | steps, as above | leftover | tail |
//! ```
//!
//! Each lane draws from its own W / L shards at a time, so a step mixes W shards, and a worker reads only the shards of
//! the lanes that its micro-batches lie in. Lanes are cut from a step by the recipe's M, never by ranks.
//!
//! Lanes must hold as many samples each, and steps must not straddle lanes. What does not fit goes elsewhere: the last one or
//! two rows of each lane are the *leftover*, and shards that do not fill a window for every lane are the *tail*, shuffled as one
//! window. Where an epoch begins in the middle of a step, the rest of that step (the *head*) is taken from the leftover.
//!
//! # Invariants
//! 1. Each epoch is a permutation of all samples.
//! 2. At any time a lane draws from W / L shards; leftover and tail draw from at most W.
//! 3. What is at a position is found in O(1).

use std::collections::BTreeSet;

use crate::keys::mix;
use crate::permutation::Permutation;

/// Sets the keys of shards apart from those of samples.
const SHARDS: u64 = 0x5348_4152_4453;

/// How samples lie in shards: each shard holds whole samples only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Full shards.
    pub full: u64,
    /// Samples of a full shard.
    pub group: u64,
    /// Samples of the last shard, which is shorter; 0 where there is none.
    pub rest: u64,
}

impl Cut {
    /// Samples in all.
    pub fn samples(&self) -> u64 {
        self.full * self.group + self.rest
    }

    /// The shard of a sample, and the sample's number within it.
    pub fn locate(&self, sample: u64) -> (u64, u64) {
        (sample / self.group, sample % self.group)
    }
}

/// Where a position of the run lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// `place` of a lane's window.
    Lane { lane: u64, window: u64, place: u64 },
    /// `place` of the tail.
    Tail { place: u64 },
}

/// An order of samples with locality.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Windows {
    seed: u64,
    cut: Cut,
    /// Samples of a step.
    size: u64,
    /// Lanes of a step.
    lanes: u64,
    /// Samples of a step that a lane gives.
    unit: u64,
    /// Shards of a lane's window.
    depth: u64,
    /// Windows of a lane in an epoch.
    windows: u64,
    /// Steps of an epoch that are lanes side by side.
    rows: u64,
    shards: Permutation,
}

impl Windows {
    /// Samples are shuffled within `window` shards; a step is `size` samples in micro-batches of `micro`.
    ///
    /// # Panics
    /// Where there are fewer full shards than the window has, or no samples in a shard.
    pub(crate) fn new(seed: u64, cut: Cut, window: u64, size: u32, micro: u32) -> Self {
        assert!(cut.group > 0 && window > 0 && cut.full >= window, "a window of {window} shards of {cut:?}");
        let micro_batches = u64::from(size / micro);
        let lanes = (1..=micro_batches.min(window)).rev().find(|lanes| micro_batches.is_multiple_of(*lanes));
        let lanes = lanes.unwrap_or(1);
        let (size, depth) = (u64::from(size), window / lanes);
        let (unit, windows) = (size / lanes, cut.full / (lanes * depth));
        let rows = (windows * depth * cut.group / unit).saturating_sub(1);
        let shards = Permutation::new(mix(seed ^ SHARDS), cut.full);
        Self { seed, cut, size, lanes, unit, depth, windows, rows, shards }
    }

    /// Samples of an epoch.
    pub(crate) fn samples(&self) -> u64 {
        self.cut.samples()
    }

    /// The sample at a position of the run.
    pub(crate) fn sample(&self, position: u64) -> u64 {
        let epoch = position / self.samples();
        let slot_of = |first: u64, index: u64| {
            let slot = first + index / self.cut.group;
            let shard = if slot < self.cut.full { self.shards.at(epoch, slot) } else { slot };
            shard * self.cut.group + index % self.cut.group
        };
        match self.place(position) {
            Place::Lane { lane, window, place } => {
                let index = self.shuffled(lane * self.windows + window, self.lane_window()).at(epoch, place);
                slot_of((lane * self.windows + window) * self.depth, index)
            }
            Place::Tail { place } => {
                let index = self.shuffled(self.lanes * self.windows, self.tail()).at(epoch, place);
                slot_of(self.tail_slot(), index)
            }
        }
    }

    /// The shards that the samples round a position are drawn from.
    pub(crate) fn shards(&self, position: u64) -> Vec<u64> {
        let epoch = position / self.samples();
        let of = |slot| if slot < self.cut.full { self.shards.at(epoch, slot) } else { slot };
        match self.place(position) {
            Place::Lane { lane, window, .. } => {
                let first = (lane * self.windows + window) * self.depth;
                (first..first + self.depth).map(of).collect()
            }
            Place::Tail { .. } => {
                let short = u64::from(self.cut.rest > 0);
                (self.tail_slot()..self.cut.full + short).map(of).collect()
            }
        }
    }

    /// The shards that these micro-batches of `micro` samples draw from at a step, and those that they draw from next.
    pub(crate) fn ahead(&self, step: u64, share: &[u32], micro: u32) -> [Vec<u64>; 2] {
        let micro = u64::from(micro);
        let mut cursors: BTreeSet<(u64, u64)> = share
            .iter()
            .map(|&index| u64::from(index) * micro)
            .map(|at| (step * self.size + at, at))
            .collect();
        let mut seen = BTreeSet::new();
        [(); 2].map(|()| {
            let touched = cursors.iter().flat_map(|(at, _)| [*at, at + micro - 1]);
            let drawn = touched.flat_map(|at| self.shards(at)).filter(|shard| seen.insert(*shard)).collect();
            cursors = cursors.iter().map(|&(at, of)| (self.next(at, of), of)).collect();
            drawn
        })
    }

    /// The next position of the same micro-batch, `of` samples into its step, that has other shards.
    fn next(&self, position: u64, of: u64) -> u64 {
        let (epoch, place) = (position / self.samples(), position % self.samples());
        let start = epoch * self.samples();
        let (head, body) = (self.head(epoch), self.rows * self.size);
        let end = if place < head {
            head
        } else if place < head + body {
            let window = (place - head) / self.size * self.unit / self.lane_window();
            let row = ((window + 1) * self.lane_window()).div_ceil(self.unit);
            head + row.min(self.rows) * self.size
        } else if place < body + self.leftovers() {
            body + self.leftovers()
        } else {
            self.samples()
        };
        (start + end).saturating_sub(of).div_ceil(self.size) * self.size + of
    }

    fn place(&self, position: u64) -> Place {
        let (epoch, place) = (position / self.samples(), position % self.samples());
        let (head, body) = (self.head(epoch), self.rows * self.size);
        if (head..head + body).contains(&place) {
            let place = place - head;
            let at = place / self.size * self.unit + place % self.unit;
            return self.of_lane(place % self.size / self.unit, at);
        }
        let beside = if place < head { place } else { place - body };
        match beside.checked_sub(self.leftovers()) {
            Some(place) => Place::Tail { place },
            None => {
                let each = self.leftovers() / self.lanes;
                self.of_lane(beside / each, self.rows * self.unit + beside % each)
            }
        }
    }

    fn of_lane(&self, lane: u64, at: u64) -> Place {
        Place::Lane { lane, window: at / self.lane_window(), place: at % self.lane_window() }
    }

    /// Positions of an epoch before its first whole step.
    fn head(&self, epoch: u64) -> u64 {
        (self.size - epoch * self.samples() % self.size) % self.size
    }

    /// Samples of a lane's window.
    fn lane_window(&self) -> u64 {
        self.depth * self.cut.group
    }

    /// Samples of all lanes that make no row.
    fn leftovers(&self) -> u64 {
        self.lanes * (self.windows * self.lane_window() - self.rows * self.unit)
    }

    /// The first of the permuted shards that is in no lane.
    fn tail_slot(&self) -> u64 {
        self.lanes * self.windows * self.depth
    }

    /// Samples of the tail.
    fn tail(&self) -> u64 {
        (self.cut.full - self.tail_slot()) * self.cut.group + self.cut.rest
    }

    fn shuffled(&self, window: u64, len: u64) -> Permutation {
        Permutation::new(mix(self.seed ^ mix(window + 1)), len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any set of more shards than a window, and any batch.
    fn sets() -> impl Strategy<Value = (Windows, u32, u64)> {
        let batch = (1u32..6, 1u32..13);
        (any::<u64>(), 1u64..9, 0u64..40, 1u64..50, 0u64..50, batch).prop_map(
            |(seed, window, more, group, rest, (micro, micro_batches))| {
                let cut = Cut { full: window + more, group, rest: rest.min(group) };
                (Windows::new(seed, cut, window, micro * micro_batches, micro), micro, window)
            },
        )
    }

    proptest! {
        #[test]
        fn each_epoch_is_a_permutation((windows, _, _) in sets(), epoch in 0u64..5) {
            let samples = windows.samples();
            let seen: BTreeSet<u64> =
                (0..samples).map(|place| windows.sample(epoch * samples + place)).collect();
            prop_assert_eq!(seen, (0..samples).collect::<BTreeSet<u64>>());
        }

        #[test]
        fn a_sample_lies_in_the_shards_that_are_told((windows, _, window) in sets(), epoch in 0u64..3) {
            for place in 0..windows.samples() {
                let position = epoch * windows.samples() + place;
                let shards = windows.shards(position);
                prop_assert!(shards.len() as u64 <= window);
                prop_assert!(shards.contains(&windows.cut.locate(windows.sample(position)).0));
            }
        }

        /// All steps between two changes of window together touch no more shards than a window has.
        #[test]
        fn whole_steps_between_changes_touch_a_window_of_shards((windows, _, window) in sets(), epoch in 0u64..3) {
            let first = epoch * windows.samples() + windows.head(epoch);
            let rows_per_window = windows.lane_window() / windows.unit;
            for row in (0..windows.rows).filter(|row| row * windows.unit % windows.lane_window() == 0) {
                let rows = row..(row + rows_per_window).min(windows.rows);
                let positions = rows.flat_map(|row| (0..windows.size).map(move |at| row * windows.size + at));
                let touched: BTreeSet<u64> =
                    positions.map(|at| windows.cut.locate(windows.sample(first + at)).0).collect();
                prop_assert!(touched.len() as u64 <= window);
            }
        }

        /// Whoever computes these micro-batches finds their samples in the shards that were announced.
        #[test]
        fn what_is_announced_is_what_is_drawn((windows, micro, _) in sets(), step in 0u64..30, index in 0u32..12) {
            let index = index % (windows.size / u64::from(micro)) as u32;
            let [now, _] = windows.ahead(step, &[index], micro);
            let first = step * windows.size + u64::from(index * micro);
            for position in [first, first + u64::from(micro) - 1] {
                prop_assert!(now.contains(&windows.cut.locate(windows.sample(position)).0));
            }
        }

        #[test]
        fn what_comes_next_is_another_place((windows, micro, _) in sets(), position in 0u64..5000) {
            let next = windows.next(position, position % windows.size / u64::from(micro) * u64::from(micro));
            prop_assert!(next + windows.size > position, "{position} -> {next}");
        }
    }

    #[test]
    fn a_lane_reads_its_own_shards_only() {
        let cut = Cut { full: 64, group: 100, rest: 7 };
        let windows = Windows::new(5, cut, 16, 32, 4);
        let of_lane = |lane: u64| -> BTreeSet<u64> {
            let positions = (0..windows.rows).flat_map(|row| (0..4).map(move |at| row * 32 + lane * 4 + at));
            positions.map(|position| cut.locate(windows.sample(position)).0).collect()
        };
        let lanes: Vec<_> = (0..8).map(of_lane).collect();
        assert!(lanes.iter().all(|lane| lane.len() == 8), "an eighth of the shards each");
        assert_eq!(lanes.iter().flatten().collect::<BTreeSet<_>>().len(), 64);
    }

    #[test]
    fn what_is_announced_next_is_where_the_lane_goes_next() {
        let windows = Windows::new(5, Cut { full: 64, group: 100, rest: 7 }, 16, 32, 4);
        let [now, next] = windows.ahead(0, &[0, 1], 4);
        assert_eq!((now.len(), next.len()), (4, 4));
        // Two shards of a lane hold 200 samples, 50 steps of 4.
        assert_eq!(windows.ahead(50, &[0, 1], 4)[0], next);
    }

    #[test]
    fn the_order_is_pinned() {
        let windows = Windows::new(42, Cut { full: 100, group: 1000, rest: 17 }, 16, 32, 4);
        let first: Vec<u64> = (0..8).map(|position| windows.sample(position)).collect();
        assert_eq!(format!("{first:?}"), "[55059, 64862, 64650, 55486, 44301, 44006, 52047, 44701]");
    }
}
