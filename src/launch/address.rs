//! By which address other machines reach this one, as far as a host can know.
//!
//! The address from which this host would speak to where the launcher is; where no launcher tells that, to the rest of the
//! world; and where there is no way out into it, to the one network that the host is in. Nothing is sent to find out.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};

use anyhow::anyhow;

use crate::exit::Failure;

/// Variables in which launchers name a host that all can reach: torchrun's first node, srun's own.
const MEETING_PLACES: [&str; 2] = ["MASTER_ADDR", "SLURM_LAUNCH_NODE_IPADDR"];
/// Reserved for documentation: no host has it, so it stands for any host far away.
const FAR_AWAY: &str = "192.0.2.1";
/// The kernel's IPv4 routes.
const ROUTES: &str = "/proc/net/route";

/// By which address other machines reach this one.
///
/// # Errors
/// Bad input where there is no such address, or several may be it: the user has to name it.
pub fn address_towards_others() -> Result<IpAddr, Failure> {
    let named = MEETING_PLACES.iter().filter_map(|variable| std::env::var(variable).ok());
    let mut places = named.chain([FAR_AWAY.to_owned()]);
    if let Some(found) = places.find_map(|place| towards(&place)) {
        return Ok(found);
    }
    let routes = std::fs::read_to_string(ROUTES).unwrap_or_default();
    let own: BTreeSet<IpAddr> =
        neighbours(&routes).filter_map(|neighbour| towards(&neighbour.to_string())).collect();
    let mut own = own.into_iter();
    match (own.next(), own.next()) {
        (Some(only), None) => Ok(only),
        (first, second) => Err(Failure::bad_input(anyhow!(
            "this host cannot tell by which of its addresses others reach it ({}): say it with --listen ADDRESS:PORT \
             (port 0 takes a free one)",
            match (first, second) {
                (Some(first), Some(second)) => format!("it may be {first} or {second}, or another"),
                _ => "it has no route to any".to_owned(),
            }
        ))),
    }
}

/// The own address on the way to a host, if there is a way.
fn towards(host: &str) -> Option<IpAddr> {
    let address = (host, 9).to_socket_addrs().ok()?.next()?;
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(address).ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_unspecified()).then_some(own)
}

/// An address in each network that the host is in, from the kernel's table of routes.
fn neighbours(routes: &str) -> impl Iterator<Item = Ipv4Addr> {
    let network = |line: &str| {
        let mut fields = line.split_whitespace();
        let (interface, destination) = (fields.next()?, fields.next()?);
        // As the bytes lie in memory.
        let network = u32::from_str_radix(destination, 16).ok()?.to_ne_bytes();
        (interface != "lo").then(|| Ipv4Addr::from_bits(u32::from_be_bytes(network) | 1))
    };
    routes.lines().skip(1).filter_map(network).collect::<Vec<Ipv4Addr>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_reached_by_the_address_it_is_spoken_to() {
        assert_eq!(towards("127.0.0.1"), Some([127, 0, 0, 1].into()));
        assert_eq!(towards("no such host.invalid"), None);
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn the_networks_of_a_host_are_read_from_its_routes() {
        let routes = "Iface\tDestination\tGateway \tFlags\neth0\t0000630A\t00000000\t0001\nlo\t0000007F\t0\t1\nshort\n\
            ib0\tnohex\t0\n";
        assert_eq!(neighbours(routes).collect::<Vec<Ipv4Addr>>(), [Ipv4Addr::new(10, 99, 0, 1)]);
        assert_eq!(neighbours("").count(), 0);
    }
}
