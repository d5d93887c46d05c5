//! Which rank owns which elements: pure arithmetic over buckets and the number of ranks.

use std::ops::Range;

use mattock_exact::CHUNK;

/// Who owns what in a ring of `world` ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShardMap {
    buckets: Vec<Range<usize>>,
    world: u32,
}

impl ShardMap {
    /// Of these buckets, that follow each other without gaps.
    pub(crate) fn new(buckets: &[Range<usize>], world: u32) -> Self {
        Self { buckets: buckets.to_vec(), world: world.max(1) }
    }

    /// How many ranks share the space.
    pub(crate) fn world(&self) -> u32 {
        self.world
    }

    /// What `rank` owns of a bucket, in elements of the flat space: whole chunks.
    ///
    /// Chunk `j` of `n` belongs to rank `(j * world + turn) / n`: in the order of ranks, and as even as chunks allow. `turn`
    /// differs from bucket to bucket, so that the larger parts are not always the same ranks'.
    pub(crate) fn part(&self, bucket: usize, rank: u32) -> Range<usize> {
        let range = &self.buckets[bucket];
        let (chunks, world) = (range.len().div_ceil(CHUNK) as u64, u64::from(self.world));
        let turn = turn(bucket, self.world);
        let first = |rank: u64| (rank * chunks).saturating_sub(turn).div_ceil(world).min(chunks);
        let (start, end) = (first(rank.into()), first(u64::from(rank) + 1));
        let end = if rank + 1 == self.world { chunks } else { end };
        let element = |chunk: u64| range.end.min(range.start + chunk as usize * CHUNK);
        element(start)..element(end)
    }

    /// What `rank` owns, by bucket.
    pub(crate) fn parts(&self, rank: u32) -> Vec<Range<usize>> {
        (0..self.buckets.len()).map(|bucket| self.part(bucket, rank)).collect()
    }

    /// How many elements of a bucket each rank owns.
    pub(crate) fn lens(&self, bucket: usize) -> Vec<usize> {
        (0..self.world).map(|rank| self.part(bucket, rank).len()).collect()
    }

    /// How many elements each rank owns.
    pub(crate) fn totals(&self) -> Vec<usize> {
        let total = |rank| self.parts(rank).iter().map(ExactSizeIterator::len).sum();
        (0..self.world).map(total).collect()
    }
}

/// Something below `world` that differs from bucket to bucket: multiples of the golden ratio, folded.
fn turn(bucket: usize, world: u32) -> u64 {
    let fraction = (bucket as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (fraction * u64::from(world)) >> 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn buckets() -> impl Strategy<Value = Vec<Range<usize>>> {
        proptest::collection::vec(1usize..300, 1..9).prop_map(|blocks| {
            let mut end = 0;
            let range = |blocks: usize| {
                let start = end;
                end += blocks * 256;
                start..end
            };
            blocks.into_iter().map(range).collect()
        })
    }

    proptest! {
        #[test]
        fn each_element_has_one_owner(buckets in buckets(), world in 1u32..70) {
            let map = ShardMap::new(&buckets, world);
            for (bucket, range) in buckets.iter().enumerate() {
                let mut end = range.start;
                for rank in 0..world {
                    let part = map.part(bucket, rank);
                    prop_assert_eq!(part.start, end, "rank {} of bucket {}", rank, bucket);
                    prop_assert!((part.start - range.start).is_multiple_of(CHUNK) || part.is_empty());
                    end = part.end;
                }
                prop_assert_eq!(end, range.end);
            }
        }

        #[test]
        fn parts_of_a_bucket_differ_by_a_chunk_at_most(buckets in buckets(), world in 1u32..70) {
            let map = ShardMap::new(&buckets, world);
            for (bucket, range) in buckets.iter().enumerate() {
                let even = range.len() / world as usize;
                for len in map.lens(bucket) {
                    prop_assert!(len <= even + 2 * CHUNK && len + 2 * CHUNK >= even, "{} of {}", len, even);
                }
            }
        }
    }

    #[test]
    fn small_buckets_go_round() {
        let buckets: Vec<_> = (0..32).map(|bucket| bucket * CHUNK..(bucket + 1) * CHUNK).collect();
        let totals = ShardMap::new(&buckets, 4).totals();
        assert!(totals.iter().all(|&total| (6 * CHUNK..=10 * CHUNK).contains(&total)), "{totals:?}");
    }
}
