//! Real processes on several hosts, of which one is killed while all are at work: every survivor learns of it at once, by way of
//! those who share its host. `MATTOCK_KILLS` says how many are killed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Authority, config, name, ring};
use mattock_collectives::{Buffer, Generation, Identity, Node, NodeConfig, Rank, RingSpec, Sum, Transport};

/// On which host each rank is; a rank that is alone on its host is missed after a timeout only.
const HOSTS: [u64; 5] = [1, 1, 2, 2, 2];
const RANKS: u32 = HOSTS.len() as u32;
/// No rank waits for this in vain; who has ended long before has not waited for it.
const TIMEOUT: Duration = Duration::from_secs(600);
const PATIENCE: Duration = Duration::from_secs(60);
/// What a rank says, among what a test program says of itself.
const SAYS: &str = "rank says: ";

/// One rank, as a process of its own: it is told who it is, tells its address, is told everybody's, and works until it fails.
#[test]
#[ignore = "survivors_of_a_kill_learn_of_it_at_once starts it"]
fn rank_process() {
    let mut lines = std::io::stdin().lines().map(Result::unwrap);
    let mut line = || lines.next().unwrap();
    let rank: u32 = line().parse().unwrap();
    let [certificate, private_key, root] = [(); 3].map(|()| unhex(&line()));
    let identity = Identity { certificates: vec![certificate], private_key, root };
    let (host, group) = (HOSTS[rank as usize], config(TIMEOUT));
    let bind = ([127, 0, 0, 1], 0).into();
    let node = Node::start(NodeConfig { host, group, ..NodeConfig::new(identity, bind) }).unwrap();
    println!("{SAYS}{}", node.local_addr());
    let ring = ring(rank, RANKS, 1);
    let next = (line().parse().unwrap(), name(ring.next().0));
    let group = node.join_ring(RingSpec { ring, next, prev: name(ring.prev().0) }).unwrap();
    assert_eq!((group.transport(), group.ring().generation()), (Transport::Hierarchical, Generation(1)));
    println!("{SAYS}joined");
    // Nobody sends this: who waits for a message of a rank that lives learns of another's death, too.
    let waiting = group.receive(Rank((rank + 2) % RANKS), 9, Buffer::<u8>::zeroed(1));
    for round in 0u32.. {
        let len = [1, 1000, 100_000, 2_000_000][round as usize % 4];
        let sum = group.all_reduce::<Sum<i32>>(Arc::new(vec![1; len].into()), group.buffer(len));
        let gathered = group.all_gather(Arc::new(vec![7u8].into()), RANKS as usize, Buffer::default());
        let (before, behind) = (Rank((rank + RANKS - 2) % RANKS), Rank((rank + 2) % RANKS));
        let sent = group.send(behind, round, Arc::new(vec![rank; len].into()));
        let received = group.receive(before, round, group.buffer::<u32>(len));
        let outcomes =
            [sum.wait().map(drop), gathered.wait().map(drop), received.wait().map(drop), sent.wait()];
        if let Some(error) = outcomes.into_iter().find_map(Result::err) {
            let missed = waiting.wait().unwrap_err();
            assert!(missed.to_string().contains("lost rank"), "{missed}");
            println!("{SAYS}{error}");
            return;
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..][..2], 16).unwrap()).collect()
}

/// A rank's process, as its parent sees it. It is killed at the latest when nobody needs it any more.
struct Process {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Process {
    fn start(rank: u32, identity: &Identity) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["rank_process", "--exact", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut to = child.stdin.take().unwrap();
        let Identity { certificates, private_key, root } = identity;
        writeln!(to, "{rank}\n{}\n{}\n{}", hex(&certificates[0]), hex(private_key), hex(root)).unwrap();
        let from = BufReader::new(child.stdout.take().unwrap());
        Self { child, to, from }
    }

    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "a rank ended without a word");
            // The test program does not end its own line before.
            if let Some((_, said)) = line.split_once(SAYS) {
                return said.trim().to_owned();
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn survivors_of_a_kill_learn_of_it_at_once() {
    let kills: u64 = std::env::var("MATTOCK_KILLS").map_or(10, |kills| kills.parse().unwrap());
    for kill in 0..kills {
        let authority = Authority::new();
        let start = |rank| Process::start(rank, &authority.identity(&[&name(rank)]));
        let mut ranks: Vec<Process> = (0..RANKS).map(start).collect();
        let addresses: Vec<String> = ranks.iter_mut().map(Process::hear).collect();
        for (rank, process) in ranks.iter_mut().enumerate() {
            writeln!(process.to, "{}", addresses[(rank + 1) % addresses.len()]).unwrap();
        }
        ranks.iter_mut().for_each(|rank| assert_eq!(rank.hear(), "joined"));
        // Any rank, leader or not, at any moment.
        let random = (kill + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        std::thread::sleep(Duration::from_micros(random % 100_000));
        let mut victim = ranks.remove((random >> 32) as usize % ranks.len());
        let killed = Instant::now();
        victim.child.kill().unwrap();
        for rank in &mut ranks {
            let said = rank.hear();
            assert!(said.contains("lost rank"), "kill {kill}: {said}");
            assert!(said.contains("process has ended"), "kill {kill}: {said}");
        }
        assert!(killed.elapsed() < PATIENCE, "kill {kill}: not by waiting");
    }
}
