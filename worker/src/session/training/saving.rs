//! Checkpoints of a ring: every rank writes its share in the background, and rank 0 tells what became of it.
//!
//! Writers do not speak with each other, so they must have the same in hand: before a checkpoint the ranks tell each other, in one
//! small exchange, whether each can take it. Where one cannot, for an earlier one still waits, all leave it out; where one does not
//! see the place, rank 0 writes alone.

use std::sync::Arc;

use mattock_checkpoint::{Outcome, Share};
use mattock_collectives::{Buffer, Group, SaturatingSum};
use mattock_coordinator::protocol::{Finish, FromWorker};
use mattock_kernels::TrainBackend;

use super::{Interruption, Seat, Training, wrapped};
use crate::evaluate::held_out;
use crate::phases::Phase;
use crate::session::{SessionError, Worker};
use crate::storage::{Readiness, Saver};
use crate::task::Task;
use crate::trainer::StepDone;

impl<B: TrainBackend, T: Task> Training<'_, B, T> {
    /// Makes sure that this rank writes, if it can: rank 0 must.
    pub(super) fn open_saver(&mut self, rank: u32) -> Result<(), SessionError> {
        let mut saver = match self.saver.take() {
            Some(saver) => saver,
            None => {
                let Worker { run, recipe, .. } = self.worker;
                Saver::new(self.plan, self.settings, self.trainer.space(), &self.facts, run, recipe)?
            }
        };
        if rank == 0 {
            saver.open()?;
        } else if let Some(text) = saver.open_if_seen() {
            self.worker.control.report(FromWorker::Notice { text });
        }
        self.saver = Some(saver);
        Ok(())
    }

    /// Copies a share of the state out where a checkpoint is due, and reports what became of earlier ones.
    pub(super) fn checkpoint(&mut self, seat: &Seat, done: &StepDone) -> Result<(), Interruption> {
        let every = self.plan.checkpoint.every;
        if every > 0 && done.step.is_multiple_of(every) {
            self.trainer.clock().enter(Phase::Checkpoint);
            let ready = self.agree(&seat.group, false)?;
            let alone = seat.group.ring().world_size().get() == 1;
            // A single writer lets a newer one take the place of one that waits; several would choose different ones.
            if ready.busy > 0 && !alone {
                let step = done.step;
                let text =
                    format!("the checkpoint of step {step} was left out: an earlier one waits to be written");
                self.tell_from(seat, text);
            } else {
                self.save(seat, done.state_hash, ready)?;
            }
        }
        if let Some(saver) = &mut self.saver {
            let outcomes = saver.outcomes();
            self.tell_outcomes(outcomes);
        }
        Ok(())
    }

    /// What all ranks of a ring say together; one that is `done` writes no more.
    fn agree(&self, group: &Group, done: bool) -> Result<Readiness, Interruption> {
        let Readiness { busy, blind } = match &self.saver {
            Some(saver) if !done => saver.readiness(),
            _ => Readiness { busy: 0, blind: 1 },
        };
        let words = Arc::new(Buffer::from(vec![busy, blind]));
        let total = group.all_reduce_now::<SaturatingSum>(words, Buffer::default());
        let total = total.map_err(|error| wrapped(error.into()))?;
        Ok(Readiness { busy: total[0], blind: total[1] })
    }

    fn save(&mut self, seat: &Seat, state_hash: u64, ready: Readiness) -> Result<(), SessionError> {
        let (rank, world) = (seat.rank, seat.group.ring().world_size().get());
        let share = match (ready.blind, rank) {
            (0, _) if world > 1 => Share { index: rank, of: world, attempt: seat.formation.generation },
            (_, 0) => Share::WHOLE,
            (_, _) => return Ok(()),
        };
        match &mut self.saver {
            Some(saver) => Ok(saver.save(self.trainer.state(), state_hash, share)?),
            None => Ok(()),
        }
    }

    fn tell_from(&self, seat: &Seat, text: String) {
        if seat.rank == 0 {
            self.worker.control.report(FromWorker::Notice { text });
        }
    }

    pub(super) fn tell_outcomes(&self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            let text = match outcome {
                Outcome::Saved(saved) => {
                    self.worker.control.report(FromWorker::Checkpoint {
                        step: saved.step,
                        url: saved.url,
                        bytes: saved.bytes,
                        seconds: saved.took.as_secs_f64(),
                    });
                    continue;
                }
                Outcome::Written { .. } => continue,
                Outcome::Superseded { step, by } => {
                    format!("the checkpoint of step {step} was not written: that of step {by} took its place")
                }
                Outcome::Failed { step, error, .. } => {
                    format!("the checkpoint of step {step} was not written: {error}")
                }
                Outcome::Incomplete { step, missing, .. } if missing.is_empty() => {
                    format!("the checkpoint of step {step} was given up: not all its shares came")
                }
                Outcome::Incomplete { step, missing, .. } => {
                    format!(
                        "the checkpoint of step {step} was given up: the shares of ranks {missing:?} did not come"
                    )
                }
                other => format!("{other:?}"),
            };
            self.worker.control.report(FromWorker::Notice { text });
        }
    }

    /// The last checkpoint, and on rank 0 the held-out loss. Where it is asked again, for a ring broke meanwhile, the answer
    /// is the same. It returns when this rank's share is in storage, and on rank 0 when all are.
    pub(super) fn finish(&mut self, seat: &Seat, state_hash: Option<u64>) -> Result<Finish, Interruption> {
        let (rank, state) = (seat.rank, self.trainer.state());
        let wrote = |finish: &Finish| rank != 0 || finish.held_out_loss.is_some() || !finish.completed;
        let earlier = self.finish.clone().filter(|finish| finish.step == state.step && wrote(finish));
        let ready = self.agree(&seat.group, earlier.is_some())?;
        if let Some(finish) = earlier {
            return Ok(finish);
        }
        let state_hash = state_hash.unwrap_or_else(|| state.hash());
        let completed = state.step >= self.plan.steps;
        self.save(seat, state_hash, ready)?;
        let state = self.trainer.state();
        let mut held_out_loss = None;
        let outcomes = match self.saver.take() {
            Some(saver) if rank == 0 => {
                if completed {
                    let (space, device) = (self.trainer.space(), self.trainer.device());
                    held_out_loss = held_out::<B::InnerBackend, T>(
                        self.task,
                        self.plan,
                        space,
                        &state.parameters,
                        device,
                    );
                }
                let over = || self.worker.control.is_over(seat.formation.generation);
                saver.finish(state, state_hash, over).map_err(SessionError::from)?
            }
            Some(saver) => saver.leave(),
            None => Vec::new(),
        };
        self.tell_outcomes(outcomes);
        let finish = Finish {
            step: state.step,
            completed,
            state_hash,
            held_out_loss,
            unigram_loss: self.facts.unigram_loss,
            parameters: self.trainer.space().parameter_count() as u64,
        };
        self.finish = Some(finish.clone());
        Ok(finish)
    }
}
