//! From a ring to the best group that its ranks can form: over the memory of one host where all are on one; along a line where the
//! ring is to be one; over memory within hosts and links between leaders where some share one; the ring as it is where none do.
//!
//! ```text
//! all-gather of cards round the ring -> who is where? -> meet, link -> has everybody? -> the better group, else the ring
//! ```
//!
//! A card says where its rank lives, and how it reaches the next rank: together, how to reach every rank.
//!
//! Every rank decides by the same facts, so all decide the same; and what may have failed on one is put to the vote.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::{Core, RingSpec};
use crate::buffer::Buffer;
use crate::error::CollectiveError;
use crate::group::hierarchy::Hierarchy;
use crate::group::line::Line;
use crate::group::shortcut::Shortcut;
use crate::group::{Group, Linked};
use crate::layout::{Layout, Seat};
use crate::link::quic::directions::{DIRECTIONS_BYTES, Directions};
use crate::link::quic::hello::Part;
use crate::message::roads::{Callers, QuicWays};
use crate::rank::Rank;
use crate::reduction::SaturatingSum;
use crate::ring::{Members, Ring, Shape};
use crate::shm::arena::Arena;
use crate::shm::board::Board;
use crate::shm::engine::Engine;
use crate::shm::meet::{CARD_BYTES, Card, Host, Met};

/// Who is on this host answers sooner than this, and so does another leader.
const MEETING_MAX: Duration = Duration::from_secs(10);
/// The others wait with their votes for a timeout: a meeting is over in this part of it.
const MEETINGS_PER_TIMEOUT: u32 = 2;

/// What a rank tells all others.
const TOLD_BYTES: usize = CARD_BYTES + DIRECTIONS_BYTES;

/// What a rank has told.
struct Told {
    card: Card,
    /// How it reaches the next rank.
    next: Option<Directions>,
}

/// What may take the ring's place, or help it.
enum Better {
    Shared(Group),
    Helped(Shortcut),
}

/// What is to be tried.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plan {
    OneHost,
    Hosts,
    Line,
}

/// By what all ranks know.
fn plan(ring: Ring, layout: &Layout, are_willing: bool) -> Option<Plan> {
    match layout.hosts() {
        1 if are_willing => Some(Plan::OneHost),
        _ if ring.shape() == Shape::Line && ring.world_size().get() > 2 => Some(Plan::Line),
        _ if are_willing && layout.has_company() => Some(Plan::Hosts),
        _ => None,
    }
}

/// The best group for these ranks, and why it is no better one, if so.
///
/// # Errors
/// Where the ring breaks meanwhile.
pub(super) async fn best(
    core: &Arc<Core>,
    ring: Group,
    spec: &RingSpec,
) -> Result<(Group, String), CollectiveError> {
    let host = core.arena.as_ref().and_then(|arena| {
        let host = Host::listen(core.host).inspect_err(|error| tracing::warn!(%error, "no local socket"));
        Some((host.ok()?, arena.clone()))
    });
    let own = host.as_ref().map_or(Card::unwilling(), |(host, _)| host.card);
    let told = tell(&ring, own, spec).await?;
    let messages = |group: Group| messages(core, group, &told);
    let are_willing = told.iter().all(|told| told.card.apart(&told.card).is_none());
    let layout = Layout::of(&told, |a, b| a.card.apart(&b.card).is_none());
    let apart = told.iter().find_map(|other| told[0].card.apart(&other.card)).unwrap_or_default();
    let Some(plan) = plan(ring.ring(), &layout, are_willing) else {
        return Ok((messages(ring), apart.to_owned()));
    };
    let better = match (plan, host) {
        (Plan::Line, _) => line(core, spec, &told).await,
        (Plan::OneHost | Plan::Hosts, Some(host)) => hosts(core, &ring, &layout, &told, host).await,
        (Plan::OneHost | Plan::Hosts, None) => Err("this rank shares no memory".to_owned()),
    };
    let failures = Arc::new(vec![u32::from(better.is_err())].into());
    let failures = ring.all_reduce::<SaturatingSum>(failures, Buffer::default()).await?[0];
    match better {
        Ok(Better::Shared(group)) if failures == 0 => Ok((messages(group), String::new())),
        Ok(Better::Helped(shortcut)) if failures == 0 => {
            Ok((messages(ring.with(shortcut)), apart.to_owned()))
        }
        refused => {
            let reason = refused.err().unwrap_or_else(|| "another rank could not".to_owned());
            tracing::warn!(reason, "QUIC round the ring of all ranks, though there is a better way");
            Ok((messages(ring), reason))
        }
    }
}

/// The group with ways for messages: to each rank as the one before it reaches it.
fn messages(core: &Core, group: Group, told: &[Told]) -> Group {
    let ways = QuicWays {
        endpoint: core.endpoint.clone(),
        client: core.client.clone(),
        lobby: core.lobby.clone(),
        obituaries: core.obituaries.clone(),
        ring: group.ring(),
        directions: (0..told.len() as u32).map(|rank| directions(told, Rank(rank)).ok().cloned()).collect(),
        chunk_bytes: core.group.chunk_bytes(),
        timeout: core.group.timeout,
    };
    let roads = ways.roads();
    group.with_messages(&core.thread, core.group, (roads, Callers::Quic(Box::new(ways))))
}

/// Tells all others, and hears from them, by rank.
async fn tell(ring: &Group, card: Card, spec: &RingSpec) -> Result<Vec<Told>, CollectiveError> {
    let ranks = ring.ring().world_size().get() as usize;
    let next = Directions { address: spec.next.0, name: spec.next.1.clone() };
    let own = [&card.encode()[..], &next.encode()].concat();
    let told = ring.all_gather(Arc::new(own.into()), ranks * TOLD_BYTES, Buffer::default()).await?;
    let (told, _) = told.as_chunks::<TOLD_BYTES>();
    Ok(told.iter().map(Told::decode).collect())
}

impl Told {
    fn decode(wire: &[u8; TOLD_BYTES]) -> Self {
        let card = std::array::from_fn(|i| wire[i]);
        let next = std::array::from_fn(|i| wire[CARD_BYTES + i]);
        let card = Card::decode(&card).unwrap_or(Card::unwilling());
        Self { card, next: Directions::decode(&next) }
    }
}

/// How long a meeting may take.
fn limit(core: &Core) -> Duration {
    (core.group.timeout / MEETINGS_PER_TIMEOUT).min(MEETING_MAX)
}

/// Links to both neighbours once more, in either direction.
async fn line(core: &Core, spec: &RingSpec, told: &[Told]) -> Result<Better, String> {
    let (there, back) = ((spec.ring, Members::default()), spec.ring.reverse());
    let next = Directions { address: spec.next.0, name: spec.next.1.clone() };
    // Where the previous rank listens others tell; who it is this rank knows.
    let address = directions(told, spec.ring.prev())?.address;
    let prev = Directions { address, name: spec.prev.clone() };
    let limit = limit(core);
    let (ahead, behind) = tokio::try_join!(
        core.join(Part::LineThere, there.clone(), &next, &prev.name, limit),
        core.join(Part::LineBack, back.clone(), &prev, &next.name, limit),
    )
    .map_err(|error| format!("no line: {error}"))?;
    let there = Linked::start(&core.thread, there, core.group, ahead);
    let back = Linked::start(&core.thread, back, core.group, behind);
    Ok(Better::Helped(Shortcut::Line(Line::new(&core.thread, there, back))))
}

/// Meets the ranks of this host, and links to the leaders of others, at the same time.
async fn hosts(
    core: &Arc<Core>,
    ring: &Group,
    layout: &Layout,
    told: &[Told],
    (host, arena): (Host, Arena),
) -> Result<Better, String> {
    let (rank, generation) = (ring.ring().rank(), ring.ring().generation());
    let limit = limit(core);
    let seat = layout.within(rank, generation).ok_or("this rank is on no host")?;
    let leader = layout.between(rank, generation).filter(|_| layout.hosts() > 1);
    let ((board, peers), leaders) = tokio::try_join!(
        meet(core, &seat, told, (host, arena.clone()), limit),
        link(core, leader, told, limit)
    )?;
    let place = (seat.ring, seat.members);
    // From here to its owner nothing waits: an engine must be closed.
    let engine = Engine::start(place, core.group, board, arena, peers, &core.thread);
    let engine = engine.map_err(|error| error.to_string())?;
    Ok(match layout.hosts() {
        1 => Better::Shared(Group::on_host(engine, ring.keep())),
        _ => Better::Helped(Shortcut::Hosts(Hierarchy::new(engine, leaders, layout.clone()))),
    })
}

/// Meets the ranks of this host on a thread that may block.
async fn meet(
    core: &Core,
    seat: &Seat,
    told: &[Told],
    (host, arena): (Host, Arena),
    limit: Duration,
) -> Result<(Board, Vec<Option<Met>>), String> {
    let cards: Vec<Card> = seat.ranks.iter().map(|rank| told[rank.0 as usize].card).collect();
    let ring = seat.ring;
    let meeting = core.thread.handle().spawn_blocking(move || {
        let board = Board::new()?;
        let met = host.meet(ring, &cards, [board.file().as_fd(), arena.file().as_fd()], limit)?;
        Ok((board, met))
    });
    meeting.await.map_err(io::Error::other).flatten().map_err(|error| error.to_string())
}

/// Links to the leaders of the hosts before and behind this one, where this rank leads its own.
async fn link(
    core: &Core,
    leader: Option<Seat>,
    told: &[Told],
    limit: Duration,
) -> Result<Option<Linked>, String> {
    let Some(Seat { ring, members, .. }) = leader else { return Ok(None) };
    let (next, prev) = (members.name(ring.next()), members.name(ring.prev()));
    let (next, prev) = (directions(told, next)?, directions(told, prev)?);
    let place = (ring, members);
    let links = core.join(Part::Leaders, place.clone(), next, &prev.name, limit).await;
    let links = links.map_err(|error| format!("no link between hosts: {error}"))?;
    Ok(Some(Linked::start(&core.thread, place, core.group, links)))
}

/// How to reach a rank, by the one before it.
fn directions(told: &[Told], rank: Rank) -> Result<&Directions, String> {
    let before = (rank.0 as usize + told.len() - 1) % told.len();
    let known = told[before].next.as_ref();
    known.ok_or_else(|| format!("rank {before} gave no directions to rank {rank}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Generation, WorldSize};
    use proptest::prelude::*;

    fn ring(ranks: u32) -> Ring {
        Ring::new(Rank(0), WorldSize::new(ranks).unwrap(), Generation(0)).unwrap()
    }

    #[test]
    fn the_plan_follows_from_who_is_where_and_from_the_shape() {
        let by = |labels: &[u8], shape, are_willing| {
            let layout = Layout::of(labels, |a, b| a == b);
            plan(ring(labels.len() as u32).shaped(shape), &layout, are_willing)
        };
        for (labels, shape, wanted) in [
            (&[1, 1, 1][..], Shape::Ring, Some(Plan::OneHost)),
            (&[1, 1, 1], Shape::Line, Some(Plan::OneHost)),
            (&[1, 1, 2], Shape::Ring, Some(Plan::Hosts)),
            (&[1, 1, 2], Shape::Line, Some(Plan::Line)),
            (&[1, 2, 3], Shape::Ring, None),
            (&[1, 2], Shape::Line, None),
        ] {
            assert_eq!(by(labels, shape, true), wanted, "{labels:?} {shape}");
        }
        assert_eq!(by(&[1, 1, 2], Shape::Ring, false), None);
    }

    #[test]
    fn directions_to_a_rank_are_those_of_the_one_before() {
        let next = |port| Some(Directions { address: ([10, 0, 0, 1], port).into(), name: "a".into() });
        let told =
            [Some(1), None, Some(3)].map(|port| Told { card: Card::unwilling(), next: port.and_then(next) });
        assert_eq!(directions(&told, Rank(1)).unwrap().address.port(), 1);
        assert_eq!(directions(&told, Rank(0)).unwrap().address.port(), 3);
        assert!(directions(&told, Rank(2)).unwrap_err().contains("rank 1 gave no directions"));
    }

    proptest! {
        /// What a peer tells is read as something, whatever it is.
        #[test]
        fn anything_can_be_told(bytes in proptest::collection::vec(any::<u8>(), TOLD_BYTES), valid in any::<bool>()) {
            let mut wire: [u8; TOLD_BYTES] = bytes.try_into().unwrap();
            if valid {
                (wire[0], wire[CARD_BYTES]) = (1, 1);
            }
            let told = Told::decode(&wire);
            prop_assert!(valid || wire[0] == 1 || told.card == Card::unwilling());
        }
    }
}
