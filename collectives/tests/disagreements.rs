//! Ranks that do not agree on lengths find out, and so does who hears nonsense or nothing: none of them waits for ever.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use mattock_collectives::link::faulty::{Faults, Faulty};
use mattock_collectives::{
    Batch, Buffer, CollectiveError, Group, GroupConfig, Pending, Rank, Sum, WorldSize, memory,
};

/// Groups of so many ranks round a ring of links, and over shared memory.
fn both_ways(ranks: u32) -> [Vec<Group>; 2] {
    let config = GroupConfig { timeout: Duration::from_secs(60), ..GroupConfig::default() };
    let ranks = WorldSize::new(ranks).unwrap();
    [memory::groups(ranks, config).unwrap(), memory::host_groups(ranks, config).unwrap()]
}

/// Somebody sees that ranks do not do the same, and all others see that it has broken off.
fn assert_mismatch<T: Debug>(outcomes: Vec<Result<T, CollectiveError>>) {
    let is_told = |outcome: &Result<T, CollectiveError>| {
        matches!(outcome, Err(CollectiveError::Mismatch { .. } | CollectiveError::PeerLost { .. }))
    };
    let finds =
        |outcome: &Result<T, CollectiveError>| matches!(outcome, Err(CollectiveError::Mismatch { .. }));
    assert!(outcomes.iter().all(is_told) && outcomes.iter().any(finds), "{outcomes:?}");
}

#[test]
fn lengths_that_ranks_do_not_agree_on_are_a_mismatch() {
    // Rank 2 believes other lengths than the rest: of the same sum, and so that it or another has nothing to send.
    for (lens, believed) in
        [([2, 2, 3], [4, 0, 3]), ([0, 4, 0], [4, 0, 0]), ([3000, 4000, 1], [4000, 3000, 1])]
    {
        for groups in both_ways(3) {
            let gather = |group: &Group| {
                let rank = group.ring().rank().0 as usize;
                let lens = if rank == 2 { &believed } else { &lens };
                group.all_gather_uneven::<f32>(
                    Arc::new(vec![1.0; lens[rank]].into()),
                    lens,
                    Buffer::default(),
                )
            };
            let gathered: Vec<_> = groups.iter().map(gather).collect();
            assert_mismatch(gathered.into_iter().map(Pending::wait).collect());
        }
        for groups in both_ways(3) {
            let scatter = |group: &Group| {
                let lens = if group.ring().rank().0 == 2 { &believed } else { &lens };
                let input = Arc::new(vec![1.0; lens.iter().sum()].into());
                group.reduce_scatter_uneven::<Sum<f32>>(input, lens, Buffer::default())
            };
            let scattered: Vec<_> = groups.iter().map(scatter).collect();
            assert_mismatch(scattered.into_iter().map(Pending::wait).collect());
        }
        for groups in both_ways(3) {
            let shift = |group: &Group| {
                let rank = group.ring().rank().0 as usize;
                let lens = if rank == 2 { &believed } else { &lens };
                group.shift::<f32>(Arc::new(vec![1.0; lens[rank]].into()), lens, Buffer::default())
            };
            let shifted: Vec<_> = groups.iter().map(shift).collect();
            // A rank needs only the one before it, so who did not hear of it may be done.
            let outcomes: Vec<_> = shifted.into_iter().map(Pending::wait).collect();
            let found =
                outcomes.iter().any(|outcome| matches!(outcome, Err(CollectiveError::Mismatch { .. })));
            assert!(found, "{outcomes:?}");
        }
    }
}

#[test]
fn batches_that_ranks_divide_differently_are_a_mismatch() {
    for (lens, believed) in [([3, 5], [4, 4]), ([3000, 5000], [5000, 3000])] {
        for groups in both_ways(3) {
            let batch = |group: &Group| {
                let lens = if group.ring().rank().0 == 1 { &believed } else { &lens };
                group.all_reduce_many::<Sum<f32>>(lens.iter().map(|&len| Buffer::zeroed(len)).collect())
            };
            let batches: Vec<_> = groups.iter().map(batch).collect();
            assert_mismatch(batches.into_iter().map(Batch::wait).collect());
        }
    }
}

#[test]
fn lengths_that_make_no_sense_are_refused() {
    let groups = memory::groups(WorldSize::new(2).unwrap(), GroupConfig::default()).unwrap();
    for lens in [&[2][..], &[2, 2, 2], &[usize::MAX, 1], &[3, 2]] {
        let outcome =
            groups[0].all_gather_uneven::<u8>(Arc::new(vec![0; 2].into()), lens, Buffer::default()).wait();
        assert!(matches!(outcome, Err(CollectiveError::InvalidInput { rank: Rank(0), .. })), "{outcome:?}");
        let input = Arc::new(vec![0; 2].into());
        let scattered = groups[0].reduce_scatter_uneven::<Sum<i32>>(input, lens, Buffer::default()).wait();
        assert!(matches!(scattered, Err(CollectiveError::InvalidInput { rank: Rank(0), .. })));
        let shifted = groups[0].shift::<u8>(Arc::new(vec![0; 9].into()), lens, Buffer::default()).wait();
        assert!(matches!(shifted, Err(CollectiveError::InvalidInput { rank: Rank(0), .. })));
    }
}

#[test]
fn in_place_a_cut_link_is_a_typed_error_too() {
    let config = GroupConfig { timeout: Duration::from_secs(20), chunk_bytes: 4096 };
    for cut in [0, 4000, 50_000, 150_000] {
        let faults = |rank| Faults { cut_after_bytes: (rank == Rank(1)).then_some(cut), ..Faults::default() };
        let groups = memory::groups_with(WorldSize::new(3).unwrap(), config, |rank, link| {
            Faulty::new(link, faults(rank))
        });
        let groups = groups.unwrap();
        let sums: Vec<_> = groups
            .iter()
            .map(|group| group.all_reduce_in_place::<Sum<f32>>(vec![1.0; 30_000].into()))
            .collect();
        for sum in sums {
            let outcome = sum.wait();
            assert!(matches!(outcome, Err(CollectiveError::PeerLost { .. })), "cut at {cut}: {outcome:?}");
        }
    }
}

#[test]
fn a_flipped_bit_in_an_empty_parts_header_is_a_mismatch_too() {
    let (lens, config) =
        ([3000, 0, 3000], GroupConfig { timeout: Duration::from_secs(20), chunk_bytes: 4096 });
    for at in 0..56 {
        let faults = |rank| Faults { flip_bit_at: (rank == Rank(1)).then_some(at), ..Faults::default() };
        let ranks = WorldSize::new(3).unwrap();
        let groups =
            memory::groups_with(ranks, config, |rank, link| Faulty::new(link, faults(rank))).unwrap();
        let gather = |group: &Group| {
            let len = lens[group.ring().rank().0 as usize];
            group.all_gather_uneven::<f32>(Arc::new(Buffer::zeroed(len)), &lens, Buffer::default())
        };
        let gathered: Vec<_> = groups.iter().map(gather).collect();
        let third = gathered.into_iter().map(Pending::wait).last().unwrap().unwrap_err();
        assert!(matches!(third, CollectiveError::Mismatch { peer: Rank(1), .. }), "byte {at}: {third}");
    }
}
