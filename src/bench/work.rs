//! What is repeated and timed, and what must come out of it.

use std::sync::Arc;
use std::time::Instant;

use mattock_collectives::{
    Buffer, CollectiveError, Group, Mean, Rank, Reduction, SaturatingSum, Sum, copy_past_caches, segment,
};

use super::{Operation, Work};

/// One measurement repeats the operation for about this long.
const RUN_SECONDS: f64 = 0.05;
/// Repetitions are no more than this.
const REPEATS_MAX: f64 = 5000.0;
/// Values of the inputs repeat after so many elements.
const PERIOD: usize = 97;
/// Elements that share a bound.
const BLOCK: usize = 256;
/// Whose input is spread, or who receives.
const ROOT: Rank = Rank(0);

/// Seconds of one operation on `count` elements, and how many elements of this rank's result are wrong.
pub(super) fn run(group: &Group, work: &Work, count: usize) -> anyhow::Result<(f64, u32)> {
    let &Work { operation, runs, in_place, .. } = work;
    let (ranks, own) = (group.ring().world_size().get() as usize, group.ring().rank().0 as usize);
    let bench = Floats { group, runs };
    match operation {
        Operation::F32 => {
            let mut sums = Summing::<Sum<f32>, _>::new(group, count, in_place, |i| element(i, own) as f32);
            let seconds = slowest(group, runs, || sums.reduce(group))?;
            Ok((seconds, sums.wrong(group, |i| summed(i, ranks) as f32)?))
        }
        Operation::Mean => {
            let mut means = Summing::<Mean<f32>, _>::new(group, count, in_place, |i| element(i, own) as f32);
            let seconds = slowest(group, runs, || means.reduce(group))?;
            Ok((seconds, means.wrong(group, |i| summed(i, ranks) as f32 / ranks as f32)?))
        }
        Operation::Exact => exact(group, count, work),
        Operation::Copy => copy(group, count, runs),
        Operation::Broadcast | Operation::Reduce | Operation::Gather | Operation::Scatter => {
            bench.rooted(operation, count)
        }
        Operation::ReduceScatter if in_place => bench.reduce_scatter_in_place(count),
        Operation::ReduceScatter => bench.run(
            count,
            |input, output| group.reduce_scatter::<Sum<f32>>(input, output).wait(),
            |i| summed(own * (count / ranks) + i, ranks) as f32,
            count / ranks,
        ),
        Operation::AllGather => bench.run(
            count / ranks,
            |input, output| group.all_gather(input, count, output).wait(),
            |i| element(i % (count / ranks), i / (count / ranks)) as f32,
            count,
        ),
        Operation::SendReceive => {
            let (ring, before) = (group.ring(), (own + ranks - 1) % ranks);
            bench.run(
                count,
                |input, output| {
                    let sent = group.send(ring.next(), 0, input);
                    let received = group.receive(ring.prev(), 0, output).wait()?;
                    sent.wait().map(|()| received)
                },
                |i| element(i, before) as f32,
                count,
            )
        }
        Operation::AllToAll => bench.run(
            count,
            |input, output| group.all_to_all(input, output).wait(),
            |i| element(own * (count / ranks) + i % (count / ranks), i / (count / ranks)) as f32,
            count,
        ),
    }
}

/// Operations on f32.
struct Floats<'a> {
    group: &'a Group,
    runs: u32,
}

impl Floats<'_> {
    /// An operation in which rank 0 gives or receives.
    fn rooted(&self, operation: Operation, count: usize) -> anyhow::Result<(f64, u32)> {
        let group = self.group;
        let (ranks, rank) = (group.ring().world_size().get() as usize, group.ring().rank());
        let (own, part) = (rank.0 as usize, count / ranks);
        let at_root = |len: usize| if rank == ROOT { len } else { 0 };
        match operation {
            Operation::Broadcast => self.run(
                count,
                |input, output| match rank {
                    ROOT => group.broadcast(input).wait().map(|()| output),
                    _ => group.receive_broadcast(ROOT, output).wait(),
                },
                |i| element(i, 0) as f32,
                count - at_root(count),
            ),
            Operation::Reduce => self.run(
                count,
                |input, output| group.reduce::<Sum<f32>>(ROOT, input, output).wait(),
                |i| summed(i, ranks) as f32,
                at_root(count),
            ),
            Operation::Gather => self.run(
                part,
                |input, output| group.gather(ROOT, input, output).wait(),
                |i| element(i % part, i / part) as f32,
                at_root(count),
            ),
            _ => self.run(
                count,
                |input, output| match rank {
                    ROOT => group.scatter(input).wait(),
                    _ => group.receive_scatter(ROOT, output).wait(),
                },
                |i| element(own * part + i, 0) as f32,
                part,
            ),
        }
    }

    fn reduce_scatter_in_place(&self, count: usize) -> anyhow::Result<(f64, u32)> {
        let (group, rank) = (self.group, self.group.ring().rank().0);
        let ranks = group.ring().world_size().get();
        let mut buffer = group.buffer(count);
        let step = |buffer: &mut Buffer<f32>| {
            *buffer = group.reduce_scatter_in_place::<Sum<f32>>(std::mem::take(buffer)).wait()?;
            Ok(())
        };
        let seconds = slowest(group, self.runs, || step(&mut buffer))?;
        fill(&mut buffer, |i| element(i, rank as usize) as f32);
        step(&mut buffer)?;
        let own = segment(count, ranks, rank);
        Ok((seconds, wrong(&buffer[own.clone()], |i| summed(own.start + i, ranks as usize) as f32)))
    }

    /// Repeats `step` on an input of that length; the result must be `expected`, and of the length that goes with it.
    fn run(
        &self,
        input_len: usize,
        step: impl Fn(Arc<Buffer<f32>>, Buffer<f32>) -> Result<Buffer<f32>, CollectiveError>,
        expected: impl Fn(usize) -> f32,
        expected_len: usize,
    ) -> anyhow::Result<(f64, u32)> {
        let rank = self.group.ring().rank().0 as usize;
        let mut input = self.group.buffer(input_len);
        fill(&mut input, |i| element(i, rank) as f32);
        let (input, mut output) = (Arc::new(input), self.group.buffer(expected_len));
        let seconds = slowest(self.group, self.runs, || {
            output = step(Arc::clone(&input), std::mem::take(&mut output))?;
            Ok(())
        })?;
        anyhow::ensure!(
            output.len() == expected_len,
            "a result has {} elements, not {expected_len}",
            output.len()
        );
        Ok((seconds, wrong(&output, expected)))
    }
}

/// The trainer's sums.
fn exact(group: &Group, count: usize, work: &Work) -> anyhow::Result<(f64, u32)> {
    let &Work { runs, in_place, .. } = work;
    let (ranks, own) = (group.ring().world_size().get() as usize, group.ring().rank().0 as usize);
    let mut integers = Summing::<Sum<i32>, _>::new(group, count, in_place, |i| element(i, own) as i32);
    let blocks = count.div_ceil(BLOCK);
    let mut bounds = Summing::<SaturatingSum, _>::new(group, blocks, in_place, |i| element(i, own));
    let both = || integers.reduce(group).and_then(|()| bounds.reduce(group));
    let seconds = slowest(group, runs, both)?;
    let errors = integers.wrong(group, |i| summed(i, ranks) as i32)?;
    Ok((seconds, errors + bounds.wrong(group, |i| summed(i, ranks))?))
}

/// No exchange at all.
fn copy(group: &Group, count: usize, runs: u32) -> anyhow::Result<(f64, u32)> {
    let (input, mut output) = (vec![1.0f32; count], vec![0.0f32; count]);
    let copy = || {
        let (from, to) = (std::hint::black_box(&input), &mut output);
        copy_past_caches(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
        Ok(())
    };
    Ok((slowest(group, runs, copy)?, wrong(&output, |_| 1.0)))
}

/// An all-reduce that is repeated.
struct Summing<R: Reduction, V> {
    /// Nothing in place.
    input: Option<Arc<Buffer<R::Element>>>,
    output: Buffer<R::Element>,
    value: V,
}

impl<R: Reduction, V: Fn(usize) -> R::Element> Summing<R, V> {
    fn new(group: &Group, count: usize, in_place: bool, value: V) -> Self {
        let filled = || {
            let mut buffer = group.buffer(count);
            fill(&mut buffer, &value);
            buffer
        };
        match in_place {
            true => Self { input: None, output: filled(), value },
            false => Self { input: Some(Arc::new(filled())), output: group.buffer(count), value },
        }
    }

    /// In place, over the last result.
    fn reduce(&mut self, group: &Group) -> anyhow::Result<()> {
        let output = std::mem::take(&mut self.output);
        self.output = match &self.input {
            Some(input) => group.all_reduce_now::<R>(Arc::clone(input), output)?,
            None => group.all_reduce_in_place_now::<R>(output)?,
        };
        Ok(())
    }

    /// How many elements of the result are not as expected; in place, of one more that begins anew.
    fn wrong(&mut self, group: &Group, expected: impl Fn(usize) -> R::Element) -> anyhow::Result<u32>
    where
        R::Element: PartialEq,
    {
        if self.input.is_none() {
            fill(&mut self.output, &self.value);
            self.reduce(group)?;
        }
        Ok(wrong(&self.output, expected))
    }
}

fn fill<E>(buffer: &mut [E], value: impl Fn(usize) -> E) {
    buffer.iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
}

/// Seconds that the slowest rank takes for the work: the median over runs.
fn slowest(group: &Group, runs: u32, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    // Once to warm up, then to see how long it takes.
    timed(group, 1, &mut work)?;
    let first = timed(group, 1, &mut work)?;
    let repeats = (RUN_SECONDS / first).clamp(1.0, REPEATS_MAX).ceil() as u32;
    let mut seconds =
        (0..runs).map(|_| timed(group, repeats, &mut work)).collect::<anyhow::Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Seconds for one of several repetitions, as the slowest rank sees it.
fn timed(group: &Group, repeats: u32, work: &mut impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    group.barrier_now()?;
    let start = Instant::now();
    (0..repeats).try_for_each(|_| work())?;
    let own = start.elapsed().as_secs_f64() / f64::from(repeats);
    let ranks = group.ring().world_size().get() as usize;
    let all = group.all_gather::<f64>(Arc::new(vec![own].into()), ranks, Buffer::default()).wait()?;
    Ok(all.iter().copied().fold(0.0, f64::max))
}

/// A rank's element: small enough for sums to be exact in f32.
fn element(i: usize, rank: usize) -> u32 {
    (i % PERIOD + rank) as u32
}

/// The sum of all ranks' elements.
fn summed(i: usize, ranks: usize) -> u32 {
    element(i, 0) * ranks as u32 + (ranks * (ranks - 1) / 2) as u32
}

/// Elements that are not what they must be.
fn wrong<E: PartialEq + Copy>(output: &[E], expected: impl Fn(usize) -> E) -> u32 {
    output.iter().enumerate().filter(|&(i, &x)| x != expected(i)).count() as u32
}
