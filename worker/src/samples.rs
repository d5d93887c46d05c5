//! Which samples a micro-batch holds: said once, for the trainer and for whoever wants to see them.

use mattock_data::SampleOrder;

use crate::plan::Plan;
use crate::task::Task;

/// Micro-batch `index` of `step`, a pure function of plan and task.
pub(crate) fn micro_batch<T: Task>(task: &T, plan: &Plan, step: u64, index: u32) -> T::Batch {
    let order = SampleOrder::new(plan.seed, task.samples());
    let samples: Vec<u64> = order.micro_batch(step, index, plan.batch.micro, plan.batch.size).collect();
    task.batch(&samples)
}

/// Token ids of a whole step, micro-batch after micro-batch, one row per sample; `None` where samples are no tokens.
pub fn token_ids<T: Task>(task: &T, plan: &Plan, step: u64) -> Option<Vec<i32>> {
    let mut ids = Vec::new();
    for index in 0..plan.batch.micro_batches() {
        ids.extend_from_slice(task.token_ids(&micro_batch(task, plan, step, index))?);
    }
    Some(ids)
}
