//! Checkpoints of a ring: every rank writes its share in the background, and rank 0 tells what became of it.
//!
//! Writers do not speak with each other, so they must have the same in hand: before a checkpoint the ranks tell each other, in one
//! small exchange, whether each can take it. Where one cannot, for an earlier one still waits, all leave it out; where one does not
//! see the place, rank 0 writes alone.

use std::sync::Arc;

use mattock_checkpoint::{Outcome, Share};
use mattock_collectives::{Buffer, CollectiveError, Group, SaturatingSum};
use mattock_coordinator::protocol::{Finish, FromWorker};
use mattock_kernels::TrainBackend;

use super::{Interruption, Seat, Training, wrapped};
use crate::commit::Ballot;
use crate::evaluate::held_out;
use crate::phases::Phase;
use crate::plan::Shard;
use crate::session::{SessionError, Worker};
use crate::storage::{Readiness, Saver, StorageError};
use crate::task::Task;
use crate::trainer::{StepDone, StepError};

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
                self.save(seat, ready, false)?;
            }
        }
        if let Some(saver) = &mut self.saver {
            let outcomes = saver.outcomes().map_err(SessionError::from)?;
            self.tell_outcomes(outcomes);
        }
        Ok(())
    }

    /// What all ranks of a ring say together; one that is `done` writes no more. They must have the same state: nobody writes one
    /// that the others do not have.
    fn agree(&mut self, group: &Group, done: bool) -> Result<Readiness, Interruption> {
        let Readiness { busy, blind } = match &mut self.saver {
            Some(saver) if !done => saver.readiness(),
            _ => Readiness { busy: 0, blind: 1 },
        };
        let mut words = Ballot::new(0, self.trainer.known_hash().unwrap_or_default()).into_words();
        words.extend([busy, blind]);
        let total = group.all_reduce_now::<SaturatingSum>(Arc::new(Buffer::from(words)), Buffer::default());
        let mut total = total.map_err(|error| wrapped(error.into()))?.into_vec();
        let (blind, busy) = (total.pop().unwrap_or_default(), total.pop().unwrap_or_default());
        let same = Ballot::from_total(total, 0).same_state(self.trainer.state().step);
        same.map_err(|error| wrapped(error.into()))?;
        Ok(Readiness { busy, blind })
    }

    /// Hands this rank's share to its writer; returns the hash of the state.
    fn save(&mut self, seat: &Seat, ready: Readiness, last: bool) -> Result<u64, Interruption> {
        let broken = |error: CollectiveError| wrapped(error.into());
        let state_hash = self.trainer.state_hash(&seat.group).map_err(broken)?;
        let (rank, world) = (seat.rank, seat.group.ring().world_size().get());
        let share = match (ready.blind, rank) {
            (0, _) if world > 1 => Share { index: rank, of: world, attempt: seat.formation.generation },
            (_, _) => Share::WHOLE,
        };
        let Some(saver) = &mut self.saver else { return Ok(state_hash) };
        if !self.trainer.is_sharded() {
            if rank == 0 || !share.is_whole() {
                let (state, loan) = self.trainer.lend();
                saver.save(state, state_hash, share, (!last).then_some(loan))?;
            }
        } else if share.is_whole() {
            // All bring it together, for each has a part.
            if let Some(whole) = self.trainer.whole_state(&seat.group, rank == 0).map_err(broken)? {
                saver.save(whole, state_hash, share, None)?;
            }
        } else {
            let part = self.trainer.part(&seat.group, &saver.weights(share)).map_err(broken)?;
            let (_, loan) = self.trainer.lend();
            saver.save_part(part, state_hash, share, (!last).then_some(loan))?;
        }
        Ok(state_hash)
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
    pub(super) fn finish(&mut self, seat: &Seat) -> Result<Finish, Interruption> {
        let (rank, step) = (seat.rank, self.trainer.state().step);
        let wrote = |finish: &Finish| rank != 0 || finish.held_out_loss.is_some() || !finish.completed;
        let earlier = self.finish.clone().filter(|finish| finish.step == step && wrote(finish));
        let ready = self.agree(&seat.group, earlier.is_some())?;
        if let Some(finish) = earlier {
            return Ok(finish);
        }
        let completed = step >= self.plan.steps;
        self.trainer.rest();
        let state_hash = self.save(seat, ready, true)?;
        let held_out_loss = if completed { self.held_out(seat)? } else { Ok(None) };
        let outcomes = match self.saver.take() {
            Some(saver) if rank == 0 => {
                let over = || self.worker.control.is_over(seat.formation.generation);
                // Who has a part of the state only cannot write it alone.
                let whole = (!self.trainer.is_sharded()).then(|| self.trainer.state());
                match saver.finish(step, whole, state_hash, over) {
                    Err(StorageError::Incomplete { .. } | StorageError::Unwritten { .. }) if over() => {
                        return Err(Interruption::Recalled);
                    }
                    outcomes => outcomes.map_err(SessionError::from)?,
                }
            }
            Some(saver) => saver.leave(),
            None => Vec::new(),
        };
        self.tell_outcomes(outcomes);
        let finish = Finish {
            step,
            completed,
            state_hash,
            // What cannot be evaluated is saved all the same.
            held_out_loss: held_out_loss?,
            unigram_loss: self.facts.unigram_loss,
            parameters: self.trainer.space().parameter_count() as u64,
        };
        self.finish = Some(finish.clone());
        Ok(finish)
    }

    /// The loss on held-out samples, on rank 0; what its own fault is comes apart from what ends the ring.
    fn held_out(&mut self, seat: &Seat) -> Result<Result<Option<f64>, SessionError>, Interruption> {
        let gate = self.worker.control.gate();
        if self.plan.parallel.shard == Shard::Full {
            return match self.trainer.held_out(&seat.group, gate) {
                Err(StepError::Samples(error)) => Ok(Err(error.into())),
                loss => Ok(Ok(loss.map_err(wrapped)?.filter(|_| seat.rank == 0))),
            };
        }
        let parameters = self.trainer.parameters(&seat.group, seat.rank == 0);
        let parameters = parameters.map_err(|error| wrapped(error.into()))?;
        if seat.rank != 0 {
            return Ok(Ok(None));
        }
        let (space, device) = (self.trainer.space(), self.trainer.device());
        let loss = held_out::<B::InnerBackend, T>(self.task, self.plan, space, &parameters, device);
        Ok(loss.map_err(SessionError::from))
    }
}
