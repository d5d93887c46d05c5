//! Which samples a micro-batch holds: said once, for the trainer and for whoever wants to see them.

use crate::plan::Plan;
use crate::task::{Task, TaskError};

/// Tells a task which micro-batches of `step` are this worker's, so that it may fetch ahead.
pub(crate) fn follow<T: Task>(task: &T, plan: &Plan, step: u64, share: &[u32]) {
    task.follow(&task.order(plan.seed, &plan.batch), &plan.batch, step, share);
}

/// Micro-batch `index` of `step`, a pure function of plan and task.
pub(crate) fn micro_batch<T: Task>(
    task: &T,
    plan: &Plan,
    step: u64,
    index: u32,
) -> Result<T::Batch, TaskError> {
    let order = task.order(plan.seed, &plan.batch);
    let samples: Vec<u64> = order.micro_batch(step, index, plan.batch.micro, plan.batch.size).collect();
    task.batch(&samples)
}

/// Token ids of a whole step, micro-batch after micro-batch, one row per sample; `None` where samples are no tokens.
///
/// # Errors
/// Where samples cannot be read.
pub fn token_ids<T: Task>(task: &T, plan: &Plan, step: u64) -> Result<Option<Vec<i32>>, TaskError> {
    let all: Vec<u32> = (0..plan.batch.micro_batches()).collect();
    follow(task, plan, step, &all);
    let mut ids = Vec::new();
    for index in all {
        let batch = micro_batch(task, plan, step, index)?;
        let Some(tokens) = task.token_ids(&batch) else { return Ok(None) };
        ids.extend_from_slice(tokens);
    }
    Ok(Some(ids))
}
