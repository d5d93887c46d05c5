//! What a rank makes of peers that break the rules, leave, die or fall silent.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::arena::Arena;
use super::board::{Board, NOTICE_WORDS};
use super::engine::{Engine, lag_of};
use super::meet::{Host, Met};
use crate::collective::Collective;
use crate::error::{CollectiveError, Disagreement, Payload, TransportError};
use crate::group::{Group, GroupConfig};
use crate::io_thread::IoThread;
use crate::rank::{Generation, Rank, WorldSize};
use crate::reduction::{ElementKind, ReductionKind, Sum};
use crate::ring::{Members, Ring};
use crate::{Buffer, frame, memory};

const PATIENT: Duration = Duration::from_secs(60);
/// Too much for a board.
const LARGE: usize = 10_000;
const ARENA_BYTES: usize = 4 << 20;

/// Rank 1 of two, played by a test: what it shares, and its line to rank 0.
struct Puppet {
    board: Board,
    met: Met,
    _arena: Arena,
}

/// Rank 0 of two, and a puppet.
fn pair(timeout: Duration) -> (Group, Puppet) {
    let hosts = [Host::listen(0).unwrap(), Host::listen(0).unwrap()];
    let cards = hosts.each_ref().map(|host| host.card);
    let meet = |rank: u32, host: Host| {
        let ring = Ring::new(Rank(rank), WorldSize::new(2).unwrap(), Generation(0)).unwrap();
        let (board, arena) = (Board::new().unwrap(), Arena::new(ARENA_BYTES).unwrap());
        let share = [board.file().as_fd(), arena.file().as_fd()];
        let met = host.meet(ring, &cards, share, PATIENT).unwrap();
        (ring, board, arena, met)
    };
    let [first, second] = hosts;
    let (own, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| meet(1, second));
        (meet(0, first), other.join().unwrap())
    });
    let io = Arc::new(IoThread::start("test").unwrap());
    let (ring, board, arena, met) = own;
    let config = GroupConfig { timeout, ..GroupConfig::default() };
    let group = Group::on_host(
        Engine::start((ring, Members::default()), config, board, arena, met, &io).unwrap(),
        io,
    );
    let (_, board, _arena, mut met) = other;
    (group, Puppet { board, met: met.swap_remove(0).unwrap(), _arena })
}

impl Puppet {
    /// Announces operation 0 in these words.
    fn announce(&self, words: [u64; 5]) {
        let mut notice = [0; NOTICE_WORDS];
        notice[..5].copy_from_slice(&words);
        notice[6] = lag_of(2) as u64;
        self.board.write_notice(0, notice);
        self.board.add_tick();
        self.board.wake();
    }
}

/// The name of a sum of that many f32.
fn sum_of(len: usize) -> u64 {
    frame::pack(Collective::AllReduce, &payload(len))
}

fn payload(len: usize) -> Payload {
    Payload { element: ElementKind::F32, reduction: Some(ReductionKind::Sum), total_bytes: bytes(len) }
}

fn bytes(len: usize) -> u64 {
    len as u64 * 4
}

/// What rank 0's sum of [`LARGE`] f32 comes to.
fn sum(group: &Group) -> Result<Buffer<f32>, CollectiveError> {
    group.all_reduce_now::<Sum<f32>>(Arc::new(group.buffer(LARGE)), group.buffer(LARGE))
}

#[track_caller]
fn disagreement(words: [u64; 5]) -> Disagreement {
    let (group, puppet) = pair(PATIENT);
    puppet.announce(words);
    match sum(&group) {
        Err(CollectiveError::Mismatch { peer: Rank(1), disagreement, .. }) => disagreement,
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_that_a_peer_does_not_share_is_not_read() {
    let end = ARENA_BYTES as u64;
    for input in [u64::MAX, u64::MAX - 63, end, end - 64, 1 << 40, 4] {
        let said = disagreement([0, sum_of(LARGE), bytes(LARGE), input, 0]);
        assert!(matches!(said, Disagreement::Outside { offset, .. } if offset == input), "{input}: {said}");
    }
}

#[test]
fn results_that_a_peer_does_not_share_are_not_read() {
    for result in [u64::MAX, ARENA_BYTES as u64 - 4, 1 << 40] {
        let (group, puppet) = pair(PATIENT);
        puppet.announce([0, sum_of(LARGE), bytes(LARGE), 0, result]);
        (0..10).for_each(|_| puppet.board.add_tick());
        let error = sum(&group).unwrap_err();
        let CollectiveError::Mismatch { disagreement, .. } = error else { panic!("{error}") };
        assert!(
            matches!(disagreement, Disagreement::Outside { offset, .. } if offset == result),
            "{disagreement}"
        );
    }
}

#[test]
fn a_peer_that_does_something_else_is_found_out() {
    let said = disagreement([0, sum_of(LARGE), bytes(LARGE) + 4, 0, 0]);
    assert!(matches!(said, Disagreement::Payload { .. }), "{said}");
    let said = disagreement([1, sum_of(LARGE), bytes(LARGE), 0, 0]);
    assert!(matches!(said, Disagreement::Operation { .. }), "{said}");
    let barrier = frame::pack(Collective::Barrier, &payload(LARGE));
    let said = disagreement([0, barrier, bytes(LARGE), 0, 0]);
    assert!(matches!(said, Disagreement::Operation { .. }), "{said}");
    for nonsense in [0, u64::MAX, 0xff, 1 << 24] {
        let said = disagreement([0, nonsense, bytes(LARGE), 0, 0]);
        assert!(matches!(said, Disagreement::Frame(_)), "{said}");
    }
}

#[test]
fn ticks_without_work_spoil_numbers_and_nothing_else() {
    let (group, puppet) = pair(PATIENT);
    puppet.announce([0, sum_of(LARGE), bytes(LARGE), 0, 0]);
    (0..1000).for_each(|_| puppet.board.add_tick());
    assert_eq!(sum(&group).unwrap().len(), LARGE);
}

#[test]
fn a_peer_that_vanishes_has_ended() {
    let (group, puppet) = pair(PATIENT);
    puppet.announce([0, sum_of(LARGE), bytes(LARGE), 0, 0]);
    drop(puppet);
    let error = sum(&group).unwrap_err();
    assert!(
        matches!(error, CollectiveError::PeerLost { source: TransportError::ProcessEnded, .. }),
        "{error}"
    );
}

#[test]
fn a_peer_that_takes_its_leave_is_missed_when_it_is_needed() {
    let (group, puppet) = pair(PATIENT);
    std::io::Write::write_all(&mut &puppet.met.line, b".").unwrap();
    drop(puppet);
    let error = sum(&group).unwrap_err();
    assert!(
        matches!(error, CollectiveError::PeerLost { source: TransportError::ClosedByPeer, .. }),
        "{error}"
    );
}

#[test]
fn a_peers_reason_is_passed_on() {
    let (group, puppet) = pair(PATIENT);
    std::io::Write::write_all(&mut &puppet.met.line, b"!the host burns").unwrap();
    drop(puppet);
    let error = sum(&group).unwrap_err();
    assert!(error.to_string().contains("the host burns"), "{error}");
}

#[test]
fn silence_is_not_waited_for_longer_than_the_timeout() {
    let (group, puppet) = pair(Duration::from_millis(50));
    let error = sum(&group).unwrap_err();
    assert!(matches!(error, CollectiveError::TimedOut { peer: Rank(1), .. }), "{error}");
    drop(puppet);
}

#[test]
fn cancelling_wakes_who_waits() {
    let (group, _puppet) = pair(PATIENT);
    let input = Arc::new(group.buffer(LARGE));
    let pending = group.all_reduce::<Sum<f32>>(input, Buffer::default());
    group.cancel("a new ring is formed");
    let error = pending.wait().unwrap_err();
    assert!(matches!(error, CollectiveError::Cancelled { .. }), "{error}");
    assert!(sum(&group).is_err(), "a group that was cancelled does nothing more");
}

#[test]
fn closing_ends_what_is_pending() {
    let (group, _puppet) = pair(PATIENT);
    let pending = group.all_reduce::<Sum<f32>>(Arc::new(group.buffer(LARGE)), Buffer::default());
    group.close();
    let error = pending.wait().unwrap_err();
    assert!(matches!(error, CollectiveError::Closed { .. }), "{error}");
}

#[test]
fn results_that_no_cache_holds_are_right_too() {
    // Twice the limit at which results go past the caches, and an odd number of elements.
    let len = super::copy::cache_bytes() / 8 + 1;
    let ranks = WorldSize::new(3).unwrap();
    let groups =
        memory::host_groups(ranks, GroupConfig { timeout: PATIENT, ..GroupConfig::default() }).unwrap();
    let sums: Vec<_> = groups
        .iter()
        .map(|group| {
            let mut input = group.buffer::<i32>(len);
            let rank = group.ring().rank().0 as i32;
            input.iter_mut().zip(0..).for_each(|(x, i): (&mut i32, i32)| *x = i.wrapping_mul(rank + 7));
            // One result lies where peers cannot read it.
            let output = if rank == 1 { Buffer::default() } else { group.buffer(len) };
            group.all_reduce::<Sum<i32>>(Arc::new(input), output)
        })
        .collect();
    for sum in sums {
        let sum = sum.wait().unwrap();
        assert!(sum.iter().zip(0..).all(|(&x, i): (&i32, i32)| x == i.wrapping_mul(7 + 8 + 9)));
    }
}
