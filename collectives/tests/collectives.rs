//! Every collective equals its serial reference, for any world size, length, chunk size and way of cutting the stream.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use half::{bf16, f16};
use mattock_collectives::link::faulty::{Faults, Faulty};
use mattock_collectives::{
    Buffer, Element, FUSED_BYTES_MAX, Group, GroupConfig, I12x2, I24, Max, Mean, Min, Rank, Reduction,
    SaturatingSum, Sum, WorldSize, memory, segment,
};
use proptest::prelude::*;

/// What carries it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// A ring of links.
    Links,
    /// The memory of one host.
    Host,
    /// A line of links.
    Line,
    /// So many hosts at most, with any ranks on each.
    Hosts(u32),
}

/// How a case is run.
#[derive(Clone, Copy, Debug)]
struct Case {
    ranks: u32,
    len: usize,
    chunk_bytes: u32,
    way: Way,
    piece_bytes_max: usize,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let lengths = prop_oneof![0usize..40, 0usize..5000];
    let chunks = prop_oneof![Just(8u32), 16u32..500, Just(1 << 16)];
    let ways =
        prop_oneof![Just(Way::Links), Just(Way::Host), Just(Way::Line), (2u32..5).prop_map(Way::Hosts)];
    (1u32..10, lengths, chunks, 1usize..2000, any::<u64>(), ways).prop_map(
        |(ranks, len, chunk_bytes, piece, seed, way)| {
            // Tiny pieces of long payloads take long and show nothing new.
            let (chunk_bytes, piece) =
                if len > 200 { (chunk_bytes.max(64), piece.max(61)) } else { (chunk_bytes, piece) };
            Case { ranks, len, chunk_bytes, way, piece_bytes_max: piece, seed }
        },
    )
}

impl Case {
    fn groups(&self) -> Vec<Group> {
        let config = GroupConfig { timeout: Duration::from_secs(60), chunk_bytes: self.chunk_bytes };
        let world = WorldSize::new(self.ranks).unwrap();
        match self.way {
            Way::Links => {}
            Way::Line => return memory::line_groups(world, config).unwrap(),
            Way::Host => return memory::host_groups(world, config).unwrap(),
            Way::Hosts(_) => return memory::hierarchical_groups(&self.hosts(), config).unwrap(),
        }
        let faults = Faults { piece_bytes_max: Some(self.piece_bytes_max), ..Faults::default() };
        memory::groups_with(world, config, |_, link| Faulty::new(link, faults)).unwrap()
    }

    /// The host of each rank.
    fn hosts(&self) -> Vec<u32> {
        let Way::Hosts(hosts) = self.way else { return vec![0; self.ranks as usize] };
        (0..self.ranks).map(|rank| (self.bits(rank, 0) % u64::from(hosts)) as u32).collect()
    }

    /// Element `i` of rank `r`: any bits.
    fn bits(&self, rank: u32, i: usize) -> u64 {
        let mut x = self.seed ^ (u64::from(rank) << 40) ^ i as u64;
        for _ in 0..2 {
            x = (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        x ^ (x >> 29)
    }

    fn inputs<E: Element>(&self, element: impl Fn(u64) -> E) -> Vec<Arc<Buffer<E>>> {
        (0..self.ranks)
            .map(|rank| {
                Arc::new((0..self.len).map(|i| element(self.bits(rank, i))).collect::<Vec<_>>().into())
            })
            .collect()
    }

    /// Segment `s` is reduced along ranks s + 1, s + 2, .., s.
    fn reference<R: Reduction>(&self, inputs: &[Arc<Buffer<R::Element>>]) -> Vec<R::Element> {
        let mut sums = Vec::with_capacity(self.len);
        for s in 0..self.ranks {
            for i in segment(self.len, self.ranks, s) {
                let order = (1..=self.ranks).map(|hop| inputs[((s + hop) % self.ranks) as usize][i]);
                let combined = order.reduce(|arrived, own| R::combine(own, arrived)).unwrap();
                sums.push(R::finish(combined, WorldSize::new(self.ranks).unwrap()));
            }
        }
        sums
    }

    /// The ranks of each host, where there are several.
    fn layout(&self) -> Option<Vec<Vec<usize>>> {
        let labels = self.hosts();
        let mut hosts: Vec<Vec<usize>> = Vec::new();
        for rank in 0..labels.len() {
            match hosts.iter_mut().find(|host| labels[host[0]] == labels[rank]) {
                Some(host) => host.push(rank),
                None => hosts.push(vec![rank]),
            }
        }
        Some(hosts).filter(|hosts| hosts.len() > 1)
    }

    /// What a reduce-scatter comes to, segment by segment: where hosts are mixed, reduced along ranks 1, 2, .., 0 of each host, then
    /// along the hosts behind that of the segment's rank.
    fn scattered<R: Reduction>(&self, inputs: &[Arc<Buffer<R::Element>>]) -> Vec<R::Element> {
        let Some(hosts) = self.layout() else { return self.reference::<R>(inputs) };
        let along = |last: usize, count: usize, value: &dyn Fn(usize) -> R::Element| {
            let order = (1..=count).map(|hop| value((last + hop) % count));
            order.reduce(|arrived, own| R::combine(own, arrived)).unwrap()
        };
        let mut sums = Vec::with_capacity(self.len);
        for s in 0..self.ranks {
            let last = hosts.iter().position(|host| host.contains(&(s as usize))).unwrap();
            for i in segment(self.len, self.ranks, s) {
                let of_host =
                    |host: usize| along(0, hosts[host].len(), &|member| inputs[hosts[host][member]][i]);
                let combined = along(last, hosts.len(), &of_host);
                sums.push(R::finish(combined, WorldSize::new(self.ranks).unwrap()));
            }
        }
        sums
    }

    /// What an all-reduce comes to.
    fn reduced<R: Reduction>(&self, inputs: &[Arc<Buffer<R::Element>>]) -> Vec<R::Element> {
        if self.way == Way::Line {
            let along = (0..self.len).map(|i| {
                let order = inputs.iter().map(|input| input[i]);
                order.reduce(|arrived, own| R::combine(own, arrived)).unwrap()
            });
            return along.map(|sum| R::finish(sum, WorldSize::new(self.ranks).unwrap())).collect();
        }
        let Some(hosts) = self.layout() else { return self.reference::<R>(inputs) };
        let piece_len =
            (4 * (self.chunk_bytes.max(8) & !7) as usize).next_multiple_of(64) / size_of::<R::Element>();
        let reduced = (0..self.len).map(|i| {
            let piece_start = i / piece_len * piece_len;
            let piece = piece_len.min(self.len - piece_start);
            let along = |ranks: usize, value: &dyn Fn(usize) -> R::Element| {
                let own =
                    (0..ranks).find(|&s| segment(piece, ranks as u32, s as u32).contains(&(i - piece_start)));
                let order = (1..=ranks).map(|hop| value((own.unwrap() + hop) % ranks));
                order.reduce(|arrived, own| R::combine(own, arrived)).unwrap()
            };
            let of_host = |host: usize| along(hosts[host].len(), &|member| inputs[hosts[host][member]][i]);
            R::finish(along(hosts.len(), &of_host), WorldSize::new(self.ranks).unwrap())
        });
        reduced.collect()
    }

    /// All-reduce, and reduce-scatter after it in the same groups, against the reference.
    fn check_reductions<R: Reduction>(&self, element: impl Fn(u64) -> R::Element)
    where
        R::Element: PartialEq + Debug,
    {
        let inputs = self.inputs(element);
        let untouched: Vec<Vec<_>> = inputs.iter().map(|input| input.to_vec()).collect();
        let (whole, expected) = (self.reduced::<R>(&inputs), self.scattered::<R>(&inputs));
        let groups = self.groups();
        let inputs = place(&groups, inputs);
        // Some results go where peers can read them, others into ordinary memory.
        let output = |group: &Group| match group.ring().rank().0 % 2 {
            0 => group.buffer(self.len),
            _ => Buffer::default(),
        };
        let ranks = || groups.iter().zip(&inputs);
        let reduced: Vec<_> = ranks().map(|(g, x)| g.all_reduce::<R>(x.clone(), output(g))).collect();
        let scattered: Vec<_> = ranks().map(|(g, x)| g.reduce_scatter::<R>(x.clone(), output(g))).collect();
        for sum in reduced {
            assert_eq!(sum.wait().unwrap(), whole, "all-reduce, {self:?}");
        }
        for (rank, sum) in (0..).zip(scattered) {
            assert_eq!(
                sum.wait().unwrap(),
                expected[segment(self.len, self.ranks, rank)],
                "reduce-scatter, {self:?}"
            );
        }
        assert!(
            inputs.iter().zip(&untouched).all(|(input, before)| **input == *before),
            "inputs are never modified"
        );
        self.check_in_place::<R>(&groups, &inputs, [&whole, &expected]);
    }

    /// The same in place: inputs are given up, wherever they lie.
    fn check_in_place<R: Reduction>(
        &self,
        groups: &[Group],
        inputs: &[Arc<Buffer<R::Element>>],
        [whole, expected]: [&[R::Element]; 2],
    ) where
        R::Element: PartialEq + Debug,
    {
        let ranks = || groups.iter().zip(inputs);
        let reduced: Vec<_> = ranks().map(|(g, x)| g.all_reduce_in_place::<R>(Buffer::clone(x))).collect();
        let scattered: Vec<_> =
            ranks().map(|(g, x)| g.reduce_scatter_in_place::<R>(Buffer::clone(x))).collect();
        for sum in reduced {
            assert_eq!(sum.wait().unwrap(), *whole, "all-reduce in place, {self:?}");
        }
        for (rank, sum) in (0..).zip(scattered) {
            let own = segment(self.len, self.ranks, rank);
            let sum = sum.wait().unwrap();
            assert_eq!(sum[own.clone()], expected[own], "reduce-scatter in place, {self:?}");
            assert_eq!(sum.len(), self.len);
        }
    }
}

/// The inputs of even ranks where peers can read them, if that is what the group is for.
fn place<E: Element>(groups: &[Group], inputs: Vec<Arc<Buffer<E>>>) -> Vec<Arc<Buffer<E>>> {
    let place = |(group, input): (&Group, Arc<Buffer<E>>)| {
        if group.ring().rank().0 % 2 == 1 {
            return input;
        }
        let mut placed = group.buffer(input.len());
        placed.copy_from_slice(&input);
        Arc::new(placed)
    };
    groups.iter().zip(inputs).map(place).collect()
}

/// A finite float with few bits, so that sums differ in their last bits when the order does.
fn float(bits: u64) -> f32 {
    (bits as i32) as f32 * 1e-3
}

fn three(bits: u64) -> [u8; 3] {
    std::array::from_fn(|byte| (bits >> (8 * byte)) as u8)
}

/// Lengths in these proportions, roughly, that add up to `len`.
fn uneven(weights: &[usize], len: usize) -> Vec<usize> {
    let all = weights.iter().sum::<usize>().max(1);
    let mut lens: Vec<usize> = weights.iter().map(|weight| weight * len / all).collect();
    let rest = len - lens.iter().sum::<usize>();
    if let Some(last) = lens.last_mut() {
        *last += rest;
    }
    lens
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn sums_of_f32(case in cases()) { case.check_reductions::<Sum<f32>>(float) }

    #[test]
    fn sums_of_bf16(case in cases()) { case.check_reductions::<Sum<bf16>>(|bits| bf16::from_f32(float(bits))) }

    #[test]
    fn sums_of_i32(case in cases()) { case.check_reductions::<Sum<i32>>(|bits| bits as i32) }

    #[test]
    fn sums_of_i64(case in cases()) { case.check_reductions::<Sum<i64>>(|bits| bits as i64) }

    #[test]
    fn sums_of_f16(case in cases()) { case.check_reductions::<Sum<f16>>(|bits| f16::from_f32(float(bits & 0xffff))) }

    #[test]
    fn sums_of_f64(case in cases()) { case.check_reductions::<Sum<f64>>(|bits| float(bits).into()) }

    #[test]
    fn sums_of_bytes(case in cases()) { case.check_reductions::<Sum<u8>>(|bits| bits as u8) }

    #[test]
    fn sums_of_i16(case in cases()) { case.check_reductions::<Sum<i16>>(|bits| bits as i16) }

    #[test]
    fn sums_of_three_bytes(case in cases()) { case.check_reductions::<Sum<I24>>(|bits| I24(three(bits))) }

    #[test]
    fn sums_of_pairs_in_three_bytes(case in cases()) { case.check_reductions::<Sum<I12x2>>(|bits| I12x2(three(bits))) }

    #[test]
    fn smallest_floats(case in cases()) { case.check_reductions::<Min<f32>>(float) }

    #[test]
    fn largest_integers(case in cases()) { case.check_reductions::<Max<i64>>(|bits| bits as i64) }

    #[test]
    fn saturating_sums(case in cases()) { case.check_reductions::<SaturatingSum>(|bits| bits as u32 >> 2) }

    #[test]
    fn means_of_f32(case in cases()) { case.check_reductions::<Mean<f32>>(float) }

    #[test]
    fn means_of_f64(case in cases()) { case.check_reductions::<Mean<f64>>(|bits| float(bits).into()) }

    #[test]
    fn means_of_bf16(case in cases()) { case.check_reductions::<Mean<bf16>>(|bits| bf16::from_f32(float(bits))) }

    #[test]
    fn means_of_f16(case in cases()) { case.check_reductions::<Mean<f16>>(|bits| f16::from_f32(float(bits & 0xffff))) }

    #[test]
    fn segments_are_gathered(case in cases()) {
        let all: Vec<u8> = (0..case.len).map(|i| case.bits(0, i) as u8).collect();
        let groups = case.groups();
        let gathered: Vec<_> = (0..).zip(&groups).map(|(rank, group)| {
            let own = all[segment(case.len, case.ranks, rank)].to_vec();
            group.all_gather(Arc::new(own.into()), case.len, Buffer::default())
        }).collect();
        for result in gathered {
            prop_assert_eq!(&result.wait().unwrap(), &all);
        }
    }

    #[test]
    fn uneven_parts_are_gathered(case in cases(), weights in proptest::collection::vec(0usize..4, 9)) {
        let lens: Vec<usize> = weights[..case.ranks as usize].iter().map(|weight| weight * case.len / 4).collect();
        let inputs: Vec<Arc<Buffer<f64>>> = (0..case.ranks).zip(&lens).map(|(rank, &len)| {
            Arc::new((0..len).map(|i| float(case.bits(rank, i)).into()).collect::<Vec<_>>().into())
        }).collect();
        let all: Vec<f64> = inputs.iter().flat_map(|input| input.to_vec()).collect();
        let groups = case.groups();
        let placed = place(&groups, inputs);
        let gather = |(group, input): (&Group, &Arc<Buffer<f64>>)| {
            (group.all_gather_uneven(input.clone(), &lens, Buffer::default()), group.barrier())
        };
        for (gathered, barrier) in groups.iter().zip(&placed).map(gather).collect::<Vec<_>>() {
            prop_assert_eq!(&gathered.wait().unwrap(), &all);
            barrier.wait().unwrap();
        }
    }

    #[test]
    fn sums_are_scattered_unevenly_and_shifted(case in cases(), weights in proptest::collection::vec(0usize..4, 9)) {
        let lens = uneven(&weights[..case.ranks as usize], case.len);
        let inputs = case.inputs::<i32>(|bits| bits as i32);
        let expected = case.reduced::<Sum<i32>>(&inputs);
        let groups = case.groups();
        let placed = place(&groups, inputs);
        let scatter = |(group, input): (&Group, &Arc<Buffer<i32>>)| {
            (group.reduce_scatter_uneven::<Sum<i32>>(input.clone(), &lens, Buffer::default()), group.barrier())
        };
        let scattered = groups.iter().zip(&placed).map(scatter).collect::<Vec<_>>();
        let mut parts = Vec::new();
        for (part, barrier) in scattered {
            parts.push(Arc::new(part.wait().unwrap()));
            barrier.wait().unwrap();
        }
        let put_together: Vec<i32> = parts.iter().flat_map(|part| part.to_vec()).collect();
        prop_assert_eq!(&put_together[..], &expected[..]);
        let shifts = groups.iter().zip(&parts).map(|(group, part)| group.shift(part.clone(), &lens, Buffer::default()));
        for (rank, shifted) in shifts.collect::<Vec<_>>().into_iter().enumerate() {
            let before = (rank + parts.len() - 1) % parts.len();
            prop_assert_eq!(&shifted.wait().unwrap()[..], &parts[before][..], "from rank {}", before);
        }
    }

    #[test]
    fn the_roots_input_reaches_everybody(case in cases(), root in any::<u32>()) {
        let root = Rank(root % case.ranks);
        let input = case.inputs(|bits| bits as i64).swap_remove(0);
        let groups = case.groups();
        let sent = groups[root.0 as usize].broadcast(input.clone());
        let others = groups.iter().filter(|group| group.ring().rank() != root);
        let received: Vec<_> = others.map(|group| group.receive_broadcast(root, Buffer::zeroed(case.len))).collect();
        sent.wait().unwrap();
        for result in received {
            prop_assert_eq!(&result.wait().unwrap(), &*input);
        }
    }

    #[test]
    fn the_root_receives_the_mean(case in cases(), root in any::<u32>()) {
        let root = Rank(root % case.ranks);
        let inputs = case.inputs(float);
        let expected = case.reduced::<Mean<f32>>(&inputs);
        let groups = case.groups();
        let inputs = place(&groups, inputs);
        let reduce = |(group, input): (&Group, &Arc<Buffer<f32>>)| {
            group.reduce::<Mean<f32>>(root, input.clone(), Buffer::default())
        };
        let reduced: Vec<_> = groups.iter().zip(&inputs).map(reduce).collect();
        for (rank, result) in (0..).zip(reduced) {
            let wanted = if Rank(rank) == root { &expected[..] } else { &[] };
            prop_assert_eq!(&result.wait().unwrap()[..], wanted);
        }
    }

    #[test]
    fn the_root_receives_all_inputs(case in cases(), root in any::<u32>()) {
        let root = Rank(root % case.ranks);
        let inputs = case.inputs(|bits| bits as u8);
        let expected: Vec<u8> = inputs.iter().flat_map(|input| input.to_vec()).collect();
        let groups = case.groups();
        let inputs = place(&groups, inputs);
        let gather = |(group, input): (&Group, &Arc<Buffer<u8>>)| group.gather(root, input.clone(), Buffer::default());
        let gathered: Vec<_> = groups.iter().zip(&inputs).map(gather).collect();
        for (rank, result) in (0..).zip(gathered) {
            let wanted = if Rank(rank) == root { &expected[..] } else { &[] };
            prop_assert_eq!(&result.wait().unwrap()[..], wanted);
        }
    }

    #[test]
    fn the_roots_input_is_divided(case in cases(), root in any::<u32>()) {
        let (root, part) = (Rank(root % case.ranks), case.len / case.ranks as usize);
        let whole: Vec<i32> = (0..part * case.ranks as usize).map(|i| case.bits(0, i) as i32).collect();
        let groups = case.groups();
        let parts: Vec<_> = groups.iter().map(|group| match group.ring().rank() == root {
            true => group.scatter(Arc::new(whole.clone().into())),
            false => group.receive_scatter(root, Buffer::zeroed(part)),
        }).collect();
        for (rank, result) in parts.into_iter().enumerate() {
            prop_assert_eq!(&result.wait().unwrap()[..], &whole[rank * part..(rank + 1) * part]);
        }
    }

    #[test]
    fn everybody_receives_a_part_of_everybody(case in cases()) {
        let (ranks, part) = (case.ranks as usize, case.len / case.ranks as usize);
        let case = Case { len: part * ranks, ..case };
        let inputs = case.inputs(|bits| bits as i64);
        let groups = case.groups();
        let placed = place(&groups, inputs.clone());
        let exchange = |(group, input): (&Group, &Arc<Buffer<i64>>)| group.all_to_all(input.clone(), Buffer::default());
        let exchanged: Vec<_> = groups.iter().zip(&placed).map(exchange).collect();
        for (rank, result) in exchanged.into_iter().enumerate() {
            let wanted: Vec<i64> = inputs.iter().flat_map(|input| input[rank * part..(rank + 1) * part].to_vec()).collect();
            prop_assert_eq!(&result.wait().unwrap()[..], &wanted[..]);
        }
    }

    /// Small and large ones, also where there is none or only one of a kind; waited for and at once.
    #[test]
    fn batches_come_back_as_separate_sums(case in cases(), lens in proptest::collection::vec(0usize..6, 0..7)) {
        let large = FUSED_BYTES_MAX / size_of::<i64>();
        let lens: Vec<usize> = lens.iter().map(|&len| if len == 5 { large + case.len } else { len * case.len / 8 }).collect();
        let groups = case.groups();
        let value = |rank: u32, which: usize, i: usize| case.bits(rank, i + 7 * which) as i64;
        let inputs = |group: &Group| -> Vec<Buffer<i64>> {
            let rank = group.ring().rank().0;
            let input = |(which, &len): (usize, &usize)| {
                let mut input = if which % 2 == 0 { group.buffer(len) } else { Buffer::zeroed(len) };
                input.iter_mut().enumerate().for_each(|(i, x)| *x = value(rank, which, i));
                input
            };
            lens.iter().enumerate().map(input).collect()
        };
        let expected: Vec<Vec<i64>> = lens.iter().enumerate().map(|(which, &len)| {
            (0..len).map(|i| (0..case.ranks).fold(0, |sum: i64, rank| sum.wrapping_add(value(rank, which, i)))).collect()
        }).collect();
        let batches: Vec<_> = groups.iter().map(|group| group.all_reduce_many::<Sum<i64>>(inputs(group))).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (rank, batch) in batches.into_iter().enumerate() {
            let sums = if rank % 2 == 0 { batch.wait() } else { runtime.block_on(batch) };
            prop_assert_eq!(&sums.unwrap(), &expected);
        }
        let at_once = std::thread::scope(|scope| {
            let inputs = &inputs;
            let now = |group: &Group| group.all_reduce_many_now::<Sum<i64>>(inputs(group)).unwrap();
            let threads: Vec<_> = groups.iter().map(|group| scope.spawn(move || now(group))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for sums in at_once {
            prop_assert_eq!(&sums, &expected);
        }
    }

    /// Many operations of different kinds, all submitted before any is waited for, by one rank long before the next.
    #[test]
    fn operations_run_pipelined_in_order(case in cases()) {
        let groups = case.groups();
        let inputs = case.inputs(|bits| bits as i32);
        let expected = case.reference::<Sum<i32>>(&inputs);
        let pending: Vec<_> = groups.iter().zip(&inputs).map(|(group, input)| {
            let sums: Vec<_> = (0..5).map(|_| {
                (group.all_reduce::<Sum<i32>>(input.clone(), Buffer::default()), group.barrier())
            }).collect();
            let part = group.reduce_scatter::<Sum<i32>>(input.clone(), Buffer::default());
            (sums, part)
        }).collect();
        for (rank, (sums, part)) in (0..).zip(pending) {
            for (sum, barrier) in sums {
                prop_assert_eq!(&sum.wait().unwrap(), &expected);
                barrier.wait().unwrap();
            }
            prop_assert_eq!(&part.wait().unwrap()[..], &expected[segment(case.len, case.ranks, rank)]);
        }
    }
}

#[test]
fn an_all_reduce_sends_what_a_ring_must() {
    for ranks in [2u32, 3, 4, 8] {
        let groups = memory::groups(WorldSize::new(ranks).unwrap(), GroupConfig::default()).unwrap();
        let len = 1 << 18;
        let sums: Vec<_> = groups
            .iter()
            .map(|group| group.all_reduce::<Sum<f32>>(Arc::new(vec![1.0; len].into()), Buffer::default()))
            .collect();
        sums.into_iter().for_each(|sum| assert_eq!(sum.wait().unwrap()[0], ranks as f32));
        let ideal = 2.0 * f64::from(ranks - 1) / f64::from(ranks) * (len * 4) as f64;
        for group in &groups {
            let sent = group.counters().sent_bytes as f64;
            assert!(sent >= ideal && sent <= ideal * 1.01, "{ranks} ranks: {sent} bytes, ideal {ideal}");
        }
    }
}

#[test]
fn nobody_leaves_a_barrier_before_all_have_entered() {
    let groups = memory::groups(WorldSize::new(3).unwrap(), GroupConfig::default()).unwrap();
    let entered = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for early in &groups[1..] {
            scope.spawn(|| {
                early.barrier().wait().unwrap();
                assert!(entered.load(Ordering::SeqCst), "left before rank 0 entered");
            });
        }
        // Time for a broken barrier to let the others through.
        std::thread::sleep(Duration::from_millis(50));
        entered.store(true, Ordering::SeqCst);
        groups[0].barrier().wait().unwrap();
    });
}
