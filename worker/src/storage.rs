//! From training state to checkpoint and back.

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mattock_checkpoint::room::copied;
use mattock_checkpoint::{
    Files, Layout, Location, Outcome, Retention, RunFacts, SaveError, Share, Slices, Snapshot, TensorMeta,
    Tuning, Writer, holder_of,
};
use mattock_exact::BLOCK;

use crate::params::Space;
use crate::plan::Plan;
use crate::settings::{Settings, Start};
use crate::state::State;
use crate::task::{Facts, Task, TaskError};
use crate::trainer::Loan;

/// How long the last checkpoint may take, once training is over.
const LAST_CHECKPOINT_LIMIT: Duration = Duration::from_secs(600);
/// How long the others' shares of it are waited for, once the own one is written; more, where that took longer.
const OTHERS_LIMIT: Duration = Duration::from_secs(20);
/// How often rank 0 looks how far it is.
const LOOK: Duration = Duration::from_millis(5);

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
    /// A record beside the checkpoints.
    #[error(transparent)]
    Record(#[from] mattock_checkpoint::RecordError),
    /// What a run has chosen cannot be read.
    #[error(
        "cannot read {url}, which says how many bits this run's sums have: {what}; write reduce.bits in numbers"
    )]
    Choice {
        /// The record.
        url: String,
        /// What is wrong with it.
        what: String,
    },
    /// The task cannot tell what it starts from.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// The last checkpoint is not in storage.
    #[error(transparent)]
    Finish(#[from] mattock_checkpoint::FinishError),
    /// The last checkpoint misses parts that only others have.
    #[error("the last checkpoint, of step {step}, is not complete: the shares of other workers did not come")]
    Incomplete {
        /// The step.
        step: u64,
    },
    /// This worker's share of the last checkpoint could not be written.
    #[error("cannot write the last checkpoint, {url}: {error}")]
    Unwritten {
        /// Where it would have been.
        url: String,
        /// Why.
        #[source]
        error: mattock_checkpoint::SaveError,
    },
    /// The system refuses a thread.
    #[error("cannot start a thread to copy the state for a checkpoint: {0}")]
    Thread(std::io::Error),
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
    let space = Space::of_task(task);
    let state = State::initial(task, &space, plan.seed)?;
    let settings = Settings { checkpoints: checkpoints.to_owned(), start: Start::Fresh };
    let mut saver = Saver::new(plan, &settings, &space, &task.facts(), run, recipe)?;
    saver.open()?;
    let state_hash = state.hash();
    saver.save(state.clone(), state_hash, Share::WHOLE, None)?;
    let saved =
        saver.finish(state.step, Some(&state), state_hash, || false)?.into_iter().find_map(|outcome| {
            match outcome {
                Outcome::Saved(saved) => Some(saved.url),
                _ => None,
            }
        });
    saved.ok_or_else(|| StorageError::Layout("the writer told of no checkpoint".to_owned()))
}

/// Writes this worker's part of a run's checkpoints in the background.
///
/// The state is the same on all ranks, so each writes a share of it, and any of them can write all of it: rank 0 does where
/// others cannot see the place, or where their shares of the last checkpoint do not come.
pub(crate) struct Saver {
    /// None where the place cannot be seen from here.
    writer: Option<Writer>,
    location: Location,
    retention: Retention,
    tuning: Tuning,
    layout: Arc<Layout>,
    files: Arc<Files>,
    run: Arc<RunFacts>,
    newest: Option<(u64, Share)>,
    copying: Option<Copying>,
    /// The store refuses what this worker writes.
    refused: bool,
    /// The place was looked for, and is not the run's here.
    unseen: bool,
}

/// What a rank writes of a state.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) step: u64,
    /// Of all blocks, in eighths.
    pub(crate) exponents: Vec<i16>,
    /// Ranges of whole tensors, and their parameters.
    pub(crate) weights: (Vec<Range<usize>>, Arc<Vec<f32>>),
    /// Other ranges, and both moments of them.
    pub(crate) moments: (Vec<Range<usize>>, [Arc<Vec<f32>>; 2]),
}

/// A part that another thread copies out of the state, while training computes the next step.
struct Copying {
    thread: JoinHandle<Part>,
    state_hash: u64,
    share: Share,
}

/// What the ranks of a ring must know of each other before each writes a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Readiness {
    /// Ranks in which an earlier checkpoint still waits to be written.
    pub(crate) busy: u32,
    /// Ranks that cannot write where checkpoints are kept.
    pub(crate) blind: u32,
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
            writer: None,
            location,
            retention: Retention { keep, keep_every: plan.checkpoint.keep_every },
            tuning: Tuning::within(plan.checkpoint.memory),
            layout: Arc::new(layout(space)?),
            files: Arc::new(files),
            run: Arc::new(run),
            newest: None,
            copying: None,
            refused: false,
            unseen: false,
        })
    }

    /// Opens the place: for the rank that must be able to write.
    pub(crate) fn open(&mut self) -> Result<(), StorageError> {
        if self.writer.is_none() {
            self.writer = Some(Writer::start(&self.location, self.retention, self.tuning)?);
        }
        Ok(())
    }

    /// Opens the place if it is the run's; says why where it is not. A folder of the same name on another host is not.
    pub(crate) fn open_if_seen(&mut self) -> Option<String> {
        if self.writer.is_some() || self.unseen {
            return None;
        }
        let seen = match holder_of(&self.location) {
            Ok(Some(holder)) if holder != self.run.run_id => Err(format!("it holds run {holder}")),
            Ok(None) if self.location.folder().is_some() => {
                Err("it is no folder of this run here; let all hosts share it, or use s3://".to_owned())
            }
            Ok(_) => self.open().map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        self.unseen = seen.is_err();
        seen.err().map(|why| format!("this worker writes no checkpoints to {}: {why}", self.location))
    }

    /// What this rank has to say before a checkpoint.
    pub(crate) fn readiness(&mut self) -> Readiness {
        if let Err(error) = self.settle() {
            tracing::warn!("this worker writes no more checkpoints: {error}");
            self.refused = true;
        }
        let busy = self.writer.as_ref().is_some_and(|writer| !writer.is_free());
        Readiness { busy: busy.into(), blind: (self.writer.is_none() || self.refused).into() }
    }

    /// Hands a share of a state of which this rank has all to the writer; one that was saved already is not saved again. Where
    /// training goes on it has lent the state, and a copy is made.
    pub(crate) fn save(
        &mut self,
        state: State,
        state_hash: u64,
        share: Share,
        loan: Option<Loan>,
    ) -> Result<(), StorageError> {
        let moments = share.of_elements(self.layout.elements(), BLOCK);
        let weights = self.weights(share);
        let (step, all) = (state.step, 0..self.layout.elements());
        let cut = move || {
            let cut = |array: &Arc<Vec<f32>>, ranges: &[Range<usize>]| match ranges {
                [range] if loan.is_none() && *range == all => Arc::clone(array),
                ranges => {
                    let parts: Vec<&[f32]> = ranges.iter().map(|range| &array[range.clone()]).collect();
                    Arc::new(copied(&parts))
                }
            };
            let parameters = cut(&state.parameters, &weights);
            let both = [&state.first, &state.second].map(|array| cut(array, std::slice::from_ref(&moments)));
            let exponents = state.exponents.eighths().to_vec();
            // Before the loan ends: who writes to arrays that are shared makes new ones.
            drop(state);
            drop(loan);
            Part { step, exponents, weights: (weights, parameters), moments: (vec![moments], both) }
        };
        self.save_as(step, state_hash, share, cut)
    }

    /// Hands over a share of a state of which this rank has a part; a copy of its moments where training goes on, which has lent
    /// them.
    pub(crate) fn save_part(
        &mut self,
        part: Part,
        state_hash: u64,
        share: Share,
        loan: Option<Loan>,
    ) -> Result<(), StorageError> {
        let step = part.step;
        let make = move || {
            let Part { moments: (ranges, mut moments), .. } = part;
            if loan.is_some() {
                // One after the other, and all before the loan ends: see above.
                moments = moments.map(|moments| Arc::new(copied(&[&moments[..]])));
            }
            drop(loan);
            Part { moments: (ranges, moments), ..part }
        };
        self.save_as(step, state_hash, share, make)
    }

    /// Has a part made by another thread, and later written.
    fn save_as(
        &mut self,
        step: u64,
        state_hash: u64,
        share: Share,
        make: impl FnOnce() -> Part + Send + 'static,
    ) -> Result<(), StorageError> {
        if self.newest.replace((step, share)) == Some((step, share)) || self.writer.is_none() {
            return Ok(());
        }
        self.settle()?;
        let thread = std::thread::Builder::new().name("checkpoint copy".to_owned()).spawn(make);
        let thread = thread.map_err(StorageError::Thread)?;
        self.copying = Some(Copying { thread, state_hash, share });
        Ok(())
    }

    /// Hands what was copied to the writer.
    fn settle(&mut self) -> Result<(), StorageError> {
        let Some(Copying { thread, state_hash, share }) = self.copying.take() else { return Ok(()) };
        let copied = thread.join();
        let part = copied.map_err(|_| StorageError::Layout("the copy of a state panicked".to_owned()))?;
        self.submit(part, state_hash, share)
    }

    /// The elements whose parameters a share has: those of whole tensors.
    pub(crate) fn weights(&self, share: Share) -> Vec<Range<usize>> {
        share.of_tensors(&self.layout)
    }

    fn submit(&mut self, part: Part, state_hash: u64, share: Share) -> Result<(), StorageError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let slices = |ranges: &[Range<usize>], values| {
            Slices::new(ranges, values).map_err(|error| StorageError::Layout(error.to_string()))
        };
        let (weights, parameters) = part.weights;
        let (moments, [first, second]) = part.moments;
        let snapshot = Snapshot {
            step: part.step,
            state_hash,
            layout: Arc::clone(&self.layout),
            share,
            params: slices(&weights, parameters)?,
            m: slices(&moments, first)?,
            v: slices(&moments, second)?,
            exponents: Arc::new(part.exponents),
            files: Arc::clone(&self.files),
            run: Arc::clone(&self.run),
        };
        writer.submit(snapshot).map_err(|error| StorageError::Layout(error.to_string()))
    }

    /// What became of checkpoints since the last call.
    pub(crate) fn outcomes(&mut self) -> Result<Vec<Outcome>, StorageError> {
        if self.copying.as_ref().is_some_and(|copying| copying.thread.is_finished()) {
            self.settle()?;
        }
        let outcomes = self.writer.as_mut().map(Writer::poll_outcomes).unwrap_or_default();
        let refusal = |outcome: &Outcome| match outcome {
            Outcome::Failed { error: SaveError::Store(error), .. } => !error.is_transient(),
            _ => false,
        };
        self.refused |= outcomes.iter().any(refusal);
        Ok(outcomes)
    }

    /// Waits for what this worker itself has under way.
    pub(crate) fn leave(mut self) -> Vec<Outcome> {
        if let Err(error) = self.settle() {
            tracing::warn!("a checkpoint was not written: {error}");
        }
        self.writer.map(|writer| writer.leave(LAST_CHECKPOINT_LIMIT)).unwrap_or_default()
    }

    /// Waits until the last checkpoint, of which this worker has share 0, is complete; writes it alone where the other
    /// shares do not come, or cannot, for `is_over` says so, and it has all of the `state`.
    pub(crate) fn finish(
        mut self,
        step: u64,
        state: Option<&State>,
        state_hash: u64,
        is_over: impl Fn() -> bool,
    ) -> Result<Vec<Outcome>, StorageError> {
        let mut outcomes = Vec::new();
        self.settle()?;
        let is_whole = self.newest.is_some_and(|(_, share)| share.is_whole());
        let ended = if is_whole { None } else { self.await_others(step, is_over, &mut outcomes)? };
        if let Some(why) = ended {
            let Some(state) = state else { return Err(why) };
            tracing::warn!(step, "the shares of others did not come: writing all of it");
            self.save(state.clone(), state_hash, Share::WHOLE, None)?;
            self.settle()?;
        }
        if let Some(writer) = self.writer {
            outcomes.extend(writer.finish(LAST_CHECKPOINT_LIMIT)?);
        }
        Ok(outcomes)
    }

    /// Why the checkpoint of this step did not get complete, if so.
    fn await_others(
        &mut self,
        step: u64,
        is_over: impl Fn() -> bool,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<Option<StorageError>, StorageError> {
        let until = Instant::now() + LAST_CHECKPOINT_LIMIT;
        let mut others_until = until;
        let incomplete = Some(StorageError::Incomplete { step });
        while Instant::now() < others_until.min(until) && !is_over() {
            for outcome in self.outcomes()? {
                match outcome {
                    Outcome::Saved(ref saved) if saved.step == step => {
                        outcomes.push(outcome);
                        return Ok(None);
                    }
                    // All of it is written instead where that can be, and told of then.
                    Outcome::Failed { step: failed, url, error } if failed == step => {
                        return Ok(Some(StorageError::Unwritten { url, error }));
                    }
                    Outcome::Incomplete { step: failed, .. } if failed == step => return Ok(incomplete),
                    Outcome::Written { step: written, took, .. } if written == step => {
                        others_until = Instant::now() + OTHERS_LIMIT.max(took * 2);
                        outcomes.push(outcome);
                    }
                    outcome => outcomes.push(outcome),
                }
            }
            std::thread::sleep(LOOK);
        }
        Ok(incomplete)
    }
}
