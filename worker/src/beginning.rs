//! What a worker has of a run's state before its first ring, or after all who had it are gone.

use std::sync::Arc;

use mattock_checkpoint::{LoadError, Location, Which, load_ranges};
use mattock_exact::Exponents;

use crate::origin::Origin;
use crate::params::Space;
use crate::partition::Stretches;
use crate::settings::{Settings, Start};
use crate::state::State;
use crate::storage::{StorageError, layout};
use crate::task::Task;

/// What a worker has.
pub(crate) enum Beginning {
    /// Nothing; the others have it.
    Nothing,
    /// All of the state, in memory.
    Whole(State),
    /// All of it, where it lies.
    At {
        /// How many steps are done.
        step: u64,
        /// Of all blocks.
        exponents: Exponents,
        /// Where parameters and moments are.
        origin: Origin,
    },
}

/// Where a worker looks for it.
pub(crate) struct Beginnings<'a, T> {
    pub(crate) settings: &'a Settings,
    pub(crate) task: &'a T,
    pub(crate) space: &'a Space,
    pub(crate) seed: u64,
    /// Whether no rank holds all of the state.
    pub(crate) divided: bool,
    /// The step of a checkpoint that turned out not to be whole, when it was read; only those before it are believed.
    pub(crate) flawed: Option<u64>,
}

/// What was found, and what was passed over to find it.
type Found = (Beginning, Vec<String>);

impl<T: Task> Beginnings<'_, T> {
    /// The state from which a run starts.
    pub(crate) fn start(&self) -> Result<Found, StorageError> {
        match self.settings.start {
            Start::Fresh => self.initial(),
            Start::Newest => self.stored(Which::Newest),
            Start::NewestIfAny => match self.stored(Which::Newest) {
                Err(StorageError::Load(LoadError::None { .. })) => self.initial(),
                found => found,
            },
            Start::Step(step) => self.stored(Which::Step(step)),
        }
    }

    /// The state from which a run goes on whose workers are all gone: that of the newest checkpoint up to this step, or the
    /// one it started from.
    pub(crate) fn restore(&self, up_to: u64) -> Result<Found, StorageError> {
        match self.stored(Which::UpTo(up_to)) {
            Err(StorageError::Load(LoadError::None { .. })) => self.start(),
            found => found,
        }
    }

    fn initial(&self) -> Result<Found, StorageError> {
        let beginning = match self.divided {
            true => {
                let origin = Origin::Initial { seed: self.seed };
                Beginning::At { step: 0, exponents: Exponents::default(), origin }
            }
            false => Beginning::Whole(State::initial(self.task, self.space, self.seed)?),
        };
        Ok((beginning, Vec::new()))
    }

    fn stored(&self, which: Which) -> Result<Found, StorageError> {
        let location = Location::parse(&self.settings.checkpoints)?;
        let which = match (self.flawed, which) {
            (None, which) | (Some(_), which @ Which::Step(_)) => which,
            (Some(0), _) => {
                let (url, skipped) = (location.to_string(), Vec::new());
                return Err(LoadError::None { url, skipped }.into());
            }
            (Some(flawed), Which::Newest) => Which::UpTo(flawed - 1),
            (Some(flawed), Which::UpTo(step)) => Which::UpTo(step.min(flawed - 1)),
        };
        let all = Stretches::new(self.space.buckets().to_vec());
        // What is divided is read when it is known who holds what.
        let now = if self.divided { &[][..] } else { all.ranges() };
        let (loaded, skipped) = load_ranges(&location, which, &layout(self.space)?, now, now)?;
        let (step, exponents) = (loaded.head.manifest.step, Exponents::from_eighths(loaded.exponents));
        let beginning = match self.divided {
            true => Beginning::At { step, exponents, origin: Origin::Stored { location, step } },
            false => {
                let [parameters, first, second] = [loaded.params, loaded.m, loaded.v].map(Arc::new);
                Beginning::Whole(State { step, parameters, first, second, exponents })
            }
        };
        Ok((beginning, skipped.iter().map(|skipped| format!("passed over {skipped}")).collect()))
    }
}
