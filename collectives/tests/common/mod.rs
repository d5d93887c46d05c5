//! Certificates and nodes for tests.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test program uses a part of it")]

use std::time::Duration;

use mattock_collectives::{
    Generation, Group, GroupConfig, Identity, Node, NodeConfig, Rank, Ring, RingSpec, TransportChoice,
    WorldSize,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// A run's certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: Vec<u8>,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().to_vec();
        Self { issuer: Issuer::new(params, key), root }
    }

    pub fn identity(&self, names: &[&str]) -> Identity {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        Identity {
            certificates: vec![certificate.der().to_vec()],
            private_key: key.serialize_der(),
            root: self.root.clone(),
        }
    }

    /// `worker-0.mattock` and so on, on loopback.
    pub fn nodes(&self, count: u32, config: GroupConfig) -> Vec<Node> {
        (0..count).map(|rank| self.node(rank, config)).collect()
    }

    pub fn node(&self, rank: u32, config: GroupConfig) -> Node {
        start(self.identity(&[&name(rank)]), config)
    }
}

pub fn start(identity: Identity, group: GroupConfig) -> Node {
    let transport = TransportChoice::Quic;
    let bind = ([127, 0, 0, 1], 0).into();
    Node::start(NodeConfig { group, transport, ..NodeConfig::new(identity, bind) }).unwrap()
}

pub fn name(rank: u32) -> String {
    format!("worker-{rank}.mattock")
}

pub fn config(timeout: Duration) -> GroupConfig {
    GroupConfig { timeout, ..GroupConfig::default() }
}

pub fn ring(rank: u32, ranks: u32, generation: u64) -> Ring {
    Ring::new(Rank(rank), WorldSize::new(ranks).unwrap(), Generation(generation)).unwrap()
}

/// How rank `rank` joins the ring of all `nodes`.
pub fn spec(nodes: &[Node], rank: u32, generation: u64) -> RingSpec {
    let ring = ring(rank, nodes.len() as u32, generation);
    let next = ring.next().0;
    RingSpec { ring, next: (nodes[next as usize].local_addr(), name(next)), prev: name(ring.prev().0) }
}

/// All nodes in one ring.
pub fn groups(nodes: &[Node], generation: u64) -> Vec<Group> {
    let joins = (0..).zip(nodes).map(|(rank, node)| node.begin_join(spec(nodes, rank, generation)));
    joins.collect::<Vec<_>>().into_iter().map(|join| join.wait().unwrap()).collect()
}
