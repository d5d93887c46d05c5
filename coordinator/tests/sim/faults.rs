//! What goes wrong, and to whom.

use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::membership::{Candidate, Event};
use mattock_coordinator::protocol::{Blame, Break, Failure, Finish, FromWorker, Holding, StepReport};

use crate::facts::Cause;
use crate::network::{Parcel, Way};
use crate::seeds::trace;
use crate::sim::{Happening, Sim};
use crate::state::State;
use crate::swarm::{Kind, TIMEOUT};
use crate::worker::{Stage, Worker};

/// Pauses that no run may notice: four of them in a row stay below the timeout.
const PAUSE: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(2);
/// A worker that was never let in.
const OUTSIDER: WorkerId = WorkerId(1_000_000);

/// A fault, and what its victim was doing; `None` where it had none.
pub(crate) type Plight = (Kind, Option<Stage>);

impl Sim {
    /// A fault happens, if faults still do.
    pub(crate) fn strike(&mut self, kind: Kind) {
        if self.calm {
            return;
        }
        let start = self.serial(self.setup.start);
        let alive: Vec<WorkerId> = self
            .workers
            .values()
            .filter(|worker| !worker.is_gone() && !worker.frozen && can_suffer(kind, worker, start))
            .map(|worker| worker.id)
            .collect();
        let victim = self.rng.pick(&alive);
        trace(|| format!("{:?} fault: {kind:?} of {victim:?}", self.now));
        let stage = victim.map(|victim| self.worker(victim).stage);
        match (kind, victim) {
            (Kind::Surplus, _) => {
                self.surplus("home");
            }
            (Kind::Stranger, _) => {
                self.surplus("elsewhere");
            }
            (Kind::Stop, _) => {
                self.cause(Cause::Stop);
                self.stop_asked = true;
                self.decide(Event::StopRequested);
            }
            (Kind::Scale, _) => self.scale(),
            (Kind::Abandon, _) => self.abandon(),
            (Kind::CoordinatorDies, _) => self.coordinator_dies(),
            (Kind::Usurp, _) => self.usurp(),
            (_, None) => return,
            (_, Some(victim)) => self.strike_worker(kind, victim),
        }
        self.plights.insert((kind, stage));
    }

    /// The user wants another number of workers; those that lack come by themselves, or do not.
    fn scale(&mut self) {
        let (least, most) = (self.setup.min_workers.max(1), self.setup.max_workers);
        let wanted = self.rng.number(&(u64::from(least)..=u64::from(most))) as u32;
        if !self.coordinator.dead && self.coordinator.registry.may_scale(wanted).is_ok() {
            self.cause(Cause::Scale);
            self.decide(Event::Shrink(wanted));
        }
    }

    fn strike_worker(&mut self, kind: Kind, victim: WorkerId) {
        if may_cost_its_place(kind) {
            self.cause(Cause::Trouble(victim));
        }
        match kind {
            Kind::Kill => self.kill(victim),
            Kind::Pause => self.pause(victim, PAUSE),
            Kind::Silence => {
                self.pause(victim, TIMEOUT + TIMEOUT / 8..=2 * TIMEOUT);
            }
            Kind::Freeze => {
                self.worker(victim).frozen = true;
            }
            Kind::Disconnect => {
                self.disconnect(victim);
            }
            Kind::Stall => self.stall(victim, &[Way::Up, Way::Down]),
            Kind::StallUp => self.stall(victim, &[Way::Up]),
            Kind::StallDown => self.stall(victim, &[Way::Down]),
            Kind::CutRing | Kind::CutRingOneWay | Kind::Partition => self.cut(kind, victim),
            Kind::NoLink => {
                self.fails_to_link(victim);
            }
            Kind::Slow => self.worker(victim).slow = true,
            Kind::Deafen => {
                self.worker(victim).deaf = true;
            }
            Kind::Leave => {
                self.cause(Cause::Leave(victim));
                let reason = "its host is needed".to_owned();
                self.send_up(victim, Parcel::Message(FromWorker::Leaving { reason }));
            }
            Kind::Ill => {
                let text = "the device is gone".to_owned();
                self.worker(victim).ailing = Some(Failure { text, blame: Blame::Worker });
            }
            Kind::JoinAgain => self.join_again(victim),
            Kind::Fail => self.sicken(victim),
            Kind::Flip => {
                self.cause(Cause::Corruption);
                self.worker(victim).state.hash ^= 1 << self.rng.number(&(0..=63));
            }
            Kind::OtherStep => {
                self.cause(Cause::Failure);
                let step = self.worker(victim).state.step + 1;
                self.worker(victim).state = self.serial(step);
            }
            Kind::Babble => self.babble(victim),
            Kind::Repeat => self.worker(victim).repeats = true,
            Kind::Surplus
            | Kind::Stranger
            | Kind::Stop
            | Kind::Abandon
            | Kind::CoordinatorDies
            | Kind::Usurp
            | Kind::Scale => {}
        }
    }

    fn cut(&mut self, kind: Kind, victim: WorkerId) {
        let ends = self.cut_link(victim, kind == Kind::CutRingOneWay);
        ends.into_iter().flatten().for_each(|end| self.cause(Cause::Trouble(end)));
        if kind == Kind::Partition {
            self.cuts.extend(ends.map(|[a, b]| (a, b)));
        }
    }

    /// A bit of a worker's memory flips, while it is one of three or more that have something left to do.
    pub(crate) fn flip(&mut self) -> Option<WorkerId> {
        let steps = self.setup.steps;
        let can = |worker: &&Worker| !worker.is_gone() && worker.whole && worker.state.step < steps;
        let able: Vec<WorkerId> = self.workers.values().filter(can).map(|worker| worker.id).collect();
        let victim = self.rng.pick(&able)?;
        trace(|| format!("{:?} a bit of {victim} flips", self.now));
        self.cause(Cause::Flipped(victim));
        self.worker(victim).state.hash ^= 1 << self.rng.number(&(0..=63));
        Some(victim)
    }

    /// Kills a process; what it had sent arrives in part, and the news of its death soon or never.
    pub(crate) fn kill(&mut self, victim: WorkerId) {
        self.cause(Cause::Trouble(victim));
        self.lose_upward(victim);
        self.ring_breaks_at(victim);
        self.process_ends(victim);
        if self.rng.chance(50) {
            self.send_up(victim, Parcel::Gone("nobody answers there"));
        }
    }

    /// Does nothing for a while; a pause within a pause changes nothing.
    pub(crate) fn pause(&mut self, victim: WorkerId, length: std::ops::RangeInclusive<Duration>) {
        let until = self.now + self.rng.duration(&length);
        let worker = self.worker(victim);
        if worker.paused_until.is_none_or(|before| before < until) {
            worker.paused_until = Some(until);
            self.schedule(until, Happening::Resume(victim));
        }
    }

    fn stall(&mut self, victim: WorkerId, ways: &[Way]) {
        self.cause(Cause::Trouble(victim));
        let length = self.rng.duration(&self.swarm.stall.clone());
        ways.iter().for_each(|&way| self.network.stall(victim, way, self.now + length));
    }

    /// One worker more than the run waits for, or one that does not fit in.
    pub(crate) fn surplus(&mut self, fingerprint: &'static str) -> WorkerId {
        let local = self.local && self.rng.chance(20);
        self.boot(fingerprint, local)
    }

    fn abandon(&mut self) {
        let bad_input = self.rng.chance(50);
        self.cause(Cause::Abandoned);
        if bad_input {
            self.cause(Cause::BadInput);
        }
        let left = self.workers.values().filter(|worker| worker.local && !worker.is_gone()).count();
        self.decide(Event::Abandoned { cause: "it ended".to_owned(), bad_input, left });
    }

    fn join_again(&mut self, victim: WorkerId) {
        let fingerprint = self.worker(victim).fingerprint.to_owned();
        let address = "elsewhere".to_owned();
        // A coordinator that does not know it yet would take it for what it says it is.
        if self.coordinator.registry.workers().any(|(id, _)| id == victim) {
            self.decide(Event::Joined(victim, Candidate { address, fingerprint }));
        }
    }

    fn sicken(&mut self, victim: WorkerId) {
        let bad_input = self.rng.chance(50);
        self.cause(if bad_input { Cause::BadInput } else { Cause::Failure });
        // Where others train, it is its own fault.
        self.cause(Cause::Trouble(victim));
        let text = "something is wrong".to_owned();
        let blame = if bad_input { Blame::Input } else { Blame::Run };
        self.worker(victim).ailing = Some(Failure { text, blame });
    }

    /// Messages that mean nothing now: repeated, of other generations, or from somebody who is not in the run.
    fn babble(&mut self, victim: WorkerId) {
        let generation = self.coordinator.registry.formation().map_or(0, |formation| formation.generation);
        let step = self.worker(victim).state.step;
        let finish = Finish {
            step: self.setup.steps,
            completed: true,
            state_hash: 0,
            held_out_loss: None,
            unigram_loss: None,
            parameters: 0,
        };
        let forged = forged(generation, step + 1);
        let failure = Failure { text: "babble".to_owned(), blame: Blame::Input };
        let broken = |generation| Break { generation, lost_rank: Some(0), text: "babble".to_owned() };
        let holding = Holding { step: Some(step + 1), done: vec![0], ..Holding::default() };
        let own = [
            FromWorker::Broken(broken(generation + 100)),
            FromWorker::Broken(broken(generation.wrapping_sub(1))),
            FromWorker::Held { generation: generation.wrapping_sub(1), holding: holding.clone() },
            FromWorker::Held { generation: generation + 100, holding: holding.clone() },
            FromWorker::Linked { generation: generation + 100 },
            FromWorker::Linked { generation: generation.wrapping_sub(1) },
            FromWorker::Heartbeat,
        ];
        own.into_iter().for_each(|message| self.send_up(victim, Parcel::Message(message)));
        // In a ring it is ready already; before, it would be believed.
        if self.worker(victim).seat.is_some() {
            let ready = FromWorker::Ready { step: Some(step) };
            self.send_up(victim, Parcel::Message(ready));
        }
        let others = [
            FromWorker::Ready { step: Some(step) },
            FromWorker::Broken(broken(generation)),
            FromWorker::Held { generation, holding },
            FromWorker::Leaving { reason: "babble".to_owned() },
            FromWorker::Linked { generation },
            FromWorker::Step(forged),
            FromWorker::Finished(finish),
            FromWorker::Failed(failure),
        ];
        // As if it were connected, so that the registry hears it.
        self.coordinator.links.insert(OUTSIDER);
        others.into_iter().for_each(|message| self.send_up(OUTSIDER, Parcel::Message(message)));
        self.send_up(OUTSIDER, Parcel::Gone("it has left"));
    }
}

/// A report of what nobody did.
fn forged(generation: u64, step: u64) -> StepReport {
    StepReport {
        generation,
        step,
        rank: 0,
        loss: 0.0,
        grad_norm: 0.0,
        lr: 0.0,
        hash_before: 0,
        state_hash: Some(0),
        tokens: 0,
        wide_blocks: 0,
        micro_batches: Vec::new(),
        counts: Vec::new(),
        tx_bytes: 0,
        rx_bytes: 0,
        held: Vec::new(),
        sent: Vec::new(),
        seconds: Vec::new(),
    }
}

/// Whether a worker may be lost for a fault of its own: a pause too, should a neighbour call it lost meanwhile, and slow work,
/// where others have shown how long it takes.
fn may_cost_its_place(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Pause
            | Kind::Silence
            | Kind::Freeze
            | Kind::Disconnect
            | Kind::NoLink
            | Kind::Slow
            | Kind::Deafen
            | Kind::Ill
    )
}

/// Whether a fault means something for a worker as it is.
fn can_suffer(kind: Kind, worker: &Worker, start: State) -> bool {
    match kind {
        Kind::CutRing | Kind::CutRingOneWay | Kind::Partition => worker.seat.is_some(),
        Kind::NoLink => worker.stage == Stage::Linking,
        Kind::Leave => worker.member.is_some(),
        Kind::Flip => worker.whole,
        Kind::JoinAgain | Kind::Babble => worker.member.is_some() && worker.stage != Stage::Leaving,
        Kind::OtherStep => worker.is_coming() && worker.state == start,
        Kind::Disconnect => worker.stage != Stage::Booting,
        _ => true,
    }
}
