//! A worker with a trainer, following the coordinator from ring to ring.
//!
//! ```text
//! Link ─> Linked ─> Train ─> [state from another rank] ─> steps ─> last checkpoint ─> Finished
//!   ^                               │ a rank is lost, or the ring is recalled
//!   └───────────────────────────────┘ what was added up of the step is kept
//! ```

mod saving;

use mattock_collectives::{CollectiveError, Counters, Group, Rank};
use mattock_coordinator::membership::Instruction;
use mattock_coordinator::protocol::{Break, Finish, Formation, FromWorker, Rebalance, Shift, StepReport};
use mattock_kernels::TrainBackend;

use super::{End, Milestone, SessionError, Worker, beginnings};
use crate::balance::{Balance, Change, Pace, median};
use crate::commit::CommitError;
use crate::control::Seat;
use crate::faults::Faults;
use crate::plan::{Plan, Shard, Sum};
use crate::settings::Settings;
use crate::storage::Saver;
use crate::task::{Facts, Task};
use crate::trainer::{StepDone, StepError, Trainer};

/// A worker with a trainer.
pub(super) struct Training<'a, B: TrainBackend, T: Task> {
    worker: &'a Worker<'a>,
    task: &'a T,
    plan: &'a Plan,
    settings: &'a Settings,
    trainer: Trainer<'a, B, T>,
    facts: Facts,
    /// Whether the trainer's state is that of some step, all of it.
    whole: bool,
    /// The step of a checkpoint that this run does not believe.
    flawed: Option<u64>,
    saver: Option<Saver>,
    finish: Option<Finish>,
    faults: Faults,
}

/// Why training in a ring ended.
enum Interruption {
    /// The coordinator knows, and will say what comes next.
    Recalled,
    /// The ring does not hold any more.
    Broken {
        /// The rank that was lost, where it is known.
        lost_rank: Option<u32>,
        text: String,
    },
    /// This worker cannot go on.
    Fatal(SessionError),
}

impl<E: Into<SessionError>> From<E> for Interruption {
    fn from(error: E) -> Self {
        use CollectiveError::{Cancelled, Closed, PeerLost, TimedOut};
        match error.into() {
            SessionError::Step(StepError::Recalled(_)) => Self::Recalled,
            SessionError::Step(StepError::Collective(Cancelled { .. } | Closed { .. })) => Self::Recalled,
            SessionError::Step(StepError::Collective(
                ref error @ (PeerLost { peer, .. } | TimedOut { peer, .. }),
            )) => Self::Broken { lost_rank: Some(peer.0), text: error.to_string() },
            // The source's memory changed since it wrote that, or something did on the way: where it happens again, it goes.
            SessionError::Step(ref error @ StepError::Transfer { root, .. }) => {
                Self::Broken { lost_rank: Some(root), text: error.to_string() }
            }
            // Who of them is wrong the coordinator can tell: it knows all hashes.
            SessionError::Step(
                ref error @ (StepError::Commit(CommitError::OtherState { .. })
                | StepError::Audit { .. }
                | StepError::ShardsLost { .. }
                | StepError::Flawed { .. }),
            ) => Self::Broken { lost_rank: None, text: error.to_string() },
            error => Self::Fatal(error),
        }
    }
}

impl<'a, B: TrainBackend, T: Task> Training<'a, B, T> {
    pub(super) fn new(
        worker: &'a Worker<'a>,
        task: &'a T,
        plan: &'a Plan,
        settings: &'a Settings,
        trainer: Trainer<'a, B, T>,
    ) -> Self {
        let (whole, facts, faults) = (!worker.under_way, task.facts(), Faults::of(worker.id));
        let (flawed, saver, finish) = (None, None, None);
        Self { worker, task, plan, settings, trainer, facts, whole, flawed, saver, finish, faults }
    }

    /// Follows the coordinator until the run is over, or goes on without this worker.
    pub(super) fn run(mut self) -> Result<End, SessionError> {
        let control = &self.worker.control;
        self.report_ready();
        let mut seat: Option<Seat> = None;
        loop {
            match control.next(self.worker.limit) {
                Some(Instruction::Link { .. }) => {
                    drop(seat.take());
                    seat = control.seat().map_err(SessionError::Nonsense)?;
                }
                Some(Instruction::Train(_)) => {
                    let Some(seat) = &seat else {
                        return Err(SessionError::Nonsense("a start without a ring".to_owned()));
                    };
                    self.take_part(seat)?;
                }
                Some(Instruction::Recall { .. }) => drop(seat.take()),
                Some(Instruction::Restore { up_to }) => self.restore(up_to)?,
                Some(Instruction::Leave { reason }) => {
                    tracing::info!("this worker leaves: {reason}");
                    let outcomes = self.saver.take().map(Saver::leave).unwrap_or_default();
                    self.tell_outcomes(outcomes);
                    return Ok(End::Left);
                }
                Some(Instruction::End { reason }) => {
                    return self.end_reached().ok_or(SessionError::Ended(reason));
                }
                Some(Instruction::Stop) | None => {}
            }
        }
    }

    /// Loads the state from storage, for nobody has it any more.
    fn restore(&mut self, up_to: u64) -> Result<(), SessionError> {
        let space = self.trainer.space();
        let beginnings = beginnings(self.settings, self.task, self.plan, space, self.flawed);
        let restored = beginnings.restore(up_to)?;
        self.trainer.replace(self.worker.told(restored));
        self.whole = true;
        self.finish = None;
        self.report_ready();
        Ok(())
    }

    fn report_ready(&self) {
        let step = self.whole.then_some(self.trainer.state().step);
        self.worker.control.gate().ready(step);
        self.worker.control.report(FromWorker::Ready { step });
    }

    /// How the run ended, if it was not broken off.
    fn end_reached(&self) -> Option<End> {
        if self.trainer.state().step >= self.plan.steps {
            Some(End::Completed)
        } else {
            self.worker.control.stop_requested().then_some(End::Stopped)
        }
    }

    /// Trains in a ring until it is over, and says how that ended.
    fn take_part(&mut self, seat: &Seat) -> Result<(), SessionError> {
        let trained = self.train(seat);
        // Where a step was written, but could not be reported, nobody must wait for that report.
        self.worker.control.gate().leave();
        self.worker.control.gate().wait();
        self.trainer.pause();
        let report = match trained {
            Ok(finish) => FromWorker::Finished(finish),
            Err(Interruption::Recalled) => return Ok(()),
            Err(Interruption::Broken { lost_rank, text }) => {
                let generation = seat.formation.generation;
                FromWorker::Broken(Break { generation, lost_rank, text })
            }
            Err(Interruption::Fatal(error)) => {
                tell_history(&seat.group, &error);
                return Err(error);
            }
        };
        self.worker.control.report(report);
        Ok(())
    }

    /// Trains to the last step, or until somebody stops the run.
    fn train(&mut self, seat: &Seat) -> Result<Finish, Interruption> {
        self.enter(seat)?;
        let Seat { group, formation, rank } = seat;
        let (control, rank) = (&self.worker.control, *rank);
        self.open_saver(rank)?;
        // The ring's first step has what it took to get there, too.
        let (mut proved, mut told) = (false, Counters::default());
        let mut balance = self.balance(formation);
        while self.trainer.state().step < self.plan.steps {
            let first = self.trainer.state().step == formation.step;
            let mut shares: Vec<Vec<u32>> = match first {
                true => formation.places.iter().map(|place| place.first.clone()).collect(),
                false => {
                    (0..formation.places.len() as u32).map(|rank| balance.share(rank).collect()).collect()
                }
            };
            self.prepare(&shares);
            let share = shares.swap_remove(rank as usize);
            let done = self
                .trainer
                .step(group, &share, control.gate(), control.stop_requested())
                .map_err(wrapped)?;
            let now = group.counters();
            let moved = now.since(&std::mem::replace(&mut told, now));
            control.report(FromWorker::Step(StepReport {
                generation: formation.generation,
                step: done.step,
                rank,
                loss: done.loss,
                grad_norm: done.grad_norm,
                lr: done.lr,
                hash_before: done.hash_before,
                state_hash: done.state_hash,
                tokens: u64::from(self.plan.batch.size) * self.task.tokens_per_sample(),
                wide_blocks: done.wide_blocks as u64,
                micro_batches: share,
                counts: if first { Vec::new() } else { balance.counts().to_vec() },
                tx_bytes: moved.sent_bytes,
                rx_bytes: moved.received_bytes,
                held: self.trainer.held_bytes(),
                sent: moved.sent_by_operation().map(|(name, bytes)| (name.to_owned(), bytes)).collect(),
                seconds: self.trainer.clock().lap(),
            }));
            control.gate().reported();
            self.rebalance(seat, &mut balance, &done);
            self.checkpoint(seat, &done)?;
            if !std::mem::replace(&mut proved, true) {
                (self.worker.told)(Milestone::Stepped);
            }
            control.leave_if_asked(formation.generation, done.stop);
            if done.stop {
                break;
            }
        }
        // The last checkpoint has a limit of its own.
        control.gate().wait();
        self.finish(seat)
    }

    /// Lets happen what is to happen before a step, and says who computes what, where that is audited.
    fn prepare(&mut self, shares: &[Vec<u32>]) {
        let step = self.trainer.state().step + 1;
        if self.faults.flips(step) {
            self.trainer.flip_bit();
        }
        self.trainer.death = self.faults.death(step);
        self.trainer.wrong = self.faults.wrong.is_some_and(|from| step >= from);
        if self.plan.elastic.audit > 0 {
            self.trainer.audit_shares(shares.to_vec());
        }
    }

    /// The shares that a ring starts with; they change with the times that its ranks tell.
    fn balance(&mut self, formation: &Formation) -> Balance {
        self.trainer.said_to_take = self.faults.micros;
        let counts = formation.places.iter().map(|place| place.micro_batches.len() as u32).collect();
        let pace = if self.plan.parallel.shard == Shard::Full { Pace::Rounds } else { Pace::Alone };
        Balance::new(counts, pace)
    }

    /// Shares follow the times that the ranks have told; the first rank says how.
    fn rebalance(&self, seat: &Seat, balance: &mut Balance, done: &StepDone) {
        // Plain sums are the same for the same shares only: those stay as they are.
        if matches!(self.plan.reduce.sum, Sum::F32 | Sum::Bf16) {
            return;
        }
        if let Some(change) = balance.note(&done.times).filter(|_| seat.rank == 0) {
            let shifts = shifts(seat.formation.generation, done.step, &change);
            self.worker.control.report(FromWorker::Rebalanced(shifts));
        }
    }

    /// Brings this worker to where the ring starts: with the state of another rank, if its own is not that.
    fn enter(&mut self, seat: &Seat) -> Result<(), Interruption> {
        let Formation { generation, step, source, .. } = &seat.formation;
        let gate = self.worker.control.gate();
        if self.trainer.is_sharded() {
            self.regroup(seat)?;
            return self.resume(seat);
        }
        let outdated = !self.whole || self.trainer.state().step != *step;
        if outdated && source.is_none_or(|source| source == seat.rank) {
            let at = self.trainer.state().step;
            let text = format!("a ring that starts after step {step} for a worker that is at {at}");
            return Err(Interruption::Fatal(SessionError::Nonsense(text)));
        }
        if let Some(source) = source {
            if outdated {
                gate.open_empty(*generation).map_err(|error| wrapped(error.into()))?;
                self.whole = false;
                self.finish = None;
            }
            let root = Rank(*source);
            gate.wait();
            self.trainer.receive_state(&seat.group, root, *step, outdated).map_err(wrapped)?;
            self.whole = true;
        }
        self.resume(seat)
    }

    /// Brings this worker's shard of the state to where the ring starts.
    fn regroup(&mut self, seat: &Seat) -> Result<(), Interruption> {
        let Formation { generation, step, .. } = seat.formation;
        let gate = self.worker.control.gate();
        if !self.whole {
            gate.open_empty(generation).map_err(|error| wrapped(error.into()))?;
        }
        self.finish = None;
        let regrouped = self.trainer.regroup(&seat.group, step, self.whole, gate);
        match &regrouped {
            Err(StepError::ShardsLost { .. }) => {
                self.whole = false;
                gate.ready(None);
            }
            Err(StepError::Flawed { step, what }) => {
                self.whole = false;
                self.flawed = Some(*step);
                gate.ready(None);
                if let Some(what) = what {
                    let text = format!("passed over {what}");
                    self.worker.control.report(FromWorker::Notice { text });
                }
            }
            Ok(()) | Err(_) => {}
        }
        regrouped.map_err(wrapped)?;
        self.whole = true;
        self.flawed = None;
        Ok(())
    }

    /// Goes on with what is added up of the ring's first step.
    fn resume(&mut self, seat: &Seat) -> Result<(), Interruption> {
        let Formation { generation, step, places, .. } = &seat.formation;
        let share = places[seat.rank as usize].share(*step, *step);
        let kept = self.trainer.holds(share);
        let gate = self.worker.control.gate();
        gate.open(*generation, *step, kept).map_err(|error| wrapped(error.into()))?;
        gate.holds_state(self.trainer.known_hash());
        self.trainer.resume(share);
        Ok(())
    }
}

/// What the coordinator is told of shares that change.
fn shifts(generation: u64, step: u64, change: &Change) -> Rebalance {
    let Change { before, after, times } = change;
    let shift = |(rank, ((&before, &after), &micros))| Shift { rank, before, after, micros };
    let all = (0..).zip(before.iter().zip(after).zip(times)).map(shift);
    let median_micros = median(times).unwrap_or_default();
    Rebalance {
        generation,
        step,
        median_micros,
        shifts: all.filter(|shift| shift.before != shift.after).collect(),
    }
}

fn wrapped(error: StepError) -> Interruption {
    SessionError::from(error).into()
}

/// Where the exchange has failed for another reason than a rank's end: what this rank did last, on standard error.
fn tell_history(group: &Group, error: &SessionError) {
    if let SessionError::Step(StepError::Collective(_)) = error {
        let history = group.history();
        let mut text = format!("the last operations of rank {}:\n", group.ring().rank());
        text.extend(history.iter().map(|record| format!("  {record}\n")));
        // In one piece: others may write to the same place.
        eprint!("{text}");
    }
}
