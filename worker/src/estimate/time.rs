//! Seconds of a step, where it is known how fast devices, links and storage are.

use serde::Serialize;

use super::Estimate;
use crate::plan::Shard;

/// How fast things are; what nobody has said is left out.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rates {
    /// Floating-point operations that a worker gets done in a second.
    pub flops: Option<f64>,
    /// Bytes that a worker sends in a second.
    pub link: Option<f64>,
    /// Bytes that a worker writes to storage in a second.
    pub store: Option<f64>,
}

/// Seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Times {
    /// Of forward and backward.
    pub compute: Option<f64>,
    /// Of all that is sent.
    pub exchange: Option<f64>,
    /// Of the exchange, what computation may hide at best.
    pub hidden: Option<f64>,
    /// Of a step, where as much is hidden.
    pub step: Option<f64>,
    /// Until a checkpoint is in storage; training goes on meanwhile.
    pub checkpoint: Option<f64>,
}

impl Times {
    /// Of an estimate made for this kind of sharding.
    pub fn new(estimate: &Estimate, shard: Shard, rates: &Rates) -> Self {
        let Rates { flops, link, store } = *rates;
        let compute = flops.map(|rate| estimate.flops / rate);
        let exchange = link.map(|rate| estimate.wire.total() as f64 / rate);
        let hidden = compute.zip(link).map(|(compute, link)| hidden(estimate, shard, compute, link));
        let step = compute.zip(exchange).zip(hidden);
        Self {
            compute,
            exchange,
            hidden,
            step: step.map(|((compute, exchange), hidden)| compute + exchange - hidden),
            // Each writes its share.
            checkpoint: store
                .map(|rate| estimate.checkpoint_bytes as f64 / f64::from(estimate.workers) / rate),
        }
    }
}

/// Blocks leave while earlier ones still run backward: of the last micro-batch, or in `full` sharding of each, where the next
/// block's parameters come meanwhile, too.
fn hidden(estimate: &Estimate, shard: Shard, compute: f64, link: f64) -> f64 {
    let wire = &estimate.wire;
    let behind = (wire.sums - wire.last_sums) as f64 / link;
    match shard {
        Shard::None | Shard::Optimizer => {
            let backward = compute / estimate.micro_batches.max(1) as f64 * 2.0 / 3.0;
            behind.min(backward)
        }
        Shard::Full => (behind + wire.parameters as f64 / link).min(compute),
    }
}
