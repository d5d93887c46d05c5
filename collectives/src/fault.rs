//! What ended a group, before it is known which operations it hits.

use std::time::Duration;

use crate::Rank;
use crate::error::{CollectiveError, Disagreement, Place, TransportError};

/// Why a group works no more.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    Lost { peer: Rank, source: TransportError },
    Disagreed { peer: Rank, disagreement: Disagreement },
    Stuck { peer: Rank, timeout: Duration },
    Cancelled { cause: String },
    Closed,
}

impl Fault {
    /// What the fault means for an operation that is at this place.
    pub(crate) fn at(&self, at: Place) -> CollectiveError {
        match self.clone() {
            Self::Lost { peer, source } => CollectiveError::PeerLost { at, peer, source },
            Self::Disagreed { peer, disagreement } => CollectiveError::Mismatch { at, peer, disagreement },
            Self::Stuck { peer, timeout } => CollectiveError::TimedOut { at, peer, timeout },
            Self::Cancelled { cause } => CollectiveError::Cancelled { at, cause },
            Self::Closed => CollectiveError::Closed { at },
        }
    }

    /// What the neighbours are told.
    pub(crate) fn told_by(&self, rank: Rank) -> String {
        match self {
            Self::Lost { peer, source } => format!("rank {rank} lost rank {peer}: {source}"),
            Self::Disagreed { peer, disagreement } => {
                format!("rank {rank} and rank {peer} disagree: {disagreement}")
            }
            Self::Stuck { peer, timeout } => {
                format!("rank {rank} heard nothing of rank {peer} for {timeout:?}")
            }
            Self::Cancelled { cause } => format!("rank {rank} was cancelled: {cause}"),
            Self::Closed => format!("rank {rank} has closed its group"),
        }
    }
}
