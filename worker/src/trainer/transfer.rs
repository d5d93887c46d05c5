//! The state on its way to ranks that have none, or an older one: a broadcast from one that has it, piece by piece.
//!
//! Every rank takes part, for that is what a broadcast is; who has the state already throws the pieces away. What came is
//! held against the hash of what was sent before anybody trains with it.

use std::collections::VecDeque;
use std::sync::Arc;

use mattock_collectives::{Buffer, CollectiveError, Group, Pending, Rank};
use mattock_exact::Exponents;
use mattock_kernels::TrainBackend;

use super::{StepError, Trainer};
use crate::phases::Phase;
use crate::task::Task;

/// Elements of a piece: 4 MiB.
pub(super) const PIECE: usize = 1 << 20;
/// Pieces under way at once.
pub(super) const UNDER_WAY: usize = 8;

impl<B: TrainBackend, T: Task> Trainer<'_, B, T> {
    /// Gives the state of `root` to every rank whose own is not that after `step` steps. All ranks of the group call
    /// this together. What was added up under an older state is forgotten.
    ///
    /// # Errors
    /// [`StepError`] where the exchange breaks, after which an outdated state is neither the old nor the new one; or where what came
    /// is not what was sent.
    pub fn receive_state(
        &mut self,
        group: &Group,
        root: Rank,
        step: u64,
        outdated: bool,
    ) -> Result<(), StepError> {
        self.clock.enter(Phase::Transfer);
        let sends = group.ring().rank() == root;
        let own = [self.state_hash as i64, i64::from(!self.state.exponents.is_empty())];
        let head: [i64; 2] = spread_small(group, root, &own)?.try_into().unwrap_or(own);
        if outdated {
            self.forget();
        }
        for array in self.state.arrays_mut() {
            match sends {
                true => send(group, array)?,
                false => receive(group, root, array, outdated)?,
            }
        }
        let has_exponents = head[1] != 0;
        let blocks = self.space.len() / mattock_exact::BLOCK * usize::from(has_exponents);
        let mut eighths: Vec<i32> = self.state.exponents.eighths().iter().map(|&e| i32::from(e)).collect();
        eighths.resize(blocks, 0);
        let eighths = spread_small(group, root, &eighths)?;
        if outdated {
            self.state.exponents =
                Exponents::from_eighths(eighths.into_iter().map(|eighths| eighths as i16).collect());
            self.state.step = step;
            let (got, want) = (self.state.hash(), head[0] as u64);
            if got != want {
                return Err(StepError::Transfer { root: root.0, got, want });
            }
            self.state_hash = got;
        }
        Ok(())
    }
}

/// The root's values, on every rank.
pub(super) fn spread_small<E: mattock_collectives::Element>(
    group: &Group,
    root: Rank,
    own: &[E],
) -> Result<Vec<E>, CollectiveError> {
    if group.ring().rank() == root {
        group.broadcast(Arc::new(Buffer::from(own.to_vec()))).wait()?;
        return Ok(own.to_vec());
    }
    Ok(group.receive_broadcast(root, Buffer::from(own.to_vec())).wait()?.into_vec())
}

fn send(group: &Group, array: &[f32]) -> Result<(), CollectiveError> {
    let mut under_way: VecDeque<Pending<()>> = VecDeque::new();
    for piece in array.chunks(PIECE) {
        if under_way.len() == UNDER_WAY
            && let Some(oldest) = under_way.pop_front()
        {
            oldest.wait()?;
        }
        under_way.push_back(group.broadcast(Arc::new(Buffer::from(piece.to_vec()))));
    }
    under_way.into_iter().try_for_each(Pending::wait)
}

/// Receives pieces, and keeps them where they are wanted.
fn receive(group: &Group, root: Rank, array: &mut [f32], wanted: bool) -> Result<(), CollectiveError> {
    let lengths: Vec<usize> = array.chunks(PIECE).map(<[f32]>::len).collect();
    let mut lengths = lengths.into_iter();
    let begin = |length| group.receive_broadcast(root, Buffer::<f32>::zeroed(length));
    let mut under_way: VecDeque<_> = lengths.by_ref().take(UNDER_WAY).map(begin).collect();
    for place in array.chunks_mut(PIECE) {
        let Some(oldest) = under_way.pop_front() else { break };
        let piece = oldest.wait()?;
        if wanted {
            place.copy_from_slice(&piece);
        }
        under_way.extend(lengths.next().map(begin));
    }
    Ok(())
}
