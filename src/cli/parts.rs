//! What `train` needs of the parts that know tensors, data and object storage.

use std::marker::PhantomData;

use mattock_checkpoint::{ClaimError, How, Location, Which, claim, probe};
use mattock_worker::task::{Outline, Sampling, Source, Task, TaskError};

use super::checkpoint::locate;
use super::generate::continue_text;
use super::train::Parts;
use crate::exit::Failure;
use crate::recipe::Resolved;
use crate::run_dir::Reuse;

/// How much is drawn from the model at the end of a run.
const SAMPLE: Sampling = Sampling { tokens: 120, temperature: 0.7, seed: 1 };
/// What it continues.
const PROMPT: &str = "pub fn ";

/// The parts of runs of a task.
pub(super) struct TaskParts<T>(pub(super) PhantomData<T>);

/// Opens a recipe's task, building its dataset where it is not there.
///
/// # Errors
/// Bad input, where a table of the recipe or the data are at fault.
pub(super) fn open<T: Task>(recipe: &Resolved) -> Result<T, Failure> {
    of_recipe(recipe, T::open)
}

/// The shapes of a recipe's task; no data is read where the task can do without.
///
/// # Errors
/// As [`open`].
pub(super) fn outline<T: Task>(recipe: &Resolved) -> Result<Outline, Failure> {
    of_recipe(recipe, T::outline)
}

fn of_recipe<R>(
    recipe: &Resolved,
    make: impl FnOnce(&Source<'_>) -> Result<R, TaskError>,
) -> Result<R, Failure> {
    let source = Source {
        model: &recipe.plan.model,
        data: &recipe.plan.data,
        cache: &crate::cache::folder(),
        progress: &|text| eprintln!("{text}"),
    };
    make(&source).map_err(|error| match error {
        TaskError::Table { table, reason } => Failure::bad_input(recipe.table_error(table, &reason)),
        error => Failure::bad_input(error),
    })
}

/// An id that no other run has.
pub(super) fn fresh_id() -> String {
    format!("{:x}-{:x}", jiff::Timestamp::now().as_nanosecond(), std::process::id())
}

impl<T: Task> Parts for TaskParts<T> {
    fn prepare(&self, recipe: &Resolved) -> Result<String, Failure> {
        Ok(open::<T>(recipe)?.facts().dataset_hash)
    }

    fn claim_checkpoints(&self, url: &str, reuse: Reuse) -> Result<String, Failure> {
        let location = Location::parse(url).map_err(Failure::bad_input)?;
        probe(&location).map_err(Failure::bad_input)?;
        let how = match reuse {
            Reuse::Refuse => How::Fresh,
            Reuse::Resume | Reuse::ResumeIfAny => How::Resume,
            Reuse::Overwrite => How::Overwrite,
        };
        match claim(&location, &fresh_id(), how) {
            Err(ClaimError::Nothing { .. }) if reuse == Reuse::ResumeIfAny => {
                claim(&location, &fresh_id(), How::Fresh)
            }
            claimed => claimed,
        }
        .map_err(Failure::bad_input)
    }

    fn sample(&self, _: &Resolved, checkpoint: &str) -> Option<String> {
        let (location, step) = locate(checkpoint).ok()?;
        continue_text(&location, step.map_or(Which::Newest, Which::Step), PROMPT, &SAMPLE).ok()
    }
}
