//! Which rank next to which, so that slow links are crossed least; and whether to go round a ring at all.
//!
//! A *ring* is as fast as the slowest link that it crosses, and it closes: `n` ranks cross `n` links, one way. A *line* reduces
//! along the ranks to the last one and broadcasts back the same way: it crosses `n - 1` links, both ways, and so leaves out the
//! worst one. But the whole payload crosses each of them, where round a ring it is `2 (n - 1) / n` of it; and ranks within the
//! line send to both sides at once.
//!
//! ```text
//! ring   2 (n - 1) / n  x  (bytes / slowest link  +  sum of latencies)
//! line   bytes / slowest link, either way, or half an inner rank's interface
//!          +  sum of latencies, both ways  +  a chunk for each hop
//! ```
//!
//! What an interface carries is taken to be the fastest link that was measured with it. Where links do not share one, a line is
//! faster than predicted here, never slower; so who is told to use a line does not regret it.
//!
//! # Invariants
//! 1. The order of a ring, and that of a line, has the fastest slowest link, and of those the least time for one round of
//!    segments: exactly up to [`EXHAUSTIVE_MAX`] ranks, by local search above.
//! 2. The same measurements give the same plan: nothing here is random.
//!
//! Deliberately absent: measuring. See `mattock bench links`.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;

use crate::rank::Rank;
pub use crate::ring::Shape;

/// Up to so many ranks, all orders are tried.
pub const EXHAUSTIVE_MAX: usize = 8;
/// Links that a local search looks at in all, so that it ends within a second or so for any number of ranks.
const LOOKS_MAX: usize = 1 << 25;
/// Orders that a local search begins with.
const STARTS_MAX: usize = 16;
/// Parts that a local search moves are shorter.
const MOVED_MAX: usize = 4;
/// What travels at once along a line.
const CHUNK_BYTES: f64 = (256 << 10) as f64;

/// What one rank's bytes to another were measured to take, one way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Seconds until the first byte is there.
    pub latency_s: f64,
    /// Bytes per second after that.
    pub bytes_per_s: f64,
}

impl Link {
    fn seconds(&self, bytes: f64) -> f64 {
        self.latency_s + bytes / self.bytes_per_s
    }
}

/// The links between all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Links {
    ranks: usize,
    /// From rank `i` to rank `j` at `i * ranks + j`; nothing of use where both are the same.
    links: Vec<Link>,
}

/// Why measurements give no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// One rank has no links.
    #[error("{ranks} ranks have no links between them; measure 2 at least")]
    Alone {
        /// How many there are.
        ranks: usize,
    },
    /// A number that cannot have been measured.
    #[error(
        "the link from rank {from} to rank {to} was measured to be {link:?}, which no link is; measure again"
    )]
    Impossible {
        /// Who sends.
        from: Rank,
        /// Who receives.
        to: Rank,
        /// What was measured.
        link: Link,
    },
}

impl Links {
    /// All links of so many ranks; `link` gives the one from its first argument to its second.
    ///
    /// # Errors
    /// [`TopologyError`] where there is none, or one that cannot be.
    pub fn new(ranks: usize, link: impl Fn(Rank, Rank) -> Link) -> Result<Self, TopologyError> {
        if ranks < 2 {
            return Err(TopologyError::Alone { ranks });
        }
        let mut links = Vec::with_capacity(ranks * ranks);
        for (from, to) in (0..ranks).flat_map(|from| (0..ranks).map(move |to| (from, to))) {
            let none = Link { latency_s: 0.0, bytes_per_s: 1.0 };
            let (i, j) = (Rank(from as u32), Rank(to as u32));
            let link = if from == to { none } else { link(i, j) };
            let known = link.latency_s.is_finite() && link.bytes_per_s.is_finite();
            if !known || link.latency_s < 0.0 || link.bytes_per_s <= 0.0 {
                return Err(TopologyError::Impossible { from: i, to: j, link });
            }
            links.push(link);
        }
        Ok(Self { ranks, links })
    }

    fn link(&self, from: usize, to: usize) -> Link {
        self.links[from * self.ranks + to]
    }

    /// What a rank's interface carries either way, at least.
    fn interface(&self, rank: usize) -> f64 {
        let others = || (0..self.ranks).filter(|&other| other != rank);
        let out = others().map(|other| self.link(rank, other).bytes_per_s).fold(0.0, f64::max);
        let into = others().map(|other| self.link(other, rank).bytes_per_s).fold(0.0, f64::max);
        out.min(into)
    }
}

/// The best order for a shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Of which shape.
    pub shape: Shape,
    /// Ranks one after the other. A ring begins with rank 0, a line with the lower one of its ends.
    pub order: Vec<Rank>,
    /// The slowest link that it crosses: from, to.
    pub slowest: (Rank, Rank),
    /// What that one carries.
    pub slowest_bytes_per_s: f64,
    /// How long an all-reduce is predicted to take.
    pub seconds: f64,
}

/// How ranks should be arranged, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Of the all-reduce that was asked for.
    pub bytes: u64,
    /// The ring in the order of their numbers.
    pub given: Route,
    /// The best ring.
    pub ring: Route,
    /// The best line.
    pub line: Route,
}

/// Plans all-reduces of so many bytes.
pub fn plan(links: &Links, bytes: u64) -> Plan {
    let search = |shape| Search { links, shape, bytes: bytes as f64 };
    let given = search(Shape::Ring).route_in((0..links.ranks).collect());
    Plan { bytes, given, ring: search(Shape::Ring).route(), line: search(Shape::Line).route() }
}

/// How long an all-reduce of so many bytes is predicted to take in this order; `None` where it is not one of all ranks.
pub fn predict(links: &Links, shape: Shape, order: &[Rank], bytes: u64) -> Option<Route> {
    let mut known: Vec<usize> = order.iter().map(|rank| rank.0 as usize).collect();
    let order = known.clone();
    known.sort_unstable();
    let is_whole = known.into_iter().eq(0..links.ranks);
    is_whole.then(|| Search { links, shape, bytes: bytes as f64 }.route_in(order))
}

impl Plan {
    /// What is predicted to be faster; a ring, where both are the same.
    pub fn best(&self) -> &Route {
        if self.line.seconds < self.ring.seconds { &self.line } else { &self.ring }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order: Vec<String> = self.order.iter().map(Rank::to_string).collect();
        write!(f, "{} {}", self.shape, order.join(if self.shape == Shape::Ring { " > " } else { " - " }))
    }
}

impl fmt::Display for Plan {
    /// The choice and its reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = self.bytes as f64 / f64::from(1 << 20);
        let best = self.best();
        write!(f, "{best}: {mebibytes:.1} MiB in {}", Prediction(best))?;
        let other = if best.shape == Shape::Ring { &self.line } else { &self.ring };
        write!(f, "; {other} in {}", Prediction(other))?;
        if self.given.order != self.ring.order {
            write!(f, "; {} in {}", self.given, Prediction(&self.given))?;
        }
        Ok(())
    }
}

/// What is expected of a route, and what decides it.
struct Prediction<'a>(&'a Route);

impl fmt::Display for Prediction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { slowest: (from, to), slowest_bytes_per_s, seconds, .. } = self.0;
        let (milliseconds, megabytes) = (seconds * 1e3, slowest_bytes_per_s / 1e6);
        write!(f, "{milliseconds:.3} ms, as its slowest link, {from} to {to}, carries {megabytes:.1} MB/s")
    }
}

/// How good an order is: the slowest link first, then the time for a segment over every link. Less is better.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Key {
    slowest_s_per_byte: f64,
    total_s: f64,
}

impl Key {
    fn is_better_than(self, other: Self) -> bool {
        let slowest = self.slowest_s_per_byte.total_cmp(&other.slowest_s_per_byte);
        slowest.then(self.total_s.total_cmp(&other.total_s)) == Ordering::Less
    }
}

/// The search for the best order.
struct Search<'a> {
    links: &'a Links,
    shape: Shape,
    bytes: f64,
}

impl Search<'_> {
    fn route(&self) -> Route {
        self.route_in(match self.links.ranks {
            ranks if ranks <= EXHAUSTIVE_MAX => self.best_of_all(),
            _ => self.best_of_some(),
        })
    }

    fn route_in(&self, mut order: Vec<usize>) -> Route {
        match self.shape {
            Shape::Ring => {
                let first = order.iter().position(|&rank| rank == 0).unwrap_or(0);
                order.rotate_left(first);
            }
            Shape::Line if order.first() > order.last() => order.reverse(),
            Shape::Line => {}
        }
        let slower = |a: &(usize, usize), b: &(usize, usize)| {
            let speed = |&(from, to): &(usize, usize)| self.links.link(from, to).bytes_per_s;
            speed(a).total_cmp(&speed(b))
        };
        let (from, to) = self.crossed(&order).min_by(slower).unwrap_or((0, 0));
        Route {
            shape: self.shape,
            slowest: (Rank(from as u32), Rank(to as u32)),
            slowest_bytes_per_s: self.links.link(from, to).bytes_per_s,
            seconds: self.seconds(&order),
            order: order.into_iter().map(|rank| Rank(rank as u32)).collect(),
        }
    }

    /// The links that an order crosses: from, to.
    fn crossed<'o>(&self, order: &'o [usize]) -> impl Iterator<Item = (usize, usize)> + use<'o> {
        let (ranks, is_ring) = (order.len(), self.shape == Shape::Ring);
        let forth =
            (0..if is_ring { ranks } else { ranks - 1 }).map(move |i| (order[i], order[(i + 1) % ranks]));
        let back = (1..if is_ring { 1 } else { ranks }).map(move |i| (order[i], order[i - 1]));
        forth.chain(back)
    }

    fn key(&self, order: &[usize]) -> Key {
        let segment = self.bytes / self.links.ranks as f64;
        let worst = Key { slowest_s_per_byte: 0.0, total_s: 0.0 };
        self.crossed(order).fold(worst, |key, (from, to)| {
            let link = self.links.link(from, to);
            Key {
                slowest_s_per_byte: key.slowest_s_per_byte.max(1.0 / link.bytes_per_s),
                total_s: key.total_s + link.seconds(segment),
            }
        })
    }

    /// The cost model of this module.
    fn seconds(&self, order: &[usize]) -> f64 {
        let latencies: f64 = self.crossed(order).map(|(from, to)| self.links.link(from, to).latency_s).sum();
        let slowest = self.key(order).slowest_s_per_byte;
        let ranks = self.links.ranks as f64;
        if self.shape == Shape::Ring {
            return 2.0 * (ranks - 1.0) / ranks * (self.bytes * slowest + latencies);
        }
        let inner = order[1..order.len() - 1].iter().map(|&rank| 2.0 / self.links.interface(rank));
        let slowest = inner.fold(slowest, f64::max);
        let chunk = self.bytes.min(CHUNK_BYTES);
        let hops = self.crossed(order).map(|(from, to)| chunk / self.links.link(from, to).bytes_per_s);
        // The last chunk leaves after all others, and then has its own way to go.
        (self.bytes - chunk) * slowest + latencies + hops.sum::<f64>()
    }

    /// Tries every order; of a ring, those that begin with rank 0.
    fn best_of_all(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.links.ranks).collect();
        let (mut best, mut key) = (order.clone(), self.key(&order));
        let fixed = usize::from(self.shape == Shape::Ring);
        while next_permutation(&mut order[fixed..]) {
            let candidate = self.key(&order);
            if candidate.is_better_than(key) {
                (best, key) = (order.clone(), candidate);
            }
        }
        best
    }

    /// Improves a few orders, step by step, and takes the best.
    fn best_of_some(&self) -> Vec<usize> {
        let ranks = self.links.ranks;
        let mut looks = LOOKS_MAX / ranks;
        let mut best: Vec<usize> = (0..ranks).collect();
        let mut key = self.key(&best);
        let starts = (0..ranks).step_by(ranks.div_ceil(STARTS_MAX)).map(|start| self.nearest_first(start));
        for mut order in starts.chain([best.clone()]).collect::<Vec<_>>() {
            let candidate = self.improve(&mut order, &mut looks);
            if candidate.is_better_than(key) {
                (best, key) = (order, candidate);
            }
        }
        best
    }

    /// From each rank to the nearest one that is left.
    fn nearest_first(&self, start: usize) -> Vec<usize> {
        let mut left: Vec<usize> = (0..self.links.ranks).filter(|&rank| rank != start).collect();
        let (mut order, mut last) = (vec![start], start);
        let segment = self.bytes / self.links.ranks as f64;
        let distance = |from: usize, to: usize| self.links.link(from, to).seconds(segment);
        let nearest = |last: usize, left: &[usize]| {
            (0..left.len()).min_by(|&a, &b| distance(last, left[a]).total_cmp(&distance(last, left[b])))
        };
        while let Some(position) = nearest(last, &left) {
            last = left.swap_remove(position);
            order.push(last);
        }
        order
    }

    /// Changes the order step by step while that makes it better, and so many orders may be looked at.
    fn improve(&self, order: &mut Vec<usize>, looks: &mut usize) -> Key {
        let mut key = self.key(order);
        loop {
            let before = key;
            for change in changes(order.len()) {
                if *looks == 0 {
                    return key;
                }
                *looks -= 1;
                let candidate = change.applied_to(order);
                let candidate_key = self.key(&candidate);
                if candidate_key.is_better_than(key) {
                    (*order, key) = (candidate, candidate_key);
                }
            }
            if !key.is_better_than(before) {
                return key;
            }
        }
    }
}

/// A step of the local search.
enum Change {
    /// A part is turned round.
    Turn(Range<usize>),
    /// A part is put where `at` others are before it.
    Move { part: Range<usize>, at: usize },
}

impl Change {
    fn applied_to(&self, order: &[usize]) -> Vec<usize> {
        let mut order = order.to_vec();
        match self {
            Self::Turn(part) => order[part.clone()].reverse(),
            Self::Move { part, at } => {
                let part: Vec<usize> = order.drain(part.clone()).collect();
                order.splice(at..at, part);
            }
        }
        order
    }
}

/// All steps that the local search knows: turns of any part, and moves of short ones.
fn changes(ranks: usize) -> impl Iterator<Item = Change> {
    let parts = move |lengths: Range<usize>| {
        lengths.flat_map(move |length| (0..=ranks - length).map(move |start| start..start + length))
    };
    let moves = move |part: Range<usize>| {
        let elsewhere = (0..=ranks - part.len()).filter(move |&at| at != part.start);
        elsewhere.map(move |at| Change::Move { part: part.clone(), at })
    };
    parts(2..ranks).map(Change::Turn).chain(parts(1..MOVED_MAX.min(ranks)).flat_map(moves))
}

/// The next one in lexicographic order; false after the last.
fn next_permutation(items: &mut [usize]) -> bool {
    let Some(pivot) = items.windows(2).rposition(|pair| pair[0] < pair[1]) else { return false };
    let Some(successor) = items.iter().rposition(|&item| item > items[pivot]) else { return false };
    items.swap(pivot, successor);
    items[pivot + 1..].reverse();
    true
}

#[cfg(test)]
mod tests;
