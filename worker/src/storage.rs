//! From training state to checkpoint and back.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use mattock_checkpoint::{
    Files, Layout, LoadError, Location, Outcome, Retention, RunFacts, Share, Slices, Snapshot, TensorMeta,
    Tuning, Which, Writer, load,
};
use mattock_exact::Exponents;

use crate::params::Space;
use crate::plan::Plan;
use crate::settings::{Settings, Start};
use crate::state::State;
use crate::task::{Facts, Task};

/// How long the last checkpoint may take, once training is over.
const LAST_CHECKPOINT_LIMIT: Duration = Duration::from_secs(600);

/// Why state could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The place is none.
    #[error(transparent)]
    Location(#[from] mattock_checkpoint::LocationError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] mattock_checkpoint::StoreError),
    /// Nothing could be loaded.
    #[error(transparent)]
    Load(#[from] mattock_checkpoint::LoadError),
    /// The last checkpoint is not in storage.
    #[error(transparent)]
    Finish(#[from] mattock_checkpoint::FinishError),
    /// Our own tensors do not fit together: a bug.
    #[error("a checkpoint of this model cannot be laid out: {0}; this is a bug")]
    Layout(String),
}

/// Where the parameters of a space lie, as a checkpoint says it.
///
/// # Errors
/// [`StorageError::Layout`] where two parameters have one name.
pub fn layout(space: &Space) -> Result<Layout, StorageError> {
    let tensors = space.parameters().iter().map(|parameter| TensorMeta {
        name: parameter.name.clone(),
        shape: parameter.shape.clone(),
        offset: parameter.offset,
    });
    Layout::new(tensors.collect(), space.len()).map_err(|error| StorageError::Layout(error.to_string()))
}

/// The state from which a run starts, and what was passed over to find it.
pub(crate) fn start(
    settings: &Settings,
    space: &Space,
    initial: State,
) -> Result<(State, Vec<String>), StorageError> {
    match settings.start {
        Start::Fresh => Ok((initial, Vec::new())),
        Start::Newest => read(settings, space, Which::Newest),
        Start::NewestIfAny => match read(settings, space, Which::Newest) {
            Err(StorageError::Load(LoadError::None { .. })) => Ok((initial, Vec::new())),
            read => read,
        },
        Start::Step(step) => read(settings, space, Which::Step(step)),
    }
}

/// The state from which a run goes on whose workers are all gone: that of the newest checkpoint up to this step, or the one
/// it started from.
pub(crate) fn restore(
    settings: &Settings,
    space: &Space,
    initial: State,
    up_to: u64,
) -> Result<(State, Vec<String>), StorageError> {
    match read(settings, space, Which::UpTo(up_to)) {
        Err(StorageError::Load(LoadError::None { .. })) => start(settings, space, initial),
        read => read,
    }
}

fn read(settings: &Settings, space: &Space, which: Which) -> Result<(State, Vec<String>), StorageError> {
    let location = Location::parse(&settings.checkpoints)?;
    let (loaded, skipped) = load(&location, which, &layout(space)?)?;
    let state = State {
        step: loaded.head.manifest.step,
        parameters: loaded.params,
        first: loaded.m,
        second: loaded.v,
        exponents: Exponents::from_eighths(loaded.exponents),
    };
    Ok((state, skipped.iter().map(|skipped| format!("passed over {skipped}")).collect()))
}

/// Writes a checkpoint of step 0, the state before any training; returns its address.
///
/// # Errors
/// [`StorageError`] where it is not in storage at the end.
pub fn save_initial<T: Task>(
    task: &T,
    plan: &Plan,
    checkpoints: &str,
    run: &str,
    recipe: &str,
) -> Result<String, StorageError> {
    let (space, state) = State::initial(task, plan.seed);
    let settings = Settings { checkpoints: checkpoints.to_owned(), start: Start::Fresh };
    let mut saver = Saver::new(plan, &settings, &space, &task.facts(), run, recipe)?;
    saver.save(&state, state.hash())?;
    let saved = saver.finish()?.into_iter().find_map(|outcome| match outcome {
        Outcome::Saved(saved) => Some(saved.url),
        _ => None,
    });
    saved.ok_or_else(|| StorageError::Layout("the writer told of no checkpoint".to_owned()))
}

/// Writes a run's checkpoints in the background.
pub(crate) struct Saver {
    writer: Writer,
    layout: Arc<Layout>,
    files: Arc<Files>,
    run: Arc<RunFacts>,
    newest: Option<u64>,
}

impl Saver {
    pub(crate) fn new(
        plan: &Plan,
        settings: &Settings,
        space: &Space,
        facts: &Facts,
        run: &str,
        recipe: &str,
    ) -> Result<Self, StorageError> {
        let location = Location::parse(&settings.checkpoints)?;
        let keep = NonZeroU32::new(plan.checkpoint.keep).unwrap_or(NonZeroU32::MIN);
        let files = Files {
            config_json: facts.config_json.clone().into(),
            tokenizer_json: facts.tokenizer_json.as_ref().map(|json| json.to_vec().into()),
            recipe_toml: Some(recipe.to_owned().into()),
        };
        let run = RunFacts {
            run_id: run.to_owned(),
            program: format!("mattock {}", env!("CARGO_PKG_VERSION")),
            seed: plan.seed,
            total_steps: plan.steps,
            dataset: facts.dataset_hash.clone(),
        };
        Ok(Self {
            writer: Writer::start(&location, Retention { keep, keep_every: 0 }, Tuning::default())?,
            layout: Arc::new(layout(space)?),
            files: Arc::new(files),
            run: Arc::new(run),
            newest: None,
        })
    }

    /// Copies the state and hands it to the writer; a state that was saved already is not saved again.
    pub(crate) fn save(&mut self, state: &State, state_hash: u64) -> Result<(), StorageError> {
        if self.newest.replace(state.step) == Some(state.step) {
            return Ok(());
        }
        let snapshot = Snapshot {
            step: state.step,
            state_hash,
            layout: Arc::clone(&self.layout),
            share: Share::WHOLE,
            params: Slices::whole(Arc::new(state.parameters.clone())),
            m: Slices::whole(Arc::new(state.first.clone())),
            v: Slices::whole(Arc::new(state.second.clone())),
            exponents: Arc::new(state.exponents.eighths().to_vec()),
            files: Arc::clone(&self.files),
            run: Arc::clone(&self.run),
        };
        self.writer.submit(snapshot).map_err(|error| StorageError::Layout(error.to_string()))
    }

    /// What became of checkpoints since the last call.
    pub(crate) fn outcomes(&mut self) -> Vec<Outcome> {
        self.writer.poll_outcomes()
    }

    /// Waits for what is under way.
    pub(crate) fn finish(self) -> Result<Vec<Outcome>, StorageError> {
        Ok(self.writer.finish(LAST_CHECKPOINT_LIMIT)?)
    }
}
