//! The commit point of a step: what every rank must have seen before anybody writes state.
//!
//! A rank contributes only when its reduced buckets are complete, and writes nothing before it holds the total. All
//! entries are sums of unsigned integers, so the total does not depend on the order of ranks: a micro-batch's count
//! and the bits of its loss are contributed by whoever computed it, and are zero elsewhere.
//!
//! # Invariants
//! 1. No state is written unless every micro-batch was counted exactly once.
//! 2. All ranks read the same verdict from the same total.
//! 3. No state is written unless all ranks started from the same one: each bit of its hash was set by all of them, or by none.
//! 4. Where state is sharded, a shard's two holders have the same one, or nothing is written.

use crate::plan::NonFinite;

/// Bits of a state hash.
const HASH_BITS: usize = 64;
/// The words at the end: whether a gradient was not finite, whether to stop, how many ranks there are.
const FLAGS: usize = 3;

/// One rank's contribution, or the total over `N` ranks: `[counts; M] [loss bits; M] [hash bits; 64] [nonfinite] [stop] [ranks]
/// [microseconds of a micro-batch; N]`, and where state is sharded among them, in pairs of words that one rank sets: `[shard hash; N] [buddy's shard hash; N]
/// [squares of the gradient's chunks]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ballot {
    words: Vec<u32>,
    micro_batches: usize,
}

/// What a rank of a ring with sharded state contributes besides.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ShardVote<'a> {
    /// The rank, and how many there are.
    pub(crate) rank: u32,
    pub(crate) world: u32,
    /// Hash of its shard of the state before the step.
    pub(crate) own: u64,
    /// Hash of its copy of the shard of the rank before it, if it holds one.
    pub(crate) before: Option<u64>,
    /// How many chunks there are, and the sums of squares of those whose gradient this rank has.
    pub(crate) chunks: usize,
    pub(crate) squares: &'a [(usize, f64)],
}

/// What the total says of sharded state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ShardTotal {
    /// Of all shards before the step, without exponents.
    pub(crate) hash: u64,
    /// Sums of squares of all chunks.
    pub(crate) squares: Vec<f64>,
}

/// What a complete total says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verdict {
    /// Mean over the micro-batches, added in their order.
    pub(crate) loss: f64,
    /// Whether the state is updated.
    pub(crate) update: bool,
    /// Whether the run ends after this step.
    pub(crate) stop: bool,
}

/// Why a step may not be written.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommitError {
    /// The one invariant that everything rests on.
    #[error(
        "micro-batch {index} was counted {count} times in step {step}: nothing was written; this is a bug"
    )]
    NotOnce {
        /// The step.
        step: u64,
        /// The micro-batch.
        index: usize,
        /// How often it was counted.
        count: u32,
    },
    /// Some rank's memory, or device, did something wrong.
    #[error("the ranks of step {step} did not start from the same state: nothing was written")]
    OtherState {
        /// The step.
        step: u64,
    },
    /// As above, of sharded state.
    #[error(
        "rank {rank} and its buddy hold different shards of the state before step {step}: nothing was written"
    )]
    OtherShard {
        /// The step.
        step: u64,
        /// The owner.
        rank: usize,
    },
    /// `nonfinite = "stop"`.
    #[error(
        "the gradient of step {step} is not finite: nothing was written; lower the learning rate, or set \
         [reduce] nonfinite = \"skip\" to leave such steps out"
    )]
    NonFinite {
        /// The step.
        step: u64,
    },
}

impl Ballot {
    /// That of a rank that starts from the state with this hash.
    pub(crate) fn new(micro_batches: usize, state_hash: u64) -> Self {
        let mut words = vec![0; 2 * micro_batches];
        words.extend((0..HASH_BITS).map(|bit| (state_hash >> bit & 1) as u32));
        words.extend([0, 0, 1]);
        Self { words, micro_batches }
    }

    fn flags(&mut self) -> &mut [u32] {
        let start = 2 * self.micro_batches + HASH_BITS;
        &mut self.words[start..start + FLAGS]
    }

    /// A micro-batch took this rank so many microseconds; 0 where it had none. Told before what is sharded.
    pub(crate) fn took(&mut self, rank: u32, world: u32, micros: u32) {
        let start = self.words.len();
        self.words.resize(start + world as usize, 0);
        self.words[start + rank as usize] = micros;
    }

    /// Of a total: how many microseconds a micro-batch took each rank.
    pub(crate) fn times(&self, world: u32) -> &[u32] {
        let start = 2 * self.micro_batches + HASH_BITS + FLAGS;
        self.words.get(start..start + world as usize).unwrap_or_default()
    }

    /// This rank's part of what is sharded.
    pub(crate) fn shard(&mut self, vote: &ShardVote<'_>) {
        let ShardVote { rank, world, own, before, chunks, squares } = *vote;
        let start = self.words.len();
        self.words.resize(start + 2 * (2 * world as usize + chunks), 0);
        let pairs = &mut self.words[start..];
        let mut set = |pair: usize, value: u64| {
            (pairs[2 * pair], pairs[2 * pair + 1]) = (value as u32, (value >> 32) as u32);
        };
        set(rank as usize, own);
        if let Some(before) = before {
            set((world + (rank + world - 1) % world) as usize, before);
        }
        squares.iter().for_each(|&(chunk, squares)| set(2 * world as usize + chunk, squares.to_bits()));
    }

    /// This rank computed micro-batch `index`.
    pub(crate) fn count(&mut self, index: usize, loss: f32) {
        self.words[index] += 1;
        self.words[self.micro_batches + index] = loss.to_bits();
    }

    /// This rank met an infinity or NaN.
    pub(crate) fn nonfinite(&mut self) {
        self.flags()[0] = 1;
    }

    /// This rank was asked to stop after the step.
    pub(crate) fn stop(&mut self) {
        self.flags()[1] = 1;
    }

    pub(crate) fn into_words(self) -> Vec<u32> {
        self.words
    }

    /// Wraps the total over all ranks.
    pub(crate) fn from_total(words: Vec<u32>, micro_batches: usize) -> Self {
        Self { words, micro_batches }
    }

    /// Reads the total of `world` ranks that have sharded state, each shard with a second holder if `buddies`.
    pub(crate) fn shards(&self, step: u64, world: u32, buddies: bool) -> Result<ShardTotal, CommitError> {
        let start = 2 * self.micro_batches + HASH_BITS + FLAGS + world as usize;
        let pairs = self.words[start..].chunks_exact(2);
        let mut pairs = pairs.map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32);
        let own: Vec<u64> = pairs.by_ref().take(world as usize).collect();
        let copies: Vec<u64> = pairs.by_ref().take(world as usize).collect();
        if let Some(rank) = own.iter().zip(&copies).position(|(own, copy)| own != copy).filter(|_| buddies) {
            return Err(CommitError::OtherShard { step, rank });
        }
        let hash = own.into_iter().fold(0u64, u64::wrapping_add);
        Ok(ShardTotal { hash, squares: pairs.map(f64::from_bits).collect() })
    }

    /// Whether all ranks started from the same state.
    pub(crate) fn same_state(&self, step: u64) -> Result<(), CommitError> {
        let (hash, flags) = self.words[2 * self.micro_batches..].split_at(HASH_BITS);
        let differs = hash.iter().any(|&set| set != 0 && set != flags[2]);
        if differs { Err(CommitError::OtherState { step }) } else { Ok(()) }
    }

    /// Reads the total.
    pub(crate) fn verdict(&self, step: u64, nonfinite: NonFinite) -> Result<Verdict, CommitError> {
        let (counts, rest) = self.words.split_at(self.micro_batches);
        let (losses, rest) = rest.split_at(self.micro_batches);
        let flags = &rest[HASH_BITS..];
        self.same_state(step)?;
        if let Some((index, &count)) = counts.iter().enumerate().find(|&(_, &count)| count != 1) {
            return Err(CommitError::NotOnce { step, index, count });
        }
        let sum: f64 = losses.iter().map(|&bits| f64::from(f32::from_bits(bits))).sum();
        let loss = sum / losses.len() as f64;
        let finite = flags[0] == 0 && loss.is_finite();
        if !finite && nonfinite == NonFinite::Stop {
            return Err(CommitError::NonFinite { step });
        }
        Ok(Verdict { loss, update: finite, stop: flags[1] != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: u64 = 0xfedc_ba98_7654_3210;

    fn total(ballots: &[Ballot]) -> Ballot {
        let mut words = vec![0u32; ballots[0].words.len()];
        for ballot in ballots {
            words.iter_mut().zip(&ballot.words).for_each(|(sum, word)| *sum = sum.saturating_add(*word));
        }
        Ballot::from_total(words, 3)
    }

    fn split(owners: [usize; 3]) -> Vec<Ballot> {
        let mut ballots = vec![Ballot::new(3, HASH), Ballot::new(3, HASH)];
        for (index, owner) in owners.into_iter().enumerate() {
            ballots[owner].count(index, 1.5 + index as f32);
        }
        ballots
    }

    #[test]
    fn the_verdict_is_the_same_whoever_computed_what() {
        let expected = Ok(Verdict { loss: 2.5, update: true, stop: false });
        for owners in [[0, 0, 0], [0, 1, 0], [1, 1, 0]] {
            assert_eq!(total(&split(owners)).verdict(7, NonFinite::Stop), expected);
        }
    }

    #[test]
    fn a_micro_batch_counted_twice_or_never_is_refused() {
        let mut ballots = split([0, 1, 0]);
        ballots[0].count(1, 2.5);
        assert_eq!(
            total(&ballots).verdict(7, NonFinite::Stop),
            Err(CommitError::NotOnce { step: 7, index: 1, count: 2 })
        );
        assert!(Ballot::new(3, HASH).verdict(7, NonFinite::Skip).is_err());
    }

    #[test]
    fn ranks_that_start_from_different_states_write_nothing() {
        for bit in 0..64 {
            let mut ballots = split([0, 1, 0]);
            let mut other = Ballot::new(3, HASH ^ 1 << bit);
            other.count(1, 2.5);
            ballots[1] = other;
            assert_eq!(
                total(&ballots).verdict(7, NonFinite::Skip),
                Err(CommitError::OtherState { step: 7 }),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn one_ranks_flag_is_everybodys() {
        let mut ballots = split([0, 1, 0]);
        ballots[1].nonfinite();
        ballots[0].stop();
        let total = total(&ballots);
        assert_eq!(total.verdict(7, NonFinite::Stop), Err(CommitError::NonFinite { step: 7 }));
        let verdict = total.verdict(7, NonFinite::Skip).unwrap();
        assert!(!verdict.update && verdict.stop);
    }

    /// The ballots of three ranks with shards, the second of which has this copy of the first one's.
    fn sharded(copy: u64) -> Ballot {
        let squares = [[(0, 1.5), (3, 2.5)], [(1, f64::MAX), (2, 0.0)], [(4, 1e-300), (5, 3.0)]];
        let copies = [77, copy, 1 << 40];
        let ballot = |rank: u32| {
            let mut ballot = Ballot::new(3, HASH);
            ballot.count(rank as usize, 1.0);
            ballot.took(rank, 3, 1000 + rank);
            let own = [u64::MAX, 1 << 40, 77][rank as usize];
            let (before, squares) = (Some(copies[rank as usize]), &squares[rank as usize][..]);
            ballot.shard(&ShardVote { rank, world: 3, own, before, chunks: 6, squares });
            ballot
        };
        total(&[ballot(0), ballot(1), ballot(2)])
    }

    #[test]
    fn shards_are_put_together() {
        let total = sharded(u64::MAX);
        assert!(total.verdict(7, NonFinite::Stop).is_ok());
        assert_eq!(total.times(3), [1000, 1001, 1002]);
        let shards = total.shards(7, 3, true).unwrap();
        assert_eq!(shards.hash, (1 << 40) + 76);
        assert_eq!(shards.squares, [1.5, f64::MAX, 0.0, 2.5, 1e-300, 3.0]);
    }

    #[test]
    fn a_shard_that_its_holders_do_not_agree_on_is_named() {
        let refused = Err(CommitError::OtherShard { step: 7, rank: 0 });
        assert_eq!(sharded(u64::MAX - 1).shards(7, 3, true), refused);
        assert!(sharded(u64::MAX - 1).shards(7, 3, false).is_ok(), "nobody holds a copy there");
    }
}
