//! Whole groups within one process, for tests and for trying things out.

use std::io;
use std::sync::Arc;

use crate::group::{Group, GroupConfig};
use crate::io_thread::IoThread;
use crate::link::memory;
use crate::rank::{Generation, Rank, WorldSize};
use crate::ring::Ring;

/// One group for each rank of a ring of `ranks`, linked in memory and driven by one thread.
///
/// # Errors
/// If the system gives us no thread.
pub fn groups(ranks: WorldSize, config: GroupConfig) -> io::Result<Vec<Group>> {
    groups_with(ranks, config, |_, sender| sender)
}

/// As [`groups`], with each rank's sender wrapped: by [`Faulty`](crate::link::faulty::Faulty), say.
///
/// # Errors
/// If the system gives us no thread.
pub fn groups_with<S: crate::link::LinkSender>(
    ranks: WorldSize,
    config: GroupConfig,
    mut wrap: impl FnMut(Rank, memory::MemorySender) -> S,
) -> io::Result<Vec<Group>> {
    let thread = Arc::new(IoThread::start("mattock-memory")?);
    let rings = (0..ranks.get()).filter_map(|rank| Ring::new(Rank(rank), ranks, Generation(0)));
    if ranks.get() == 1 {
        return Ok(rings.map(|ring| Group::alone(ring, config, thread.clone())).collect());
    }
    let (senders, mut receivers): (Vec<_>, Vec<_>) = (0..ranks.get()).map(|_| memory::link()).unzip();
    // Rank r sends on link r and receives from link r - 1.
    receivers.rotate_right(1);
    let links = senders.into_iter().zip(receivers);
    Ok(rings
        .zip(links)
        .map(|(ring, (sender, receiver))| {
            Group::over_links(&thread, ring, config, wrap(ring.rank(), sender), receiver)
        })
        .collect())
}
