//! Messages between two ranks of any group: by tag and in order, beside what all do together; and how they end.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Authority, config, name, spec};
use half::{bf16, f16};
use mattock_collectives::{
    Buffer, CollectiveError, Disagreement, Element, Generation, Group, GroupConfig, I12x2, I24, Node,
    NodeConfig, PENDING_MAX, Pending, Rank, Sum, Transport, TransportChoice, WorldSize, memory,
};
use proptest::prelude::*;

/// Long enough for a busy machine.
const PATIENT: Duration = Duration::from_secs(60);
/// For tests in which a timeout must run out.
const SHORT: Duration = Duration::from_secs(1);

/// What carries a group.
#[derive(Clone, Copy, Debug)]
enum Way {
    Links,
    Host,
    Line,
    Hosts,
}

const WAYS: [Way; 4] = [Way::Links, Way::Host, Way::Line, Way::Hosts];

impl Way {
    fn groups(self, ranks: u32, timeout: Duration, chunk_bytes: u32) -> Vec<Group> {
        let (world, config) = (WorldSize::new(ranks).unwrap(), GroupConfig { timeout, chunk_bytes });
        match self {
            Self::Links => memory::groups(world, config),
            Self::Host => memory::host_groups(world, config),
            Self::Line => memory::line_groups(world, config),
            Self::Hosts => {
                memory::hierarchical_groups(&(0..ranks).map(|rank| rank % 2).collect::<Vec<_>>(), config)
            }
        }
        .unwrap()
    }
}

/// A message to be sent.
#[derive(Clone, Debug)]
struct Plan {
    from: u32,
    to: u32,
    tag: u32,
    kind: usize,
    len: usize,
}

/// A message under way at both ends: whether all of it came as it was sent.
type Ends = Box<dyn FnOnce() -> bool>;

fn begin<E: Element + PartialEq + Debug>(
    groups: &[Group],
    plan: &Plan,
    element: impl Fn(usize) -> E,
) -> Ends {
    let (sender, receiver) = (&groups[plan.from as usize], &groups[plan.to as usize]);
    let elements: Vec<E> = (0..plan.len).map(|i| element(i * 37 + plan.len + plan.from as usize)).collect();
    let mut input =
        if plan.from.is_multiple_of(2) { sender.buffer(plan.len) } else { Buffer::zeroed(plan.len) };
    input.copy_from_slice(&elements);
    let output = if plan.to.is_multiple_of(2) { receiver.buffer(plan.len) } else { Buffer::zeroed(plan.len) };
    // One asks before the other sends, or after.
    let (sent, received): (Pending<()>, Pending<Buffer<E>>);
    if plan.len.is_multiple_of(3) {
        received = receiver.receive(Rank(plan.from), plan.tag, output);
        sent = sender.send(Rank(plan.to), plan.tag, Arc::new(input));
    } else {
        sent = sender.send(Rank(plan.to), plan.tag, Arc::new(input));
        received = receiver.receive(Rank(plan.from), plan.tag, output);
    }
    Box::new(move || {
        sent.wait().unwrap();
        received.wait().unwrap() == elements
    })
}

fn begin_any(groups: &[Group], plan: &Plan) -> Ends {
    match plan.kind {
        0 => begin(groups, plan, |i| i as f32),
        1 => begin(groups, plan, |i| bf16::from_f32(i as f32)),
        2 => begin(groups, plan, |i| i as i32),
        3 => begin(groups, plan, |i| i as i64),
        4 => begin(groups, plan, |i| i as u32),
        5 => begin(groups, plan, |i| i as u8),
        6 => begin(groups, plan, |i| i as f64),
        7 => begin(groups, plan, |i| f16::from_f32((i % 1000) as f32)),
        8 => begin(groups, plan, |i| i as i16),
        9 => begin(groups, plan, |i| I24([i as u8, (i >> 8) as u8, 3])),
        _ => begin(groups, plan, |i| I12x2([i as u8, (i >> 8) as u8, 3])),
    }
}

fn plans() -> impl Strategy<Value = (u32, Vec<Plan>)> {
    let lens = prop_oneof![0usize..40, 0usize..3000, 20_000usize..60_000];
    let plan = (any::<u32>(), any::<u32>(), 0u32..3, 0usize..11, lens);
    (2u32..6, proptest::collection::vec(plan, 0..25)).prop_map(|(ranks, plans)| {
        let plan = |(from, hops, tag, kind, len)| {
            let from = from % ranks;
            Plan { from, to: (from + 1 + hops % (ranks - 1)) % ranks, tag, kind, len }
        };
        (ranks, plans.into_iter().map(plan).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Elements of all types and any number, between any ranks, many at a time, while all ranks reduce.
    #[test]
    fn messages_come_as_they_were_sent(
        (ranks, plans) in plans(), way in proptest::sample::select(WAYS.to_vec()), chunk in prop_oneof![Just(64u32), Just(1 << 16)],
    ) {
        let groups = way.groups(ranks, PATIENT, chunk);
        let sums = |group: &Group| group.all_reduce::<Sum<i32>>(Arc::new(vec![1; 3000].into()), Buffer::default());
        let before: Vec<_> = groups[1..].iter().map(sums).collect();
        let ends: Vec<Ends> = plans.iter().map(|plan| begin_any(&groups, plan)).collect();
        for (plan, end) in plans.iter().zip(ends) {
            prop_assert!(end(), "{plan:?}, {way:?}");
        }
        // Rank 0 joins only now: messages do not wait for what ranks do together.
        let last = sums(&groups[0]);
        for sum in before.into_iter().chain([last]) {
            prop_assert_eq!(sum.wait().unwrap(), vec![ranks as i32; 3000]);
        }
        groups.into_iter().for_each(drop);
    }
}

#[test]
fn other_elements_or_another_length_end_this_message_only() {
    for way in WAYS {
        let groups = way.groups(3, PATIENT, 1 << 12);
        for len in [10usize, 100_000] {
            let sent = groups[0].send(Rank(2), 7, Arc::new(Buffer::from(vec![1f32; len])));
            let received = groups[2].receive(Rank(0), 7, Buffer::<i32>::zeroed(len));
            let shorter = groups[2].send(Rank(0), 7, Arc::new(Buffer::from(vec![1f32; len])));
            let longer = groups[0].receive(Rank(2), 7, Buffer::<f32>::zeroed(len + 1));
            let errors = [sent, shorter].map(|sent| sent.wait().unwrap_err());
            for (error, peer) in errors
                .into_iter()
                .zip([2, 0])
                .chain([(received.wait().unwrap_err(), 0), (longer.wait().unwrap_err(), 2)])
            {
                let CollectiveError::Mismatch {
                    at,
                    peer: named,
                    disagreement: Disagreement::Payload { got, want },
                } = &error
                else {
                    panic!("{way:?}: {error}")
                };
                assert_eq!((*named, at.rank), (Rank(peer), Rank(2 - peer)), "{error}");
                assert_ne!(got, want);
                assert!(error.to_string().contains("message with tag 7"), "{error}");
            }
        }
        let sent = groups[0].send(Rank(2), 7, Arc::new(Buffer::from(vec![3i64; 5])));
        assert_eq!(groups[2].receive(Rank(0), 7, Buffer::zeroed(5)).wait(), Ok(vec![3i64; 5].into()));
        sent.wait().unwrap();
        let barriers: Vec<_> = groups.iter().map(Group::barrier).collect();
        barriers.into_iter().for_each(|barrier| barrier.wait().unwrap());
    }
}

#[test]
fn nothing_is_sent_to_oneself_or_to_nobody() {
    for way in WAYS {
        let groups = way.groups(2, PATIENT, 1 << 12);
        for peer in [0, 2, u32::MAX] {
            let sent = groups[0].send(Rank(peer), 0, Arc::new(Buffer::from(vec![1u8]))).wait();
            assert!(matches!(sent, Err(CollectiveError::InvalidInput { rank: Rank(0), .. })), "{sent:?}");
            let received = groups[0].receive(Rank(peer), 0, Buffer::<u8>::zeroed(1)).wait();
            assert!(matches!(received, Err(CollectiveError::InvalidInput { .. })), "{received:?}");
        }
    }
    let alone = memory::groups(WorldSize::new(1).unwrap(), GroupConfig::default()).unwrap();
    let sent = alone[0].send(Rank(0), 0, Arc::new(Buffer::from(vec![1u8]))).wait();
    assert!(matches!(sent, Err(CollectiveError::InvalidInput { .. })), "{sent:?}");
}

#[test]
fn what_nobody_asks_for_stays_with_its_sender() {
    let groups = Way::Links.groups(2, PATIENT, 1 << 16);
    let small = Arc::new(Buffer::from(vec![1u8; 16 << 10]));
    let large = Arc::new(Buffer::from(vec![2u8; 1 << 20]));
    let mut sent: Vec<_> = (0..200).map(|tag| groups[0].send(Rank(1), tag, small.clone())).collect();
    sent.extend((200..210).map(|tag| groups[0].send(Rank(1), tag, large.clone())));
    // Later than all of these, so they are there, or were not sent.
    let last = groups[0].send(Rank(1), 1000, Arc::new(Buffer::<u8>::default()));
    assert_eq!(groups[1].receive(Rank(0), 1000, Buffer::<u8>::default()).wait(), Ok(Buffer::default()));
    last.wait().unwrap();
    assert!(groups[1].counters().received_bytes < (1 << 20) + 100_000, "{:?}", groups[1].counters());
    for tag in (0..210).rev() {
        let wanted = if tag < 200 { &small } else { &large };
        let received = groups[1].receive(Rank(0), tag, Buffer::zeroed(wanted.len())).wait();
        assert!(received.unwrap() == **wanted);
    }
    sent.into_iter().for_each(|sent| sent.wait().unwrap());
}

#[test]
fn what_neighbours_send_is_read_where_it_lies() {
    for way in [Way::Host, Way::Hosts] {
        let groups = way.groups(4, PATIENT, 1 << 16);
        for in_arena in [true, false] {
            let mut input = if in_arena { groups[0].buffer(1 << 20) } else { Buffer::zeroed(1 << 20) };
            input.fill(7u8);
            let before = groups[0].counters().sent_bytes;
            let sent = groups[0].send(Rank(2), 5, Arc::new(input));
            // It is there for the other to read, although nobody has asked for it, and the links have not had a chance.
            assert!(groups[0].counters().sent_bytes - before >= 1 << 20, "{way:?}");
            assert_eq!(
                groups[2].receive(Rank(0), 5, Buffer::zeroed(1 << 20)).wait(),
                Ok(vec![7u8; 1 << 20].into())
            );
            sent.wait().unwrap();
        }
    }
}

#[test]
fn no_more_than_the_bound_are_under_way() {
    let groups = Way::Links.groups(2, PATIENT, 1 << 16);
    let pending: Vec<_> =
        (0..PENDING_MAX).map(|_| groups[0].receive(Rank(1), 3, Buffer::<u8>::zeroed(1))).collect();
    let refused = groups[0].send(Rank(1), 3, Arc::new(Buffer::from(vec![1u8]))).wait();
    assert!(matches!(refused, Err(CollectiveError::InvalidInput { .. })), "{refused:?}");
    drop(groups);
    let ended =
        pending.into_iter().all(|pending| matches!(pending.wait(), Err(CollectiveError::Closed { .. })));
    assert!(ended);
}

#[test]
fn a_message_that_never_comes_ends_the_group_after_a_timeout() {
    for way in WAYS {
        let groups = way.groups(3, SHORT, 1 << 12);
        let waiting = groups[2].receive(Rank(0), 5, Buffer::<f32>::zeroed(10));
        let error = waiting.wait().unwrap_err();
        assert!(
            matches!(error, CollectiveError::TimedOut { peer: Rank(0), timeout: SHORT, .. }),
            "{way:?}: {error}"
        );
        let error = groups[2].barrier().wait().unwrap_err();
        assert!(matches!(error, CollectiveError::TimedOut { .. }), "{error}");
    }
}

#[test]
fn cancelling_ends_messages_too() {
    for way in WAYS {
        let groups = way.groups(3, PATIENT, 1 << 12);
        let waiting = groups[1].receive(Rank(0), 5, Buffer::<f32>::zeroed(10));
        let own = groups[0].send(Rank(2), 5, Arc::new(Buffer::<f32>::zeroed(10)));
        groups[0].cancel("worker 3 is dead");
        let told = waiting.wait().unwrap_err();
        assert!(told.to_string().contains("worker 3 is dead"), "{way:?}: {told}");
        let own = own.wait().unwrap_err();
        assert!(matches!(own, CollectiveError::Cancelled { .. }), "{own}");
    }
}

#[test]
fn who_waits_for_a_rank_that_leaves_is_told_at_once() {
    for way in WAYS {
        let mut groups = way.groups(4, PATIENT, 1 << 12);
        let started = Instant::now();
        let lost = groups.remove(3);
        let received = groups[1].receive(Rank(3), 5, Buffer::<u8>::zeroed(100_000));
        let Err(received) = received.wait_for(SHORT / 10) else { panic!("nobody has sent it") };
        drop(lost);
        let error = received.wait().unwrap_err();
        assert!(matches!(error, CollectiveError::PeerLost { .. }), "{way:?}: {error}");
        // The others may hear of it, or of its end by and by.
        let sent = groups[0].send(Rank(3), 5, Arc::new(Buffer::<u8>::zeroed(100_000)));
        let error = sent.wait().unwrap_err();
        assert!(matches!(error, CollectiveError::PeerLost { .. }), "{way:?}: {error}");
        assert!(started.elapsed() < PATIENT / 2, "not by waiting for the timeout");
    }
}

#[test]
fn who_leaves_when_all_is_said_is_missed_by_nobody() {
    for way in WAYS {
        for round in 0..10 {
            let groups = way.groups(4, PATIENT, 1 << 12);
            std::thread::scope(|scope| {
                for group in groups {
                    scope.spawn(move || {
                        let (own, len) = (group.ring().rank().0, 10 + 10_000 * round);
                        let others = (0..4).map(Rank).filter(|rank| rank.0 != own);
                        let sent: Vec<_> = others
                            .clone()
                            .map(|to| group.send(to, 0, Arc::new(Buffer::from(vec![own; len]))))
                            .collect();
                        for from in others {
                            assert_eq!(
                                group.receive(from, 0, Buffer::zeroed(len)).wait(),
                                Ok(vec![from.0; len].into())
                            );
                        }
                        sent.into_iter().for_each(|sent| sent.wait().unwrap());
                        if own % 2 == 0 { group.close() } else { drop(group) }
                    });
                }
            });
        }
    }
}

/// Nodes that say they are on these hosts, in one ring.
fn between_nodes(hosts: &[u64], transport: TransportChoice) -> (Vec<Node>, Vec<Group>) {
    let authority = Authority::new();
    let start = |(rank, &host): (u32, &u64)| {
        let (identity, bind) = (authority.identity(&[&name(rank)]), ([127, 0, 0, 1], 0).into());
        let group = config(PATIENT);
        Node::start(NodeConfig { host, transport, group, ..NodeConfig::new(identity, bind) }).unwrap()
    };
    let nodes: Vec<Node> = (0..).zip(hosts).map(start).collect();
    let groups = join(&nodes, 1);
    (nodes, groups)
}

fn join(nodes: &[Node], generation: u64) -> Vec<Group> {
    let joins = (0..).zip(nodes).map(|(rank, node)| node.begin_join(spec(nodes, rank, generation)));
    joins.collect::<Vec<_>>().into_iter().map(|join| join.wait().unwrap()).collect()
}

#[test]
fn nodes_send_to_any_other_whatever_carries_their_group() {
    let (auto, quic) = (TransportChoice::Auto, TransportChoice::Quic);
    for (hosts, choice, transport) in [
        (&[1, 1, 1, 1][..], quic, Transport::Quic),
        (&[1, 2, 3], auto, Transport::Quic),
        (&[1, 1, 1], auto, Transport::SharedMemory),
        (&[1, 1, 2, 2], auto, Transport::Hierarchical),
    ] {
        let (nodes, mut groups) = between_nodes(hosts, choice);
        for generation in 2..4 {
            assert!(groups.iter().all(|group| group.transport() == transport), "{hosts:?}");
            let ranks = groups.len() as u32;
            let all = (0..ranks).flat_map(|from| (0..ranks).map(move |to| (from, to)));
            let plans: Vec<_> = all
                .filter(|(from, to)| from != to)
                .flat_map(|(from, to)| {
                    [(0, 0), (2, 100), (0, 3_000_000), (1, 40_000)].map(|(kind, len)| Plan {
                        from,
                        to,
                        tag: kind as u32,
                        kind,
                        len,
                    })
                })
                .collect();
            let ends: Vec<Ends> = plans.iter().map(|plan| begin_any(&groups, plan)).collect();
            let barriers: Vec<_> = groups.iter().map(Group::barrier).collect();
            plans.iter().zip(ends).for_each(|(plan, end)| assert!(end(), "{plan:?}, {hosts:?}"));
            barriers.into_iter().for_each(|barrier| barrier.wait().unwrap());
            drop(groups);
            groups = join(&nodes, generation);
            assert_eq!(groups[0].ring().generation(), Generation(generation));
        }
    }
}

#[test]
fn a_node_that_leaves_is_missed_by_who_waits_for_its_message() {
    for hosts in [&[1, 2, 3, 4][..], &[1, 1, 2, 2], &[1, 1, 1, 1]] {
        let (_nodes, mut groups) = between_nodes(hosts, TransportChoice::Auto);
        let started = Instant::now();
        let waiting = groups[0].receive(Rank(2), 0, Buffer::<f32>::zeroed(10));
        let Err(waiting) = waiting.wait_for(SHORT / 10) else { panic!("nobody has sent it") };
        drop(groups.remove(2));
        let error = waiting.wait().unwrap_err();
        assert!(matches!(error, CollectiveError::PeerLost { .. }), "{hosts:?}: {error}");
        assert!(started.elapsed() < PATIENT / 2, "not by waiting for the timeout");
    }
}
