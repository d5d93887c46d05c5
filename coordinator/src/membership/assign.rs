//! Which rank computes which micro-batches: contiguous, and as even as can be.

use std::ops::Range;

/// The micro-batches of `rank` among `ranks`, of `micro_batches` in all; ranks beyond them get none.
pub fn assigned(micro_batches: u32, ranks: u32, rank: u32) -> Range<u32> {
    let bound = |rank: u32| (u64::from(micro_batches) * u64::from(rank) / u64::from(ranks)) as u32;
    bound(rank)..bound(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

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
