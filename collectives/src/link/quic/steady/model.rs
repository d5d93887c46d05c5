//! What a path can carry, and how much to have under way on it: the core of [`Steady`](super::Steady), without a clock.
//!
//! Loss says little about a long path: radio and overloaded switches lose packets whatever is sent. What says much is
//! how fast bytes are delivered and how long that takes. The product of the best rate seen lately and the shortest
//! round trip is what the path holds without a queue; a little more than that keeps it busy, and measures whether it
//! could carry more.
//!
//! ```text
//! window = rate * round trip  +  headroom * (rate * slack + SHARE packets)          pace = 1.125 * rate
//!
//! Starting --no faster, a queue, or losses--> Cruising --five seconds without an empty queue--> Draining
//!    ^------------- ever faster, no queue ------'  ^----------------- two rounds later -------------'
//! ```
//!
//! The queue that one sender leaves standing is `slack`, an eighth of the round trip, and a number of packets that is the
//! same for all: that makes flows which share a bottleneck converge, because the one with less gains more by it.
//! Losses count where they come with a queue: then the queue is full, it may be our share that filled it, and headroom
//! is halved, down to nothing. It comes back by sixteenths.
//!
//! Only rates measured with a full window replace older ones, so a pause, or a host that is too busy to fill the window,
//! leaves the model as it was: sending goes on at the known rate at once, and evenly, for the queue may be shorter than
//! what the path holds.
//!
//! # Invariants
//! 1. The window never falls below [`WINDOW_PACKETS_MIN`] packets and never exceeds [`WINDOW_BYTES_MAX`].
//! 2. Whatever is acknowledged, in whatever order, the rate is never above what was delivered over any time as long as the
//!    shortest round trip.
//! 3. What is remembered of packets under way is bounded.
//!
//! The model is that of BBR (Cardwell and others, 2016; `draft-ietf-ccwg-bbr`), its way to measure rates included; the
//! constant share is that of Vegas (Brakmo, 1994). Deliberately absent: random probing, and anything that depends on
//! which packet was lost.

use std::collections::VecDeque;
use std::time::Duration;

/// Packets under way at least.
const WINDOW_PACKETS_MIN: u64 = 4;
/// Packets before anything is known.
const WINDOW_PACKETS_INITIAL: u64 = 32;
/// More than any path of today holds.
const WINDOW_BYTES_MAX: u64 = 256 << 20;
/// Packets that each flow may keep in a queue.
const SHARE_PACKETS: u64 = 32;
/// A standing queue of this part of the round trip.
const SLACK: f64 = 0.125;
/// Threads are late by so much, however near the peer.
const SLACK_MIN: Duration = Duration::from_micros(2500);
/// Rounds for which a rate is believed.
const RATE_ROUNDS: usize = 10;
/// Rounds of which rates are believed once losses show that there is less.
const RATE_ROUNDS_LOSSY: usize = 2;
/// A round trip longer by this part of the slack means that there is a queue.
const QUEUE_PART: f64 = 0.25;
/// A larger share of a round that is lost, with a queue, is congestion.
const LOSS_MAX: f64 = 0.02;
/// A larger share that is lost is congestion without a visible queue: somebody enforces a rate.
const LOSS_MAX_WITHOUT_QUEUE: f64 = 0.10;
/// While starting, a rate that grows by less in [`STALLED_ROUNDS`] is all there is.
const GROWTH_MIN: f64 = 1.25;
const STALLED_ROUNDS: u32 = 3;
/// Of its constant share, a flow always keeps so much: or those with more would push it out.
const HEADROOM_MIN: f64 = 1.0 / 8.0;
/// How headroom comes back, a round.
const HEADROOM_STEP: f64 = 1.0 / 16.0;
/// The shortest round trip of fewer packets than that says nothing of queues: acknowledgements are delayed, too.
const ROUND_PACKETS_MIN: u64 = 32;
/// Shares of losses are taken over so many packets at least.
const VERDICT_PACKETS: u64 = 128;
/// After so long without a round trip as short as the shortest, look for it; after twice that, forget the old one.
const ROUND_TRIP_STALE: Duration = Duration::from_secs(5);
const DRAIN_ROUNDS: u64 = 2;
/// A rate that grows by so much in each of so many rounds without a queue is far from all there is.
const RESTART_GROWTH: f64 = 1.05;
const RESTART_ROUNDS: u32 = 3;
/// What may be under way while the queue drains, of what the path holds.
const DRAIN_GAIN: f64 = 0.75;
/// How much faster than its rate a path is filled: what is queued after a round trip is the part beyond one.
const PACE_GAIN: f64 = 1.125;
/// The same while starting: twice as much each round.
const START_GAIN: f64 = 2.0;
/// A window that has less room is full: two calls of the kernel.
const BURST_PACKETS: u64 = 20;
/// Moments of sending that are remembered.
const DEPARTURES_MAX: usize = 1 << 14;

/// When packets left, and what had been delivered by then.
#[derive(Clone, Copy, Debug)]
struct Departure {
    at: Duration,
    delivered: u64,
    delivered_at: Duration,
    /// When the packet left whose arrival was the last known one.
    first_sent: Duration,
    /// There was less to send than the path would have taken.
    limited: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Twice as much each round.
    Starting,
    Cruising,
    /// Until that round the queue empties.
    Draining {
        until: u64,
    },
}

/// What happened since the round began.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    number: u64,
    /// It is over when something arrives that left with so many bytes delivered.
    end_delivered: u64,
    acked: u64,
    shortest: Option<Duration>,
    /// Of the last packets, while starting, and how many bytes they are.
    recent: Option<Duration>,
    recent_acked: u64,
    /// At least one rate was measured with enough to send.
    measured: bool,
}

/// What became of the packets of one round or a few.
#[derive(Clone, Copy, Debug, Default)]
struct Verdict {
    acked: u64,
    lost: u64,
}

/// The shortest round trip.
#[derive(Clone, Copy, Debug)]
struct Shortest {
    is: Duration,
    /// When it was last seen.
    seen: Duration,
    /// The shortest since it went stale.
    since_stale: Option<Duration>,
    drained: Duration,
}

/// The newest departure among those acknowledged together.
#[derive(Clone, Copy, Debug)]
struct Sample {
    departure: Departure,
    round_trip: Duration,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Model {
    packet: u64,
    phase: Phase,
    departures: VecDeque<Departure>,
    sample: Option<Sample>,
    delivered: u64,
    delivered_at: Duration,
    first_sent: Duration,
    /// Rates are limited by what there is to send until so much is delivered.
    limited_until: u64,
    in_flight: u64,
    /// Bytes per second, the best of each of the last rounds; the newest is the first.
    rates: [f64; RATE_ROUNDS],
    shortest: Option<Shortest>,
    /// As quinn has it: it paces by this.
    smoothed: Duration,
    round: Round,
    verdict: Verdict,
    /// The rate that must be exceeded, and for how many rounds it was not (while starting) or was (later).
    full_rate: f64,
    stalled_rounds: u32,
    growing_rounds: u32,
    /// Of the last round.
    last_acked: u64,
    headroom: f64,
    /// While starting.
    start_window: u64,
    window: u64,
}

impl Model {
    pub(super) fn new(packet: u64) -> Self {
        Self {
            packet,
            phase: Phase::Starting,
            departures: VecDeque::new(),
            sample: None,
            delivered: 0,
            delivered_at: Duration::ZERO,
            first_sent: Duration::ZERO,
            limited_until: 0,
            in_flight: 0,
            rates: [0.0; RATE_ROUNDS],
            shortest: None,
            smoothed: Duration::ZERO,
            round: Round::default(),
            verdict: Verdict::default(),
            full_rate: 0.0,
            stalled_rounds: 0,
            growing_rounds: 0,
            last_acked: 0,
            headroom: 1.0,
            start_window: WINDOW_PACKETS_INITIAL * packet,
            window: WINDOW_PACKETS_INITIAL * packet,
        }
    }

    /// Bytes that may be under way now.
    pub(super) fn window(&self) -> u64 {
        self.window
    }

    /// Whether one more packet may leave.
    pub(super) fn is_open(&self) -> bool {
        self.in_flight + self.packet < self.window
    }

    /// Bytes per second at which to send; endless before anything is known.
    pub(super) fn pace(&self) -> f64 {
        match self.phase {
            Phase::Starting if self.smoothed.is_zero() => f64::INFINITY,
            Phase::Starting => START_GAIN * self.start_window as f64 / self.smoothed.as_secs_f64(),
            Phase::Cruising | Phase::Draining { .. } => PACE_GAIN * self.rate(),
        }
    }

    fn window_now(&self) -> u64 {
        let holds = self.holds();
        let bytes = match self.phase {
            Phase::Starting => self.start_window,
            Phase::Draining { .. } => (DRAIN_GAIN * holds) as u64,
            Phase::Cruising => {
                let slack = self.headroom * self.rate() * self.slack().as_secs_f64();
                let share = self.headroom.max(HEADROOM_MIN) * (SHARE_PACKETS * self.packet) as f64;
                (holds + slack + share) as u64
            }
        };
        bytes.clamp(WINDOW_PACKETS_MIN * self.packet, WINDOW_BYTES_MAX)
    }

    /// Bytes per second that the path carries.
    pub(super) fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    /// Bytes that the path holds without a queue.
    fn holds(&self) -> f64 {
        self.rate() * self.shortest.map_or(0.0, |shortest| shortest.is.as_secs_f64())
    }

    fn slack(&self) -> Duration {
        let shortest = self.shortest.map_or(Duration::ZERO, |shortest| shortest.is);
        shortest.mul_f64(SLACK).max(SLACK_MIN)
    }

    /// Another size of packets was found to pass.
    pub(super) fn set_packet(&mut self, bytes: u64) {
        self.packet = bytes;
        self.start_window = self.start_window.max(WINDOW_PACKETS_INITIAL * bytes);
        self.window = self.window_now();
    }

    /// Packets leave.
    pub(super) fn on_sent(&mut self, now: Duration, bytes: u64) {
        if self.in_flight < 2 * self.packet {
            // After a pause: nothing was delivered because nothing was sent.
            (self.first_sent, self.delivered_at) = (now, now);
            self.limited_until = self.delivered;
        }
        self.in_flight += bytes;
        self.window = self.window_now();
        if self.departures.back().is_some_and(|last| last.at >= now) {
            return;
        }
        if self.departures.len() == DEPARTURES_MAX {
            self.departures.pop_front();
        }
        self.departures.push_back(Departure {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            limited: self.delivered <= self.limited_until,
        });
    }

    /// One packet has arrived, as one of several that are acknowledged together.
    pub(super) fn on_ack(&mut self, now: Duration, sent: Duration, bytes: u64, smoothed: Duration) {
        self.delivered += bytes;
        self.delivered_at = now;
        self.round.acked += bytes;
        self.round.recent_acked += bytes;
        self.verdict.acked += bytes;
        self.smoothed = smoothed;
        let after = self.departures.partition_point(|departure| departure.at < sent);
        let Some(&departure) = self.departures.get(after).filter(|departure| departure.at == sent) else {
            return;
        };
        if self.sample.is_none_or(|sample| sample.departure.at <= sent) {
            self.sample = Some(Sample { departure, round_trip: now.saturating_sub(sent) });
        }
    }

    /// All packets that are acknowledged together have been told.
    pub(super) fn on_acks_end(&mut self, now: Duration, in_flight: u64, limited: bool) {
        let grown = self.in_flight.saturating_sub(in_flight);
        let full = self.in_flight + BURST_PACKETS * self.packet >= self.window;
        self.in_flight = in_flight;
        if limited || !(full || self.phase == Phase::Starting) {
            self.limited_until = self.delivered + in_flight;
        }
        let Some(Sample { departure, round_trip }) = self.sample.take() else { return };
        self.first_sent = self.first_sent.max(departure.at);
        self.learn_round_trip(now, round_trip);
        self.learn_rate(now, &departure);
        if self.phase == Phase::Starting && !limited {
            self.start_window = (self.start_window + grown).min(WINDOW_BYTES_MAX);
            self.look_for_queue(round_trip);
        }
        if departure.delivered >= self.round.end_delivered {
            self.end_round();
        }
        self.forget(departure.at);
        self.window = self.window_now();
    }

    /// Packets are given up; all that were sent for several round trips, if `persistent`.
    pub(super) fn on_lost(&mut self, bytes: u64, persistent: bool) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.verdict.lost += bytes;
        if persistent {
            self.start_over();
        }
        self.window = self.window_now();
    }

    /// This is another path than before.
    fn start_over(&mut self) {
        let fresh = Self::new(self.packet);
        *self = Self {
            departures: std::mem::take(&mut self.departures),
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            in_flight: self.in_flight,
            smoothed: self.smoothed,
            round: Round { end_delivered: self.delivered, ..Round::default() },
            start_window: WINDOW_PACKETS_MIN * self.packet,
            ..fresh
        };
    }

    fn learn_round_trip(&mut self, now: Duration, round_trip: Duration) {
        let of_round = &mut self.round.shortest;
        *of_round = Some(of_round.map_or(round_trip, |shortest| shortest.min(round_trip)));
        let seen_now = |is| Shortest { is, seen: now, since_stale: None, drained: now };
        let Some(shortest) = self.shortest.as_mut().filter(|shortest| round_trip > shortest.is) else {
            self.shortest = Some(seen_now(round_trip));
            return;
        };
        let stale_for = now.saturating_sub(shortest.seen);
        if stale_for <= ROUND_TRIP_STALE {
            return;
        }
        let since_stale = shortest.since_stale.map_or(round_trip, |since| since.min(round_trip));
        shortest.since_stale = Some(since_stale);
        if now.saturating_sub(shortest.drained) > ROUND_TRIP_STALE && self.phase == Phase::Cruising {
            shortest.drained = now;
            self.phase = Phase::Draining { until: self.round.number + DRAIN_ROUNDS };
        } else if stale_for > 2 * ROUND_TRIP_STALE && self.phase == Phase::Cruising {
            self.shortest = Some(seen_now(since_stale));
        }
    }

    /// What was delivered since the packet left, over the time that took or the time in which it was sent, if that was
    /// longer: acknowledgements may arrive in a heap.
    fn learn_rate(&mut self, now: Duration, departure: &Departure) {
        let sending = departure.at.saturating_sub(departure.first_sent);
        let arriving = now.saturating_sub(departure.delivered_at);
        let interval = sending.max(arriving);
        if interval.is_zero() || self.shortest.is_some_and(|shortest| interval < shortest.is) {
            return;
        }
        let rate = (self.delivered - departure.delivered) as f64 / interval.as_secs_f64();
        let limited = departure.limited || matches!(self.phase, Phase::Draining { .. });
        if !limited || rate > self.rate() {
            self.rates[0] = self.rates[0].max(rate);
        }
        self.round.measured |= !limited;
    }

    fn end_round(&mut self) {
        let round = self.round;
        self.round = Round { number: round.number + 1, end_delivered: self.delivered, ..Round::default() };
        let queue = self.queues(&round);
        self.last_acked = round.acked;
        let congested = self.judge(queue);
        match self.phase {
            Phase::Starting => {
                if self.is_full(&round) || congested || queue {
                    self.cruise();
                }
            }
            Phase::Draining { until } if self.round.number < until => {}
            Phase::Draining { .. } => self.phase = Phase::Cruising,
            Phase::Cruising => {
                if self.is_far_from_full(&round, queue) {
                    (self.phase, self.start_window, self.stalled_rounds) = (Phase::Starting, self.window, 0);
                }
            }
        }
        if round.measured {
            self.rates.rotate_right(1);
            self.rates[0] = 0.0;
        }
    }

    /// Gives way where losses come of congestion.
    fn judge(&mut self, queue: bool) -> bool {
        if self.verdict.packets(self.packet) < VERDICT_PACKETS {
            return false;
        }
        let congested = std::mem::take(&mut self.verdict).is_congestion(queue);
        if congested {
            self.headroom /= 2.0;
            self.rates[RATE_ROUNDS_LOSSY..].fill(0.0);
        } else {
            self.headroom = (self.headroom + HEADROOM_STEP).min(1.0);
        }
        congested
    }

    /// Ends starting as soon as all packets of half a round had to wait, or many are lost: at its end there would be many
    /// more.
    fn look_for_queue(&mut self, round_trip: Duration) {
        let half = (ROUND_PACKETS_MIN * self.packet).max(self.last_acked / 2);
        let round = &mut self.round;
        let recent = round.recent.map_or(round_trip, |recent| recent.min(round_trip));
        round.recent = Some(recent);
        let mut full =
            self.verdict.packets(self.packet) >= VERDICT_PACKETS && self.verdict.is_congestion(false);
        if round.recent_acked >= half {
            (round.recent, round.recent_acked) = (None, 0);
            full |= self.is_queued(recent);
        }
        if full {
            self.cruise();
        }
    }

    fn cruise(&mut self) {
        (self.phase, self.full_rate, self.growing_rounds) = (Phase::Cruising, self.rate(), 0);
    }

    /// Whether even the fastest packet of a round had to wait.
    fn queues(&self, round: &Round) -> bool {
        let enough = round.acked >= ROUND_PACKETS_MIN * self.packet;
        enough && round.shortest.is_some_and(|shortest| self.is_queued(shortest))
    }

    /// Whether a packet with such a round trip had to wait.
    fn is_queued(&self, round_trip: Duration) -> bool {
        self.shortest.is_some_and(|shortest| round_trip > shortest.is + self.slack().mul_f64(QUEUE_PART))
    }

    /// Whether no more comes of more, while starting.
    fn is_full(&mut self, round: &Round) -> bool {
        if round.measured {
            let rate = self.rate();
            self.stalled_rounds =
                if rate >= GROWTH_MIN * self.full_rate { 0 } else { self.stalled_rounds + 1 };
            if self.stalled_rounds == 0 {
                self.full_rate = rate;
            }
        }
        self.stalled_rounds >= STALLED_ROUNDS
    }

    /// Whether starting has ended too early, or the path has become much wider.
    fn is_far_from_full(&mut self, round: &Round, queue: bool) -> bool {
        if !round.measured || queue {
            self.growing_rounds = 0;
            return false;
        }
        let rate = self.rate();
        self.growing_rounds =
            if rate >= RESTART_GROWTH * self.full_rate { self.growing_rounds + 1 } else { 0 };
        self.full_rate = rate;
        self.growing_rounds >= RESTART_ROUNDS
    }

    /// What left long before something that has arrived is lost or arrives much too late to count.
    fn forget(&mut self, arrived: Duration) {
        let long = 4 * self.smoothed.max(SLACK_MIN);
        while self.departures.front().is_some_and(|departure| departure.at + long < arrived) {
            self.departures.pop_front();
        }
    }
}

impl Verdict {
    fn packets(self, packet: u64) -> u64 {
        (self.acked + self.lost) / packet
    }

    fn is_congestion(self, queue: bool) -> bool {
        let share = self.lost as f64 / (self.lost + self.acked).max(1) as f64;
        share > if queue { LOSS_MAX } else { LOSS_MAX_WITHOUT_QUEUE }
    }
}
