//! The collectives alone, between two processes: no recipe, no coordinator, no model.
//!
//!     cargo run --release --example ring
//!
//! This process makes a certificate authority and starts itself again as rank 1; both join a ring under mutual TLS
//! and sum 64 MiB of f32, five times. Each rank checks the sums; rank 0 prints how long they took.

use std::error::Error;
use std::io::{BufRead, BufReader, Write, stdin};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use mattock_collectives::{
    Generation, Group, Identity, Node, NodeConfig, Rank, Ring, RingSpec, Sum, WorldSize,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

const ELEMENTS: usize = 16 << 20;
const REPEATS: usize = 5;

/// The names in the two ranks' certificates.
fn name(rank: u32) -> String {
    format!("rank-{rank}.example")
}

/// An authority for this run, and a certificate by it for each rank.
fn identities() -> Result<[Identity; 2], rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key)?.der().to_vec();
    let issuer = Issuer::new(params, key);
    let identity = |rank| {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![name(rank)])?.signed_by(&key, &issuer)?;
        let certificates = vec![certificate.der().to_vec()];
        Ok(Identity { certificates, private_key: key.serialize_der(), root: root.clone() })
    };
    Ok([identity(0)?, identity(1)?])
}

fn start(identity: Identity) -> Result<Node, Box<dyn Error>> {
    let bind = SocketAddr::from(([127, 0, 0, 1], 0));
    Ok(Node::start(NodeConfig::new(identity, bind))?)
}

fn join(node: &Node, rank: u32, peer: SocketAddr) -> Result<Group, Box<dyn Error>> {
    let world = WorldSize::new(2).ok_or("a ring has members")?;
    let ring = Ring::new(Rank(rank), world, Generation(0)).ok_or("a rank is within its ring")?;
    let other = name(1 - rank);
    Ok(node.join_ring(RingSpec { ring, next: (peer, other.clone()), prev: other })?)
}

/// Sums over both ranks, and checks every element.
fn reduce(group: &Group) -> Result<(), Box<dyn Error>> {
    let rank = group.ring().rank().0;
    // Over shared memory, the other rank reads it where it lies.
    let mut input = group.buffer(ELEMENTS);
    input.fill(rank as f32 + 1.0);
    let (input, mut output) = (Arc::new(input), group.buffer(ELEMENTS));
    for repeat in 0..REPEATS {
        let start = Instant::now();
        output = group.all_reduce::<Sum<f32>>(Arc::clone(&input), output).wait()?;
        let seconds = start.elapsed().as_secs_f64();
        if output.iter().any(|&sum| sum != 3.0) {
            return Err(format!("rank {rank}: a sum is wrong").into());
        }
        if rank == 0 {
            let gigabytes = size_of_val(&output[..]) as f64 / 1e9;
            println!("all-reduce {repeat}: {seconds:.3} s, {:.2} GB/s", gigabytes / seconds);
        }
    }
    Ok(group.barrier().wait()?)
}

/// Rank 0: hands rank 1 its identity through a pipe, never on a command line.
fn first() -> Result<(), Box<dyn Error>> {
    let [own, other] = identities()?;
    let node = start(own)?;
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.arg("--rank-1").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut pipe = child.stdin.take().ok_or("the child has a standard input")?;
    for part in [&other.certificates[0], &other.private_key, &other.root] {
        writeln!(pipe, "{}", hex::encode(part))?;
    }
    writeln!(pipe, "{}", node.local_addr())?;
    let mut address = String::new();
    BufReader::new(child.stdout.take().ok_or("the child has a standard output")?).read_line(&mut address)?;
    reduce(&join(&node, 0, address.trim().parse()?)?)?;
    match child.wait()?.success() {
        true => Ok(()),
        false => Err("rank 1 failed".into()),
    }
}

/// Rank 1: reads who it is, says where it listens.
fn second() -> Result<(), Box<dyn Error>> {
    let lines = stdin().lock().lines().take(4).collect::<Result<Vec<_>, _>>()?;
    let [certificate, private_key, root, peer] =
        lines.try_into().map_err(|_| "four lines on standard input")?;
    let certificates = vec![hex::decode(certificate)?];
    let node =
        start(Identity { certificates, private_key: hex::decode(private_key)?, root: hex::decode(root)? })?;
    println!("{}", node.local_addr());
    reduce(&join(&node, 1, peer.parse()?)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().any(|argument| argument == "--rank-1") { second() } else { first() }
}
