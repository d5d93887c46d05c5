//! How many bytes have gone over a link, or through shared memory, and for what.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Collective;

/// What bytes are sent for: operations, those into even and uneven parts as one.
const KINDS: [&str; 7] =
    ["all-reduce", "reduce-scatter", "all-gather", "broadcast", "shift", "message", "other"];

fn kind(collective: Collective) -> usize {
    use Collective::{
        AllGather, AllGatherUneven, AllReduce, AllReduceBatch, AllToAll, Barrier, Broadcast, Gather, Message,
        Reduce, ReduceScatter, ReduceScatterUneven, Scatter, Shift,
    };
    match collective {
        AllReduce | AllReduceBatch { .. } => 0,
        ReduceScatter | ReduceScatterUneven { .. } => 1,
        AllGather | AllGatherUneven { .. } => 2,
        Broadcast { .. } => 3,
        Shift { .. } => 4,
        Message { .. } => 5,
        Barrier | Reduce { .. } | Gather { .. } | Scatter { .. } | AllToAll => 6,
    }
}

/// Bytes on the links so far: payload and headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Handed to the links to other ranks.
    pub sent_bytes: u64,
    /// Taken from the links of other ranks.
    pub received_bytes: u64,
    sent: [u64; KINDS.len()],
}

impl Counters {
    /// What was sent, by the operation that it was for; only operations that sent anything.
    pub fn sent_by_operation(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        KINDS.into_iter().zip(self.sent).filter(|(_, bytes)| *bytes > 0)
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut sent = self.sent;
        sent.iter_mut().zip(earlier.sent).for_each(|(sent, earlier)| *sent -= earlier);
        Self {
            sent_bytes: self.sent_bytes - earlier.sent_bytes,
            received_bytes: self.received_bytes - earlier.received_bytes,
            sent,
        }
    }
}

/// Counts one rank's bytes.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    sent: [AtomicU64; KINDS.len()],
    received: AtomicU64,
}

impl Meter {
    pub(crate) fn sent(&self, collective: Collective, bytes: u64) {
        self.sent[kind(collective)].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_to(&self, counters: &mut Counters) {
        for (total, sent) in counters.sent.iter_mut().zip(&self.sent) {
            let sent = sent.load(Ordering::Relaxed);
            *total += sent;
            counters.sent_bytes += sent;
        }
        counters.received_bytes += self.received.load(Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rank;

    #[test]
    fn what_is_sent_is_told_by_operation() {
        let (meter, other) = (Meter::default(), Meter::default());
        meter.sent(Collective::AllReduce, 7);
        meter.received(2);
        let mut earlier = Counters::default();
        meter.add_to(&mut earlier);
        meter.sent(Collective::AllGatherUneven { lengths: 3 }, 5);
        other.sent(Collective::Message { tag: 1 }, 1);
        other.sent(Collective::Reduce { root: Rank(1) }, 4);
        other.sent(Collective::AllGather, 1);
        let mut counters = Counters::default();
        [&meter, &other].into_iter().for_each(|meter| meter.add_to(&mut counters));
        assert_eq!((counters.sent_bytes, counters.received_bytes), (18, 2));
        let since: Vec<_> = counters.since(&earlier).sent_by_operation().collect();
        assert_eq!(since, [("all-gather", 6), ("message", 1), ("other", 4)]);
    }
}
