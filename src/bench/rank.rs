//! One rank of a measurement.

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use mattock_collectives::{
    Buffer, Generation, Group, GroupConfig, Identity, Node, NodeConfig, Rank, Ring, RingSpec, SaturatingSum,
    WorldSize,
};
use mattock_coordinator::WorkerId;

use super::{Assignment, Operation, Sample, Work, work};
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
    let mut lines = io::stdin().lock().lines();
    let mut line = || lines.next().context("the parent has ended")?.context("cannot read standard input");
    let assignment: Assignment = serde_json::from_str(&line()?)?;
    let node = start(&assignment)?;
    writeln!(out, "{}", serde_json::to_string(&node.local_addr())?)?;
    out.flush()?;
    let addresses: Vec<SocketAddr> = serde_json::from_str(&line()?)?;
    let group = node.join_ring(spec(&assignment, &addresses)?)?;
    for &bytes in &assignment.work.sizes {
        let sample =
            measure(&group, &assignment.work, bytes).inspect_err(|_| {
                let history: String = group.history().iter().map(|record| format!("  {record}\n")).collect();
                eprint!("{history}");
            })?;
        if assignment.rank == 0 {
            writeln!(out, "{}", sample.json()?)?;
            out.flush()?;
        }
    }
    group.barrier().wait()?;
    group.close();
    Ok(())
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

fn spec(assignment: &Assignment, addresses: &[SocketAddr]) -> anyhow::Result<RingSpec> {
    let world = WorldSize::new(assignment.ranks).context("a group has members")?;
    let ring = Ring::new(Rank(assignment.rank), world, Generation(0)).context("a rank is within its ring")?;
    let name = |rank: Rank| WorkerId(rank.0.into()).dns_name();
    let next = *addresses.get(ring.next().0 as usize).context("an address is missing")?;
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
        _ => (group.transport().to_string(), group.algorithm(bytes as usize).into()),
    };
    Ok(Sample {
        bytes,
        count,
        element: operation.element().into(),
        time_us: seconds * 1e6,
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
