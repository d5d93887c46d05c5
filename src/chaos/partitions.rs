//! Which ways between hosts are cut, and for how long: a pure function of a seed.
//!
//! Host 0 has the coordinator, each other a worker. The first half of the cuts heals within the timeout, and must not be
//! noticed; the other half heals after it.

use mattock_data::keys::Stream;

/// A way that is cut for a while.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    /// Who is not heard,
    pub from: usize,
    /// by whom.
    pub to: usize,
    /// Nor the other way round.
    pub both: bool,
    /// How long, in timeouts.
    pub timeouts: f64,
}

impl Cut {
    /// Whether it heals so early that nobody may be given up for it.
    pub fn is_short(&self) -> bool {
        self.timeouts < 1.0
    }

    /// The hosts with a worker that it concerns.
    pub fn workers(&self) -> impl Iterator<Item = usize> + use<> {
        [self.from, self.to].into_iter().filter(|host| *host > 0)
    }
}

/// The cuts of a seed among so many workers.
pub fn partitions(seed: u64, workers: usize, count: usize) -> Vec<Cut> {
    let mut draw = Stream::new(seed);
    let mut below = |bound: usize| (draw.uniform() * bound as f64) as usize;
    let cut = |number: usize| {
        let one = 1 + below(workers);
        // Its neighbour in some ring, or the coordinator.
        let other = match workers > 1 && below(2) == 0 {
            true => 1 + (one + below(workers - 1)) % workers,
            false => 0,
        };
        let (from, to) = if below(2) == 0 { (one, other) } else { (other, one) };
        let both = below(2) == 0;
        let part = below(1000) as f64 / 1000.0;
        let timeouts = if number < count.div_ceil(2) { 0.1 + 0.3 * part } else { 1.5 + part };
        Cut { from, to, both, timeouts }
    };
    (0..count).map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_list_and_all_kinds_come() {
        let mut kinds = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let cuts = partitions(seed, 3, 6);
            assert_eq!(cuts, partitions(seed, 3, 6));
            assert!(cuts[..3].iter().all(Cut::is_short) && !cuts[3..].iter().any(Cut::is_short));
            for cut in &cuts {
                assert!(cut.from != cut.to && cut.from <= 3 && cut.to <= 3, "{cut:?}");
                kinds.insert((cut.from == 0, cut.to == 0, cut.both, cut.is_short()));
            }
        }
        assert_eq!(kinds.len(), 12, "{kinds:?}");
        assert!(partitions(1, 1, 4).iter().all(|cut| cut.from == 0 || cut.to == 0));
    }
}
