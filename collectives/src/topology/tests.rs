//! Plans against plans made by trying everything, and on networks whose best order is known.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn links(ranks: usize, link: impl Fn(u32, u32) -> Link) -> Links {
    Links::new(ranks, |from, to| link(from.0, to.0)).unwrap()
}

fn megabits(rate: f64, latency_ms: f64) -> Link {
    Link { latency_s: latency_ms * 1e-3, bytes_per_s: rate * 1e6 / 8.0 }
}

fn numbers(order: &[Rank]) -> Vec<u32> {
    order.iter().map(|rank| rank.0).collect()
}

/// All orders, by putting each rank that is left behind each beginning.
fn all_orders(ranks: usize) -> Vec<Vec<usize>> {
    let mut orders = vec![Vec::new()];
    for _ in 0..ranks {
        let longer = |order: &Vec<usize>| {
            let left = (0..ranks).filter(|rank| !order.contains(rank));
            left.map(|rank| [&order[..], &[rank]].concat()).collect::<Vec<_>>()
        };
        orders = orders.iter().flat_map(longer).collect();
    }
    orders
}

/// The slowest link of an order, and its time for a segment over every link; written down once more.
fn judge(links: &Links, shape: Shape, order: &[usize], bytes: f64) -> (f64, f64) {
    let ranks = order.len();
    let mut crossed = Vec::new();
    for i in 0..ranks - 1 {
        crossed.push((order[i], order[i + 1]));
        if shape == Shape::Line {
            crossed.push((order[i + 1], order[i]));
        }
    }
    if shape == Shape::Ring {
        crossed.push((order[ranks - 1], order[0]));
    }
    let crossed: Vec<Link> = crossed.into_iter().map(|(from, to)| links.link(from, to)).collect();
    let slowest = crossed.iter().map(|link| link.bytes_per_s).fold(f64::INFINITY, f64::min);
    (slowest, crossed.iter().map(|link| link.latency_s + bytes / ranks as f64 / link.bytes_per_s).sum())
}

fn random_links() -> impl Strategy<Value = Links> {
    // Few rates, so that orders are alike in their slowest link and the second criterion decides.
    let rate = prop_oneof![Just(50.0), Just(100.0), Just(500.0), 1.0f64..1000.0];
    (2usize..7).prop_flat_map(move |ranks| {
        proptest::collection::vec((rate.clone(), 0.0f64..50.0), ranks * ranks).prop_map(move |drawn| {
            links(ranks, |from, to| {
                let (rate, latency_ms) = drawn[from as usize * ranks + to as usize];
                megabits(rate, latency_ms)
            })
        })
    })
}

proptest! {
    #[test]
    fn no_order_is_better(links in random_links(), bytes in 1u64..100 * MIB) {
        let plan = plan(&links, bytes);
        for route in [&plan.ring, &plan.line] {
            let found: Vec<usize> = route.order.iter().map(|rank| rank.0 as usize).collect();
            let (slowest, total) = judge(&links, route.shape, &found, bytes as f64);
            prop_assert_eq!(slowest, route.slowest_bytes_per_s);
            for order in all_orders(links.ranks) {
                let (other, other_total) = judge(&links, route.shape, &order, bytes as f64);
                prop_assert!(other <= slowest, "{route}: {order:?} does not cross a link as slow");
                prop_assert!(other < slowest || other_total >= total * (1.0 - 1e-9), "{route}: {order:?} is faster");
            }
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// Where all orders are too many, the search still finds those of networks that have a clear one: sites of which each has
    /// to be entered once.
    #[test]
    fn sites_are_entered_once(sites in 2u32..5, each in 3u32..7, shift in any::<u32>()) {
        let ranks = sites * each;
        prop_assume!(ranks as usize > EXHAUSTIVE_MAX);
        // The ranks of a site are spread over all numbers.
        let site = |rank: u32| (rank + shift % ranks) % ranks % sites;
        let links = links(ranks as usize, |from, to| {
            if site(from) == site(to) { megabits(10_000.0, 0.1) } else { megabits(100.0, 20.0) }
        });
        let plan = plan(&links, 64 * MIB);
        let crossings = |order: &[Rank], closes: bool| {
            let next = |i: usize| order[(i + 1) % order.len()].0;
            (0..order.len() - usize::from(!closes)).filter(|&i| site(order[i].0) != site(next(i))).count()
        };
        prop_assert_eq!(crossings(&plan.ring.order, true), sites as usize);
        prop_assert_eq!(crossings(&plan.line.order, false), sites as usize - 1);
    }

    #[test]
    fn every_rank_has_one_place(ranks in 2usize..24, seed in any::<u64>()) {
        let rate = |from: u32, to: u32| 1.0 + (seed ^ u64::from(from * 31 + to * 17)).wrapping_mul(0x9e37_79b9) as u8 as f64;
        let plan = plan(&links(ranks, |from, to| megabits(rate(from, to), 1.0)), MIB);
        prop_assert!(plan.given.slowest_bytes_per_s <= plan.ring.slowest_bytes_per_s);
        for route in [&plan.ring, &plan.line, &plan.given] {
            let mut order = numbers(&route.order);
            order.sort_unstable();
            prop_assert_eq!(order, (0..ranks as u32).collect::<Vec<_>>());
        }
    }
}

#[test]
fn one_slow_pair_is_left_out_by_a_line() {
    let links =
        links(3, |from, to| if from + to == 2 { megabits(50.0, 10.0) } else { megabits(500.0, 10.0) });
    let plan = plan(&links, 16 * MIB);
    assert_eq!(numbers(&plan.line.order), [0, 1, 2], "the slow pair is at the ends");
    assert_eq!(plan.best().shape, Shape::Line);
    assert!(plan.ring.seconds > 5.0 * plan.line.seconds, "{plan}");
    let said = plan.to_string();
    assert!(said.starts_with("line 0 - 1 - 2: 16.0 MiB in "), "{said}");
    assert!(said.contains("; ring 0 > 1 > 2 in ") && said.contains("2 to 0, carries 6.2 MB/s"), "{said}");
}

#[test]
fn among_equals_a_ring_is_the_best() {
    for ranks in 2..=12 {
        for rate in [100.0, 10_000.0] {
            let plan = plan(&links(ranks, |_, _| megabits(rate, 0.5)), 64 * MIB);
            assert_eq!(plan.best().shape, Shape::Ring, "{plan}");
            assert_eq!(plan.best().order[0], Rank(0));
        }
    }
}

#[test]
fn a_ring_is_predicted_to_take_what_its_slowest_link_takes() {
    let plan = plan(&links(4, |_, _| Link { latency_s: 0.01, bytes_per_s: 1e6 }), 4_000_000);
    // 3/4 of the payload twice, and as many hops.
    assert!((plan.ring.seconds - (6.0 + 0.06)).abs() < 1e-9, "{plan}");
}

#[test]
fn a_slow_direction_is_seen() {
    // Round one way all is well, round the other way all is slow.
    let links = links(3, |from, to| megabits(if (from + 1) % 3 == to { 900.0 } else { 10.0 }, 1.0));
    let plan = plan(&links, MIB);
    assert_eq!((numbers(&plan.ring.order), plan.best().shape), (vec![0, 1, 2], Shape::Ring));
    assert_eq!(plan.line.slowest_bytes_per_s, 10e6 / 8.0);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let good = megabits(100.0, 1.0);
    for bad in [
        Link { bytes_per_s: 0.0, ..good },
        Link { bytes_per_s: f64::NAN, ..good },
        Link { latency_s: -1.0, ..good },
        Link { latency_s: f64::INFINITY, ..good },
    ] {
        let refused = Links::new(3, |from, to| if (from, to) == (Rank(1), Rank(2)) { bad } else { good });
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("from rank 1 to rank 2"), "{error}");
    }
    assert_eq!(Links::new(1, |_, _| good), Err(TopologyError::Alone { ranks: 1 }));
}

#[test]
fn an_order_is_predicted_as_it_was_planned() {
    let links = links(4, |from, to| megabits(if from + to == 3 { 20.0 } else { 200.0 }, 5.0));
    let plan = plan(&links, 16 * MIB);
    for route in [&plan.given, &plan.ring, &plan.line] {
        assert_eq!(predict(&links, route.shape, &route.order, 16 * MIB).as_ref(), Some(route));
    }
    for order in [&[0, 1, 2][..], &[0, 1, 2, 2], &[0, 1, 2, 4]] {
        let order: Vec<Rank> = order.iter().copied().map(Rank).collect();
        assert_eq!(predict(&links, Shape::Ring, &order, MIB), None);
    }
}
