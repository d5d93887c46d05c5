//! A network in between: hands datagrams on between a caller and a node, keeps a copy of each, and may mistreat them.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A datagram that was held back is let go after this long without another.
const HELD_BACK: Duration = Duration::from_millis(3);

/// What happens to datagrams, each so many times in a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    pub flipped: u64,
    pub dropped: u64,
    pub doubled: u64,
    /// Overtaken by the next one.
    pub held_back: u64,
}

impl Weather {
    pub const BAD: Self = Self { flipped: 30, dropped: 30, doubled: 30, held_back: 30 };
}

/// What the relay has seen and done.
#[derive(Debug, Default)]
pub struct Log {
    seen: Mutex<Vec<u8>>,
    from_caller: AtomicU64,
    from_node: AtomicU64,
    mistreated: AtomicU64,
    silent: AtomicBool,
    exclusive: AtomicBool,
}

/// A network between one caller and one node.
pub struct Relay {
    address: SocketAddr,
    log: Arc<Log>,
}

impl Relay {
    pub fn before(node: SocketAddr) -> Self {
        Self::with(node, Weather::default(), 0)
    }

    /// Only the first caller gets through.
    pub fn for_one_caller(node: SocketAddr) -> Self {
        let relay = Self::before(node);
        relay.log.exclusive.store(true, Ordering::SeqCst);
        relay
    }

    /// For any number of callers, each of whom has a way back of its own.
    pub fn per_caller(node: SocketAddr) -> Self {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
        socket.set_read_timeout(Some(HELD_BACK)).unwrap();
        let (address, log) = (socket.local_addr().unwrap(), Arc::<Log>::default());
        let relay = Self { address, log: log.clone() };
        std::thread::spawn(move || hand_on_per_caller(&socket, node, &log));
        relay
    }

    /// Mistreats datagrams in a way that only depends on the seed and on their order.
    pub fn with(node: SocketAddr, weather: Weather, seed: u64) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(HELD_BACK)).unwrap();
        let (address, log) = (socket.local_addr().unwrap(), Arc::<Log>::default());
        let way = Way { socket, node, caller: None, weather, dice: Dice(seed), held: None, log: log.clone() };
        // It ends with the last one who looks at the log.
        std::thread::spawn(move || way.run());
        Self { address, log }
    }

    /// Where the caller should call.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on nothing gets through.
    pub fn fall_silent(&self) {
        self.log.silent.store(true, Ordering::SeqCst);
    }

    /// All bytes that came, one way or the other.
    pub fn seen(&self) -> Vec<u8> {
        self.log.seen.lock().unwrap().clone()
    }

    /// Bytes that came from the caller, and from the node.
    pub fn carried(&self) -> (u64, u64) {
        (self.log.from_caller.load(Ordering::SeqCst), self.log.from_node.load(Ordering::SeqCst))
    }

    /// Datagrams that something happened to.
    pub fn mistreated(&self) -> u64 {
        self.log.mistreated.load(Ordering::SeqCst)
    }
}

/// Ends with the last one who looks at the log, as do the ways back.
fn hand_on_per_caller(socket: &Arc<UdpSocket>, node: SocketAddr, log: &Arc<Log>) {
    let mut callers: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
    let ended = Arc::new(AtomicBool::new(false));
    let mut buffer = vec![0; 65_536];
    while Arc::strong_count(log) > 1 {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        log.from_caller.fetch_add(length as u64, Ordering::SeqCst);
        let ahead = callers.entry(from).or_insert_with(|| {
            let ahead = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
            ahead.connect(node).unwrap();
            ahead.set_read_timeout(Some(HELD_BACK)).unwrap();
            let (back, ahead_too, ended) = (socket.clone(), ahead.clone(), ended.clone());
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while !ended.load(Ordering::SeqCst) {
                    if let Ok(length) = ahead_too.recv(&mut buffer) {
                        let _ = back.send_to(&buffer[..length], from);
                    }
                }
            });
            ahead
        });
        // A lost datagram is the network's everyday life.
        let _ = ahead.send(&buffer[..length]);
    }
    ended.store(true, Ordering::SeqCst);
}

/// The relay's thread.
struct Way {
    socket: UdpSocket,
    node: SocketAddr,
    caller: Option<SocketAddr>,
    weather: Weather,
    dice: Dice,
    held: Option<(Vec<u8>, SocketAddr)>,
    log: Arc<Log>,
}

impl Way {
    fn run(mut self) {
        let mut buffer = vec![0; 65_536];
        while Arc::strong_count(&self.log) > 1 {
            match self.socket.recv_from(&mut buffer) {
                Ok((length, from)) => self.take(&mut buffer[..length], from),
                Err(_) => self.let_go(),
            }
        }
    }

    fn take(&mut self, datagram: &mut [u8], from: SocketAddr) {
        if self.log.silent.load(Ordering::SeqCst) {
            return;
        }
        let is_other = from != self.node && self.caller.is_some_and(|caller| caller != from);
        if is_other && self.log.exclusive.load(Ordering::SeqCst) {
            return;
        }
        self.log.seen.lock().unwrap().extend_from_slice(datagram);
        let (to, count) = match from == self.node {
            true => (self.caller, &self.log.from_node),
            false => {
                self.caller = Some(from);
                (Some(self.node), &self.log.from_caller)
            }
        };
        count.fetch_add(datagram.len() as u64, Ordering::SeqCst);
        let Some(to) = to else { return };
        let fate = self.dice.below(1000);
        let Weather { flipped, dropped, doubled, held_back } = self.weather;
        if fate < flipped + dropped + doubled + held_back {
            self.log.mistreated.fetch_add(1, Ordering::SeqCst);
        }
        if fate < flipped && !datagram.is_empty() {
            let bit = self.dice.below(8 * datagram.len() as u64) as usize;
            datagram[bit / 8] ^= 1 << (bit % 8);
        } else if fate < flipped + dropped {
            return;
        } else if fate < flipped + dropped + doubled {
            self.send(datagram, to);
        } else if fate < flipped + dropped + doubled + held_back {
            self.let_go();
            self.held = Some((datagram.to_vec(), to));
            return;
        }
        self.send(datagram, to);
        self.let_go();
    }

    fn let_go(&mut self) {
        if let Some((datagram, to)) = self.held.take() {
            self.send(&datagram, to);
        }
    }

    fn send(&self, datagram: &[u8], to: SocketAddr) {
        // A lost datagram is the network's everyday life.
        let _ = self.socket.send_to(datagram, to);
    }
}

/// SplitMix64.
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Whether `bytes` hold `pattern` anywhere.
pub fn holds(bytes: &[u8], pattern: &[u8]) -> bool {
    bytes.windows(pattern.len()).any(|window| window == pattern)
}
