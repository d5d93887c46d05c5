//! A worker's main thread: what worker/src/session/training.rs does, from ring to ring.

use std::collections::BTreeSet;
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::Instruction;
use mattock_coordinator::protocol::{Blame, Break, Failure, Finish, Formation, FromWorker, StepReport};

use crate::facts::Fact;
use crate::ring::Part;
use crate::seeds::trace;
use crate::sim::Sim;
use crate::state::State;
use crate::swarm::TIMEOUT;
use crate::worker::{Seat, Stage, Status, ms};

impl Sim {
    pub(crate) fn idle(&mut self, id: WorkerId) {
        self.turn_to(id, Stage::Idle, None);
        self.follow(id);
    }

    /// Follows the coordinator from ring to ring.
    pub(crate) fn follow(&mut self, id: WorkerId) {
        while self.worker(id).stage == Stage::Idle {
            let Some(instruction) = self.worker(id).instructions.pop_front() else { return };
            match instruction {
                Instruction::Link { rank, formation } => {
                    self.drop_seat(id);
                    let recalled = self.worker(id).gate.is_recalled(formation.generation);
                    let seat = Seat { rank, formation: formation.clone(), cancelled: false, broken: None };
                    if !recalled {
                        self.worker(id).seat = Some(seat);
                        self.turn_to(id, Stage::Linking, None);
                        self.call_neighbours(id, &formation, rank);
                    }
                }
                Instruction::Train(_) if self.worker(id).seat.is_none() => {
                    self.fail(id, nonsense("a start without a ring"));
                }
                Instruction::Train(_) => self.enter(id),
                Instruction::Recall { .. } => self.drop_seat(id),
                Instruction::Restore { up_to } => {
                    self.worker(id).restores = Some(up_to);
                    let takes = self.rng.duration(&ms(1..=1_000));
                    self.turn_to(id, Stage::Loading, Some(takes));
                }
                Instruction::Leave { .. } => self.exit(id, Status::Success),
                Instruction::End { .. } => self.exit(id, Status::Failure),
                Instruction::Stop => {}
            }
        }
    }

    /// The links to its neighbours are gone.
    pub(crate) fn drop_seat(&mut self, id: WorkerId) {
        self.ring_breaks_at(id);
        self.worker(id).seat = None;
    }

    pub(crate) fn has_loaded(&mut self, id: WorkerId) {
        if let Some(up_to) = self.worker(id).restores.take() {
            let newest = self.storage.range(..=up_to).next_back().map(|(_, state)| *state);
            let Some(newest) = newest else { return self.fail(id, nonsense("no checkpoint to restore")) };
            let worker = self.worker(id);
            (worker.state, worker.whole, worker.finish) = (newest, true, None);
            worker.counted.clear();
        }
        let worker = self.worker(id);
        let step = worker.whole.then_some(worker.state.step);
        worker.gate.ready(step);
        self.report(id, FromWorker::Ready { step });
        self.idle(id);
    }

    pub(crate) fn has_linked(&mut self, id: WorkerId) {
        let Some(generation) = self.worker(id).generation() else { return };
        self.observe(&Fact::Linked(id, generation));
        self.report(id, FromWorker::Linked { generation });
        self.idle(id);
    }

    /// Its links do not come up.
    pub(crate) fn fails_to_link(&mut self, id: WorkerId) {
        let Some(generation) = self.worker(id).generation() else { return };
        self.drop_seat(id);
        let text = "a neighbour cannot be reached".to_owned();
        self.report(id, FromWorker::Broken(Break { generation, lost_rank: None, text }));
        self.idle(id);
    }

    /// Brings itself to where the ring starts, with the state of another rank if its own is not that.
    fn enter(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let Some(seat) = worker.seat.clone() else { return };
        let outdated = !worker.whole || worker.state.step != seat.formation.step;
        match seat.formation.source {
            Some(_) if outdated => {
                if !worker.gate.open_empty(seat.formation.generation) {
                    return self.part_ends(id);
                }
                (worker.whole, worker.finish) = (false, None);
                self.transfer(id, &seat);
            }
            Some(_) => self.transfer(id, &seat),
            None if outdated => self.fail(id, nonsense("a ring for another step")),
            None => self.resume_step(id),
        }
    }

    /// Takes part in a broadcast of the source's state.
    fn transfer(&mut self, id: WorkerId, seat: &Seat) {
        self.turn_to(id, Stage::Transferring, None);
        match (seat.cancelled, seat.broken) {
            (true, _) => self.part_ends(id),
            (false, Some(rank)) => self.breaks_off(id, rank),
            (false, None) => self.take_part_in_transfer(id, seat),
        }
    }

    /// The state of the source is there.
    pub(crate) fn worker_has_state(&mut self, id: WorkerId, generation: u64) {
        let offered = self.rings.get(&generation).and_then(|ring| ring.offered);
        let worker = self.worker(id);
        if worker.stage != Stage::Transferring || worker.generation() != Some(generation) {
            return;
        }
        if let Some(offered) = offered.filter(|_| !worker.whole) {
            let step = worker.seat.as_ref().map_or(0, |seat| seat.formation.step);
            // It is taken for the state of the step that the ring starts from.
            let offered = State { step, ..offered };
            worker.counted.clear();
            (worker.state, worker.whole) = (offered, true);
            self.observe(&Fact::Received(id, offered));
        }
        self.resume_step(id);
    }

    /// Begins the ring's first step with what is added up of its own share.
    fn resume_step(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let Some(seat) = worker.seat.clone() else { return };
        let (generation, step) = (seat.formation.generation, seat.formation.step);
        let share = seat.formation.places[seat.rank as usize].share(step, step);
        if !worker.counted.iter().all(|index| share.contains(index)) {
            worker.counted.clear();
        }
        let kept = worker.counted.clone();
        if !worker.gate.open(generation, step, &kept) {
            return self.part_ends(id);
        }
        self.works(id, true);
        self.observe(&Fact::Entered { worker: id, generation, step, kept: &kept });
        self.next_step(id);
    }

    fn next_step(&mut self, id: WorkerId) {
        match self.worker(id).state.step >= self.setup.steps {
            true => self.finish(id),
            false => self.next_micro_batch(id),
        }
    }

    /// Computes what is missing of its share, one micro-batch after the other; then takes part in the commit.
    fn next_micro_batch(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let Some(seat) = worker.seat.clone() else { return };
        let done = worker.state.step;
        let share = share(&seat.formation, seat.rank, done);
        let Some(index) = share.iter().copied().find(|index| !worker.counted.contains(index)) else {
            return self.exchange(id, &seat);
        };
        if !worker.gate.begin(index) {
            return self.part_ends(id);
        }
        worker.computes = index;
        let generation = seat.formation.generation;
        self.works(id, true);
        self.observe(&Fact::Began { worker: id, generation, index });
        let mut takes = self.rng.duration(&ms(1..=30));
        if std::mem::take(&mut self.worker(id).slow) {
            takes = self.rng.duration(&(TIMEOUT..=3 * TIMEOUT));
            self.slow_work += takes;
        }
        self.turn_to(id, Stage::Computing, Some(takes));
    }

    pub(crate) fn has_computed(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let index = worker.computes;
        worker.counted.insert(index);
        worker.gate.end(index);
        self.works(id, true);
        self.next_micro_batch(id);
    }

    /// Takes part in the commit of a step, if its ring still holds.
    fn exchange(&mut self, id: WorkerId, seat: &Seat) {
        self.works(id, false);
        let worker = self.worker(id);
        let counted: BTreeSet<u32> = worker.counted.clone();
        let (basis, sum) = (worker.state, worker.state.sum(counted.iter().copied()));
        let (step, stop) = (worker.state.step + 1, worker.stop);
        match (seat.cancelled, seat.broken) {
            (true, _) => self.part_ends(id),
            (false, Some(rank)) => self.breaks_off(id, rank),
            (false, None) => {
                self.turn_to(id, Stage::Exchanging, None);
                self.contribute(seat, step, Part { counted, sum, basis, stop });
            }
        }
    }

    /// The total of a step is there: the state is written, unless the ring was recalled meanwhile.
    pub(crate) fn worker_commits(&mut self, id: WorkerId, generation: u64, step: u64) {
        let Some(total) = self.rings.get(&generation).and_then(|ring| ring.total(step)).cloned() else {
            return;
        };
        let worker = self.worker(id);
        let waits = worker.stage == Stage::Exchanging && worker.generation() == Some(generation);
        if !waits || step != worker.state.step + 1 {
            return;
        }
        if !total.same {
            let text = "the ranks did not start from the same state".to_owned();
            self.report(id, FromWorker::Broken(Break { generation, lost_rank: None, text }));
            return self.part_ends(id);
        }
        if !worker.gate.commit(step) {
            return self.part_ends(id);
        }
        worker.state = worker.state.next(total.sum);
        worker.counted.clear();
        worker.fruitless = 0;
        let state = worker.state;
        self.works(id, true);
        self.observe(&Fact::Committed { worker: id, generation, state, counts: &total.counts });
        let takes = self.rng.duration(&ms(0..=20));
        self.turn_to(id, Stage::Writing, Some(takes));
    }

    /// The state is written, and the coordinator told.
    pub(crate) fn has_written(&mut self, id: WorkerId) {
        let worker = self.worker(id);
        let Some(seat) = worker.seat.clone() else { return };
        let state = worker.state;
        self.report_step(id, &seat);
        self.works(id, true);
        self.has_reported(id);
        if seat.rank == 0 && state.step.is_multiple_of(self.setup.checkpoint_every) {
            self.save_soon(id, state);
        }
        let total = self.rings.get(&seat.formation.generation).and_then(|ring| ring.total(state.step));
        match total.is_some_and(|total| total.stop) {
            true => self.finish(id),
            false => self.next_step(id),
        }
    }

    fn report_step(&mut self, id: WorkerId, seat: &Seat) {
        let worker = self.worker(id);
        let (state, repeats) = (worker.state, worker.repeats);
        let done = state.step - 1;
        let report = StepReport {
            generation: seat.formation.generation,
            step: state.step,
            rank: seat.rank,
            loss: state.loss(),
            grad_norm: 1.0,
            lr: 1.0,
            hash_before: 0,
            state_hash: Some(state.hash),
            tokens: 1,
            wide_blocks: 0,
            micro_batches: share(&seat.formation, seat.rank, done),
            counts: counts(&seat.formation, done).unwrap_or_default(),
            tx_bytes: 1,
            rx_bytes: 1,
            held: Vec::new(),
            sent: Vec::new(),
            seconds: Vec::new(),
        };
        self.observe(&Fact::Reported(id, &report));
        if repeats {
            self.report(id, FromWorker::Step(report.clone()));
        }
        self.report(id, FromWorker::Step(report));
    }

    /// The last checkpoint, by the rank that writes; asked again, the answer is the same.
    fn finish(&mut self, id: WorkerId) {
        self.works(id, false);
        let worker = self.worker(id);
        let writes = worker.seat.as_ref().is_some_and(|seat| seat.rank == 0);
        let wrote = |finish: &Finish| !writes || finish.held_out_loss.is_some();
        let again = worker.finish.as_ref().is_some_and(|f| f.step == worker.state.step && wrote(f));
        let takes = match (writes && !again, self.rng.chance(3)) {
            (false, _) => Duration::ZERO,
            (true, false) => self.rng.duration(&ms(1..=500)),
            // A far store takes longer than the timeout; the worker is heard of all the while.
            (true, true) => self.rng.duration(&ms(500..=15_000)),
        };
        self.turn_to(id, Stage::Finishing, Some(takes));
    }

    pub(crate) fn has_finished(&mut self, id: WorkerId) {
        let steps = self.setup.steps;
        let worker = self.worker(id);
        let (state, writes) = (worker.state, worker.seat.as_ref().is_some_and(|seat| seat.rank == 0));
        let known = worker.finish.as_ref().filter(|finish| finish.step == state.step);
        let held_out_loss = known.and_then(|finish| finish.held_out_loss).or(writes.then_some(0.5));
        let finish = Finish {
            step: state.step,
            completed: state.step >= steps,
            state_hash: state.hash,
            held_out_loss,
            unigram_loss: None,
            parameters: 1,
        };
        worker.finish = Some(finish.clone());
        if writes {
            self.save(id, state);
        }
        self.report(id, FromWorker::Finished(finish));
        self.part_ends(id);
    }

    /// Its part in a ring has ended; the links stay until it hears what comes next.
    pub(crate) fn part_ends(&mut self, id: WorkerId) {
        self.works(id, false);
        self.idle_first(id);
        self.worker(id).gate.leave();
        self.has_reported(id);
        self.follow(id);
    }

    fn idle_first(&mut self, id: WorkerId) {
        self.turn_to(id, Stage::Idle, None);
    }

    /// Tells the coordinator that the ring does not hold.
    fn breaks_off(&mut self, id: WorkerId, lost: u32) {
        let Some(generation) = self.worker(id).generation() else { return };
        trace(|| format!("{:?} {id} has lost rank {lost} of generation {generation}", self.now));
        let text = format!("rank {lost} was lost");
        self.report(id, FromWorker::Broken(Break { generation, lost_rank: Some(lost), text }));
        self.part_ends(id);
    }

    pub(crate) fn worker_loses_neighbour(&mut self, id: WorkerId, generation: u64, rank: u32) {
        let worker = self.worker(id);
        let Some(seat) = worker.seat.as_mut().filter(|seat| seat.formation.generation == generation) else {
            return;
        };
        seat.broken = Some(rank);
        if matches!(worker.stage, Stage::Exchanging | Stage::Transferring) {
            self.breaks_off(id, rank);
        }
    }

    /// Tells the coordinator why it cannot go on, and waits to hear how the run ends.
    pub(crate) fn fail(&mut self, id: WorkerId, failure: Failure) {
        trace(|| format!("{:?} {id} fails: {}", self.now, failure.text));
        let status = if failure.blame == Blame::Input { Status::BadInput } else { Status::Failure };
        self.worker(id).status = Some(status);
        self.report(id, FromWorker::Failed(failure));
        self.drop_seat(id);
        self.turn_to(id, Stage::Leaving, Some(TIMEOUT));
        self.worker(id).gate.leave();
        self.has_reported(id);
        self.say_goodbye(id);
    }

    pub(crate) fn say_goodbye(&mut self, id: WorkerId) {
        while let Some(instruction) = self.worker(id).instructions.pop_front() {
            if matches!(instruction, Instruction::End { .. }) {
                return self.exit(id, Status::Failure);
            }
        }
    }
}

/// How many micro-batches each rank has in the step after `done`, in order, where the ring's shares have changed: in some rings
/// others have more from the third step on.
fn counts(ring: &Formation, done: u64) -> Option<Vec<u32>> {
    let mut counts: Vec<u32> = ring.places.iter().map(|place| place.micro_batches.len() as u32).collect();
    counts.rotate_right(1);
    (done >= ring.step + 2 && !ring.generation.is_multiple_of(3)).then_some(counts)
}

/// A rank's micro-batches of the step after `done`.
pub(crate) fn share(ring: &Formation, rank: u32, done: u64) -> Vec<u32> {
    let Some(counts) = counts(ring, done) else {
        return ring.places[rank as usize].share(ring.step, done).to_vec();
    };
    let start = counts[..rank as usize].iter().sum();
    (start..start + counts[rank as usize]).collect()
}

fn nonsense(text: &str) -> Failure {
    Failure { text: text.to_owned(), blame: Blame::Run }
}
