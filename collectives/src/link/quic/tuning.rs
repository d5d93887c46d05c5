//! QUIC's many numbers, chosen by where the node is bound and by the one timeout.
//!
//! On the loopback interface datagrams of 64 KB arrive whole, which is three times as fast as those of an Ethernet
//! (`design.md`, section 10, has the measurements); elsewhere the path is probed up to jumbo frames.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig};
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::steady::{Paces, SteadyConfig};
use super::stream::STREAMS_MAX;

/// The largest payload of a UDP datagram over IPv4.
pub(crate) const LOOPBACK_PAYLOAD_MAX: u16 = 65_507;
/// What every path carries.
const FIRST_PAYLOAD: u16 = 1_200;
/// What a jumbo frame of 9,000 bytes carries over IPv6 and UDP.
const JUMBO_PAYLOAD_MAX: u16 = 8_952;
/// What may be under way before the first acknowledgement: ten datagrams.
const LOOPBACK_WINDOW_BYTES: u64 = 10 * LOOPBACK_PAYLOAD_MAX as u64;
/// How often a quiet link says that it lives, in parts of the timeout.
const KEEP_ALIVES_PER_TIMEOUT: u32 = 4;
/// And at least so often: a host can answer for a dead process only when it is asked.
const KEEP_ALIVE_MAX: Duration = Duration::from_millis(250);

/// Packets that may overtake another before it is called lost: real networks reorder, and a wrong guess halves the rate.
const PACKET_THRESHOLD: u32 = 200;

/// Round trips after which a packet that was overtaken is called lost. A queue that forms makes the last packets late by an
/// eighth, which is quinn's default: where packets overtake each other, each new queue looked like losses.
const TIME_THRESHOLD: f32 = 1.3;

/// How fast to send where the way is longer than a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// By the rate and delay that are measured, with short queues: keeps its rate where packets are lost for other
    /// reasons than queues, and gives way to those who fill queues.
    #[default]
    Steady,
    /// By the rate and delay that are measured, with long queues: what quinn calls BBR.
    Bbr,
    /// By losses: gentle to others, and slow where packets are lost for other reasons.
    Cubic,
}

impl std::str::FromStr for Congestion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "steady" => Ok(Self::Steady),
            "bbr" => Ok(Self::Bbr),
            "cubic" => Ok(Self::Cubic),
            _ => Err(format!("'{text}' is no congestion control: steady, bbr and cubic are")),
        }
    }
}

impl std::fmt::Display for Congestion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Steady => "steady",
            Self::Bbr => "bbr",
            Self::Cubic => "cubic",
        })
    }
}

impl Congestion {
    fn controllers(self, paces: &Arc<Paces>) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Steady => Arc::new(SteadyConfig { paces: paces.clone() }),
            Self::Bbr => Arc::new(BbrConfig::default()),
            Self::Cubic => Arc::new(CubicConfig::default()),
        }
    }
}

/// What is known of the way to the peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// All peers are on this host.
    Loopback,
    /// Anything else.
    Network,
}

impl Path {
    pub(crate) fn of(bind: SocketAddr) -> Self {
        if bind.ip().is_loopback() { Self::Loopback } else { Self::Network }
    }

    /// The largest datagram worth sending or taking.
    pub(crate) fn payload_max(self) -> u16 {
        match self {
            Self::Loopback => LOOPBACK_PAYLOAD_MAX,
            Self::Network => JUMBO_PAYLOAD_MAX,
        }
    }

    /// Datagrams that arrive in one call of the kernel: those fit 64 KB together.
    pub(crate) fn receive_segments_max(self) -> usize {
        usize::from(LOOPBACK_PAYLOAD_MAX).div_ceil(self.payload_max().into())
    }

    /// The datagrams with which a connection begins.
    pub(crate) fn payload_min(self) -> u16 {
        match self {
            Self::Loopback => LOOPBACK_PAYLOAD_MAX,
            Self::Network => FIRST_PAYLOAD,
        }
    }
}

pub(crate) fn endpoint_config(path: Path) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    if let Err(error) = config.max_udp_payload_size(path.payload_max()) {
        // Never with the constants above; the default works, slower.
        tracing::warn!(%error, "datagrams stay small");
    }
    config
}

pub(crate) fn transport_config(
    path: Path,
    congestion: Congestion,
    paces: &Arc<Paces>,
    timeout: Duration,
) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(STREAMS_MAX))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some((timeout / KEEP_ALIVES_PER_TIMEOUT).min(KEEP_ALIVE_MAX)))
        .max_idle_timeout(Some(idle_timeout(timeout)));
    match path {
        Path::Loopback => {
            // The default is less than one datagram of this size: it would never be sent.
            let mut congestion = CubicConfig::default();
            congestion.initial_window(LOOPBACK_WINDOW_BYTES);
            config
                .congestion_controller_factory(Arc::new(congestion))
                .initial_mtu(path.payload_max())
                .mtu_discovery_config(None)
                .initial_rtt(Duration::from_millis(50))
                .stream_receive_window(VarInt::from_u32(8 << 20))
                .receive_window(VarInt::from_u32(8 << 20))
                .send_window(4 << 20);
        }
        Path::Network => {
            let mut discovery = MtuDiscoveryConfig::default();
            discovery.upper_bound(path.payload_max());
            config
                .congestion_controller_factory(congestion.controllers(paces))
                .packet_threshold(PACKET_THRESHOLD)
                .time_threshold(TIME_THRESHOLD)
                .mtu_discovery_config(Some(discovery))
                .stream_receive_window(VarInt::from_u32(16 << 20))
                .receive_window(VarInt::from_u32(16 << 20))
                .send_window(16 << 20);
        }
    }
    Arc::new(config)
}

fn idle_timeout(timeout: Duration) -> IdleTimeout {
    let longest = IdleTimeout::from(VarInt::MAX);
    IdleTimeout::try_from(timeout).unwrap_or(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_moves_at_once_fits_64_kilobytes() {
        for path in [Path::Loopback, Path::Network] {
            assert!(path.payload_min() <= path.payload_max());
            let payload = usize::from(path.payload_max());
            assert!(path.receive_segments_max() * payload >= 65_507);
        }
        assert_eq!(Path::Loopback.receive_segments_max(), 1);
    }
}
