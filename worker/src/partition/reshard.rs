//! From who holds what to who needs what: a pure plan that every rank makes alike.

use std::collections::BTreeSet;
use std::ops::Range;

/// A range that one rank gives to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    /// Who gives it.
    pub(crate) from: u32,
    /// Who lacks it, in order.
    pub(crate) to: Vec<u32>,
    /// In the flat space.
    pub(crate) range: Range<usize>,
}

/// Some elements are held by nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost {
    /// How many.
    pub(crate) elements: usize,
}

/// Every element that some rank wants and does not have travels once, from a rank that has it: from the one that gives least
/// so far. `have` and `want` are ranges of the flat space by rank; ranges of one rank do not overlap.
pub(crate) fn plan(have: &[Vec<Range<usize>>], want: &[Vec<Range<usize>>]) -> Result<Vec<Move>, Lost> {
    let edges: BTreeSet<usize> =
        have.iter().chain(want).flatten().flat_map(|range| [range.start, range.end]).collect();
    let edges: Vec<usize> = edges.into_iter().collect();
    let (have, want) = (Cursors::new(have), Cursors::new(want));
    let (mut moves, mut lost) = (Vec::<Move>::new(), 0);
    let mut given = vec![0usize; have.0.len()];
    for edge in edges.windows(2) {
        let range = edge[0]..edge[1];
        let holders: Vec<u32> = have.at(range.start);
        let to: Vec<u32> = want.at(range.start).into_iter().filter(|rank| !holders.contains(rank)).collect();
        if to.is_empty() {
            continue;
        }
        let Some(&from) = holders.iter().min_by_key(|&&rank| given[rank as usize]) else {
            lost += range.len();
            continue;
        };
        given[from as usize] += range.len();
        match moves.last_mut() {
            Some(last) if last.range.end == range.start && last.from == from && last.to == to => {
                last.range.end = range.end;
            }
            _ => moves.push(Move { from, to, range }),
        }
    }
    if lost > 0 { Err(Lost { elements: lost }) } else { Ok(moves) }
}

/// The ranges of each rank, in order.
struct Cursors(Vec<Vec<Range<usize>>>);

impl Cursors {
    fn new(ranges: &[Vec<Range<usize>>]) -> Self {
        let sorted = |ranges: &Vec<Range<usize>>| {
            let mut ranges: Vec<Range<usize>> =
                ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
            ranges.sort_by_key(|range| range.start);
            ranges
        };
        Self(ranges.iter().map(sorted).collect())
    }

    /// The ranks in whose ranges an element lies.
    fn at(&self, element: usize) -> Vec<u32> {
        let holds = |ranges: &Vec<Range<usize>>| {
            let behind = ranges.partition_point(|range| range.start <= element);
            behind > 0 && ranges[behind - 1].contains(&element)
        };
        (0..).zip(&self.0).filter(|(_, ranges)| holds(ranges)).map(|(rank, _)| rank).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::partition::ShardMap;

    const BUCKETS: [Range<usize>; 3] = [0..70_000, 70_000..71_000, 71_000..200_000];

    /// What ranks of a ring of `world` hold, with that of the rank before each, if `buddies`.
    fn held(world: u32, buddies: bool) -> Vec<Vec<Range<usize>>> {
        let map = ShardMap::new(&BUCKETS, world);
        let of = |rank: u32| {
            let mut ranges = map.parts(rank);
            if buddies && world > 1 {
                ranges.extend(map.parts((rank + world - 1) % world));
            }
            ranges
        };
        (0..world).map(of).collect()
    }

    /// Who has which elements after the moves.
    fn carried_out(have: &[Vec<Range<usize>>], moves: &[Move]) -> Vec<BTreeSet<usize>> {
        let step = 250;
        let mut held: Vec<BTreeSet<usize>> = have
            .iter()
            .map(|ranges| {
                let of = |range: &Range<usize>| range.clone().filter(|at| at % step == 0).collect::<Vec<_>>();
                ranges.iter().flat_map(of).collect()
            })
            .collect();
        for Move { from, to, range } in moves {
            let elements: Vec<usize> = range.clone().filter(|at| at % step == 0).collect();
            assert!(elements.iter().all(|at| held[*from as usize].contains(at)), "it gives what it has");
            to.iter().for_each(|&rank| held[rank as usize].extend(elements.iter().copied()));
        }
        held
    }

    proptest! {
        #[test]
        fn everybody_gets_what_it_wants(
            (world, lost) in (1u32..8).prop_flat_map(|world| (Just(world), 0..world)),
            joining in 0usize..3,
            buddies in any::<bool>(),
        ) {
            let mut have = held(world, buddies);
            if world > 1 && buddies {
                have.remove(lost as usize);
            }
            have.extend(std::iter::repeat_n(Vec::new(), joining));
            let want = held(have.len() as u32, buddies);
            let moves = plan(&have, &want).unwrap();
            let held = carried_out(&have, &moves);
            for (rank, want) in want.iter().enumerate() {
                for range in want {
                    let missing = range.clone().filter(|at| at % 250 == 0).find(|at| !held[rank].contains(at));
                    prop_assert_eq!(missing, None, "rank {}", rank);
                }
            }
            let mut travelled: Vec<Range<usize>> = moves.into_iter().map(|step| step.range).collect();
            travelled.sort_by_key(|range| range.start);
            prop_assert!(travelled.windows(2).all(|pair| pair[0].end <= pair[1].start), "each element once");
        }

        #[test]
        fn what_no_survivor_has_is_lost(world in 2u32..8, lost in 0u32..8) {
            let lost = lost % world;
            let mut have = held(world, false);
            have.remove(lost as usize);
            let elements = ShardMap::new(&BUCKETS, world).totals()[lost as usize];
            let outcome = plan(&have, &held(world - 1, false));
            prop_assert_eq!(outcome.is_err(), elements > 0);
            prop_assert_eq!(outcome.err().map_or(0, |lost| lost.elements), elements);
        }

        #[test]
        fn two_neighbours_are_one_too_many(world in 3u32..8, first in 0u32..8) {
            let first = first % world;
            let gone = [first, (first + 1) % world];
            let have = (0..world).zip(held(world, true)).filter(|(rank, _)| !gone.contains(rank));
            let have: Vec<Vec<Range<usize>>> = have.map(|(_, ranges)| ranges).collect();
            let elements = ShardMap::new(&BUCKETS, world).totals()[first as usize];
            prop_assert_eq!(plan(&have, &held(world - 2, true)).is_err(), elements > 0);
        }
    }

    #[test]
    fn nothing_moves_where_nobody_lacks_anything() {
        assert_eq!(plan(&held(5, true), &held(5, true)), Ok(vec![]));
        let everything = [held(1, false), held(1, false)].concat();
        assert_eq!(plan(&everything, &held(2, true)), Ok(vec![]));
    }
}
