//! A micro-batch that is computed before the first step, for who has something to choose by how long it takes; and what is chosen.

use mattock_collectives::Group;
use mattock_exact::{BLOCK, Bits};
use mattock_kernels::TrainBackend;

use super::{StepError, Trainer};
use crate::gate::Gate;
use crate::plan::Shard;
use crate::task::Task;

/// The first brings up memory and kernels.
const TIMES: usize = 2;

impl<B: TrainBackend, T: Task> Trainer<'_, B, T> {
    /// Seconds that a micro-batch takes this rank by itself; nothing is kept of it. All ranks of the group call this together.
    ///
    /// # Errors
    /// [`StepError`].
    pub(crate) fn try_out(&mut self, group: &Group, gate: &Gate) -> Result<f64, StepError> {
        let full = self.plan.parallel.shard == Shard::Full;
        self.forget();
        if !full {
            self.gather_parameters(group, gate)?;
            self.attach();
        }
        let mut seconds = 0.0;
        for _ in 0..TIMES {
            gate.proceed()?;
            let before = self.clock.own_work();
            if full {
                let mut maxima = vec![0.0; self.space.len() / BLOCK];
                self.round(group, gate, Some(0), Some(&mut maxima))?;
            } else {
                self.measure()?;
            }
            seconds = self.clock.own_work() - before;
        }
        Ok(seconds)
    }

    /// From now on sums have so many bits; only before anything is added up.
    pub(crate) fn use_bits(&mut self, bits: Bits) {
        if bits != self.plan.reduce.bits {
            self.forget();
            self.sum.change_bits(self.plan, &self.space, bits);
        }
    }
}
