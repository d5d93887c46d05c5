//! Where the state of a run lies before its first ring, and how a rank takes from there what it holds, and no more.
//!
//! A worker of a run whose state is divided says at its start which state it can bring, and reads nothing of it before it knows
//! its place in a ring. So no worker needs memory for all of a state, not even at the start.

use std::sync::Arc;

use mattock_checkpoint::{LoadError, Location, Which, load_ranges};
use mattock_kernels::Cpu;

use crate::params::{Space, values};
use crate::partition::Stretches;
use crate::state::State;
use crate::storage::{StorageError, layout};
use crate::task::{Task, TaskError};

/// Where a state lies.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    /// Nowhere yet: it is drawn, or the task reads its parameters.
    Initial {
        /// From which it is drawn.
        seed: u64,
    },
    /// In a checkpoint.
    Stored {
        /// Where checkpoints are kept.
        location: Location,
        /// Its step.
        step: u64,
    },
}

/// Why a state was not read.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The checkpoint is not whole: one before it may be.
    #[error("{0}")]
    Flawed(String),
    /// Storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The task has parameters to start from, and they cannot be read.
    #[error(transparent)]
    Task(#[from] TaskError),
}

impl Origin {
    /// Parameters and moments of each of these parts of the flat space, without exponents.
    pub(crate) fn read<T: Task>(
        &self,
        task: &T,
        space: &Space,
        parts: &[&Stretches],
    ) -> Result<Vec<State>, OriginError> {
        match self {
            Self::Initial { seed } => Ok(initial(task, *seed, space, parts)?),
            Self::Stored { location, step } => {
                let layout = layout(space)?;
                let read = |part: &&Stretches| {
                    if part.len() == 0 {
                        return Ok(State::blank(*step, 0));
                    }
                    let ranges = part.ranges();
                    let loaded = load_ranges(location, Which::Step(*step), &layout, ranges, ranges);
                    let (loaded, _) = loaded.map_err(|error| match error {
                        LoadError::Bad { bad, .. } => OriginError::Flawed(bad.to_string()),
                        gone @ LoadError::NoStep { .. } => OriginError::Flawed(gone.to_string()),
                        error => OriginError::Storage(error.into()),
                    })?;
                    let [parameters, first, second] = [loaded.params, loaded.m, loaded.v].map(Arc::new);
                    Ok(State { parameters, first, second, ..State::blank(*step, 0) })
                };
                parts.iter().map(read).collect()
            }
        }
    }
}

/// Parts of the state before the first step: a pure function of task and seed, whatever the device.
pub(crate) fn initial<T: Task>(
    task: &T,
    seed: u64,
    space: &Space,
    parts: &[&Stretches],
) -> Result<Vec<State>, TaskError> {
    // Zeros take no memory before they are written.
    let mut states: Vec<State> = parts.iter().map(|part| State::blank(0, part.len())).collect();
    let mut put = |values: &[f32], start: usize| {
        for (part, state) in parts.iter().zip(&mut states) {
            for (range, at) in part.overlaps(start..start + values.len()) {
                let from = range.start - start..range.end - start;
                let [parameters, ..] = state.arrays_mut();
                parameters[at..at + range.len()].copy_from_slice(&values[from]);
            }
        }
    };
    match task.pretrained(space)? {
        Some(parameters) if parameters.len() == space.len() => put(&parameters, 0),
        Some(parameters) => {
            let (given, wanted) = (parameters.len(), space.len());
            return Err(TaskError::Other(format!(
                "the task starts from {given} parameters where the model has {wanted}, padding included"
            )));
        }
        // Each block is given up once it is copied.
        None => {
            let device = Default::default();
            for (block, bucket) in task.blocks::<Cpu>(seed, &device).zip(space.buckets()) {
                put(&values(&block), bucket.start);
            }
        }
    }
    Ok(states)
}
