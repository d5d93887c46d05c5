//! Bytes that a rank sends in a step.

use mattock_exact::{BLOCK, packed_bytes};
use serde::Serialize;

use super::has_exponents;
use crate::partition::ShardMap;
use crate::plan::{Plan, Shard, Sum};
use crate::task::Outline;

/// What a rank sends in a step, in bytes, by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Wire {
    /// Parameters that are gathered; of `full` sharding, in each round forward and backward.
    pub parameters: u64,
    /// Sums of gradients.
    pub sums: u64,
    /// Bounds of sums, an integer per 256 elements.
    pub bounds: u64,
    /// The gradient for the copy of a shard.
    pub copies: u64,
    /// Of the sums, those of the first block: nothing is left to compute when they leave.
    pub last_sums: u64,
}

impl Wire {
    pub(super) fn new(outline: &Outline, plan: &Plan, world: u32) -> Self {
        let buckets = outline.space.buckets();
        let all = outline.space.len();
        let ring = |bytes: usize| bytes as u64 * u64::from(world - 1) / u64::from(world);
        let width = |elements: usize| match plan.reduce.sum {
            _ if plan.parallel.shard == Shard::Full => packed_bytes(elements, plan.reduce.bits),
            Sum::Exact => packed_bytes(elements, plan.reduce.bits),
            Sum::Exact64 => 8 * elements,
            Sum::F32 => 4 * elements,
            Sum::Bf16 => 2 * elements,
        };
        let blocks = if has_exponents(plan) { all / BLOCK } else { 0 };
        let rounds = u64::from(plan.batch.micro_batches().div_ceil(world));
        let first = buckets.first().map_or(0, ExactSizeIterator::len);
        let shifted = || ShardMap::new(buckets, world).totals().into_iter().max().unwrap_or(0);
        let copies = match plan.parallel.shard {
            Shard::Optimizer | Shard::Full if plan.parallel.buddies && world > 1 => 4 * shifted() as u64,
            _ => 0,
        };
        match plan.parallel.shard {
            // An all-reduce is a reduce-scatter and a gather.
            Shard::None | Shard::Optimizer => {
                let gathers = plan.parallel.shard == Shard::Optimizer;
                let times = if gathers { 1 } else { 2 };
                let bound = if plan.reduce.sum == Sum::Exact64 { 8 } else { 4 };
                Self {
                    parameters: if gathers { ring(4 * all) } else { 0 },
                    sums: times * ring(width(all)),
                    bounds: 2 * ring(bound * blocks),
                    copies,
                    last_sums: times * ring(width(first)),
                }
            }
            // The last block keeps its parameters from forward to backward.
            Shard::Full => {
                let last = buckets.last().map_or(0, ExactSizeIterator::len);
                Self {
                    parameters: rounds * (ring(4 * all) + ring(4 * (all - last))),
                    sums: rounds * ring(width(all)),
                    bounds: rounds * 2 * ring(4 * blocks),
                    copies,
                    last_sums: rounds * ring(width(first)),
                }
            }
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.parameters + self.sums + self.bounds + self.copies
    }
}
