//! How to reach a rank, as ranks tell each other: where it listens, and the name that it proves.
//!
//! A rank that listens on all interfaces does not know its address as others see it. The rank before it does: it has called
//! there, and has seen the name proved. So each rank tells how it reaches the next one.
//!
//! ```text
//! 0 1 version   1 1 length of the name   2 2 port   4 4 zero   8 16 address, IPv6 or IPv4 mapped   24 256 name, then zeros
//! ```

use std::net::{IpAddr, SocketAddr};

pub(crate) const DIRECTIONS_BYTES: usize = 280;
const VERSION: u8 = 1;
const NAME: usize = 24;
/// A DNS name is no longer.
const NAME_BYTES_MAX: usize = 253;

/// Where a rank listens, and the DNS name in its certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Directions {
    pub(crate) address: SocketAddr,
    pub(crate) name: String,
}

impl Directions {
    /// All zeros, which say nothing, where the name is none or the address means something on this host alone.
    pub(crate) fn encode(&self) -> [u8; DIRECTIONS_BYTES] {
        let mut wire = [0; DIRECTIONS_BYTES];
        let ip = match self.address {
            SocketAddr::V4(address) => address.ip().to_ipv6_mapped(),
            SocketAddr::V6(address) if address.scope_id() == 0 => *address.ip(),
            SocketAddr::V6(_) => return wire,
        };
        let name = self.name.as_bytes();
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return wire;
        }
        (wire[0], wire[1]) = (VERSION, name.len() as u8);
        wire[2..4].copy_from_slice(&self.address.port().to_le_bytes());
        wire[8..NAME].copy_from_slice(&ip.octets());
        wire[NAME..][..name.len()].copy_from_slice(name);
        wire
    }

    /// `None` where they lead nowhere.
    pub(crate) fn decode(wire: &[u8; DIRECTIONS_BYTES]) -> Option<Self> {
        let (version, length) = (wire[0], usize::from(wire[1]));
        if version != VERSION || wire[4..8] != [0; 4] || !(1..=NAME_BYTES_MAX).contains(&length) {
            return None;
        }
        let (name, rest) = wire[NAME..].split_at(length);
        let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._*".contains(byte);
        if !name.iter().all(known) || rest.iter().any(|&byte| byte != 0) {
            return None;
        }
        let octets: [u8; 16] = std::array::from_fn(|i| wire[8 + i]);
        let (ip, port) = (IpAddr::from(octets).to_canonical(), u16::from_le_bytes([wire[2], wire[3]]));
        if ip.is_unspecified() || ip.is_multicast() || port == 0 {
            return None;
        }
        let name = String::from_utf8(name.to_vec()).ok()?;
        Some(Self { address: SocketAddr::new(ip, port), name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn directions(address: &str, name: &str) -> Directions {
        Directions { address: address.parse().unwrap(), name: name.into() }
    }

    #[test]
    fn bytes_are_pinned() {
        let wire = directions("10.0.0.7:258", "worker-1.mattock").encode();
        let golden = b"\x01\x10\x02\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff\xff\x0a\0\0\x07worker-1.mattock\0";
        assert_eq!(&wire[..golden.len()], golden);
        assert!(wire[golden.len()..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn directions_come_back() {
        for address in ["10.0.0.7:1", "[2001:db8::1]:65535", "127.0.0.1:9"] {
            let known = directions(address, "a.b");
            assert_eq!(Directions::decode(&known.encode()), Some(known));
        }
    }

    #[test]
    fn directions_that_lead_nowhere_are_none() {
        let long = "x".repeat(254);
        for (address, name) in [
            ("0.0.0.0:7", "a"),
            ("[::]:7", "a"),
            ("10.0.0.1:0", "a"),
            ("224.0.0.1:7", "a"),
            ("10.0.0.1:7", ""),
        ] {
            assert_eq!(Directions::decode(&directions(address, name).encode()), None, "{address} {name}");
        }
        for name in [&long, "a b", "a\0b", "ä"] {
            assert_eq!(Directions::decode(&directions("10.0.0.1:7", name).encode()), None, "{name}");
        }
        let scoped = Directions { address: "[fe80::1%3]:7".parse().unwrap(), name: "a".into() };
        assert_eq!(Directions::decode(&scoped.encode()), None);
    }

    proptest! {
        #[test]
        fn decoding_never_panics(
            bytes in proptest::collection::vec(any::<u8>(), DIRECTIONS_BYTES),
            length in any::<u8>(),
            ascii in any::<bool>(),
        ) {
            let mut wire: [u8; DIRECTIONS_BYTES] = bytes.try_into().unwrap();
            // A valid beginning, so that later fields are reached as well.
            (wire[0], wire[1]) = (VERSION, length);
            wire[4..8].fill(0);
            if ascii {
                wire[NAME..].fill(0);
                wire[NAME..][..usize::from(length)].fill(b'a');
            }
            if let Some(known) = Directions::decode(&wire) {
                prop_assert_eq!(known.encode(), wire);
            }
        }
    }
}
