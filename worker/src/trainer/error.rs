//! Why a step was not done.

use mattock_collectives::CollectiveError;

use crate::commit::CommitError;
use crate::gate::Recalled;
use crate::origin::OriginError;
use crate::task::TaskError;

/// How [`StepError::ShardsLost`] says it.
pub const SHARDS_LOST: &str = "were lost with the workers that held them";

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// The exchange failed; nothing was written, and the step can be run again.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The coordinator has ended the ring; nothing was written.
    #[error(transparent)]
    Recalled(#[from] Recalled),
    /// The total says that the step may not be written.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The samples of a micro-batch cannot be read; nothing of it was added up.
    #[error(transparent)]
    Samples(#[from] TaskError),
    /// Two ranks have computed a micro-batch, with different results; nothing was written.
    #[error(
        "ranks {owner} and {auditor} have different gradients of micro-batch {index} in step {step}: one's device computes \
         wrongly, and nothing was written"
    )]
    Audit {
        /// The step.
        step: u64,
        /// The micro-batch.
        index: u32,
        /// Who has it in its sums.
        owner: u32,
        /// Who has computed it again.
        auditor: u32,
    },
    /// What came from another rank is not its state.
    #[error("the state that came from rank {root} has hash {got:016x}, there it has {want:016x}")]
    Transfer {
        /// The rank.
        root: u32,
        /// Of what came.
        got: u64,
        /// Of what was sent.
        want: u64,
    },
    /// The ranks of a ring do not have all of the state.
    #[error(
        "{elements} parameters of the state after step {step} {lost}: it is read from the newest checkpoint; [parallel] buddies \
         = true keeps a second copy of each shard",
        lost = SHARDS_LOST
    )]
    ShardsLost {
        /// The step.
        step: u64,
        /// How many parameters nobody has.
        elements: usize,
    },
    /// The checkpoint that the ranks of a ring start from is not whole, as some of them found when they read their parts.
    #[error("the checkpoint of step {step} is not whole: the one before it is used")]
    Flawed {
        /// Of the checkpoint.
        step: u64,
        /// What this rank found, if it was this one.
        what: Option<String>,
    },
    /// The state that the ranks of a ring start from cannot be read.
    #[error(transparent)]
    Origin(#[from] OriginError),
}
