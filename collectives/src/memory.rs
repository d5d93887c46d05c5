//! Whole groups within one process, for tests and for trying things out.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::group::{Group, GroupConfig};
use crate::io_thread::IoThread;
use crate::link::faulty::Gluing;
use crate::link::memory;
use crate::rank::{Generation, Rank, WorldSize};
use crate::ring::Ring;
use crate::shm::arena::Arena;
use crate::shm::board::Board;
use crate::shm::engine::Engine;
use crate::shm::meet::{Card, Host};

/// One group for each rank of a ring of `ranks`, linked in memory and driven by one thread.
///
/// # Errors
/// If the system gives us no thread.
pub fn groups(ranks: WorldSize, config: GroupConfig) -> io::Result<Vec<Group>> {
    groups_with(ranks, config, |_, sender| sender)
}

/// As [`groups`], with each rank's sender wrapped: by [`Faulty`](crate::link::faulty::Faulty), say. What arrives may be glued
/// together.
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
            Group::over_links(&thread, ring, config, wrap(ring.rank(), sender), Gluing::new(receiver))
        })
        .collect())
}

/// One group for each of `ranks`, over shared memory as between the processes of a host.
///
/// # Errors
/// If the system gives us no thread, socket or memory to share.
pub fn host_groups(ranks: WorldSize, config: GroupConfig) -> io::Result<Vec<Group>> {
    /// Bytes that a rank may share.
    const ARENA_BYTES: usize = 1 << 32;
    if ranks.get() == 1 {
        return groups(ranks, config);
    }
    let thread = Arc::new(IoThread::start("mattock-memory")?);
    let hosts: Vec<Host> = (0..ranks.get()).map(|_| Host::listen()).collect::<io::Result<_>>()?;
    let cards: Vec<Card> = hosts.iter().map(|host| host.card).collect();
    let join = |rank: u32, host: Host| {
        let ring = Ring::new(Rank(rank), ranks, Generation(0)).ok_or(io::ErrorKind::InvalidInput)?;
        let (board, arena) = (Board::new()?, Arena::new(ARENA_BYTES)?);
        let met = host.meet(ring, &cards, [board.file().as_fd(), arena.file().as_fd()], config.timeout)?;
        let engine = Engine::start(ring, config, board, arena, met, &thread)?;
        Ok(Group::on_host(engine, thread.clone()))
    };
    std::thread::scope(|scope| {
        let joins: Vec<_> =
            (0..).zip(hosts).map(|(rank, host)| scope.spawn(move || join(rank, host))).collect();
        let panicked = |_| Err(io::Error::other("a thread has panicked"));
        joins.into_iter().map(|join| join.join().unwrap_or_else(panicked)).collect()
    })
}
