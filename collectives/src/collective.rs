//! Names of what ranks do together: the collective operations, and one numbered instance of them.

use std::fmt;

use crate::Rank;

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Collective {
    /// Everybody ends with the reduction of all inputs.
    AllReduce,
    /// As all-reduce, of several buffers at once.
    AllReduceBatch {
        /// A digest of the buffers' lengths, which are to be the same for all.
        lengths: u32,
    },
    /// Rank `r` ends with segment `r` of the reduction of all inputs.
    ReduceScatter,
    /// As reduce-scatter, into segments of any lengths.
    ReduceScatterUneven {
        /// A digest of the lengths, which are to be the same for all.
        lengths: u32,
    },
    /// Everybody ends with all segments, each from its rank.
    AllGather,
    /// As all-gather, of segments of any lengths.
    AllGatherUneven {
        /// A digest of the lengths, which are to be the same for all.
        lengths: u32,
    },
    /// Everybody ends with the root's input.
    Broadcast {
        /// Whose input is spread.
        root: Rank,
    },
    /// Nobody leaves before everybody has entered.
    Barrier,
    /// The root ends with the reduction of all inputs.
    Reduce {
        /// Who receives it.
        root: Rank,
    },
    /// The root ends with all segments, each from its rank.
    Gather {
        /// Who receives them.
        root: Rank,
    },
    /// Rank `r` ends with segment `r` of the root's input.
    Scatter {
        /// Whose input is divided.
        root: Rank,
    },
    /// Rank `r` ends with segment `r` of everybody's input.
    AllToAll,
    /// Rank `r` ends with the segment of the rank before it.
    Shift {
        /// A digest of the lengths of the segments, which are to be the same for all.
        lengths: u32,
    },
    /// One rank ends with what another has sent it; no other rank takes part.
    Message {
        /// What tells messages between the same two ranks apart.
        tag: u32,
    },
}

impl Collective {
    /// Whether segments may be empty, and are announced even so.
    pub(crate) fn is_uneven(self) -> bool {
        matches!(self, Self::ReduceScatterUneven { .. } | Self::AllGatherUneven { .. } | Self::Shift { .. })
    }

    /// The collective whose chunks travel a ring the same way: who does not need the result passes it on all the same.
    pub(crate) fn pattern(self) -> Self {
        match self {
            Self::Reduce { .. } | Self::AllReduceBatch { .. } => Self::AllReduce,
            Self::Gather { .. } | Self::AllToAll | Self::AllGatherUneven { .. } => Self::AllGather,
            Self::Scatter { root } => Self::Broadcast { root },
            Self::ReduceScatterUneven { .. } => Self::ReduceScatter,
            other => other,
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllReduce => f.write_str("all-reduce"),
            Self::ReduceScatter => f.write_str("reduce-scatter"),
            Self::AllGather => f.write_str("all-gather"),
            Self::AllReduceBatch { lengths } => write!(f, "all-reduce of a batch ({lengths:08x})"),
            Self::AllGatherUneven { lengths } => write!(f, "all-gather of uneven parts ({lengths:08x})"),
            Self::Broadcast { root } => write!(f, "broadcast from rank {root}"),
            Self::Barrier => f.write_str("barrier"),
            Self::Reduce { root } => write!(f, "reduce to rank {root}"),
            Self::Gather { root } => write!(f, "gather to rank {root}"),
            Self::Scatter { root } => write!(f, "scatter from rank {root}"),
            Self::AllToAll => f.write_str("all-to-all"),
            Self::ReduceScatterUneven { lengths } => {
                write!(f, "reduce-scatter into uneven parts ({lengths:08x})")
            }
            Self::Shift { lengths } => write!(f, "shift to the next rank ({lengths:08x})"),
            Self::Message { tag } => write!(f, "message with tag {tag}"),
        }
    }
}

/// One operation of a group: ranks submit the same operations in the same order, so its number names it for all. Messages are
/// numbered by themselves, between each two ranks and in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpId {
    /// How many operations the group was given before this one.
    pub sequence: u64,
    /// What kind of operation it is.
    pub collective: Collective,
}

impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.collective, self.sequence)
    }
}
