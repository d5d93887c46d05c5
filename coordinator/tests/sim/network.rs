//! Control connections: a FIFO per worker and direction, as a QUIC stream is, with delays, stalls and loss of the whole.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use mattock_coordinator::WorkerId;
use mattock_coordinator::protocol::{FromCoordinator, FromWorker};

use crate::sim::{Happening, Sim};
use crate::swarm::TIMEOUT;

/// What arrives, or the news that nothing more will.
#[derive(Debug, Clone)]
pub(crate) enum Parcel<M> {
    /// A message.
    Message(M),
    /// The connection is gone.
    Gone(&'static str),
}

/// One direction of a connection.
#[derive(Debug)]
pub(crate) struct Pipe<M> {
    under_way: VecDeque<Parcel<M>>,
    /// When the newest arrives; nothing overtakes it.
    last: Duration,
    closed: bool,
    /// Which connection this is: what was under way on one before is none of it.
    number: u64,
}

impl<M> Default for Pipe<M> {
    fn default() -> Self {
        Self { under_way: VecDeque::new(), last: Duration::ZERO, closed: false, number: 0 }
    }
}

impl<M> Pipe<M> {
    /// Puts a parcel on its way; when it arrives, unless the connection is gone already.
    fn post(&mut self, parcel: Parcel<M>, arrival: Duration) -> Option<Duration> {
        if self.closed {
            return None;
        }
        self.closed = matches!(parcel, Parcel::Gone(_));
        self.under_way.push_back(parcel);
        self.last = self.last.max(arrival);
        Some(self.last)
    }

    /// Lets what is under way arrive from `now` on; returns how much that is.
    fn heal(&mut self, now: Duration) -> usize {
        self.last = now;
        self.under_way.len()
    }

    /// Another connection takes its place.
    fn renew(&mut self) {
        *self = Self { number: self.number + 1, ..Self::default() };
    }

    /// Loses all but the first `kept` of what is under way.
    fn lose_all_but(&mut self, kept: u64) {
        self.under_way.truncate(kept as usize);
    }
}

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// To the coordinator.
    Up,
    /// From it.
    Down,
}

/// All control connections.
#[derive(Debug, Default)]
pub(crate) struct Network {
    up: BTreeMap<WorkerId, Pipe<FromWorker>>,
    down: BTreeMap<WorkerId, Pipe<FromCoordinator>>,
    /// Until when a connection carries nothing this way.
    stalled: BTreeMap<(WorkerId, Way), Duration>,
}

impl Network {
    pub(crate) fn stall(&mut self, worker: WorkerId, way: Way, until: Duration) {
        let stalled = self.stalled.entry((worker, way)).or_default();
        *stalled = (*stalled).max(until);
    }

    /// Lets everything flow again, from `now` on; returns what is under way, as arrivals that are due.
    fn heal(&mut self, now: Duration) -> Vec<Happening> {
        self.stalled.clear();
        let mut due = Vec::new();
        for (worker, pipe) in &mut self.up {
            due.extend(std::iter::repeat_n(Happening::Upward(*worker, pipe.number), pipe.heal(now)));
        }
        for (worker, pipe) in &mut self.down {
            due.extend(std::iter::repeat_n(Happening::Downward(*worker, pipe.number), pipe.heal(now)));
        }
        due
    }

    pub(crate) fn next_up(&mut self, worker: WorkerId, number: u64) -> Option<Parcel<FromWorker>> {
        self.up.get_mut(&worker).filter(|pipe| pipe.number == number)?.under_way.pop_front()
    }

    pub(crate) fn next_down(&mut self, worker: WorkerId, number: u64) -> Option<Parcel<FromCoordinator>> {
        self.down.get_mut(&worker).filter(|pipe| pipe.number == number)?.under_way.pop_front()
    }

    /// A worker connects once more.
    pub(crate) fn renew(&mut self, worker: WorkerId) {
        self.up.entry(worker).or_default().renew();
        self.down.entry(worker).or_default().renew();
    }

    /// Nobody receives what is under way to the coordinator, or will be.
    pub(crate) fn lose_receiver(&mut self, worker: WorkerId) {
        let pipe = self.up.entry(worker).or_default();
        pipe.lose_all_but(0);
        pipe.closed = true;
    }
}

impl Sim {
    fn arrival(&mut self, worker: WorkerId, way: Way) -> Duration {
        let from = self.network.stalled.get(&(worker, way)).map_or(self.now, |&until| until.max(self.now));
        from + self.rng.duration(&self.swarm.delay)
    }

    /// From a worker to the coordinator.
    pub(crate) fn send_up(&mut self, worker: WorkerId, parcel: Parcel<FromWorker>) {
        let arrival = self.arrival(worker, Way::Up);
        let pipe = self.network.up.entry(worker).or_default();
        let number = pipe.number;
        if let Some(at) = pipe.post(parcel, arrival) {
            self.schedule(at, Happening::Upward(worker, number));
        }
    }

    /// From the coordinator to a worker.
    pub(crate) fn send_down(&mut self, worker: WorkerId, parcel: Parcel<FromCoordinator>) {
        let arrival = self.arrival(worker, Way::Down);
        self.post_down(worker, parcel, arrival);
    }

    fn post_down(&mut self, worker: WorkerId, parcel: Parcel<FromCoordinator>, arrival: Duration) {
        let pipe = self.network.down.entry(worker).or_default();
        let number = pipe.number;
        if let Some(at) = pipe.post(parcel, arrival) {
            self.schedule(at, Happening::Downward(worker, number));
        }
    }

    /// The coordinator's end of a connection is gone: what it has sent arrives in part, and the worker learns of it soon, or
    /// from its silence.
    pub(crate) fn lose_coordinator(&mut self, worker: WorkerId) {
        self.network.lose_receiver(worker);
        let kept = self.rng.number(&(0..=3));
        self.network.down.entry(worker).or_default().lose_all_but(kept);
        let takes = self.rng.duration(&(Duration::ZERO..=TIMEOUT));
        let noticed = if self.rng.chance(50) { takes / 20 } else { takes };
        self.post_down(worker, Parcel::Gone("the coordinator is gone"), self.now + noticed);
    }

    /// Breaks a connection: some of what is under way is lost, then both ends learn of it.
    pub(crate) fn disconnect(&mut self, worker: WorkerId) {
        self.lose_upward(worker);
        let kept = self.rng.number(&(0..=3));
        self.network.down.entry(worker).or_default().lose_all_but(kept);
        self.send_up(worker, Parcel::Gone("its connection was lost"));
        self.send_down(worker, Parcel::Gone("the connection was lost"));
    }

    /// What a dead process had sent arrives in part.
    pub(crate) fn lose_upward(&mut self, worker: WorkerId) {
        let kept = self.rng.number(&(0..=3));
        self.network.up.entry(worker).or_default().lose_all_but(kept);
    }

    /// All that is under way arrives soon, in order.
    pub(crate) fn heal_network(&mut self) {
        for arrival in self.network.heal(self.now) {
            self.schedule(self.now, arrival);
        }
    }
}
