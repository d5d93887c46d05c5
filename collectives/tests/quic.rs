//! Rings over QUIC on loopback: they compute, they let nobody in who does not belong, and they end with a reason.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/relay.rs"]
mod relay;

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Authority, config, groups, name, ring, spec, start};
use mattock_collectives::{
    Buffer, CollectiveError, Disagreement, Group, JoinError, Node, NodeConfig, RingSpec, Sum, Transport,
    TransportChoice, TransportError,
};
use relay::{Relay, holds};

/// Long enough for a busy machine.
const PATIENT: Duration = Duration::from_secs(20);
/// For tests in which a timeout must run out.
const SHORT: Duration = Duration::from_millis(1500);

fn all_reduce(groups: &[Group], len: usize) {
    let ranks = groups.len() as i32;
    let sums: Vec<_> = groups
        .iter()
        .map(|group| {
            let rank = group.ring().rank().0 as i32;
            group.all_reduce::<Sum<i32>>(
                Arc::new((0..len as i32).map(|i| i ^ rank).collect::<Vec<_>>().into()),
                Buffer::default(),
            )
        })
        .collect();
    let expected: Vec<i32> = (0..len as i32).map(|i| (0..ranks).map(|rank| i ^ rank).sum()).collect();
    for sum in sums {
        assert!(sum.wait().unwrap() == expected);
    }
}

#[test]
fn rings_of_several_sizes_reduce() {
    for ranks in [1, 2, 3, 5] {
        let nodes = Authority::new().nodes(ranks, config(PATIENT));
        let groups = groups(&nodes, 0);
        for len in [0, 1, 1000, 1_000_003] {
            all_reduce(&groups, len);
        }
        groups
            .iter()
            .map(Group::barrier)
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|barrier| barrier.wait().unwrap());
    }
}

/// What is not an all-reduce out of place: in place, in a batch, and parts of which one is empty.
#[test]
fn other_forms_of_operations_come_through() {
    let nodes = Authority::new().nodes(3, config(PATIENT));
    let groups = groups(&nodes, 0);
    let lens = [0, 5, 300_000];
    let begin = |group: &Group| {
        let rank = group.ring().rank().0;
        let value = |i: usize| i as u32 * (rank + 1);
        let filled = |len: usize| Buffer::from((0..len).map(value).collect::<Vec<_>>());
        let part = Arc::new(Buffer::from(vec![rank; lens[rank as usize]]));
        let sum = group.all_reduce_in_place::<Sum<u32>>(filled(500_001));
        let batch = group.all_reduce_many::<Sum<u32>>(lens.map(filled).into());
        (sum, batch, group.all_gather_uneven(part, &lens, Buffer::default()))
    };
    let summed = |len: usize| (0..len as u32).map(|i| i * (1 + 2 + 3)).collect::<Vec<_>>();
    for (sum, batch, parts) in groups.iter().map(begin).collect::<Vec<_>>() {
        assert!(sum.wait().unwrap() == summed(500_001));
        assert!(batch.wait().unwrap() == lens.map(summed));
        assert!(parts.wait().unwrap() == [vec![1; 5], vec![2; 300_000]].concat());
    }
}

#[test]
fn the_bytes_sent_are_those_of_a_ring() {
    let nodes = Authority::new().nodes(3, config(PATIENT));
    let groups = groups(&nodes, 0);
    all_reduce(&groups, 1 << 20);
    let ideal = 2.0 * 2.0 / 3.0 * f64::from(4 << 20);
    for group in &groups {
        let sent = group.counters().sent_bytes as f64;
        assert!(sent >= ideal && sent < ideal * 1.01, "{sent} bytes, ideal {ideal}");
    }
}

#[test]
fn nodes_join_one_ring_after_the_other() {
    let mut nodes = Authority::new().nodes(3, config(PATIENT));
    all_reduce(&groups(&nodes, 1), 1000);
    nodes.pop();
    all_reduce(&groups(&nodes, 2), 1000);
    all_reduce(&groups(&nodes, 7), 1000);
}

/// Each rank ends as soon as its own result is there, in any order, and nobody misses anything.
#[test]
fn a_rank_that_leaves_early_leaves_nothing_behind() {
    let nodes = Authority::new().nodes(3, config(PATIENT));
    for generation in 0..10 {
        let groups = groups(&nodes, generation);
        std::thread::scope(|scope| {
            for group in groups {
                scope.spawn(move || {
                    let sum =
                        group.all_reduce::<Sum<i64>>(Arc::new(vec![1; 50_000].into()), Buffer::default());
                    assert_eq!(sum.wait().unwrap(), vec![3; 50_000]);
                    drop(group);
                });
            }
        });
    }
}

#[test]
fn another_authoritys_worker_is_refused() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let nodes = [ours.node(0, config(SHORT)), theirs.node(1, config(SHORT))];
    let joins: Vec<_> =
        (0..).zip(&nodes).map(|(rank, node)| node.begin_join(spec(&nodes, rank, 0))).collect();
    for join in joins {
        assert!(matches!(join.wait(), Err(JoinError::Refused { .. })));
    }
}

/// The right authority is not enough: a worker that calls itself by another's rank is turned away, and does not
/// keep the right one out.
#[test]
fn the_wrong_name_is_refused() {
    let authority = Authority::new();
    let mut nodes = authority.nodes(2, config(PATIENT));
    let stranger = authority.node(7, config(PATIENT));
    let first = nodes[0].begin_join(spec(&nodes, 0, 0));
    // The stranger plays rank 1 towards rank 0.
    let refused = stranger.join_ring(spec(&nodes, 1, 0)).unwrap_err();
    assert!(matches!(&refused, JoinError::Refused { reason, .. } if reason.contains(&name(7))), "{refused}");
    let second = nodes[1].join_ring(spec(&nodes, 1, 0)).unwrap();
    all_reduce(&[first.wait().unwrap(), second], 100);

    // And as the one who is called.
    nodes[1] = stranger;
    let called = nodes[0].join_ring(spec(&nodes, 0, 1)).unwrap_err();
    assert!(matches!(called, JoinError::Refused { .. }), "{called}");
}

#[test]
fn a_certificate_with_two_names_is_none() {
    let authority = Authority::new();
    let identity = authority.identity(&[&name(0), &name(1)]);
    assert!(identity.name().is_err());
}

#[test]
fn an_old_generation_is_refused() {
    let nodes = Authority::new().nodes(2, config(PATIENT));
    let waiting = nodes[0].begin_join(spec(&nodes, 0, 5));
    let late = nodes[1].join_ring(spec(&nodes, 1, 4)).unwrap_err();
    assert!(matches!(&late, JoinError::Refused { reason, .. } if reason.contains("over")), "{late}");
    let stale = nodes[0].join_ring(spec(&nodes, 0, 4)).map(|_| ()).unwrap_err();
    assert!(matches!(stale, JoinError::Stale { .. }), "{stale}");
    let second = nodes[1].join_ring(spec(&nodes, 1, 5)).unwrap();
    all_reduce(&[waiting.wait().unwrap(), second], 100);
}

#[test]
fn neighbours_that_see_different_rings_are_refused() {
    let nodes = Authority::new().nodes(2, config(SHORT));
    let mut confused = spec(&nodes, 1, 0);
    confused.ring = ring(2, 3, 0);
    let joins = [nodes[0].begin_join(spec(&nodes, 0, 0)), nodes[1].begin_join(confused)];
    for join in joins {
        assert!(join.wait().is_err());
    }
}

#[test]
fn a_neighbour_that_never_comes_is_named() {
    let nodes = Authority::new().nodes(2, config(SHORT));
    let alone = nodes[0].join_ring(spec(&nodes, 0, 0)).unwrap_err();
    assert!(matches!(&alone, JoinError::TimedOut { name: missing, .. } if *missing == name(1)), "{alone}");
}

#[test]
fn a_rank_that_leaves_in_the_middle_is_lost_at_once() {
    let nodes = Authority::new().nodes(3, config(PATIENT));
    let mut groups = groups(&nodes, 3);
    let started = Instant::now();
    let input = Arc::new(Buffer::from(vec![1.0; 3_000_000]));
    let sums: Vec<_> = groups[..2]
        .iter()
        .map(|group| group.all_reduce::<Sum<f32>>(input.clone(), Buffer::default()))
        .collect();
    drop(groups.pop());
    for sum in sums {
        let lost = sum.wait().unwrap_err();
        assert!(matches!(&lost, CollectiveError::PeerLost { at, .. } if at.generation.0 == 3), "{lost}");
    }
    assert!(started.elapsed() < PATIENT / 2, "not by waiting for the timeout");
    assert!(input.iter().all(|x| *x == 1.0));
    // What comes later fails as well, and at once.
    groups[0].barrier().wait().unwrap_err();
    // The same input goes round in the ring of those who are left.
    let mut nodes = nodes;
    nodes.pop();
    let again = common::groups(&nodes, 4);
    let sums: Vec<_> =
        again.iter().map(|group| group.all_reduce::<Sum<f32>>(input.clone(), Buffer::default())).collect();
    sums.into_iter().for_each(|sum| assert_eq!(sum.wait().unwrap()[0], 2.0));
}

#[test]
fn cancelling_ends_everything_at_once_and_tells_the_others_why() {
    let nodes = Authority::new().nodes(2, config(PATIENT));
    let groups = groups(&nodes, 0);
    let (mine, theirs) =
        (groups[0].barrier(), groups[1].all_reduce::<Sum<f32>>(Arc::new(vec![].into()), Buffer::default()));
    theirs.wait().unwrap();
    groups[0].cancel("worker 3 is dead");
    assert!(
        matches!(mine.wait(), Err(CollectiveError::Cancelled { cause, .. }) if cause == "worker 3 is dead")
    );
    let told = groups[1].barrier().wait().unwrap_err();
    assert!(told.to_string().contains("worker 3 is dead"), "{told}");
}

#[test]
fn a_rank_that_never_takes_part_is_noticed() {
    let nodes = Authority::new().nodes(2, config(SHORT));
    let groups = groups(&nodes, 0);
    let stuck = groups[0].barrier().wait().unwrap_err();
    assert!(matches!(stuck, CollectiveError::TimedOut { .. }), "{stuck}");
}

#[test]
fn ranks_that_do_different_things_are_told() {
    let nodes = Authority::new().nodes(2, config(PATIENT));
    let groups = groups(&nodes, 0);
    let floats = groups[0].all_reduce::<Sum<f32>>(Arc::new(vec![1.0; 10].into()), Buffer::default());
    let integers = groups[1].all_reduce::<Sum<i32>>(Arc::new(vec![1; 10].into()), Buffer::default());
    let errors = [floats.wait().unwrap_err(), integers.wait().unwrap_err()];
    let mismatches = errors.iter().filter(|error| {
        matches!(error, CollectiveError::Mismatch { disagreement: Disagreement::Payload { .. }, .. })
    });
    assert!(mismatches.count() >= 1, "{errors:?}");
}

/// Joins both nodes, with the way from rank 0 to rank 1 over one relay and the way back over another.
fn join_by_way_of(relays: &[Relay; 2], nodes: &[Node]) -> Vec<Group> {
    let joins = [0, 1].map(|rank| {
        let next = (relays[rank as usize].address(), name(1 - rank));
        nodes[rank as usize].begin_join(RingSpec { next, ..spec(nodes, rank, 0) })
    });
    joins.map(|join| join.wait().unwrap()).into()
}

/// A relay before rank 1, and one before rank 0.
fn relays(nodes: &[Node]) -> [Relay; 2] {
    [1, 0].map(|rank| Relay::before(nodes[rank].local_addr()))
}

#[test]
fn no_plaintext_on_the_wire() {
    let nodes = Authority::new().nodes(2, config(PATIENT));
    let relays = relays(&nodes);
    let groups = join_by_way_of(&relays, &nodes);
    let secret = b"the quick brown fox jumps over the lazy dog!";
    let payload: Vec<u8> = secret.iter().copied().cycle().take(400_000).collect();
    let sent = groups[0].broadcast(Arc::new(payload.clone().into()));
    let received = groups[1].receive_broadcast(groups[0].ring().rank(), Buffer::<u8>::zeroed(payload.len()));
    sent.wait().unwrap();
    assert!(received.wait().unwrap() == payload);

    // Gradients: what each rank puts in, and the sum.
    let inputs = [*b"gradient of 0, 16 bytes", *b"gradient of 1, 16 bytes"];
    let words = |rank: usize| -> Vec<i64> {
        inputs[rank].as_chunks::<8>().0.iter().map(|word| i64::from_le_bytes(*word) >> 1).collect()
    };
    let repeated = |words: &[i64]| words.iter().copied().cycle().take(100_000).collect::<Vec<_>>();
    let bytes = |words: &[i64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let sum: Vec<i64> = words(0).iter().zip(words(1)).map(|(a, b)| a + b).collect();
    let sums: Vec<_> = (groups.iter().enumerate())
        .map(|(rank, group)| {
            group.all_reduce::<Sum<i64>>(Arc::new(repeated(&words(rank)).into()), Buffer::default())
        })
        .collect();
    sums.into_iter().for_each(|reduced| assert!(reduced.wait().unwrap() == repeated(&sum)));

    let gradients = 8 * 100_000;
    for (relay, least) in relays.iter().zip([payload.len() + gradients, gradients]) {
        let seen = relay.seen();
        assert!(seen.len() > least, "all of it went by the relay");
        let readable = [secret[4..20].to_vec(), bytes(&words(0)), bytes(&words(1)), bytes(&sum)];
        assert!(readable.iter().all(|part| !holds(&seen, part)));
        let unprotected = [&seen[..], &bytes(&repeated(&sum))].concat();
        assert!(holds(&unprotected, &readable[3]), "in the clear it would be found");
    }
}

#[test]
fn a_link_that_falls_silent_ends_with_a_reason() {
    let nodes = Authority::new().nodes(2, config(SHORT));
    let relays = relays(&nodes);
    let groups = join_by_way_of(&relays, &nodes);
    all_reduce(&groups, 1000);
    relays[0].fall_silent();
    let sums: Vec<_> = groups
        .iter()
        .map(|group| group.all_reduce::<Sum<f32>>(Arc::new(vec![1.0; 1000].into()), Buffer::default()))
        .collect();
    for sum in sums {
        let error = sum.wait().unwrap_err();
        let typed = matches!(
            &error,
            CollectiveError::TimedOut { .. }
                | CollectiveError::PeerLost {
                    source: TransportError::TimedOut | TransportError::BrokenOff { .. },
                    ..
                }
        );
        assert!(typed, "{error}");
    }
}

/// Closing a relay's socket is what a killed process looks like from here: the kernel answers for it.
#[cfg(target_os = "linux")]
#[test]
fn a_peer_whose_port_is_closed_is_lost_long_before_the_timeout() {
    const NEVER: Duration = Duration::from_secs(3600);
    for at_work in [false, true] {
        let nodes = Authority::new().nodes(2, config(NEVER));
        let relays = relays(&nodes);
        let groups = join_by_way_of(&relays, &nodes);
        all_reduce(&groups, 1000);
        // Rank 1 does not take part, so rank 0 has something in flight, or only waits.
        let len = if at_work { 10_000_000 } else { 1 };
        let sum = groups[0].all_reduce::<Sum<f32>>(Arc::new(vec![1.0; len].into()), Buffer::default());
        let started = Instant::now();
        drop(relays);
        let error = sum.wait().unwrap_err();
        let typed = matches!(&error, CollectiveError::PeerLost { source: TransportError::NobodyListens, .. });
        assert!(typed, "{error}");
        assert!(started.elapsed() < PATIENT, "it took {:?}", started.elapsed());
    }
}

#[test]
fn a_node_that_is_not_a_node_is_unreachable() {
    let deaf = UdpSocket::bind("127.0.0.1:0").unwrap();
    let node = start(Authority::new().identity(&[&name(0)]), config(SHORT));
    let next = (deaf.local_addr().unwrap(), name(1));
    let error = node.join_ring(RingSpec { ring: ring(0, 2, 0), next, prev: name(1) }).unwrap_err();
    assert!(matches!(error, JoinError::TimedOut { .. } | JoinError::Unreachable { .. }), "{error}");
}

/// Rank 1 calls before rank 0 has heard of the ring: its call is kept until rank 0 asks.
#[test]
fn a_call_from_a_newer_generation_waits() {
    let nodes = Authority::new().nodes(2, config(PATIENT));
    drop(groups(&nodes, 1));
    let early = nodes[1].begin_join(spec(&nodes, 1, 2));
    // Time to arrive, and to be refused if that is what happens.
    std::thread::sleep(Duration::from_millis(100));
    let late = nodes[0].join_ring(spec(&nodes, 0, 2)).unwrap();
    all_reduce(&[late, early.wait().unwrap()], 100);
}

#[test]
fn a_newer_join_ends_an_older_one() {
    let nodes = Authority::new().nodes(2, config(PATIENT));
    let older = nodes[0].begin_join(spec(&nodes, 0, 1));
    let newer = nodes[0].begin_join(spec(&nodes, 0, 2));
    assert!(matches!(older.wait(), Err(JoinError::Stale { .. })));
    let other = nodes[1].join_ring(spec(&nodes, 1, 2)).unwrap();
    all_reduce(&[newer.wait().unwrap(), other], 100);
}

/// The settings for real networks, with path discovery and small datagrams at first.
#[test]
fn nodes_on_all_interfaces_reduce() {
    let authority = Authority::new();
    let nodes = [0, 1].map(|rank| {
        let (identity, bind) = (authority.identity(&[&name(rank)]), ([0, 0, 0, 0], 0).into());
        Node::start(NodeConfig { group: config(PATIENT), ..NodeConfig::new(identity, bind) }).unwrap()
    });
    let reachable = |rank: u32| {
        let mut spec = spec(&nodes, rank, 0);
        spec.next.0.set_ip([127, 0, 0, 1].into());
        spec
    };
    let joins = [0, 1].map(|rank| nodes[rank as usize].begin_join(reachable(rank)));
    all_reduce(&joins.map(|join| join.wait().unwrap()), 1_000_000);
}

/// Two nodes that want this, in one ring.
fn joined(choices: [TransportChoice; 2]) -> [Result<Group, JoinError>; 2] {
    let authority = Authority::new();
    let mut rank = 0..;
    let nodes = choices.map(|transport| {
        let identity = authority.identity(&[&name(rank.next().unwrap())]);
        let bind = ([127, 0, 0, 1], 0).into();
        Node::start(NodeConfig { group: config(PATIENT), transport, ..NodeConfig::new(identity, bind) })
            .unwrap()
    });
    let joins = [0, 1].map(|rank| nodes[rank as usize].begin_join(spec(&nodes, rank, 0)));
    joins.map(|join| join.wait())
}

#[test]
fn ranks_of_one_host_share_memory_where_all_of_them_may() {
    for choice in [TransportChoice::Auto, TransportChoice::SharedMemory] {
        let groups = joined([TransportChoice::Auto, choice]).map(Result::unwrap);
        assert!(groups.iter().all(|group| group.transport() == Transport::SharedMemory));
        all_reduce(&groups, 100_000);
    }
}

#[test]
fn one_rank_that_wants_quic_is_enough() {
    let groups = joined([TransportChoice::Auto, TransportChoice::Quic]).map(Result::unwrap);
    assert!(groups.iter().all(|group| group.transport() == Transport::Quic));
    all_reduce(&groups, 100_000);
}

#[test]
fn who_insists_on_shared_memory_is_told_why_it_cannot_be() {
    let [insisting, other] = joined([TransportChoice::SharedMemory, TransportChoice::Quic]);
    let error = insisting.unwrap_err();
    assert!(
        matches!(error, JoinError::NotShared { .. }) && error.to_string().contains("shares no memory"),
        "{error}"
    );
    assert!(other.is_ok());
}
