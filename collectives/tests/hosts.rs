//! Groups of which some ranks share a host: shared memory within hosts, QUIC between, and one end for all when a part of it ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/relay.rs"]
mod relay;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Authority, config, name, spec};
use mattock_collectives::{
    Buffer, CollectiveError, Disagreement, Group, I24, JoinError, Node, NodeConfig, Rank, RingSpec, Sum,
    Transport, TransportChoice, TransportError, segment,
};
use relay::Relay;

/// Long enough for a busy machine.
const PATIENT: Duration = Duration::from_secs(20);
/// For tests in which a timeout must run out.
const SHORT: Duration = Duration::from_secs(3);

/// Nodes that say they are on these hosts.
fn nodes(hosts: &[u64], timeout: Duration) -> Vec<Node> {
    with_choices(&hosts.iter().map(|&host| (host, TransportChoice::Auto)).collect::<Vec<_>>(), timeout)
}

fn with_choices(ranks: &[(u64, TransportChoice)], timeout: Duration) -> Vec<Node> {
    let authority = Authority::new();
    let start = |(rank, &(host, transport)): (u32, &(u64, TransportChoice))| {
        let (identity, bind) = (authority.identity(&[&name(rank)]), ([127, 0, 0, 1], 0).into());
        let group = config(timeout);
        Node::start(NodeConfig { host, transport, group, ..NodeConfig::new(identity, bind) }).unwrap()
    };
    (0..).zip(ranks).map(start).collect()
}

fn join(nodes: &[Node], generation: u64) -> Vec<Result<Group, JoinError>> {
    let joins = (0..).zip(nodes).map(|(rank, node)| node.begin_join(spec(nodes, rank, generation)));
    joins.collect::<Vec<_>>().into_iter().map(|join| join.wait()).collect()
}

fn groups(nodes: &[Node], generation: u64) -> Vec<Group> {
    join(nodes, generation).into_iter().map(Result::unwrap).collect()
}

fn input(rank: Rank, len: usize) -> Vec<i32> {
    (0..len as i32).map(|i| i.wrapping_mul(31) ^ rank.0 as i32).collect()
}

fn sum_of(ranks: usize, len: usize) -> Vec<i32> {
    let add = |sum: Vec<i32>, rank| sum.iter().zip(input(Rank(rank), len)).map(|(a, b)| a + b).collect();
    (0..ranks as u32).fold(vec![0; len], add)
}

/// Lengths of parts that differ, one of them nothing.
fn uneven(ranks: usize, len: usize) -> Vec<usize> {
    let mut lens: Vec<usize> = (0..ranks).map(|rank| len * rank / (ranks * ranks)).collect();
    lens[ranks - 1] += len - lens.iter().sum::<usize>();
    lens
}

/// Several operations, of which some are hierarchical and others go round the ring, all under way at once.
fn compute(groups: &[Group], len: usize) {
    let expected = sum_of(groups.len(), len);
    let pending: Vec<_> = groups
        .iter()
        .map(|group| {
            let own: Arc<Buffer<i32>> = Arc::new(input(group.ring().rank(), len).into());
            let mut shared = group.buffer(len);
            shared.copy_from_slice(&own);
            let all = group.all_reduce::<Sum<i32>>(own.clone(), Buffer::default());
            let part = group.reduce_scatter::<Sum<i32>>(own.clone(), Buffer::default());
            let rooted =
                group.gather(Rank(0), Arc::new(vec![group.ring().rank().0].into()), Buffer::default());
            let lens = uneven(groups.len(), len);
            let share = group.reduce_scatter_uneven::<Sum<i32>>(own.clone(), &lens, group.buffer(0));
            let own_len = lens[group.ring().rank().0 as usize];
            let mut mine = group.buffer(own_len);
            mine.fill(group.ring().rank().0 as u8);
            let whole = group.all_gather_uneven(Arc::new(mine), &lens, group.buffer(0));
            let again = group.all_reduce::<Sum<i32>>(Arc::new(shared), group.buffer(len));
            (
                (all, part, again, rooted),
                (share, whole),
                group.barrier(),
                group.all_gather(Arc::new(vec![7u8].into()), groups.len(), Buffer::default()),
            )
        })
        .collect();
    let lens = uneven(groups.len(), len);
    let parts: Vec<u8> = (0..).zip(&lens).flat_map(|(rank, &len)| std::iter::repeat_n(rank, len)).collect();
    let mut rest = &expected[..];
    for (rank, ((all, part, again, rooted), (share, whole), barrier, gathered)) in (0..).zip(pending) {
        let own;
        (own, rest) = rest.split_at(lens[rank as usize]);
        assert!(share.wait().unwrap() == *own);
        assert!(whole.wait().unwrap() == parts);
        let ranks: Vec<u32> = (0..groups.len() as u32).collect();
        assert_eq!(rooted.wait().unwrap(), if rank == 0 { ranks } else { Vec::new() });
        assert!(all.wait().unwrap() == expected);
        assert!(part.wait().unwrap()[..] == expected[segment(len, groups.len() as u32, rank)]);
        assert!(again.wait().unwrap() == expected);
        barrier.wait().unwrap();
        assert_eq!(gathered.wait().unwrap(), vec![7u8; groups.len()]);
    }
}

#[test]
fn ranks_share_memory_within_hosts_wherever_they_are() {
    for hosts in [&[1, 1, 2][..], &[1, 2, 2], &[1, 2, 1, 2], &[1, 1, 1, 2], &[1, 1, 2, 2, 3]] {
        let nodes = nodes(hosts, PATIENT);
        for generation in [3, 4] {
            let groups = groups(&nodes, generation);
            for group in &groups {
                assert_eq!(group.transport(), Transport::Hierarchical, "{hosts:?}");
                assert_eq!(group.algorithm(100), "hierarchical");
            }
            for len in [0, 1, 1000, 1_000_003] {
                compute(&groups, len);
            }
            assert!(groups.iter().all(|group| group.history().iter().all(|record| record.end.is_some())));
        }
    }
}

/// Pieces of elements of three bytes begin where peers may read them.
#[test]
fn elements_of_any_size_are_read_where_they_lie() {
    let groups = groups(&nodes(&[1, 1, 2, 2], PATIENT), 0);
    let len = 1_000_003;
    let sums = groups.iter().map(|group| {
        let mut input = group.buffer(len);
        input.fill(I24([1, 2, 0]));
        let input = Arc::new(input);
        let sum = group.all_reduce::<Sum<I24>>(input.clone(), group.buffer(len));
        (sum, group.reduce_scatter::<Sum<I24>>(input, group.buffer(len)))
    });
    for (rank, (sum, part)) in (0..).zip(sums.collect::<Vec<_>>()) {
        assert!(sum.wait().unwrap().iter().all(|&x| x == I24([4, 8, 0])));
        assert!(part.wait().unwrap() == vec![I24([4, 8, 0]); segment(len, 4, rank).len()]);
    }
}

#[test]
fn floats_have_the_same_bits_on_all_ranks_and_every_time() {
    let nodes = nodes(&[1, 1, 2, 2, 2], PATIENT);
    let groups = groups(&nodes, 0);
    let mut seen: Option<Vec<u32>> = None;
    for _ in 0..3 {
        let sums = groups.iter().map(|group| {
            let rank = group.ring().rank().0 as f32;
            let own = (0..700_000).map(|i| (i as f32).sin() * (rank + 0.3)).collect::<Vec<_>>();
            group.all_reduce::<Sum<f32>>(Arc::new(own.into()), Buffer::default())
        });
        for sum in sums.collect::<Vec<_>>() {
            let bits: Vec<u32> = sum.wait().unwrap().iter().map(|x| x.to_bits()).collect();
            assert!(*seen.get_or_insert_with(|| bits.clone()) == bits);
        }
    }
}

/// A group whose every link goes by a relay: that of a rank leads to the next one, for whoever calls it.
fn by_relays(nodes: &[Node]) -> (Vec<Group>, Vec<Relay>) {
    let next = |rank: usize| (rank + 1) % nodes.len();
    let relays: Vec<_> =
        (0..nodes.len()).map(|rank| Relay::per_caller(nodes[next(rank)].local_addr())).collect();
    let joins: Vec<_> = (0..)
        .zip(nodes)
        .map(|(rank, node)| {
            let spec = spec(nodes, rank, 0);
            node.begin_join(RingSpec { next: (relays[rank as usize].address(), spec.next.1), ..spec })
        })
        .collect();
    (joins.into_iter().map(|join| join.wait().unwrap()).collect(), relays)
}

/// Bytes that each relay carries while all do something.
fn carried(relays: &[Relay], work: impl FnOnce()) -> Vec<u64> {
    let bytes = || relays.iter().map(|relay| relay.carried().0).collect::<Vec<u64>>();
    let before = bytes();
    work();
    bytes().into_iter().zip(before).map(|(after, before)| after - before).collect()
}

/// The link between hosts carries the payload once, not once for each rank.
#[test]
fn only_leaders_send_between_hosts() {
    let nodes = nodes(&[1, 1, 1, 2, 2], PATIENT);
    let (groups, relays) = by_relays(&nodes);
    let carried = carried(&relays, || {
        let input = Arc::new(Buffer::from(vec![1i32; 1 << 20]));
        let sum = |group: &Group| group.all_reduce::<Sum<i32>>(input.clone(), Buffer::default());
        let sums: Vec<_> = groups.iter().map(sum).collect();
        sums.into_iter().for_each(|sum| assert!(sum.wait().unwrap().iter().all(|&x| x == 5)));
    });
    // The leaders, ranks 0 and 3, are reached by way of the relays of those before them.
    for rank in [0, 1, 3] {
        assert!(carried[rank] < 100_000, "{carried:?}");
    }
    for rank in [2, 4] {
        assert!((4 << 20..5 << 20).contains(&carried[rank]), "{carried:?}");
    }
}

/// Two hosts of two ranks: a half of the payload crosses each way where leaders do it, three quarters round a ring of all ranks.
#[test]
fn segments_cross_between_hosts_once() {
    let (auto, quic) = (TransportChoice::Auto, TransportChoice::Quic);
    for (choice, transport, quarters) in [(auto, Transport::Hierarchical, 2), (quic, Transport::Quic, 3)] {
        let nodes = with_choices(&[(1, choice), (1, choice), (2, choice), (2, choice)], PATIENT);
        let (groups, relays) = by_relays(&nodes);
        assert!(groups.iter().all(|group| group.transport() == transport));
        let (len, bytes) = (1 << 20, 4 << 20);
        let scattered = carried(&relays, || {
            let input = Arc::new(Buffer::from(vec![1i32; len]));
            let sum = |group: &Group| group.reduce_scatter::<Sum<i32>>(input.clone(), Buffer::default());
            let sums: Vec<_> = groups.iter().map(sum).collect();
            sums.into_iter().for_each(|sum| assert_eq!(sum.wait().unwrap(), vec![4; len / 4]));
        });
        let gathered = carried(&relays, || {
            let input = Arc::new(Buffer::from(vec![3i32; len / 4]));
            let gather = |group: &Group| group.all_gather(input.clone(), len, Buffer::default());
            let gathers: Vec<_> = groups.iter().map(gather).collect();
            gathers.into_iter().for_each(|all| assert!(all.wait().unwrap() == vec![3; len]));
        });
        for carried in [scattered, gathered] {
            // From rank 1's host to rank 2's, and back.
            for link in [1, 3] {
                let wanted = bytes / 4 * quarters;
                assert!((wanted..wanted + bytes / 8).contains(&carried[link]), "{transport}: {carried:?}");
            }
        }
    }
}

#[test]
fn hosts_of_one_rank_each_are_a_ring() {
    let groups = groups(&nodes(&[1, 2, 3], PATIENT), 0);
    assert!(groups.iter().all(|group| group.transport() == Transport::Quic));
}

#[test]
fn one_rank_that_wants_quic_keeps_all_on_the_ring() {
    let auto = TransportChoice::Auto;
    let nodes = with_choices(&[(1, auto), (1, auto), (2, TransportChoice::Quic)], PATIENT);
    let groups = groups(&nodes, 0);
    assert!(groups.iter().all(|group| group.transport() == Transport::Quic));
    compute(&groups, 1000);
}

#[test]
fn who_insists_on_shared_memory_is_told_that_there_are_several_hosts() {
    let auto = TransportChoice::Auto;
    let nodes = with_choices(&[(1, auto), (1, auto), (2, TransportChoice::SharedMemory)], PATIENT);
    let error = join(&nodes, 0).pop().unwrap().unwrap_err();
    let JoinError::NotShared { reason, .. } = &error else { panic!("{error}") };
    assert!(reason.contains("several hosts"), "{reason}");
}

/// A leader that other leaders cannot reach, though the rank before it can.
#[test]
fn leaders_that_cannot_link_leave_all_on_the_ring() {
    let nodes = nodes(&[1, 1, 2, 2], SHORT);
    let relay = Relay::for_one_caller(nodes[2].local_addr());
    let joins: Vec<_> = (0..)
        .zip(&nodes)
        .map(|(rank, node)| {
            let spec = spec(&nodes, rank, 0);
            let next = if rank == 1 { (relay.address(), name(2)) } else { spec.next.clone() };
            node.begin_join(RingSpec { next, ..spec })
        })
        .collect();
    let groups: Vec<_> = joins.into_iter().map(|join| join.wait().unwrap()).collect();
    assert!(groups.iter().all(|group| group.transport() == Transport::Quic));
    compute(&groups, 10_000);
}

/// What every survivor says when a rank lets go of its group while all are at work.
fn errors_without(victim: usize, hosts: &[u64]) -> Vec<CollectiveError> {
    let nodes = nodes(hosts, PATIENT);
    let mut groups = groups(&nodes, 5);
    compute(&groups, 100);
    let started = Instant::now();
    let lost = groups.remove(victim);
    let input = Arc::new(Buffer::from(vec![1.0; 3_000_000]));
    let sums: Vec<_> =
        groups.iter().map(|group| group.all_reduce::<Sum<f32>>(input.clone(), Buffer::default())).collect();
    drop(lost);
    let errors = sums.into_iter().map(|sum| sum.wait().unwrap_err()).collect();
    assert!(started.elapsed() < PATIENT / 2, "not by waiting for the timeout");
    for group in &groups {
        group.barrier().wait().unwrap_err();
        group.all_gather(Arc::new(vec![7u8].into()), hosts.len(), Buffer::default()).wait().unwrap_err();
    }
    errors
}

#[test]
fn a_rank_that_leaves_in_the_middle_is_lost_by_all_at_once() {
    for victim in 0..4 {
        for error in errors_without(victim, &[1, 1, 2, 2]) {
            let CollectiveError::PeerLost { at, .. } = &error else { panic!("{error}") };
            assert_eq!(at.generation.0, 5);
        }
    }
}

#[test]
fn cancelling_ends_all_parts_and_tells_all_ranks_why() {
    for canceller in 0..3 {
        let nodes = nodes(&[1, 1, 2], PATIENT);
        let groups = groups(&nodes, 0);
        let others = (0..3).filter(|&rank| rank != canceller);
        let waiting: Vec<_> = others.map(|rank| groups[rank].barrier()).collect();
        groups[canceller].cancel("worker 3 is dead");
        for pending in waiting {
            let told = pending.wait().unwrap_err();
            assert!(told.to_string().contains("worker 3 is dead"), "{told}");
        }
        let own = groups[canceller].barrier().wait().unwrap_err();
        assert!(matches!(own, CollectiveError::Cancelled { .. }), "{own}");
    }
}

#[test]
fn a_rank_that_never_takes_part_is_noticed() {
    for lazy in [0, 1, 2] {
        let nodes = nodes(&[1, 1, 2], SHORT);
        let groups = groups(&nodes, 0);
        let others = (0..3).filter(|&rank| rank != lazy);
        let waiting: Vec<_> = others.map(|rank| groups[rank].barrier()).collect();
        for pending in waiting {
            let error = pending.wait().unwrap_err();
            let typed = matches!(
                error,
                CollectiveError::TimedOut { .. }
                    | CollectiveError::PeerLost { source: TransportError::BrokenOff { .. }, .. }
            );
            assert!(typed, "{error}");
        }
    }
}

#[test]
fn ranks_that_do_different_things_are_told_within_and_between_hosts() {
    for odd in 0..3 {
        let nodes = nodes(&[1, 1, 2], PATIENT);
        let groups = groups(&nodes, 0);
        let sums: Vec<_> = (0..3)
            .map(|rank| {
                // Of the same number of pieces, so that only the length differs.
                let len = if rank == odd { 1001 } else { 1000 };
                groups[rank].all_reduce::<Sum<i32>>(Arc::new(vec![1; len].into()), Buffer::default())
            })
            .collect();
        let errors: Vec<_> = sums.into_iter().map(|sum| sum.wait().unwrap_err()).collect();
        let mismatches = errors.iter().filter(|error| {
            matches!(error, CollectiveError::Mismatch { disagreement: Disagreement::Payload { .. }, .. })
        });
        assert!(mismatches.count() >= 1, "{errors:?}");
    }
}

/// An operation that is hierarchical on one rank, while another goes round the ring.
#[test]
fn ranks_that_take_different_ways_are_told() {
    let nodes = nodes(&[1, 1, 2], PATIENT);
    let groups = groups(&nodes, 0);
    let gathered = groups[0].gather(Rank(0), Arc::new(vec![7u8].into()), Buffer::default());
    let barriers = [groups[1].barrier(), groups[2].barrier()];
    let error = gathered.wait().unwrap_err();
    let mut errors = vec![error];
    errors.extend(barriers.into_iter().map(|barrier| barrier.wait().unwrap_err()));
    let mismatches = errors.iter().filter(|error| {
        matches!(error, CollectiveError::Mismatch { disagreement: Disagreement::Operation { .. }, .. })
    });
    assert!(mismatches.count() >= 1, "{errors:?}");
}

/// Each rank ends as soon as its own results are there, in any order, and nobody misses anything.
#[test]
fn a_rank_that_leaves_early_leaves_nothing_behind() {
    let nodes = nodes(&[1, 1, 2, 2], PATIENT);
    for generation in 0..10 {
        let groups = groups(&nodes, generation);
        std::thread::scope(|scope| {
            for group in groups {
                scope.spawn(move || {
                    let sum =
                        group.all_reduce::<Sum<i64>>(Arc::new(vec![1; 50_000].into()), Buffer::default());
                    assert_eq!(sum.wait().unwrap(), vec![4; 50_000]);
                    drop(group);
                });
            }
        });
    }
}

#[test]
fn closing_waits_for_what_others_need() {
    let nodes = nodes(&[1, 2, 2], PATIENT);
    let groups = groups(&nodes, 0);
    std::thread::scope(|scope| {
        for group in groups {
            scope.spawn(move || {
                let sum = group.all_reduce::<Sum<i64>>(Arc::new(vec![1; 300_000].into()), Buffer::default());
                let gathered = group.all_gather(Arc::new(vec![7u8].into()), 3, Buffer::default());
                assert_eq!(sum.wait().unwrap()[0], 3);
                gathered.wait().unwrap();
                group.close();
            });
        }
    });
}
