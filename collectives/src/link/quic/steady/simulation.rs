//! The model over simulated bottlenecks: a rate, a delay, a queue that overflows, and losses that mean nothing.
//!
//! Senders obey the window and the pace that quinn makes of it, and give packets up as quinn does. Time goes in steps, far
//! shorter than a round trip. Every claim is tried over many seeds, which draw the path; a failure names its seed.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::model::Model;

const STEP: Duration = Duration::from_micros(200);
const PACKET: u64 = 1452;
const REORDERING: u64 = 200;
const SEEDS: u64 = 24;

/// SplitMix64 (Steele and others, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What the senders share.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// Bytes per second.
    rate: f64,
    round_trip: Duration,
    queue_bytes: f64,
    /// Share of the packets that are lost whatever is sent.
    loss: f64,
    /// Up to which a packet takes longer, each for itself: so they overtake each other.
    jitter: Duration,
}

impl Path {
    /// With a queue of some part of what the path holds, if it is short; else with room for what two senders want besides.
    fn draw(random: &mut Random, queue: Queue, loss_max: f64) -> Self {
        let rate = random.between(2e6, 30e6);
        let round_trip = Duration::from_secs_f64(random.between(0.01, 0.1));
        let holds = rate * round_trip.as_secs_f64();
        let queue_bytes = match queue {
            Queue::Short => (holds * random.between(0.03, 0.1)).max(20.0 * PACKET as f64),
            Queue::Roomy => holds * random.between(0.3, 1.0) + 64.0 * PACKET as f64 + 0.003 * rate,
        };
        Self { rate, round_trip, queue_bytes, loss: random.between(0.0, loss_max), jitter: Duration::ZERO }
    }
}

#[derive(Clone, Copy)]
enum Queue {
    Short,
    Roomy,
}

struct Sender {
    model: Model,
    next_packet: u64,
    /// Packets that are neither acknowledged nor given up, and when they left.
    under_way: BTreeMap<u64, Duration>,
    tokens: f64,
    /// How much of what it may send its host lets it send.
    strength: f64,
    smoothed: Duration,
    /// Bytes that it still wants to send.
    backlog: f64,
    delivered: u64,
}

impl Sender {
    fn new(backlog: f64) -> Self {
        let model = Model::new(PACKET);
        Self {
            model,
            next_packet: 0,
            under_way: BTreeMap::new(),
            tokens: 0.0,
            strength: 1.0,
            smoothed: Duration::ZERO,
            backlog,
            delivered: 0,
        }
    }

    fn in_flight(&self) -> u64 {
        self.under_way.len() as u64 * PACKET
    }

    /// Packets that leave in this step.
    fn send(&mut self, now: Duration) -> Vec<u64> {
        let mut sent = Vec::new();
        let pace = self.strength * self.model.pace().min(1e9);
        let capacity = pace * 0.004 + 10.0 * PACKET as f64;
        self.tokens = (self.tokens + pace * STEP.as_secs_f64()).min(capacity);
        while self.backlog > 0.0
            && self.tokens >= PACKET as f64
            && self.in_flight() + PACKET < self.model.window()
        {
            self.tokens -= PACKET as f64;
            self.backlog -= PACKET as f64;
            self.under_way.insert(self.next_packet, now);
            sent.push(self.next_packet);
            self.next_packet += 1;
            if sent.len() % 10 == 0 {
                self.model.on_sent(now, 10 * PACKET);
            }
        }
        if sent.len() % 10 > 0 {
            self.model.on_sent(now, sent.len() as u64 % 10 * PACKET);
        }
        sent
    }

    /// Packets that are acknowledged together.
    fn acknowledge(&mut self, now: Duration, packets: &[u64]) {
        let mut largest = None;
        for packet in packets {
            let Some(sent) = self.under_way.remove(packet) else { continue };
            self.delivered += PACKET;
            self.model.on_ack(now, sent, PACKET, self.smoothed);
            largest = largest.max(Some((*packet, sent)));
        }
        let Some((largest, sent)) = largest else { return };
        self.model.on_acks_end(now, self.in_flight(), self.backlog <= 0.0);
        self.smoothed =
            if self.smoothed.is_zero() { now - sent } else { (7 * self.smoothed + (now - sent)) / 8 };
        self.give_up(now, largest);
    }

    /// Nothing has come back for long, so nothing will.
    fn probe(&mut self, now: Duration) {
        let newest = self.under_way.last_key_value().map(|(_, &sent)| sent);
        if newest.is_some_and(|newest| now - newest > 4 * self.smoothed.max(seconds(0.1))) {
            self.model.on_lost(self.in_flight(), false);
            self.backlog += self.in_flight() as f64;
            self.under_way.clear();
        }
    }

    fn give_up(&mut self, now: Duration, largest: u64) {
        let patience = self.smoothed * 9 / 8;
        let lost: Vec<u64> = self
            .under_way
            .range(..largest)
            .take_while(|&(&packet, &sent)| packet + REORDERING <= largest || now - sent >= patience)
            .map(|(&packet, _)| packet)
            .collect();
        if !lost.is_empty() {
            for packet in &lost {
                self.under_way.remove(packet);
            }
            self.backlog += lost.len() as f64 * PACKET as f64;
            self.model.on_lost(lost.len() as u64 * PACKET, false);
        }
    }
}

struct World {
    seed: u64,
    random: Random,
    path: Path,
    now: Duration,
    senders: Vec<Sender>,
    queue: VecDeque<(usize, u64)>,
    /// Bytes that the bottleneck may send now.
    credit: f64,
    returning: VecDeque<(Duration, usize, u64)>,
    overflown: u64,
    /// The sum of the queue's length over the steps.
    queued: f64,
}

impl World {
    fn new(seed: u64, path: Path, mut random: Random) -> Self {
        random.next();
        let (queue, returning) = (VecDeque::new(), VecDeque::new());
        let now = Duration::from_secs(1);
        Self {
            seed,
            random,
            path,
            now,
            senders: Vec::new(),
            queue,
            credit: 0.0,
            returning,
            overflown: 0,
            queued: 0.0,
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        self.credit = (self.credit + self.path.rate * STEP.as_secs_f64()).min(self.path.rate * 0.002);
        while self.credit >= PACKET as f64 {
            let Some((sender, packet)) = self.queue.pop_front() else { break };
            self.credit -= PACKET as f64;
            if self.random.between(0.0, 1.0) >= self.path.loss {
                let jitter = self.path.jitter.mul_f64(self.random.between(0.0, 1.0));
                let at = self.now + self.path.round_trip + jitter;
                let place = self.returning.partition_point(|&(other, ..)| other <= at);
                self.returning.insert(place, (at, sender, packet));
            }
        }
        if self.queue.is_empty() {
            self.credit = self.credit.min(PACKET as f64);
        }
        self.queued += self.queue.len() as f64 * PACKET as f64;
        let mut arrived = vec![Vec::new(); self.senders.len()];
        while self.returning.front().is_some_and(|&(at, ..)| at <= self.now) {
            let Some((_, sender, packet)) = self.returning.pop_front() else { break };
            arrived[sender].push(packet);
        }
        for (number, packets) in arrived.iter().enumerate() {
            self.senders[number].acknowledge(self.now, packets);
            self.senders[number].probe(self.now);
            for packet in self.senders[number].send(self.now) {
                if (self.queue.len() as f64) * PACKET as f64 > self.path.queue_bytes {
                    self.overflown += PACKET;
                } else {
                    self.queue.push_back((number, packet));
                }
            }
        }
    }

    /// What happens in a stretch of time.
    fn measure(&mut self, time: Duration) -> Measured {
        let before: Vec<u64> = self.senders.iter().map(|sender| sender.delivered).collect();
        (self.overflown, self.queued) = (0, 0.0);
        self.run(time);
        let steps = time.as_secs_f64() / STEP.as_secs_f64();
        let bytes: Vec<f64> = self
            .senders
            .iter()
            .zip(before)
            .map(|(sender, before)| (sender.delivered - before) as f64)
            .collect();
        let all: f64 = bytes.iter().sum();
        Measured {
            share_of_path: all / time.as_secs_f64() / self.path.rate,
            overflown: self.overflown as f64 / (all + self.overflown as f64),
            queue: Duration::from_secs_f64(self.queued / steps / self.path.rate),
            bytes,
        }
    }
}

#[derive(Debug)]
struct Measured {
    /// Of what the path could have carried.
    share_of_path: f64,
    /// Of what was sent.
    overflown: f64,
    /// The mean wait.
    queue: Duration,
    /// Delivered, by sender.
    bytes: Vec<f64>,
}

const ENDLESS: f64 = 1e12;

/// Tries a claim on many paths.
fn for_each_seed(queue: Queue, loss_max: f64, claim: impl Fn(&mut World)) {
    for seed in 0..SEEDS {
        let mut random = Random(seed);
        let path = Path::draw(&mut random, queue, loss_max);
        let mut world = World::new(seed, path, random);
        world.senders.push(Sender::new(ENDLESS));
        claim(&mut world);
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

#[test]
fn a_path_is_filled_and_its_queue_stays_short() {
    for_each_seed(Queue::Roomy, 0.02, |world| {
        world.run(seconds(3.0));
        let (measured, path) = (world.measure(seconds(6.0)), world.path);
        let said = format!("seed {}: {path:?}, {measured:?}", world.seed);
        assert!(measured.share_of_path > 0.97 * (1.0 - path.loss), "{said}");
        assert!(measured.overflown < 0.001, "{said}");
        let intended = path.round_trip.as_secs_f64() / 8.0 + 32.0 * PACKET as f64 / path.rate;
        assert!(measured.queue < seconds(1.2 * intended + 0.001), "{said}");
    });
}

#[test]
fn a_path_that_reorders_is_filled() {
    for_each_seed(Queue::Roomy, 0.01, |world| {
        world.path.jitter = Duration::from_millis(2);
        world.run(seconds(3.0));
        let measured = world.measure(seconds(3.0));
        let said = format!("seed {}: {:?}, {measured:?}", world.seed, world.path);
        assert!(measured.share_of_path > 0.95, "{said}");
        assert!(measured.overflown < 0.001, "{said}");
    });
}

#[test]
fn a_short_queue_is_not_flooded() {
    for_each_seed(Queue::Short, 0.02, |world| {
        let start = world.measure(seconds(2.0));
        let measured = world.measure(seconds(6.0));
        let said = format!("seed {}: {:?}, {start:?}, {measured:?}", world.seed, world.path);
        assert!(start.overflown < 0.2, "{said}");
        assert!(measured.share_of_path > 0.9, "{said}");
        assert!(measured.overflown < 0.08, "{said}");
    });
}

#[test]
fn senders_that_share_a_path_come_to_share_it_evenly() {
    for_each_seed(Queue::Roomy, 0.01, |world| {
        world.run(seconds(3.0));
        world.senders.push(Sender::new(ENDLESS));
        world.run(seconds(35.0));
        let measured = world.measure(seconds(6.0));
        let ratio = measured.bytes[0] / measured.bytes[1];
        let said = format!("seed {}: {:?}, {measured:?}", world.seed, world.path);
        assert!((0.6..1.7).contains(&ratio), "{said}");
        assert!(measured.share_of_path > 0.95, "{said}");
        assert!(measured.overflown < 0.02, "{said}");
    });
}

#[test]
fn after_a_pause_the_path_is_filled_at_once_and_not_flooded() {
    for_each_seed(Queue::Roomy, 0.0, |world| {
        world.run(seconds(4.0));
        world.senders[0].backlog = 0.0;
        world.run(seconds(2.0));
        let path = world.path;
        let bytes = 6.0 * path.rate * path.round_trip.as_secs_f64();
        world.senders[0].backlog = bytes;
        let measured = world.measure(seconds(bytes / path.rate) + path.round_trip);
        let said = format!("seed {}: {path:?}, {measured:?}", world.seed);
        assert!(measured.bytes[0] > 0.97 * bytes, "{said}");
        assert!(measured.overflown == 0.0, "{said}");
    });
}

/// What a busy host did not send says nothing of the path.
#[test]
fn after_a_busy_time_of_its_host_a_sender_is_as_fast_as_before() {
    for_each_seed(Queue::Roomy, 0.01, |world| {
        world.run(seconds(3.0));
        world.senders[0].strength = 0.4;
        world.run(seconds(2.0));
        world.senders[0].strength = 1.0;
        // Until what was sent before has come back.
        world.run(2 * world.path.round_trip);
        let measured = world.measure(4 * world.path.round_trip);
        let said = format!("seed {}: {:?}, {measured:?}", world.seed, world.path);
        assert!(measured.share_of_path > 0.9, "{said}");
    });
}

#[test]
fn a_path_that_changes_is_followed() {
    for_each_seed(Queue::Roomy, 0.01, |world| {
        world.run(seconds(3.0));
        for factor in [1.0 / 3.0, 3.0] {
            world.path.rate *= factor;
            world.run(seconds(4.0));
            let measured = world.measure(seconds(2.0));
            let said = format!("seed {}: {:?} after {factor:.2}, {measured:?}", world.seed, world.path);
            assert!(measured.share_of_path > 0.9, "{said}");
            assert!(measured.overflown < 0.02, "{said}");
        }
    });
}

/// What quinn may tell a controller.
#[derive(Clone, Debug)]
enum Event {
    Sent(u64),
    Acked { age_us: u64, bytes: u64, limited: bool },
    Lost { bytes: u64, persistent: bool },
    Packet(u64),
}

fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let event = prop_oneof![
        (0u64..100_000).prop_map(Event::Sent),
        (0u64..500_000, 0u64..100_000, any::<bool>()).prop_map(|(age_us, bytes, limited)| Event::Acked {
            age_us,
            bytes,
            limited
        }),
        (0u64..100_000, prop::bool::weighted(0.1))
            .prop_map(|(bytes, persistent)| Event::Lost { bytes, persistent }),
        (1200u64..9000).prop_map(Event::Packet),
    ];
    prop::collection::vec((0u64..50_000, event), 0..300)
}

proptest! {
    #[test]
    fn whatever_is_told_the_window_stays_within_its_bounds(events in events()) {
        let (mut model, mut now, mut moments) = (Model::new(1200), Duration::ZERO, Vec::new());
        for (us, event) in events {
            now += Duration::from_micros(us);
            match event {
                Event::Sent(bytes) => {
                    model.on_sent(now, bytes);
                    moments.push(now);
                }
                Event::Acked { age_us, bytes, limited } => {
                    // Often a moment at which something did leave.
                    let sent = moments.pop().unwrap_or(now.saturating_sub(Duration::from_micros(age_us)));
                    model.on_ack(now, sent, bytes, Duration::from_micros(age_us));
                    model.on_acks_end(now, bytes, limited);
                }
                Event::Lost { bytes, persistent } => model.on_lost(bytes, persistent),
                Event::Packet(bytes) => model.set_packet(bytes),
            }
            prop_assert!((4 * 1200..=256 << 20).contains(&model.window()));
            prop_assert!(model.rate().is_finite() && model.pace() > 0.0);
        }
    }
}
