//! One rank of a measurement.

use std::io::{self, BufRead, StdinLock, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use mattock_collectives::{
    Buffer, Generation, Group, GroupConfig, Identity, Node, NodeConfig, Rank, Ring, RingSpec, SaturatingSum,
    Shape, WorldSize,
};
use mattock_coordinator::WorkerId;
use serde::Serialize;

use super::{Assignment, Operation, Sample, Task, Work, links, work};
use crate::exit::Failure;
use crate::launch;

/// Runs `mattock bench rank`: what to do comes from standard input, results go to `out`.
///
/// # Errors
/// A failed run, whatever it is.
pub(crate) fn serve_rank(out: &mut impl Write) -> Result<(), Failure> {
    launch::die_with_parent().map_err(Failure::internal)?;
    serve(out).map_err(Failure::run)
}

fn serve(out: &mut impl Write) -> anyhow::Result<()> {
    let mut lines = Lines { input: io::stdin().lock(), output: out };
    let assignment: Assignment = serde_json::from_str(&lines.next()?)?;
    let node = start(&assignment)?;
    lines.say(&node.local_addr())?;
    match &assignment.task {
        Task::Operation(work) => serve_operation(&node, &assignment, work, &mut lines),
        Task::Links { long_enough } => links::serve(&node, &assignment, *long_enough, &mut lines),
    }
}

fn serve_operation(
    node: &Node,
    assignment: &Assignment,
    work: &Work,
    lines: &mut Lines<'_>,
) -> anyhow::Result<()> {
    let addresses = lines.addresses()?;
    let members: Vec<u32> = (0..assignment.ranks).collect();
    let spec = spec(assignment.rank, &members, 0, &addresses)?;
    let shape = if assignment.is_line { Shape::Line } else { Shape::Ring };
    let group = node.join_ring(RingSpec { ring: spec.ring.shaped(shape), ..spec })?;
    for &bytes in &work.sizes {
        let sample = measure(&group, work, bytes).inspect_err(|_| {
            let history: String = group.history().iter().map(|record| format!("  {record}\n")).collect();
            eprint!("{history}");
        })?;
        if assignment.rank == 0 {
            lines.say(&sample)?;
        }
    }
    group.barrier().wait()?;
    group.close();
    Ok(())
}

/// What is said between a rank and its parent: JSON, a line each.
pub(super) struct Lines<'a> {
    input: StdinLock<'static>,
    output: &'a mut dyn Write,
}

impl Lines<'_> {
    /// The parent's next line.
    pub(super) fn next(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let read = self.input.read_line(&mut line).context("cannot read standard input")?;
        ensure!(read > 0, "the parent has ended");
        Ok(line)
    }

    /// Where all ranks listen, which is the parent's second line.
    pub(super) fn addresses(&mut self) -> anyhow::Result<Vec<SocketAddr>> {
        Ok(serde_json::from_str(&self.next()?)?)
    }

    pub(super) fn say(&mut self, what: &impl Serialize) -> anyhow::Result<()> {
        writeln!(self.output, "{}", serde_json::to_string(what)?)?;
        Ok(self.output.flush()?)
    }
}

fn start(assignment: &Assignment) -> anyhow::Result<Node> {
    let Assignment { certificate, key, authority, bind, .. } = assignment;
    let identity = Identity {
        certificates: vec![certificate.clone()],
        private_key: key.clone(),
        root: authority.clone(),
    };
    let nonsense = |error: String| anyhow!(error);
    let transport = assignment.transport.parse().map_err(nonsense)?;
    let congestion = assignment.congestion.parse().map_err(nonsense)?;
    let group = GroupConfig { timeout: Duration::from_secs(assignment.timeout_s), ..GroupConfig::default() };
    Ok(Node::start(NodeConfig {
        group,
        transport,
        congestion,
        ..NodeConfig::new(identity, SocketAddr::new(*bind, 0))
    })?)
}

/// The place of `rank` in a ring of these members, which are in ascending order.
pub(super) fn spec(
    rank: u32,
    members: &[u32],
    generation: u64,
    addresses: &[SocketAddr],
) -> anyhow::Result<RingSpec> {
    let world = WorldSize::new(members.len() as u32).context("a group has members")?;
    let place = members.binary_search(&rank).map_err(|_| anyhow!("rank {rank} is none of {members:?}"))?;
    let ring =
        Ring::new(Rank(place as u32), world, Generation(generation)).context("a rank is in its ring")?;
    let member = |place: Rank| members[place.0 as usize];
    let name = |place: Rank| WorkerId(member(place).into()).dns_name();
    let next = *addresses.get(member(ring.next()) as usize).context("an address is missing")?;
    Ok(RingSpec { ring, next: (next, name(ring.next())), prev: name(ring.prev()) })
}

/// Measures one payload on all ranks.
fn measure(group: &Group, work: &Work, bytes: u64) -> anyhow::Result<Sample> {
    let &Work { operation, runs, in_place, .. } = work;
    let ranks = group.ring().world_size().get();
    let count = operation.count(bytes, ranks);
    let bytes = count * size_of::<f32>() as u64;
    let (seconds, errors) = work::run(group, work, count as usize)?;
    let errors = group.all_reduce_now::<SaturatingSum>(Arc::new(vec![errors].into()), Buffer::default())?[0];
    let algbw = bytes as f64 / seconds / 1e9;
    let (transport, algorithm) = match operation {
        Operation::Copy => ("none".into(), "copy".into()),
        Operation::SendReceive => (group.transport().to_string(), "direct".into()),
        _ => (group.transport().to_string(), group.algorithm(bytes as usize).into()),
    };
    Ok(Sample {
        bytes,
        count,
        element: operation.element().into(),
        time_us: seconds * 1e6,
        predicted_us: None,
        algbw,
        busbw: algbw * operation.bus_factor(ranks),
        errors: errors.into(),
        transport,
        algorithm,
        ranks,
        runs,
        in_place,
    })
}
