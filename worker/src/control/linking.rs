//! Links up for the next ring in a thread of its own, while training still computes what it was at when the last ring ended.
//!
//! ```text
//! listener   Form ──> request ─────────────┐
//! linking             neighbours, memory ──┴─> Linked ──> seat
//! training   ... the micro-batch that was under way ... ──> takes the seat, goes on
//! ```
//!
//! So nobody waits for the slowest to be done with its micro-batch: each goes on with its next one as soon as the links are up.
//!
//! Deliberately absent: what travels. Nothing is exchanged in a ring before training takes its seat.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use mattock_collectives::{Generation, Group, JoinError, Node, Rank, Ring, RingSpec, WorldSize};
use mattock_coordinator::protocol::{Break, Formation, FromWorker};

use super::Shared;

/// How often it is looked whether the ring is still wanted.
const PULSE: Duration = Duration::from_millis(5);

/// A ring to be linked, as the rank that is named.
pub(super) type Request = (u32, Formation);

/// A place in a ring whose links are up; nothing where they did not come up, or nobody wants them any more.
pub(super) type Outcome = Result<Option<Seat>, String>;

/// A place in a ring whose links are up.
pub(crate) struct Seat {
    pub(crate) group: Arc<Group>,
    pub(crate) formation: Formation,
    pub(crate) rank: u32,
}

/// The linking thread.
pub(super) struct Linker {
    pub(super) shared: Arc<Shared>,
    pub(super) node: Node,
    pub(super) seats: SyncSender<Outcome>,
}

impl Linker {
    /// Links up for one ring after the other, until nobody asks for another, or takes a seat.
    pub(super) fn link_all(self, requests: &Receiver<Request>) {
        while let Ok((rank, formation)) = requests.recv() {
            if self.seats.send(self.sit_down(rank, formation)).is_err() {
                return;
            }
        }
    }

    /// Links up with the neighbours, and says so.
    fn sit_down(&self, rank: u32, formation: Formation) -> Outcome {
        let (shared, generation) = (&self.shared, formation.generation);
        let group = match self.link(rank, &formation)? {
            Ok(Some(group)) => Arc::new(group),
            Ok(None) => return Ok(None),
            Err(error) => {
                let (lost_rank, text) = (accused(&error, &formation), error.to_string());
                shared.report(FromWorker::Broken(Break { generation, lost_rank, text }));
                return Ok(None);
            }
        };
        shared.guard(generation, &group);
        if rank == 0 && generation == 1 && group.ring().world_size().get() > 1 {
            let text = format!("gradients travel by {}", group.transport());
            shared.report(FromWorker::Notice { text });
        }
        shared.report(FromWorker::Linked { generation });
        Ok(Some(Seat { group, formation, rank }))
    }

    /// Brings up the links to both neighbours; nothing where the ring is recalled meanwhile.
    fn link(&self, rank: u32, formation: &Formation) -> Result<Result<Option<Group>, JoinError>, String> {
        let nonsense = |what: &str| format!("{what} in generation {}", formation.generation);
        let places = &formation.places;
        let world = WorldSize::new(places.len() as u32).ok_or_else(|| nonsense("an empty ring"))?;
        let ring = Ring::new(Rank(rank), world, Generation(formation.generation))
            .ok_or_else(|| nonsense("a rank outside the ring"))?;
        let (next, prev) = (&places[ring.next().0 as usize], &places[ring.prev().0 as usize]);
        let address = next.address.parse().map_err(|_| nonsense("an address that is none"))?;
        let spec = RingSpec { ring, next: (address, next.worker.dns_name()), prev: prev.worker.dns_name() };
        let mut joining = self.node.begin_join(spec);
        loop {
            match joining.wait_for(PULSE) {
                Ok(joined) => return Ok(joined.map(Some)),
                Err(_) if self.shared.is_over(formation.generation) => return Ok(Ok(None)),
                Err(still) => joining = still,
            }
        }
    }
}

/// The rank to which no link came up, where the error says so.
fn accused(error: &JoinError, formation: &Formation) -> Option<u32> {
    let (JoinError::Unreachable { name, .. } | JoinError::TimedOut { name, .. }) = error else { return None };
    formation.places.iter().position(|place| place.worker.dns_name() == *name).map(|rank| rank as u32)
}
