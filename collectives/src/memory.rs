//! Whole groups within one process, for tests and for trying things out.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::group::hierarchy::Hierarchy;
use crate::group::line::Line;
use crate::group::shortcut::Shortcut;
use crate::group::{Group, GroupConfig, Linked};
use crate::io_thread::IoThread;
use crate::layout::{Layout, Seat};
use crate::link::faulty::Gluing;
use crate::link::memory;
use crate::message::roads::within_process;
use crate::rank::{Generation, Rank, WorldSize};
use crate::ring::{Members, Ring};
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
    wrap: impl FnMut(Rank, memory::MemorySender) -> S,
) -> io::Result<Vec<Group>> {
    let thread = Arc::new(IoThread::start("mattock-memory")?);
    Ok(with_messages(&thread, config, groups_on(&thread, ranks, config, wrap)))
}

/// The groups of all ranks, with ways for messages.
fn with_messages(thread: &IoThread, config: GroupConfig, groups: Vec<Group>) -> Vec<Group> {
    let ways = within_process(groups.len() as u32);
    groups.into_iter().zip(ways).map(|(group, ways)| group.with_messages(thread, config, ways)).collect()
}

fn groups_on<S: crate::link::LinkSender>(
    thread: &Arc<IoThread>,
    ranks: WorldSize,
    config: GroupConfig,
    mut wrap: impl FnMut(Rank, memory::MemorySender) -> S,
) -> Vec<Group> {
    let rings = (0..ranks.get()).filter_map(|rank| Ring::new(Rank(rank), ranks, Generation(0)));
    if ranks.get() == 1 {
        return rings.map(|ring| Group::alone(ring, config, thread.clone())).collect();
    }
    let links = ring_of_links(ranks.get() as usize);
    rings
        .zip(links)
        .map(|(ring, (sender, receiver))| {
            Group::over_links(thread, ring, config, wrap(ring.rank(), sender), Gluing::new(receiver))
        })
        .collect()
}

/// One group for each of `ranks`, over shared memory as between the processes of a host.
///
/// # Errors
/// If the system gives us no thread, socket or memory to share.
pub fn host_groups(ranks: WorldSize, config: GroupConfig) -> io::Result<Vec<Group>> {
    if ranks.get() == 1 {
        return groups(ranks, config);
    }
    let thread = Arc::new(IoThread::start("mattock-memory")?);
    let rings = (0..ranks.get()).filter_map(|rank| Ring::new(Rank(rank), ranks, Generation(0)));
    let engines = engines(rings.map(|ring| (ring, Members::default())).collect(), config, &thread)?;
    let groups = engines.into_iter().map(|engine| Group::on_host(engine, thread.clone())).collect();
    Ok(with_messages(&thread, config, groups))
}

/// One group for each rank, of which `hosts` says on which host it is to be: over shared memory within a host, linked in memory
/// between hosts.
///
/// # Errors
/// If the system gives us no thread, socket or memory to share.
pub fn hierarchical_groups(hosts: &[u32], config: GroupConfig) -> io::Result<Vec<Group>> {
    let layout = Layout::of(hosts, |a, b| a == b);
    let ranks = WorldSize::new(hosts.len() as u32).ok_or(io::ErrorKind::InvalidInput)?;
    if layout.hosts() == 1 {
        return host_groups(ranks, config);
    }
    let thread = Arc::new(IoThread::start("mattock-memory")?);
    let (generation, all) = (Generation(0), (0..ranks.get()).map(Rank));
    let mut engines_of: BTreeMap<Rank, (Arc<Engine>, JoinHandle<()>)> = BTreeMap::new();
    let mut leaders: Vec<Seat> = all.clone().filter_map(|rank| layout.between(rank, generation)).collect();
    leaders.sort_by_key(|seat| seat.ring.rank());
    for leader in &leaders {
        let lowest = leader.members.name(leader.ring.rank());
        let members = layout.within(lowest, generation).map_or(Vec::new(), |seat| seat.ranks);
        let seats: Vec<Seat> = members.iter().filter_map(|&rank| layout.within(rank, generation)).collect();
        let places = seats.into_iter().map(|seat| (seat.ring, seat.members)).collect();
        engines_of.extend(members.into_iter().zip(engines(places, config, &thread)?));
    }
    let mut between: BTreeMap<Rank, Linked> = (leaders.iter().zip(ring_of_links(leaders.len())))
        .map(|(seat, links)| {
            let place = (seat.ring, seat.members.clone());
            (seat.members.name(seat.ring.rank()), Linked::start(&thread, place, config, links))
        })
        .collect();
    let whole = groups_on(&thread, ranks, config, |_, sender| sender);
    let joined = all.zip(whole).map(|(rank, group)| {
        let engine = engines_of.remove(&rank).ok_or(io::ErrorKind::NotFound)?;
        Ok(group.with(Shortcut::Hosts(Hierarchy::new(engine, between.remove(&rank), layout.clone()))))
    });
    Ok(with_messages(&thread, config, joined.collect::<io::Result<_>>()?))
}

/// As [`groups`], used as a line: what is reduced goes to the last rank and back.
///
/// # Errors
/// If the system gives us no thread.
pub fn line_groups(ranks: WorldSize, config: GroupConfig) -> io::Result<Vec<Group>> {
    let thread = Arc::new(IoThread::start("mattock-memory")?);
    let whole = groups_on(&thread, ranks, config, |_, sender| sender);
    if ranks.get() == 1 {
        return Ok(whole);
    }
    let (there, mut back) = (ring_of_links(whole.len()), ring_of_links(whole.len()));
    back.reverse();
    let line = |(group, (there, back)): (Group, _)| {
        let there = Linked::start(&thread, (group.ring(), Members::default()), config, there);
        let back = Linked::start(&thread, group.ring().reverse(), config, back);
        group.with(Shortcut::Line(Line::new(&thread, there, back)))
    };
    let lines = whole.into_iter().zip(there.into_iter().zip(back)).map(line).collect();
    Ok(with_messages(&thread, config, lines))
}

/// The ends of links in memory round a ring, by rank.
fn ring_of_links(ranks: usize) -> Vec<(memory::MemorySender, memory::MemoryReceiver)> {
    let (senders, mut receivers): (Vec<_>, Vec<_>) = (0..ranks).map(|_| memory::link()).unzip();
    // Rank r sends on link r and receives from link r - 1.
    receivers.rotate_right(1);
    senders.into_iter().zip(receivers).collect()
}

/// Engines that have met.
fn engines(
    places: Vec<(Ring, Members)>,
    config: GroupConfig,
    thread: &IoThread,
) -> io::Result<Vec<(Arc<Engine>, JoinHandle<()>)>> {
    /// Bytes that a rank may share.
    const ARENA_BYTES: usize = 1 << 32;
    let hosts: Vec<Host> = places.iter().map(|_| Host::listen(0)).collect::<io::Result<_>>()?;
    let cards: Vec<Card> = hosts.iter().map(|host| host.card).collect();
    let join = |(ring, members): (Ring, Members), host: Host| {
        let (board, arena) = (Board::new()?, Arena::new(ARENA_BYTES)?);
        let met = host.meet(ring, &cards, [board.file().as_fd(), arena.file().as_fd()], config.timeout)?;
        Engine::start((ring, members), config, board, arena, met, thread)
    };
    std::thread::scope(|scope| {
        let joins: Vec<_> = places
            .into_iter()
            .zip(hosts)
            .map(|(place, host)| scope.spawn(move || join(place, host)))
            .collect();
        let panicked = |_| Err(io::Error::other("a thread has panicked"));
        joins.into_iter().map(|join| join.join().unwrap_or_else(panicked)).collect()
    })
}
