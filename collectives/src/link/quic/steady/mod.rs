//! A congestion controller for long paths that lose packets: a rate and a round trip instead of losses.
//!
//! [`Steady`] is the thin part that quinn calls: it turns moments into durations since its start. What it decides is in
//! `model.rs`; `simulation.rs` runs that over simulated bottlenecks.

mod model;
mod pace;
#[cfg(test)]
mod simulation;

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use model::Model;
use pace::Pace;

pub(crate) use pace::Paces;

/// A window that quinn does not pace: [`Pace`] does.
const OPEN: u64 = 1 << 40;

/// Makes a controller for each path.
#[derive(Debug)]
pub(super) struct SteadyConfig {
    pub(super) paces: Arc<Paces>,
}

impl ControllerFactory for SteadyConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let pace = Arc::new(Pace::new(now));
        self.paces.put(pace.clone());
        Box::new(Steady { start: now, model: Model::new(mtu.into()), pace, free: Duration::ZERO })
    }
}

/// See the module.
#[derive(Clone, Debug)]
struct Steady {
    start: Instant,
    model: Model,
    pace: Arc<Pace>,
    /// When the path has taken what was scheduled, since the start.
    free: Duration,
}

impl Steady {
    fn since_start(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.start)
    }
}

impl Controller for Steady {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        let now = self.since_start(now);
        self.model.on_sent(now, bytes);
        self.pace.schedule(now, &mut self.free, bytes, self.model.pace());
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, rtt: &RttEstimator) {
        self.model.on_ack(self.since_start(now), self.since_start(sent), bytes, rtt.get());
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest: Option<u64>) {
        self.model.on_acks_end(self.since_start(now), in_flight, app_limited);
    }

    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.model.on_lost(lost_bytes, is_persistent);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.model.set_packet(new_mtu.into());
    }

    /// Where the model's count says that the path is full, quinn's own count decides: acknowledgements are in the one but
    /// not in the other.
    fn window(&self) -> u64 {
        if self.model.is_open() { OPEN } else { self.model.window() }
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.model.window();
        metrics.pacing_rate = Some((8.0 * self.model.pace()) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.model.window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
