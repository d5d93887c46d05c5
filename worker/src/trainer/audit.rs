//! A share of the micro-batches is computed by a second rank, too: a device that computes wrongly tells nothing of it, and no
//! hash of the state shows it.
//!
//! ```text
//! compute own ─ compute the audited ones of the rank before ─ compare ─┬─ equal ─ commit
//!                                     differs: all compute that one ───┴─ the ring ends, and most of its ranks are right
//! ```
//!
//! What is compared is a hash of the gradient before it is rounded, and of the loss. It is compared before the commit, so
//! nothing is written that was found to be wrong. Who is wrong the coordinator says, by what all ranks tell of it in the
//! answer to the recall that follows.
//!
//! # Invariants
//! 1. Which micro-batches are audited is a function of (seed, step, micro-batch): all ranks know the same.
//! 2. What an auditor computes is added to no sum.

use std::collections::BTreeMap;
use std::sync::Arc;

use mattock_collectives::{Buffer, Group, SaturatingSum};
use mattock_exact::parameter_hash;
use mattock_kernels::TrainBackend;

use super::{StepError, Trainer};
use crate::gate::Gate;
use crate::phases::Phase;
use crate::task::Task;

/// The place of the choice among what draws random numbers for a micro-batch.
const CHOICE: u64 = u64::MAX - 1;
/// Words of an audited micro-batch: its owner's hash, and its auditor's.
const WORDS: usize = 4;

/// What is audited.
#[derive(Debug, Default)]
pub(super) struct Audit {
    /// Micro-batches of the step's, by rank; empty where nothing is audited.
    shares: Vec<Vec<u32>>,
    /// Hashes of this rank's own that are audited, as far as they are computed.
    own: BTreeMap<u32, u64>,
}

impl Audit {
    /// Keeps the hash of an own micro-batch.
    pub(super) fn keep(&mut self, index: u32, hash: u64) {
        self.own.insert(index, hash);
    }

    pub(super) fn forget(&mut self) {
        self.own.clear();
    }

    fn has(&self, rank: u32, index: u32) -> bool {
        self.shares.get(rank as usize).is_some_and(|share| share.contains(&index))
    }
}

impl<B: TrainBackend, T: Task> Trainer<'_, B, T> {
    /// Audits steps whose micro-batches are shared so, by rank.
    pub(crate) fn audit_shares(&mut self, shares: Vec<Vec<u32>>) {
        self.audit.shares = shares;
    }

    /// Whether a micro-batch of the next step is one that two ranks compute.
    pub(super) fn is_audited(&self, index: u32) -> bool {
        let drawn = self.key_of(index).stream(CHOICE).bits() >> 32;
        (drawn * 1_000_000) >> 32 < u64::from(self.plan.elastic.audit)
    }

    /// Computes what this rank audits, and compares with the others. All ranks of the group call this together.
    pub(super) fn audit(&mut self, group: &Group, gate: &Gate) -> Result<(), StepError> {
        let world = group.ring().world_size().get();
        if self.plan.elastic.audit == 0 || world < 2 || self.audit.shares.len() != world as usize {
            return Ok(());
        }
        let all = 0..self.plan.batch.micro_batches();
        let audited: Vec<u32> = all.filter(|&index| self.is_audited(index)).collect();
        if audited.is_empty() {
            return Ok(());
        }
        let before = group.ring().prev().0;
        let mut words = Vec::with_capacity(WORDS * audited.len());
        for &index in &audited {
            let own = self.audit.own.get(&index).copied();
            let others = match self.audit.has(before, index) {
                true => Some(self.gradient_hash(index, gate)?),
                false => None,
            };
            for hash in [own, others].map(Option::unwrap_or_default) {
                words.extend([hash as u32, (hash >> 32) as u32]);
            }
        }
        gate.wait();
        self.clock.enter(Phase::Exchange);
        let total = group
            .all_reduce_now::<SaturatingSum>(Arc::new(Buffer::from(words.clone())), Buffer::default())?;
        let differs = |words: &[u32]| words[..2] != words[2..];
        let Some(place) = total.chunks_exact(WORDS).position(differs) else { return Ok(()) };
        let told: Vec<u64> = words[WORDS * place..][..WORDS]
            .chunks_exact(2)
            .map(|w| u64::from(w[0]) | u64::from(w[1]) << 32)
            .collect();
        let known = told.into_iter().find(|&hash| hash != 0);
        self.settle(group, gate, audited[place], known)
    }

    /// Ranks differ in a micro-batch: all compute it, and say so when all have.
    fn settle(
        &mut self,
        group: &Group,
        gate: &Gate,
        index: u32,
        known: Option<u64>,
    ) -> Result<(), StepError> {
        let hash = match known {
            Some(hash) => hash,
            None => self.gradient_hash(index, gate)?,
        };
        gate.audited(hash);
        gate.wait();
        // Nobody ends the ring before all can answer for it.
        group.all_reduce_now::<SaturatingSum>(Arc::new(Buffer::from(vec![1u32])), Buffer::default())?;
        let world = self.audit.shares.len() as u32;
        let owner = (0..world).find(|&rank| self.audit.has(rank, index)).unwrap_or_default();
        Err(StepError::Audit { step: self.state.step + 1, index, owner, auditor: (owner + 1) % world })
    }

    /// Computes a micro-batch for its hash only.
    fn gradient_hash(&mut self, index: u32, gate: &Gate) -> Result<u64, StepError> {
        let batch = self.batch_of(index)?;
        gate.proceed()?;
        let starts = self.starts();
        let mut hash = 0u64;
        let loss = self.gradients_of(index, &batch, |bucket, gradient, _, _| {
            hash = hash.wrapping_add(parameter_hash(gradient, starts[bucket]));
        });
        Ok(with_loss(hash, loss))
    }

    /// Where buckets start in the flat space.
    pub(super) fn starts(&self) -> Vec<u64> {
        self.space.buckets().iter().map(|range| range.start as u64).collect()
    }
}

/// A gradient's hash and the loss that it came with; never 0, which stands for none.
pub(super) fn with_loss(hash: u64, loss: f32) -> u64 {
    hash.wrapping_add(u64::from(loss.to_bits())).max(1)
}
