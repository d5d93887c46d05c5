//! Lines over QUIC: to the last rank and back, with nothing on the link that would close the ring.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/relay.rs"]
mod relay;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Authority, config, name, spec};
use mattock_collectives::{
    Buffer, CollectiveError, Group, JoinError, Node, RingSpec, Shape, Sum, Transport, segment,
};
use relay::Relay;

/// Long enough for a busy machine.
const PATIENT: Duration = Duration::from_secs(20);

fn line(nodes: &[Node], rank: u32) -> RingSpec {
    let spec = spec(nodes, rank, 2);
    RingSpec { ring: spec.ring.shaped(Shape::Line), ..spec }
}

fn groups(nodes: &[Node]) -> Vec<Group> {
    let joins = (0..).zip(nodes).map(|(rank, node)| node.begin_join(line(nodes, rank)));
    joins.collect::<Vec<_>>().into_iter().map(|join| join.wait().unwrap()).collect()
}

#[test]
fn lines_reduce_and_everything_else_goes_round() {
    for ranks in [2, 3, 5] {
        let nodes = Authority::new().nodes(ranks, config(PATIENT));
        let groups = groups(&nodes);
        let algorithm = if ranks > 2 { "line" } else { "ring" };
        assert!(groups.iter().all(|group| group.algorithm(1000) == algorithm));
        assert!(groups.iter().all(|group| group.transport() == Transport::Quic));
        for len in [0, 1, 1000, 3_000_003] {
            let pending: Vec<_> = (0..)
                .zip(&groups)
                .map(|(rank, group)| {
                    let own: Arc<Buffer<i32>> =
                        Arc::new((0..len as i32).map(|i| i ^ rank).collect::<Vec<_>>().into());
                    let part = group.reduce_scatter::<Sum<i32>>(own.clone(), Buffer::default());
                    let all = group.all_reduce::<Sum<i32>>(own.clone(), Buffer::default());
                    let in_place = group.all_reduce_in_place::<Sum<i32>>(Buffer::clone(&own));
                    (part, all, in_place, group.barrier())
                })
                .collect();
            let sum = |i: i32| (0..ranks as i32).map(|rank| i ^ rank).sum::<i32>();
            let expected: Vec<i32> = (0..len as i32).map(sum).collect();
            for (rank, (part, all, in_place, barrier)) in (0..).zip(pending) {
                assert!(part.wait().unwrap()[..] == expected[segment(len, ranks, rank)]);
                assert!(all.wait().unwrap() == expected);
                assert!(in_place.wait().unwrap() == expected);
                barrier.wait().unwrap();
            }
        }
    }
}

#[test]
fn nothing_crosses_the_link_that_would_close_the_ring() {
    let nodes = Authority::new().nodes(3, config(PATIENT));
    // What each rank sends ahead goes by a relay; so does what is sent back to it, for others are told of it.
    let relays = [1, 2, 0].map(|next| Relay::per_caller(nodes[next].local_addr()));
    let joins: Vec<_> = (0..)
        .zip(&nodes)
        .map(|(rank, node)| {
            let spec = line(&nodes, rank);
            node.begin_join(RingSpec {
                next: (relays[rank as usize].address(), name((rank + 1) % 3)),
                ..spec
            })
        })
        .collect();
    let groups: Vec<_> = joins.into_iter().map(|join| join.wait().unwrap()).collect();
    let carried = |relay: &Relay| relay.carried().0;
    let before: Vec<u64> = relays.iter().map(carried).collect();
    let input = Arc::new(Buffer::from(vec![1i32; 1 << 20]));
    let sums: Vec<_> =
        groups.iter().map(|group| group.all_reduce::<Sum<i32>>(input.clone(), Buffer::default())).collect();
    sums.into_iter().for_each(|sum| assert!(sum.wait().unwrap().iter().all(|&x| x == 3)));
    let after: Vec<u64> = relays.iter().zip(before).map(|(relay, before)| carried(relay) - before).collect();
    // To rank 1 from both sides; to rank 2 from rank 1; to rank 0 from rank 1, and nothing from rank 2.
    let payload = 4 << 20;
    for (index, times) in [(0, 2), (1, 1), (2, 1)] {
        assert!((payload * times..payload * times + payload / 4).contains(&after[index]), "{after:?}");
    }
}

#[test]
fn ranks_that_see_different_shapes_are_refused() {
    let nodes = Authority::new().nodes(3, config(Duration::from_millis(1500)));
    let joins: Vec<_> = (0..)
        .zip(&nodes)
        .map(|(rank, node)| {
            node.begin_join(if rank == 1 { spec(&nodes, rank, 2) } else { line(&nodes, rank) })
        })
        .collect();
    let errors: Vec<JoinError> = joins.into_iter().map(|join| join.wait().unwrap_err()).collect();
    assert!(errors.iter().any(|error| error.to_string().contains("looks different")), "{errors:?}");
}

#[test]
fn a_rank_that_leaves_in_the_middle_is_lost_by_all_at_once() {
    for victim in 0..4 {
        let nodes = Authority::new().nodes(4, config(PATIENT));
        let mut groups = groups(&nodes);
        let started = Instant::now();
        let lost = groups.remove(victim);
        let input = Arc::new(Buffer::from(vec![1.0; 3_000_000]));
        let sums: Vec<_> = groups
            .iter()
            .map(|group| group.all_reduce::<Sum<f32>>(input.clone(), Buffer::default()))
            .collect();
        drop(lost);
        for sum in sums {
            let error = sum.wait().unwrap_err();
            assert!(matches!(error, CollectiveError::PeerLost { .. }), "{error}");
        }
        assert!(started.elapsed() < PATIENT / 2, "not by waiting for the timeout");
        groups.iter().for_each(|group| drop(group.barrier().wait().unwrap_err()));
    }
}

#[test]
fn a_rank_that_leaves_early_leaves_nothing_behind() {
    let nodes = Authority::new().nodes(3, config(PATIENT));
    std::thread::scope(|scope| {
        for group in groups(&nodes) {
            scope.spawn(move || {
                let sum = group.all_reduce::<Sum<i64>>(Arc::new(vec![1; 500_000].into()), Buffer::default());
                assert_eq!(sum.wait().unwrap(), vec![3; 500_000]);
                drop(group);
            });
        }
    });
}
