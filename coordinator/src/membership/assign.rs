//! Which rank computes which micro-batches: contiguous, and as even as can be; and who does what of a step that was
//! interrupted.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::ops::Range;

use crate::protocol::Holding;

/// The micro-batches of `rank` among `ranks`, of `micro_batches` in all; ranks beyond them get none.
pub fn assigned(micro_batches: u32, ranks: u32, rank: u32) -> Range<u32> {
    let bound = |rank: u32| (u64::from(micro_batches) * u64::from(rank) / u64::from(ranks)) as u32;
    bound(rank)..bound(rank + 1)
}

/// The shares, by rank, of a step that was interrupted: who has computed a micro-batch, or is at it, keeps it; what is
/// missing goes to whoever has least to do. What two claim stays with the first.
pub fn resumed(micro_batches: u32, holdings: &[&Holding]) -> Vec<Vec<u32>> {
    let mut missing: BTreeSet<u32> = (0..micro_batches).collect();
    let mut keep = |index: &u32| missing.remove(index);
    let mut shares: Vec<Vec<u32>> = Vec::new();
    let mut left_to_do: Vec<usize> = Vec::new();
    for holding in holdings {
        let done: Vec<u32> = holding.done.iter().copied().filter(&mut keep).collect();
        let running: Vec<u32> = holding.running.iter().copied().filter(&mut keep).collect();
        left_to_do.push(running.len());
        shares.push([done, running].concat());
    }
    let burdens = left_to_do.iter().zip(&shares).enumerate();
    let mut idlest: BinaryHeap<Reverse<(usize, usize, usize)>> =
        burdens.map(|(rank, (left, share))| Reverse((*left, share.len(), rank))).collect();
    for index in missing {
        let Some(Reverse((left, count, rank))) = idlest.pop() else { break };
        shares[rank].push(index);
        idlest.push(Reverse((left + 1, count + 1, rank)));
    }
    shares.iter_mut().for_each(|share| share.sort_unstable());
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(done: &[u32], running: Option<u32>) -> Holding {
        Holding { step: Some(7), done: done.to_vec(), running, ..Holding::default() }
    }

    #[test]
    fn only_what_is_missing_changes_hands() {
        let (a, b, c) = (holding(&[0, 1], Some(2)), holding(&[4], None), holding(&[], None));
        // 3 was computed by one that is gone, and so were 5 to 7.
        assert_eq!(resumed(8, &[&a, &b, &c]), [vec![0, 1, 2], vec![4, 5, 7], vec![3, 6]]);
    }

    #[test]
    fn what_two_claim_is_computed_once() {
        let (a, b) = (holding(&[0, 1, 9], Some(2)), holding(&[1, 2], Some(0)));
        assert_eq!(resumed(4, &[&a, &b]), [vec![0, 1, 2], vec![3]]);
    }

    #[test]
    fn every_micro_batch_of_an_interrupted_step_has_one_rank() {
        for seed in 0u32..2000 {
            let mut state = seed.wrapping_mul(2_654_435_761).max(1);
            let mut draw = |below: u32| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state % below
            };
            let (micro_batches, ranks) = (1 + draw(20), 1 + draw(8));
            let mut any = || {
                let done = (0..draw(6)).map(|_| draw(24)).collect::<Vec<u32>>();
                let running = (draw(2) == 0).then(|| draw(24));
                holding(&done, running)
            };
            let holdings: Vec<Holding> = (0..ranks).map(|_| any()).collect();
            let shares = resumed(micro_batches, &holdings.iter().collect::<Vec<_>>());
            let mut all = shares.concat();
            all.sort_unstable();
            assert_eq!(all, (0..micro_batches).collect::<Vec<u32>>(), "seed {seed}: {holdings:?}");
        }
    }

    #[test]
    fn every_micro_batch_has_one_rank_and_shares_are_even() {
        for micro_batches in 0..40 {
            for ranks in 1..20 {
                let shares: Vec<Range<u32>> =
                    (0..ranks).map(|rank| assigned(micro_batches, ranks, rank)).collect();
                let all: Vec<u32> = shares.iter().cloned().flatten().collect();
                assert_eq!(all, (0..micro_batches).collect::<Vec<u32>>());
                let lengths: Vec<usize> = shares.iter().map(ExactSizeIterator::len).collect();
                let (least, most) = (lengths.iter().min().unwrap(), lengths.iter().max().unwrap());
                assert!(most - least <= 1, "{micro_batches} on {ranks}: {lengths:?}");
            }
        }
    }
}
