//! What a ring makes of links that cut, flip, delay and glue what they carry.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use mattock_collectives::link::faulty::{Faults, Faulty};
use mattock_collectives::{Buffer, CollectiveError, GroupConfig, Pending, Rank, Sum, WorldSize, memory};

/// Runs a ring of three in which one sender is faulty, and says what each rank saw.
fn outcomes_with(faults: Faults) -> Vec<Result<Buffer<f32>, CollectiveError>> {
    let config = GroupConfig { timeout: Duration::from_secs(20), chunk_bytes: 4096 };
    let wrap = |rank, link| Faulty::new(link, if rank == Rank(1) { faults } else { Faults::default() });
    let groups = memory::groups_with(WorldSize::new(3).unwrap(), config, wrap).unwrap();
    let input: Arc<Buffer<f32>> = Arc::new(vec![1.0; 30_000].into());
    let sums: Vec<_> =
        groups.iter().map(|group| group.all_reduce::<Sum<f32>>(input.clone(), Buffer::default())).collect();
    let outcomes = sums.into_iter().map(Pending::wait).collect();
    assert!(input.iter().all(|x| *x == 1.0), "inputs are never modified");
    outcomes
}

#[test]
fn a_cut_link_is_a_typed_error_wherever_it_is_cut() {
    for cut in [0, 1, 55, 56, 57, 4000, 50_000, 150_000] {
        for (rank, outcome) in
            (0..).zip(outcomes_with(Faults { cut_after_bytes: Some(cut), ..Faults::default() }))
        {
            let Err(CollectiveError::PeerLost { at, peer, .. }) = outcome else {
                panic!("cut at {cut}: {outcome:?}")
            };
            assert_eq!(at.rank, Rank(rank));
            assert!(peer == Rank((rank + 1) % 3) || peer == Rank((rank + 2) % 3), "a neighbour is named");
            assert!(at.bytes_done <= 160_000);
        }
    }
}

#[test]
fn a_flipped_bit_in_a_header_is_a_mismatch() {
    for at in 0..56 {
        let outcomes = outcomes_with(Faults { flip_bit_at: Some(at), ..Faults::default() });
        let third = outcomes[2].as_ref().unwrap_err();
        assert!(matches!(third, CollectiveError::Mismatch { peer: Rank(1), .. }), "byte {at}: {third}");
    }
}

#[test]
fn slow_links_change_nothing() {
    let delay = Some(Duration::from_millis(1));
    for outcome in outcomes_with(Faults { delay, ..Faults::default() }) {
        assert_eq!(outcome, Ok(vec![3.0; 30_000].into()));
    }
}

#[test]
fn a_chunk_travels_on_although_what_came_with_it_must_wait() {
    // Rank 2 sends two broadcasts in one piece: header and payload of each. Rank 0 has not asked for the second one
    // yet when the piece arrives, and rank 1 waits for the first. Which of its loops a driver looks at first is
    // random, and only one order shows the fault.
    for _ in 0..32 {
        let world = WorldSize::new(3).unwrap();
        let config = GroupConfig { timeout: Duration::from_secs(20), ..GroupConfig::default() };
        let groups = memory::groups_with(world, config, |rank, link| {
            let glue_pieces = (rank == Rank(2)).then_some(4);
            Faulty::new(link, Faults { glue_pieces, ..Faults::default() })
        })
        .unwrap();
        let receive = |rank: usize| groups[rank].receive_broadcast(Rank(2), Buffer::<i32>::zeroed(3));
        let first = [receive(0), receive(1)];
        let sent: Vec<_> = [5, 6].map(|value| groups[2].broadcast(Arc::new(vec![value; 3].into()))).into();
        for pending in first {
            assert_eq!(pending.wait(), Ok(vec![5; 3].into()));
        }
        for pending in [receive(0), receive(1)] {
            assert_eq!(pending.wait(), Ok(vec![6; 3].into()));
        }
        for pending in sent {
            assert_eq!(pending.wait(), Ok(()));
        }
    }
}
