//! What would fit where a plan does not: the same estimate, of plans that are like it.

use serde::Serialize;

use super::Estimate;
use crate::plan::{Batch, Parallel, Plan, Shard, Sum};
use crate::task::Outline;

/// A plan that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Way {
    /// Workers.
    pub workers: u32,
    /// What is divided.
    pub shard: Shard,
    /// Whether each shard has a second holder.
    pub buddies: bool,
    /// Samples per micro-batch; another number than before gives other bits.
    pub micro: u32,
    /// The most memory of a worker.
    pub bytes: u64,
}

/// The first plan that fits, in this order: more is divided; then no second copies; then twice as many workers, up to one
/// for each micro-batch; then smaller micro-batches, which alone change the result.
pub fn way(outline: &Outline, plan: &Plan, workers: u32, memory: u64) -> Option<Way> {
    for micro in (1..=plan.batch.micro).rev().filter(|&micro| fits_the_batch(plan, micro)) {
        let batch = Batch { micro, ..plan.batch };
        let more = std::iter::successors(Some(workers), |workers| workers.checked_mul(2));
        for workers in more.take_while(|&more| more == workers || more <= batch.micro_batches()) {
            for parallel in divisions(plan) {
                let plan = Plan { batch, parallel, ..plan.clone() };
                let bytes = Estimate::new(outline, &plan, workers).peak_bytes();
                if bytes <= memory {
                    let Parallel { shard, buddies } = parallel;
                    return Some(Way { workers, shard, buddies, micro, bytes });
                }
            }
        }
    }
    None
}

fn fits_the_batch(plan: &Plan, micro: u32) -> bool {
    plan.batch.size.is_multiple_of(micro) && plan.batch.size / micro <= plan.reduce.bits.micro_batches_max()
}

/// The plan's own division of state, and those that divide more.
fn divisions(plan: &Plan) -> Vec<Parallel> {
    let rank = |shard: Shard| match shard {
        Shard::None => 0,
        Shard::Optimizer => 1,
        Shard::Full => 2,
    };
    let integers = matches!(plan.reduce.sum, Sum::Exact | Sum::Exact64);
    let shards = [Shard::None, Shard::Optimizer, Shard::Full].into_iter();
    let shards = shards.filter(|&shard| rank(shard) >= rank(plan.parallel.shard));
    let shards: Vec<Shard> = shards.filter(|&shard| integers || shard != Shard::Full).collect();
    let with = |buddies: bool| shards.iter().map(move |&shard| Parallel { shard, buddies });
    let copied = with(true).filter(|_| plan.parallel.buddies);
    copied
        .chain(with(false).filter(|parallel| parallel.shard != Shard::None || !plan.parallel.buddies))
        .collect()
}
