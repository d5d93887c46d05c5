//! The gradient sum of one step: from micro-batch gradients to one decoded sum that every rank holds.
//!
//! Four ways, one contract. [`ExactSum`] rounds each micro-batch to integers and exchanges 32 bits an element, or fewer;
//! the few blocks whose sum needs more follow in 64 bits. [`ExactSum64`] exchanges 64 bits throughout and gives the
//! same bits: it is the reference. [`ShardSum`] exchanges every micro-batch's gradient as it appears, and gives the same bits, too.
//! [`PlainSum`] adds floats, fast and deterministic for one world size only.
//!
//! A bucket leaves as soon as its last micro-batch is in, while earlier blocks still run backward. Inputs of the
//! exchange are kept as they are until the step is committed.

mod exact;
mod exact64;
mod flight;
mod plain;
mod sharded;
mod wire;

use std::ops::Range;

use mattock_collectives::{CollectiveError, Group};
use mattock_exact::{BLOCK, Bits, Exponents, Rounding};

use self::exact::ExactSum;
use self::exact64::ExactSum64;
use self::plain::PlainSum;
pub(crate) use self::sharded::{ShardSum, Target};
use crate::params::Space;
use crate::partition::Stretches;
use crate::plan::{Plan, Shard, Sum};

/// The sum over all ranks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summed {
    /// Exponents of the next step; unchanged by plain sums.
    pub(crate) exponents: Exponents,
    /// Blocks whose sum may have needed more bits than the recipe gives it.
    pub(crate) wide_blocks: usize,
}

/// Why a whole bucket is never added to a sharded sum.
const ROUNDS: &str = "a sharded sum is exchanged in rounds";

/// One of the ways.
pub(crate) enum GradientSum {
    Exact(ExactSum),
    Exact64(ExactSum64),
    Sharded(Box<ShardSum>),
    Plain(PlainSum),
}

impl GradientSum {
    pub(crate) fn new(plan: &Plan, space: &Space, bits: Bits) -> Self {
        let micro_batches = plan.batch.micro_batches();
        let rounding = Rounding::new(micro_batches, bits);
        match plan.reduce.sum {
            Sum::Exact | Sum::Exact64 if plan.parallel.shard == Shard::Full => {
                Self::Sharded(Box::new(ShardSum::new(rounding)))
            }
            Sum::Exact => Self::Exact(ExactSum::new(space, rounding)),
            Sum::Exact64 => Self::Exact64(ExactSum64::new(space, rounding)),
            Sum::F32 => Self::Plain(PlainSum::new(space, micro_batches, false)),
            Sum::Bf16 => Self::Plain(PlainSum::new(space, micro_batches, true)),
        }
    }

    /// Makes it one of other bits, where nothing is added up.
    pub(crate) fn change_bits(&mut self, plan: &Plan, space: &Space, bits: Bits) {
        // Two of them might not fit where one does.
        *self = Self::Plain(PlainSum::new(&Space::default(), 0, false));
        *self = Self::new(plan, space, bits);
    }

    /// Whether block exponents are part of the state.
    pub(crate) fn has_exponents(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }

    /// Forgets what was added.
    pub(crate) fn begin(&mut self) {
        match self {
            Self::Exact(sum) => sum.begin(),
            Self::Exact64(sum) => sum.begin(),
            // It begins when it is known who owns what.
            Self::Sharded(_) => {}
            Self::Plain(sum) => sum.begin(),
        }
    }

    /// Adds a micro-batch's gradient of one bucket; `key` is that micro-batch's, for what is rounded at random.
    pub(crate) fn add(&mut self, bucket: usize, gradient: &[f32], exponents: &Exponents, key: u64) {
        match self {
            Self::Exact(sum) => sum.add(bucket, gradient, exponents, key),
            Self::Exact64(sum) => sum.add(bucket, gradient, exponents, key),
            Self::Sharded(_) => unreachable!("{ROUNDS}"),
            Self::Plain(sum) => sum.add(bucket, gradient),
        }
    }

    /// Sends a bucket on its way: nothing will be added to it in this step. Where `lens` say how many elements are each
    /// rank's part, a rank receives its own only.
    pub(crate) fn send(&mut self, bucket: usize, group: &Group, lens: Option<&[usize]>) {
        match self {
            Self::Exact(sum) => sum.send(bucket, group, lens),
            Self::Exact64(sum) => sum.send(bucket, group, lens),
            Self::Sharded(_) => unreachable!("{ROUNDS}"),
            Self::Plain(sum) => sum.send(bucket, group, lens),
        }
    }

    /// Whether this rank met an infinity or NaN.
    pub(crate) fn nonfinite(&self) -> bool {
        match self {
            Self::Exact(sum) => sum.nonfinite(),
            Self::Exact64(sum) => sum.nonfinite(),
            Self::Sharded(sum) => sum.nonfinite(),
            Self::Plain(sum) => sum.nonfinite(),
        }
    }

    /// Waits for all buckets and decodes the mean over micro-batches into `gradient`, which covers what is this rank's own;
    /// sharded sums keep it themselves: see [`decoded`](Self::decoded).
    pub(crate) fn finish(
        &mut self,
        group: &Group,
        exponents: &Exponents,
        own: &Stretches,
        gradient: &mut [f32],
    ) -> Result<Summed, CollectiveError> {
        match self {
            Self::Exact(sum) => sum.finish(group, exponents, own, gradient),
            Self::Exact64(sum) => sum.finish(group, exponents, own, gradient),
            Self::Sharded(sum) => Ok(sum.finish(exponents, own)),
            Self::Plain(sum) => sum.finish(exponents, own, gradient),
        }
    }

    /// The gradient that [`finish`](Self::finish) has decoded, where that is not the caller's.
    pub(crate) fn decoded(&self) -> Option<&[f32]> {
        match self {
            Self::Sharded(sum) => Some(sum.gradient()),
            Self::Exact(_) | Self::Exact64(_) | Self::Plain(_) => None,
        }
    }

    /// Gives up memory that the next step would make again.
    pub(crate) fn rest(&mut self) {
        if let Self::Sharded(sum) = self {
            sum.rest();
        }
    }
}

/// The blocks of a range of the flat space that is made of whole ones.
fn blocks_of(range: &Range<usize>) -> Range<usize> {
    range.start / BLOCK..range.end / BLOCK
}
