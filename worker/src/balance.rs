//! Who computes how many micro-batches: fewer for a worker that is merely slow.
//!
//! At each commit every rank tells how long a micro-batch has taken it, so all know the same times, and all come to the same
//! next shares by the same arithmetic, without a word from the coordinator. A share is a stretch of a step's micro-batches, in
//! the order of ranks; who computes which leaves no trace in the result.
//!
//! A rank's time is the median of its last steps. Shares change only where a step would take a tenth less, for some steps in
//! a row, and then not again for a while: what is tossed to and fro costs more than it saves.
//!
//! # Invariants
//! 1. Every micro-batch belongs to one rank.
//! 2. Whoever has one keeps one at least, so that its time stays known.
//! 3. The same times give the same shares, on every rank: all integers, no clock.
//!
//! Deliberately absent: times of an earlier ring. Who is new would not know them, and all must know the same.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;

/// Steps over which a time is a median; it is not known before.
const WINDOW: usize = 5;
/// A step must be better by one part of so many.
const GAIN: u64 = 10;
/// In so many steps in a row.
const STEADY: u32 = 3;
/// Steps from one change to the next, at least.
const REST: u32 = 8;

/// How long a step takes, from the times of single micro-batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Each rank computes its micro-batches by itself; all wait for the last.
    Alone,
    /// All compute in rounds of one micro-batch at most, and each round waits for its slowest.
    Rounds,
}

impl Pace {
    /// Microseconds of a step.
    fn makespan(self, counts: &[u32], times: &[u32]) -> u64 {
        let each = || counts.iter().zip(times).map(|(&count, &time)| (u64::from(count), u64::from(time)));
        match self {
            Self::Alone => each().map(|(count, time)| count * time).max().unwrap_or(0),
            Self::Rounds => {
                // Rounds beyond those of slower ranks are those of the faster alone.
                let mut by_time: Vec<(u64, u64)> = each().map(|(count, time)| (time, count)).collect();
                by_time.sort_unstable_by_key(|&(time, _)| Reverse(time));
                let mut done = 0;
                let cost = |(time, count): (u64, u64)| {
                    let more = count.saturating_sub(done);
                    done += more;
                    more * time
                };
                by_time.into_iter().map(cost).sum()
            }
        }
    }

    /// Shares under which a step takes least, or nearly so, with one micro-batch for each rank at least.
    fn best(self, micro_batches: u32, times: &[u32]) -> Vec<u32> {
        let mut counts = vec![1; times.len()];
        let left = micro_batches - times.len() as u32;
        match self {
            Self::Alone => {
                let after =
                    |rank: usize, count: u32| Reverse((u64::from(count + 1) * u64::from(times[rank]), rank));
                let mut next: BinaryHeap<_> = (0..times.len()).map(|rank| after(rank, 1)).collect();
                for _ in 0..left {
                    let Some(Reverse((_, rank))) = next.pop() else { break };
                    counts[rank] += 1;
                    next.push(after(rank, counts[rank]));
                }
            }
            Self::Rounds => {
                let mut ranks: Vec<usize> = (0..times.len()).collect();
                ranks.sort_by_key(|&rank| (times[rank], rank));
                // Rounds of the fastest ranks, so many that a micro-batch costs least.
                let cost = |many: &u32| {
                    let slowest = u64::from(times[ranks[*many as usize - 1]]);
                    // In millionths, for a fraction.
                    (slowest * 1_000_000 / u64::from(*many), Reverse(*many))
                };
                let many = (1..=times.len() as u32).min_by_key(cost).unwrap_or(1);
                for (place, &rank) in (0..).zip(&ranks[..many as usize]) {
                    counts[rank] += left / many + u32::from(place < left % many);
                }
            }
        }
        counts
    }
}

/// The shares of a ring's ranks, from step to step.
#[derive(Debug, Clone)]
pub(crate) struct Balance {
    pace: Pace,
    counts: Vec<u32>,
    /// By rank: microseconds of a micro-batch in the last steps, the newest last.
    recent: Vec<VecDeque<u32>>,
    /// Steps in a row in which other shares would have been better.
    better: u32,
    /// Steps until shares may change again.
    rest: u32,
}

/// Shares that change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// By rank.
    pub(crate) before: Vec<u32>,
    pub(crate) after: Vec<u32>,
    /// Microseconds of a micro-batch.
    pub(crate) times: Vec<u32>,
}

impl Balance {
    /// Of a ring whose ranks begin with so many micro-batches each.
    pub(crate) fn new(counts: Vec<u32>, pace: Pace) -> Self {
        let recent = counts.iter().map(|_| VecDeque::with_capacity(WINDOW)).collect();
        Self { pace, counts, recent, better: 0, rest: 0 }
    }

    /// How many micro-batches each rank has.
    pub(crate) fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// The micro-batches of a rank.
    pub(crate) fn share(&self, rank: u32) -> Range<u32> {
        let rank = rank as usize;
        let start = self.counts[..rank].iter().sum();
        start..start + self.counts[rank]
    }

    /// Takes in how many microseconds a micro-batch took each rank in a step, 0 where it had none; says how shares change from
    /// the next step on, if they do.
    pub(crate) fn note(&mut self, times: &[u32]) -> Option<Change> {
        for (recent, &time) in self.recent.iter_mut().zip(times) {
            if time > 0 {
                if recent.len() == WINDOW {
                    recent.pop_front();
                }
                recent.push_back(time);
            }
        }
        self.rest = self.rest.saturating_sub(1);
        let known = |recent: &VecDeque<u32>| median(recent).filter(|_| recent.len() == WINDOW);
        let times: Vec<u32> = self.recent.iter().map(known).collect::<Option<_>>()?;
        let micro_batches: u32 = self.counts.iter().sum();
        if micro_batches < times.len() as u32 {
            return None;
        }
        let best = self.pace.best(micro_batches, &times);
        let (now, then) = (self.pace.makespan(&self.counts, &times), self.pace.makespan(&best, &times));
        self.better = if then * GAIN <= now * (GAIN - 1) { self.better + 1 } else { 0 };
        if self.better < STEADY || self.rest > 0 {
            return None;
        }
        (self.better, self.rest) = (0, REST);
        let before = std::mem::replace(&mut self.counts, best);
        Some(Change { before, after: self.counts.clone(), times })
    }
}

/// The middle one, the lower of two; none of nothing.
pub(crate) fn median<'t>(times: impl IntoIterator<Item = &'t u32>) -> Option<u32> {
    let mut sorted: Vec<u32> = times.into_iter().copied().collect();
    sorted.sort_unstable();
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use mattock_data::keys::Stream;

    use super::*;

    fn even(micro_batches: u32, ranks: u32) -> Vec<u32> {
        (0..ranks).map(|rank| micro_batches * (rank + 1) / ranks - micro_batches * rank / ranks).collect()
    }

    /// Steps with these times: the changes, each with its step.
    fn steps(
        balance: &mut Balance,
        count: usize,
        mut times: impl FnMut(usize) -> Vec<u32>,
    ) -> Vec<(usize, Change)> {
        (0..count).filter_map(|step| Some((step, balance.note(&times(step))?))).collect()
    }

    #[test]
    fn a_slow_rank_gets_fewer_once_it_is_slow_for_some_steps() {
        let mut balance = Balance::new(vec![2, 2, 3], Pace::Alone);
        let times = vec![1000, 1100, 4000];
        let changes = steps(&mut balance, 50, |_| times.clone());
        let change = Change { before: vec![2, 2, 3], after: vec![3, 3, 1], times: times.clone() };
        assert_eq!(changes, [(WINDOW + STEADY as usize - 2, change)]);
        assert_eq!([0, 1, 2].map(|rank| balance.share(rank)), [0..3, 3..6, 6..7]);
    }

    #[test]
    fn what_lasts_for_a_step_or_two_changes_nothing() {
        let mut balance = Balance::new(even(12, 3), Pace::Alone);
        let times = |step: usize| if step % 6 < 2 { vec![1000, 1000, 9000] } else { vec![1000; 3] };
        assert_eq!(steps(&mut balance, 200, times), []);
    }

    #[test]
    fn who_is_fast_again_gets_its_share_back() {
        let mut balance = Balance::new(even(12, 3), Pace::Alone);
        let times = |step: usize| vec![1000, 1000, if step < 50 { 3000 } else { 1000 }];
        let changes = steps(&mut balance, 100, times);
        assert_eq!(changes.len(), 2, "{changes:?}");
        assert!(changes[1].0 > 50 && balance.counts() == [4, 4, 4], "{changes:?}");
    }

    #[test]
    fn a_rank_without_a_micro_batch_is_not_known_and_nothing_changes() {
        let mut balance = Balance::new(vec![0, 1, 1], Pace::Alone);
        assert_eq!(steps(&mut balance, 20, |_| vec![0, 1000, 9000]), []);
    }

    /// Ranks of any speed, whose times vary by some percent.
    #[test]
    fn shares_come_near_the_best_and_stay_there() {
        for seed in 0..300 {
            let mut stream = Stream::new(seed);
            let mut draw = |from: u32, to: u32| from + (stream.uniform() * f64::from(to - from + 1)) as u32;
            let ranks = draw(2, 9);
            let micro_batches = draw(ranks, 64);
            let pace = if draw(0, 1) == 0 { Pace::Alone } else { Pace::Rounds };
            let speeds: Vec<u32> = (0..ranks).map(|_| draw(1000, 8000)).collect();
            let mut balance = Balance::new(even(micro_batches, ranks), pace);
            let mut changes = 0;
            for _ in 0..200 {
                let jitter = |speed: &u32| speed * draw(97, 103) / 100;
                let times: Vec<u32> = speeds.iter().map(jitter).collect();
                changes += u32::from(balance.note(&times).is_some());
                let all: Vec<u32> = (0..ranks).flat_map(|rank| balance.share(rank)).collect();
                assert_eq!(all, (0..micro_batches).collect::<Vec<u32>>(), "seed {seed}: each once");
                assert!(balance.counts().iter().all(|&count| count > 0), "seed {seed}: {balance:?}");
            }
            assert!(changes <= 2, "seed {seed}: {changes} changes");
            let best = pace.makespan(&pace.best(micro_batches, &speeds), &speeds);
            let reached = pace.makespan(balance.counts(), &speeds);
            assert!(reached * 100 <= best * 120, "seed {seed}: {reached} us where {best} is possible");
        }
    }

    /// All ways to share so many among these ranks, one each at least.
    fn ways(micro_batches: u32, ranks: usize) -> Vec<Vec<u32>> {
        if ranks == 1 {
            return vec![vec![micro_batches]];
        }
        let first = 1..=micro_batches + 1 - ranks as u32;
        let rest = |first| ways(micro_batches - first, ranks - 1).into_iter().map(move |rest| (first, rest));
        first.flat_map(rest).map(|(first, rest)| [vec![first], rest].concat()).collect()
    }

    #[test]
    fn no_shares_are_better_or_by_little() {
        for seed in 0..200 {
            let mut stream = Stream::new(seed);
            let mut draw = |from: u32, to: u32| from + (stream.uniform() * f64::from(to - from + 1)) as u32;
            let ranks = draw(1, 4) as usize;
            let micro_batches = draw(ranks as u32, 12);
            let times: Vec<u32> = (0..ranks).map(|_| draw(100, 2000)).collect();
            for (pace, percent) in [(Pace::Alone, 100), (Pace::Rounds, 125)] {
                let found = pace.makespan(&pace.best(micro_batches, &times), &times);
                let all = ways(micro_batches, ranks);
                let best = all.iter().map(|counts| pace.makespan(counts, &times)).min().unwrap();
                assert!(found * 100 <= best * percent, "seed {seed}: {found} of {best}, {pace:?}, {times:?}");
            }
        }
    }
}
