//! By which address other machines reach this one, as far as a host can know.
//!
//! The address from which this host would speak to where the launcher is; where no launcher tells that, to the rest of the
//! world. Nothing is sent to find out.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};

use crate::exit::Failure;

/// Variables in which launchers name a host that all can reach: torchrun's first node, srun's own.
const MEETING_PLACES: [&str; 2] = ["MASTER_ADDR", "SLURM_LAUNCH_NODE_IPADDR"];
/// Reserved for documentation: no host has it, so it stands for any host far away.
const FAR_AWAY: &str = "192.0.2.1";

/// By which address other machines reach this one.
///
/// # Errors
/// Bad input where there is no such address: the user has to name it.
pub fn address_towards_others() -> Result<IpAddr, Failure> {
    let named = MEETING_PLACES.iter().filter_map(|variable| std::env::var(variable).ok());
    let places = named.chain([FAR_AWAY.to_owned()]);
    places.filter_map(|place| towards(&place)).next().ok_or_else(|| {
        Failure::bad_input(anyhow::anyhow!(
            "this host has no route to others, so it cannot tell by which of its addresses they reach it: say it \
             with --listen ADDRESS:PORT (port 0 takes a free one)"
        ))
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_reached_by_the_address_it_is_spoken_to() {
        assert_eq!(towards("127.0.0.1"), Some([127, 0, 0, 1].into()));
        assert_eq!(towards("no such host.invalid"), None);
    }
}
