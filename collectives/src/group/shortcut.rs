//! A faster way than round the ring, for what groups do most: by hosts, or along a line.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::Linked;
use super::hierarchy::{Hierarchy, is_scattered};
use super::line::Line;
use super::order::Order;
use crate::alarm::Alarm;
use crate::buffer::Buffer;
use crate::collective::Collective;
use crate::driver::Shared;
use crate::fault::Fault;
use crate::message::neighbours::Neighbours;
use crate::pending::Pending;
use crate::rank::Rank;
use crate::recorder::Recorder;
use crate::reduction::Element;
use crate::shm::engine::Engine;

/// What a ring has beside it.
pub(crate) enum Shortcut {
    /// Some ranks share a host.
    Hosts(Hierarchy),
    /// The closing link is slow.
    Line(Line),
}

impl Shortcut {
    /// Whether it carries such an operation; all others go round the ring.
    pub(super) fn carries(&self, collective: Collective) -> bool {
        let reduces_all = matches!(collective.pattern(), Collective::AllReduce | Collective::Barrier);
        reduces_all || (matches!(self, Self::Hosts(_)) && is_scattered(collective))
    }

    /// Queues an operation that the ring of all ranks numbers.
    pub(super) fn submit<E: Element, T: Send + 'static>(
        &self,
        whole: &Shared,
        order: Order<E>,
        recorder: Arc<Recorder>,
        finish: impl FnOnce(Buffer<E>) -> T + Send + 'static,
    ) -> Pending<T> {
        match self {
            Self::Hosts(hierarchy) => hierarchy.submit(whole, order, recorder, finish),
            Self::Line(line) => line.submit(whole, order, recorder, finish),
        }
    }

    /// How it does an all-reduce.
    pub(super) fn algorithm(&self) -> &'static str {
        match self {
            Self::Hosts(_) => "hierarchical",
            Self::Line(_) => "line",
        }
    }

    /// From now on the ring of all ranks and these parts end together.
    pub(super) fn join(&self, whole: &Arc<Shared>) {
        match self {
            Self::Hosts(hierarchy) => hierarchy.join(whole),
            Self::Line(line) => line.join(whole),
        }
    }

    /// Those who share a host with this rank.
    pub(super) fn neighbours(&self, rank: Rank) -> Option<Neighbours> {
        match self {
            Self::Hosts(hierarchy) => Some(hierarchy.neighbours(rank)),
            Self::Line(_) => None,
        }
    }

    /// What ends all parts together.
    pub(super) fn alarm(&self) -> &Arc<Alarm> {
        match self {
            Self::Hosts(hierarchy) => &hierarchy.alarm,
            Self::Line(line) => &line.alarm,
        }
    }

    /// Ends everything at once.
    pub(super) fn raise(&self, fault: &Fault) {
        match self {
            Self::Hosts(hierarchy) => hierarchy.raise(fault),
            Self::Line(line) => line.raise(fault),
        }
    }

    /// Its rings that this rank is in.
    pub(super) fn links(&self) -> impl Iterator<Item = &Linked> {
        let [first, second] = match self {
            Self::Hosts(hierarchy) => [hierarchy.leaders.as_ref(), None],
            Self::Line(line) => [Some(&line.there), Some(&line.back)],
        };
        first.into_iter().chain(second)
    }

    /// Of this host, where there is one.
    pub(super) fn engine(&self) -> Option<&Arc<Engine>> {
        match self {
            Self::Hosts(hierarchy) => Some(&hierarchy.engine),
            Self::Line(_) => None,
        }
    }

    /// Wants nothing more of its parts.
    pub(super) fn end(&self) {
        if let Some(engine) = self.engine() {
            engine.close();
        }
        self.links().for_each(|links| links.shared.close());
    }

    /// Waits until its parts have ended.
    pub(super) fn wait(&mut self) {
        match self {
            Self::Hosts(Hierarchy { leaders, thread, .. }) => {
                leaders.iter_mut().for_each(Linked::wait);
                // How a thread ends is all the same.
                drop(thread.take().map(JoinHandle::join));
            }
            Self::Line(Line { there, back, .. }) => [there, back].into_iter().for_each(Linked::wait),
        }
    }
}
