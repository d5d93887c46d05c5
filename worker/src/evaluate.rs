//! The loss on held-out samples, measured after the last step.

use burn::tensor::backend::Backend;
use mattock_kernels::Kernels;

use crate::gradients;
use crate::params::{Space, attach};
use crate::plan::Plan;
use crate::task::{Task, TaskError};

/// The model with these parameters, without a graph.
pub(crate) fn model<B: Backend, T: Task>(
    task: &T,
    space: &Space,
    parameters: &[f32],
    device: &B::Device,
) -> Vec<T::Block<B>> {
    let blocks = task.shapes::<B>(device).zip(space.buckets());
    blocks.map(|(block, range)| attach(block, &parameters[range.clone()], device)).collect()
}

/// Mean loss over all held-out samples; `None` where there are none.
pub(crate) fn held_out<B: Kernels, T: Task>(
    task: &T,
    plan: &Plan,
    space: &Space,
    parameters: &[f32],
    device: &B::Device,
) -> Result<Option<f64>, TaskError> {
    let blocks = model::<B, T>(task, space, parameters, device);
    let mut total = 0.0;
    let mut samples = 0;
    for (size, batch) in task.held_out(plan.batch.micro as usize)? {
        total += f64::from(gradients::evaluate::<B, T>(task, &blocks, &batch)) * size as f64;
        samples += size;
    }
    Ok((samples > 0).then(|| total / samples as f64))
}
