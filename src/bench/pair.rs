//! One rank's half of measuring a link: how long a byte takes to the other and back, and how fast many arrive.
//!
//! ```text
//! sender    -- length -->             -- payload -->
//! receiver             <-- ready --                 <-- got it --
//!                         clock starts                 clock ends
//! ```
//!
//! The receiver has asked for the payload before it says that it is ready, so nothing waits for it. Payloads grow until one takes
//! long enough, and by then the congestion controller knows the path. Clocks of two hosts are not compared: a latency is
//! half of the way there and back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mattock_collectives::{Buffer, Group, Rank};
use serde::{Deserialize, Serialize};

/// A payload says how fast the link is where it takes several times its latency.
const LATENCIES: u32 = 16;
/// The first of the growing payloads.
const FIRST_BYTES: usize = 64 << 10;
/// No payload is larger.
const BYTES_MAX: usize = 64 << 20;
/// Single bytes that are sent; the median counts.
const PINGS: usize = 21;
/// Payloads that take long enough; the median counts.
const LONG_ONES: usize = 3;

/// A link as its sender measured it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Who receives.
    pub(super) to: u32,
    /// Seconds for one byte, one way.
    pub(super) latency_s: f64,
    /// Bytes per second of the largest payload.
    pub(super) bytes_per_s: f64,
    /// What carried them.
    pub(super) transport: String,
}

/// Measures both links of a group of two, one after the other, by payloads that take at least so long, and says what this
/// rank's is like. `to` is the other.
pub(super) fn measure(group: &Group, to: u32, long_enough: Duration) -> anyhow::Result<Measured> {
    let mut own = None;
    for sender in [Rank(0), Rank(1)] {
        match sender == group.ring().rank() {
            true => own = Some(send_all(group, long_enough)?),
            false => while receive(group, sender)? {},
        }
    }
    let (round_trip, bytes_per_s) = own.context("a rank is one of two")?;
    let latency_s = round_trip.as_secs_f64() / 2.0;
    Ok(Measured { to, latency_s, bytes_per_s, transport: group.transport().to_string() })
}

/// The time for a byte there and back, and the bytes per second of the largest payloads.
fn send_all(group: &Group, long_enough: Duration) -> anyhow::Result<(Duration, f64)> {
    let median = |payload: &Arc<Buffer<u8>>, times: usize| {
        let mut times =
            (0..times).map(|_| send(group, payload)).collect::<anyhow::Result<Vec<Duration>>>()?;
        times.sort();
        anyhow::Ok(times[times.len() / 2])
    };
    let round_trip = median(&Arc::new(group.buffer(1)), PINGS)?;
    let long_enough = long_enough.max(round_trip * LATENCIES);
    let mut bytes = FIRST_BYTES;
    let mut payload = Arc::new(group.buffer(bytes));
    while send(group, &payload)? < long_enough && bytes < BYTES_MAX {
        bytes *= 2;
        payload = Arc::new(group.buffer(bytes));
    }
    let time = median(&payload, LONG_ONES)?;
    tell(group, 0)?;
    // The last byte is heard of a round trip after it was sent. Where that is all the time, the clock is too coarse.
    let moving = time.saturating_sub(round_trip).max(time / 2);
    Ok((round_trip, bytes as f64 / moving.as_secs_f64()))
}

/// Sends a payload, and says how long it took until the other had it.
fn send(group: &Group, payload: &Arc<Buffer<u8>>) -> anyhow::Result<Duration> {
    let other = Rank(1 - group.ring().rank().0);
    tell(group, payload.len())?;
    group.receive_broadcast(other, Buffer::<u8>::zeroed(1)).wait()?;
    let start = Instant::now();
    let sent = group.broadcast(Arc::clone(payload));
    group.receive_broadcast(other, Buffer::<u8>::zeroed(1)).wait()?;
    let time = start.elapsed();
    sent.wait()?;
    Ok(time)
}

/// Says how many bytes come next; nothing comes after 0.
fn tell(group: &Group, bytes: usize) -> anyhow::Result<()> {
    Ok(group.broadcast(Arc::new(vec![bytes as i64].into())).wait()?)
}

/// Receives a payload. False where none comes any more.
fn receive(group: &Group, sender: Rank) -> anyhow::Result<bool> {
    let length = group.receive_broadcast(sender, Buffer::<i64>::zeroed(1)).wait()?[0];
    let length = usize::try_from(length)?;
    ensure!(length <= BYTES_MAX, "rank {sender} wants to send {length} bytes, more than {BYTES_MAX}");
    if length == 0 {
        return Ok(false);
    }
    let byte = || Arc::new(vec![0u8].into());
    let ready = group.broadcast(byte());
    let payload = group.receive_broadcast(sender, group.buffer::<u8>(length));
    let got = payload.wait().and_then(|_| group.broadcast(byte()).wait());
    ready.wait()?;
    got?;
    Ok(true)
}
