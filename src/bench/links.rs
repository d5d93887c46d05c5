//! Measures the links between all ranks, and plans the order in which to use them.
//!
//! Pairs meet in rounds, so that no rank takes part in two measurements at once; the next round begins when all have ended the
//! last. What is not measured: whether links share a wire that carries less than the sum of them.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use mattock_collectives::topology::{Link, Links, Plan, Route, Shape, plan, predict};
use mattock_collectives::{Node, Rank};
use serde_json::{Value, json};

use super::pair::{self, Measured};
use super::rank::{Lines, spec};
use super::tournament::{opponent, rounds};
use super::{Assignment, Launch, Ranks, Task};
use crate::exit::Failure;

/// What was measured, and what follows from it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Survey {
    /// By rank: its links to all others, in their order.
    links: Vec<Vec<Measured>>,
    known: Links,
    pub(crate) plan: Plan,
}

/// Measures all links of a launch by payloads that take at least so long, and plans all-reduces of so many bytes.
///
/// # Errors
/// Bad input where there is one rank only; a failed run where a rank fails.
pub(crate) fn survey(launch: &Launch, long_enough: Duration, bytes: u64) -> Result<Survey, Failure> {
    if launch.ranks < 2 {
        return Err(Failure::bad_input(anyhow!("one rank has no links: give --ranks 2 or more")));
    }
    let mut ranks = launch.start(&Task::Links { long_enough })?;
    let outcome = collect(&mut ranks);
    let links = ranks.end(outcome)?;
    let measured = |from: Rank, to: Rank| {
        let behind = usize::from(to > from);
        let Measured { latency_s, bytes_per_s, .. } = links[from.0 as usize][to.0 as usize - behind];
        Link { latency_s, bytes_per_s }
    };
    let known = Links::new(links.len(), measured).map_err(Failure::run)?;
    let plan = plan(&known, bytes);
    Ok(Survey { links, known, plan })
}

/// Hears what each rank measured, round by round.
fn collect(ranks: &mut Ranks) -> anyhow::Result<Vec<Vec<Measured>>> {
    ranks.introduce()?;
    let mut links = vec![Vec::new(); ranks.0.len()];
    for round in 0..rounds(links.len() as u32) {
        for (rank, links) in ranks.0.iter_mut().zip(&mut links) {
            let line = rank.line()?.with_context(|| format!("a rank has ended in round {round}"))?;
            links.extend(serde_json::from_str::<Option<Measured>>(&line)?);
        }
        ranks.0.iter_mut().try_for_each(|rank| rank.tell("next"))?;
    }
    for (rank, links) in (0..).zip(&mut links) {
        links.sort_by_key(|link| link.to);
        let heard: Vec<u32> = links.iter().map(|link| link.to).collect();
        let others: Vec<u32> = (0..ranks.0.len() as u32).filter(|&other| other != rank).collect();
        ensure!(heard == others, "rank {rank} has measured its links to {heard:?}, not to {others:?}");
    }
    Ok(links)
}

/// One rank's part.
pub(super) fn serve(
    node: &Node,
    assignment: &Assignment,
    long_enough: Duration,
    lines: &mut Lines<'_>,
) -> anyhow::Result<()> {
    let addresses = lines.addresses()?;
    let ranks = assignment.ranks;
    for round in 0..rounds(ranks) {
        let measured = match opponent(assignment.rank, round, ranks) {
            None => None,
            Some(other) => {
                let mut pair = [assignment.rank, other];
                pair.sort_unstable();
                let group = node.join_ring(spec(assignment.rank, &pair, u64::from(round), &addresses)?)?;
                let measured = pair::measure(&group, other, long_enough)?;
                group.close();
                Some(measured)
            }
        };
        lines.say(&measured)?;
        lines.next()?;
    }
    Ok(())
}

impl Survey {
    /// Microseconds that an all-reduce of so many bytes is predicted to take in this order.
    pub(crate) fn predict_us(&self, shape: Shape, order: &[Rank], bytes: u64) -> Option<f64> {
        predict(&self.known, shape, order, bytes).map(|route| route.seconds * 1e6)
    }

    /// As one line.
    pub(crate) fn json(&self) -> Value {
        let link = |from: usize, link: &Measured| {
            let Measured { to, latency_s, bytes_per_s, transport } = link;
            let (latency_us, bandwidth) = (latency_s * 1e6, bytes_per_s / 1e9);
            json!({ "from": from, "to": to, "latency_us": latency_us, "bandwidth_GBps": bandwidth, "transport": transport })
        };
        let links = self
            .links
            .iter()
            .enumerate()
            .flat_map(|(from, links)| links.iter().map(move |to| link(from, to)));
        let route = |route: &Route| {
            let order: Vec<u32> = route.order.iter().map(|rank| rank.0).collect();
            json!({
                "order": order,
                "predicted_us": route.seconds * 1e6,
                "slowest": { "from": route.slowest.0.0, "to": route.slowest.1.0 },
            })
        };
        let Plan { bytes, given, ring, line } = &self.plan;
        json!({
            "ranks": self.links.len(),
            "links": links.collect::<Vec<_>>(),
            "bytes": bytes,
            "given": route(given),
            "ring": route(ring),
            "line": route(line),
            "best": self.plan.best().shape.to_string(),
            "reason": self.plan.to_string(),
        })
    }
}

impl Survey {
    /// A number for each link, one line a sender.
    fn table(&self, f: &mut fmt::Formatter<'_>, what: &str, value: impl Fn(&Measured) -> f64) -> fmt::Result {
        write!(f, "{what:<16}")?;
        (0..self.links.len()).try_for_each(|to| write!(f, "{:>12}", format!("to {to}")))?;
        writeln!(f)?;
        for (from, links) in self.links.iter().enumerate() {
            write!(f, "{:<16}", format!("from {from}"))?;
            let (before, behind) = links.split_at(from);
            before.iter().try_for_each(|link| write!(f, "{:>12.1}", value(link)))?;
            write!(f, "{:>12}", "-")?;
            behind.iter().try_for_each(|link| write!(f, "{:>12.1}", value(link)))?;
            writeln!(f)?;
        }
        writeln!(f)
    }
}

impl fmt::Display for Survey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.table(f, "latency, us", |link| link.latency_s * 1e6)?;
        self.table(f, "bandwidth, MB/s", |link| link.bytes_per_s / 1e6)?;
        let links = self.links.iter().flatten();
        let mut transports: Vec<&str> = links.map(|link| link.transport.as_str()).collect();
        transports.sort_unstable();
        transports.dedup();
        writeln!(f, "over {}", transports.join(" and "))?;
        write!(f, "{}", self.plan)
    }
}
