//! From a ring to a group over the memory of one host, where all its ranks are on one.
//!
//! ```text
//! all-gather of cards round the ring -> all on one host? -> meet -> has everybody? -> shared memory, else the ring
//! ```
//!
//! Every rank decides by the same facts, so all decide the same.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::arena::Arena;
use super::board::Board;
use super::engine::Engine;
use super::meet::{CARD_BYTES, Card, Host, Met};
use crate::buffer::Buffer;
use crate::error::CollectiveError;
use crate::group::{Group, GroupConfig};
use crate::io_thread::IoThread;
use crate::reduction::SaturatingSum;
use crate::ring::Members;

/// Who is on this host answers sooner than this.
const MEETING_MAX: Duration = Duration::from_secs(10);

/// What came of it.
pub(crate) enum Outcome {
    /// All ranks share memory.
    Shared(Group),
    /// The ring goes on as it was, because of this.
    Apart(Group, String),
}

/// Tries to replace a ring by shared memory. Without an arena this rank only takes part in the decision.
///
/// # Errors
/// Where the ring breaks meanwhile.
pub(crate) async fn share_memory(
    io: &Arc<IoThread>,
    ring: Group,
    arena: Option<&Arena>,
    config: GroupConfig,
) -> Result<Outcome, CollectiveError> {
    let host = arena.map(|arena| (Host::listen(), arena.clone()));
    let (host, mut obstacle) = match host {
        Some((Ok(host), arena)) => (Some((host, arena)), None),
        Some((Err(error), _)) => (None, Some(format!("no local socket: {error}"))),
        None => (None, None),
    };
    let own = host.as_ref().map_or(Card::unwilling(), |(host, _)| host.card);
    let cards = exchange(&ring, own).await?;
    obstacle = obstacle.or_else(|| cards.iter().find_map(|card| own.apart(card)).map(str::to_owned));
    let mut started = None;
    if let (Some((host, arena)), None) = (host, &obstacle) {
        let met = meet(io, &ring, host, cards, arena.clone(), config.timeout.min(MEETING_MAX)).await;
        match met.and_then(|(board, peers)| {
            Engine::start((ring.ring(), Members::default()), config, board, arena, peers, io)
        }) {
            Ok(engine) => started = Some(Group::on_host(engine, ring.keep())),
            Err(error) => obstacle = Some(error.to_string()),
        }
    }
    let failures = Arc::new(vec![u32::from(started.is_none())].into());
    let failures = ring.all_reduce::<SaturatingSum>(failures, Buffer::default()).await?[0];
    Ok(match started {
        Some(group) if failures == 0 => Outcome::Shared(group),
        _ => Outcome::Apart(ring, obstacle.unwrap_or_else(|| "another rank could not".to_owned())),
    })
}

/// Everybody's cards, by rank.
async fn exchange(ring: &Group, own: Card) -> Result<Vec<Card>, CollectiveError> {
    let ranks = ring.ring().world_size().get() as usize;
    let input: Buffer<u8> = own.encode().to_vec().into();
    let cards = ring.all_gather(Arc::new(input), ranks * CARD_BYTES, Buffer::default()).await?;
    let (cards, _) = cards.as_chunks::<CARD_BYTES>();
    Ok(cards.iter().map(|card| Card::decode(card).unwrap_or(Card::unwilling())).collect())
}

/// Meets the others on a thread that may block.
async fn meet(
    io: &IoThread,
    ring: &Group,
    host: Host,
    cards: Vec<Card>,
    arena: Arena,
    limit: Duration,
) -> std::io::Result<(Board, Vec<Option<Met>>)> {
    let ring = ring.ring();
    let meeting = io.handle().spawn_blocking(move || {
        let board = Board::new()?;
        let met = host.meet(ring, &cards, [board.file().as_fd(), arena.file().as_fd()], limit)?;
        Ok((board, met))
    });
    meeting.await.map_err(std::io::Error::other)?
}
