//! Hosts on this machine: network namespaces on a switch, whose ways to each other can be cut, each direction by itself.
//!
//! A way is cut where it begins: the sender is given a wrong hardware address for the other host. Its frames are sent and reach
//! nobody, as on a network that fails: no error comes back, and what was underway arrives.
//!
//! Needs root and `ip` of iproute2.

use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// A hardware address that no host has.
const NOBODY: &str = "02:00:00:00:00:01";

/// Hosts, numbered from 0; gone when dropped.
#[derive(Debug)]
pub struct Hosts {
    prefix: String,
    count: usize,
}

impl Hosts {
    /// Why there can be none here, if so.
    pub fn obstacle() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("hosts are network namespaces, which only root makes: run it as root".to_owned());
        }
        let found =
            Command::new("ip").args(["netns", "list"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        match found {
            Ok(status) if status.success() => None,
            Ok(status) => {
                Some(format!("`ip netns` does not work here ({status}): give this container CAP_SYS_ADMIN"))
            }
            Err(error) => Some(format!("cannot run `ip`, of the package iproute2: {error}")),
        }
    }

    /// Makes so many, at most 200.
    ///
    /// # Errors
    /// Where the system refuses; nothing is left then.
    pub fn up(count: usize) -> io::Result<Self> {
        assert!(count <= 200, "their addresses differ in one byte");
        let hosts = Self { prefix: format!("mt{}", std::process::id()), count };
        let switch = hosts.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "br0", "up"])?;
        for host in 0..count {
            let (name, port) = (hosts.name(host), format!("p{host}"));
            ip(&["netns", "add", &name])?;
            ip(&[
                "-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name,
            ])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", &name, "addr", "add", &format!("{}/24", Self::address(host)), "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    /// Where a host is reached by the others.
    pub fn address(host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, 77, host as u8 + 1)
    }

    /// A program, to be run on a host; its process is the child itself.
    pub fn command(&self, host: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name(host)]).arg(program);
        command
    }

    /// From now on nothing that `from` sends reaches `to`.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn cut(&self, from: usize, to: usize) -> io::Result<()> {
        let (name, to) = (self.name(from), Self::address(to).to_string());
        ip(&["-n", &name, "neigh", "replace", &to, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0"])
    }

    /// From now on it does again.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn heal(&self, from: usize, to: usize) -> io::Result<()> {
        let (name, to) = (self.name(from), Self::address(to).to_string());
        ip(&["-n", &name, "neigh", "del", &to, "dev", "eth0"])
    }

    fn name(&self, host: usize) -> String {
        format!("{}h{host}", self.prefix)
    }

    fn switch(&self) -> String {
        format!("{}sw", self.prefix)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // What was not made cannot be removed.
        (0..self.count).for_each(|host| drop(ip(&["netns", "del", &self.name(host)])));
        drop(ip(&["netns", "del", &self.switch()]));
    }
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    // Not of this process' group: Ctrl-C is not for it, hosts are taken down after that.
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).process_group(0).output()?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(format!("`ip {}`: {}", arguments.join(" "), said.trim())))
        }
    }
}
