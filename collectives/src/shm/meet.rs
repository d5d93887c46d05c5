//! How the ranks of one host find each other: each tells all others, over the authenticated ring, where it listens;
//! then every pair connects by a local socket and exchanges what it shares.
//!
//! The socket is in the abstract namespace: it is no file, and vanishes with its process. Who connects must be a process of
//! the same user and know a rank's secret, else it is ignored. The connection stays open: its end is how
//! the death of a process is noticed, at once.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with,
};

use crate::ring::Ring;

/// What ranks tell each other before they meet, as it travels.
pub(crate) const CARD_BYTES: usize = 64;
const VERSION: u8 = 1;
const SECRET_BYTES: usize = 16;
/// Secret of the sender, rank, generation.
const HELLO_BYTES: usize = SECRET_BYTES + 4 + 8;
/// A board and an arena.
const SHARED_FILES: usize = 2;

/// Where a rank lives and listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Card {
    /// Whether it wants to share memory, and can.
    willing: bool,
    /// The kernel's boot, and which host of several it plays.
    boot: [u8; 16],
    /// The network namespace, in which the socket's name is valid.
    namespace: u64,
    user: u32,
    /// Of the socket; anybody on the host can list it.
    name: [u8; 16],
    /// Proves to others who it is.
    secret: [u8; SECRET_BYTES],
}

impl Card {
    /// The card of a rank that shares no memory.
    pub(crate) fn unwilling() -> Self {
        Self {
            willing: false,
            boot: [0; 16],
            namespace: 0,
            user: 0,
            name: [0; 16],
            secret: [0; SECRET_BYTES],
        }
    }

    pub(crate) fn encode(&self) -> [u8; CARD_BYTES] {
        let mut wire = [0; CARD_BYTES];
        wire[0] = VERSION;
        wire[1] = self.willing.into();
        wire[4..8].copy_from_slice(&self.user.to_le_bytes());
        wire[8..16].copy_from_slice(&self.namespace.to_le_bytes());
        wire[16..32].copy_from_slice(&self.boot);
        wire[32..48].copy_from_slice(&self.name);
        wire[48..64].copy_from_slice(&self.secret);
        wire
    }

    /// `None` where it is of another version.
    pub(crate) fn decode(wire: &[u8; CARD_BYTES]) -> Option<Self> {
        let part = |at: usize| -> [u8; 16] { std::array::from_fn(|i| wire[at + i]) };
        (wire[0] == VERSION).then(|| Self {
            willing: wire[1] != 0,
            user: u32::from_le_bytes(std::array::from_fn(|i| wire[4 + i])),
            namespace: u64::from_le_bytes(std::array::from_fn(|i| wire[8 + i])),
            boot: part(16),
            name: part(32),
            secret: part(48),
        })
    }

    /// Why these two cannot share memory, if they cannot.
    pub(crate) fn apart(&self, other: &Self) -> Option<&'static str> {
        if !(self.willing && other.willing) {
            Some("a rank shares no memory")
        } else if self.boot != other.boot {
            Some("ranks are on several hosts")
        } else if self.namespace != other.namespace {
            Some("ranks are in several network namespaces")
        } else if self.user != other.user {
            Some("ranks belong to several users")
        } else {
            None
        }
    }

    fn address(&self) -> io::Result<SocketAddr> {
        SocketAddr::from_abstract_name(self.socket_name())
    }

    fn socket_name(&self) -> String {
        format!("mattock-{:032x}", u128::from_le_bytes(self.name))
    }

    /// Connects to the rank with this card. Strangers may have filled its queue, so this too has a deadline.
    fn call(&self, deadline: Instant) -> io::Result<UnixStream> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(until(deadline)))?;
        connect(&socket, &SocketAddrUnix::new_abstract_name(self.socket_name().as_bytes())?)?;
        Ok(socket.into())
    }
}

/// A rank that is ready to be met.
#[derive(Debug)]
pub(crate) struct Host {
    listener: UnixListener,
    pub(crate) card: Card,
}

/// A peer that was met: what it shares, and the line that ends when it does.
#[derive(Debug)]
pub(crate) struct Met {
    pub(crate) line: UnixStream,
    pub(crate) board: OwnedFd,
    pub(crate) arena: OwnedFd,
}

impl Host {
    /// Listens under a name that nobody else has. `label` tells hosts apart that have the same kernel.
    ///
    /// # Errors
    /// Where the system gives no such socket.
    pub(crate) fn listen(label: u64) -> io::Result<Self> {
        let (mut name, mut secret) = ([0; 16], [0; SECRET_BYTES]);
        let mut random = std::fs::File::open("/dev/urandom")?;
        random.read_exact(&mut name)?;
        random.read_exact(&mut secret)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = u128::from_str_radix(&boot.trim().replace('-', ""), 16).map_err(io::Error::other)?;
        let card = Card {
            willing: true,
            boot: (boot ^ u128::from(label)).to_le_bytes(),
            namespace: std::fs::metadata("/proc/self/ns/net")?.ino(),
            user: rustix::process::geteuid().as_raw(),
            name,
            secret,
        };
        let listener = UnixListener::bind_addr(&card.address()?)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, card })
    }

    /// Meets all other ranks, whose cards these are, by rank: connects to the lower ones, is called by the higher ones.
    /// `None` stands for this rank itself. Blocks, the limit at most.
    ///
    /// # Errors
    /// Where a rank does not come, or is not who it says.
    pub(crate) fn meet(
        self,
        ring: Ring,
        cards: &[Card],
        share: [BorrowedFd<'_>; SHARED_FILES],
        limit: Duration,
    ) -> io::Result<Vec<Option<Met>>> {
        let deadline = Instant::now() + limit;
        let own = ring.rank().0 as usize;
        let mut met: Vec<Option<Met>> = cards.iter().map(|_| None).collect();
        for (rank, card) in cards.iter().enumerate().take(own) {
            let line = prepare(card.call(deadline)?, &self.card, deadline)?;
            send(&line, &hello(&self.card, own, ring), share)?;
            let expected = hello(card, rank, ring);
            met[rank] = Some(receive(line, |wire| (*wire == expected).then_some(()))?.1);
        }
        while met[own + 1..].iter().any(Option::is_none) {
            let caller = prepare(self.accept(deadline)?, &self.card, deadline).and_then(|line| {
                receive(line, |wire| {
                    (own + 1..cards.len()).find(|&rank| *wire == hello(&cards[rank], rank, ring))
                })
            });
            match caller {
                Ok((rank, peer)) => {
                    send(&peer.line, &hello(&self.card, own, ring), share)?;
                    met[rank] = Some(peer);
                }
                Err(error) => tracing::debug!(%error, "a caller was turned away"),
            }
        }
        Ok(met)
    }

    fn accept(&self, deadline: Instant) -> io::Result<UnixStream> {
        loop {
            match self.listener.accept() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                accepted => return accepted.map(|(line, _)| line),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "a rank of this host did not call"));
            }
            let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&limit))?;
        }
    }
}

/// What is left of a deadline; never nothing, which sockets take for no limit.
fn until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// Sets deadlines, and checks whose process it is.
fn prepare(line: UnixStream, own: &Card, deadline: Instant) -> io::Result<UnixStream> {
    let left = until(deadline);
    line.set_nonblocking(false)?;
    line.set_read_timeout(Some(left))?;
    line.set_write_timeout(Some(left))?;
    let user = rustix::net::sockopt::socket_peercred(&line)?.uid.as_raw();
    if user != own.user {
        return Err(io::Error::other(format!(
            "a process of user {user} answers for a rank of user {}",
            own.user
        )));
    }
    Ok(line)
}

/// What rank `rank`, with this card, says first.
fn hello(card: &Card, rank: usize, ring: Ring) -> [u8; HELLO_BYTES] {
    let mut wire = [0; HELLO_BYTES];
    wire[..SECRET_BYTES].copy_from_slice(&card.secret);
    wire[SECRET_BYTES..][..4].copy_from_slice(&(rank as u32).to_le_bytes());
    wire[SECRET_BYTES + 4..].copy_from_slice(&ring.generation().0.to_le_bytes());
    wire
}

fn send(line: &UnixStream, hello: &[u8], share: [BorrowedFd<'_>; SHARED_FILES]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SHARED_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&share)) {
        return Err(io::Error::other("no room for what is shared"));
    }
    // Local sockets take so little at once.
    let sent = sendmsg(line, &[IoSlice::new(hello)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == hello.len() { Ok(()) } else { Err(io::Error::other("the greeting was cut")) }
}

/// A peer's greeting, which `known` recognizes, and what it shares.
fn receive<T>(line: UnixStream, known: impl FnOnce(&[u8; HELLO_BYTES]) -> Option<T>) -> io::Result<(T, Met)> {
    let mut wire = [0; HELLO_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SHARED_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(line.as_fd(), &mut [IoSliceMut::new(&mut wire)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => files.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let (board, arena) = (files.next(), files.next());
    drop(files);
    let known = if got.bytes == HELLO_BYTES { known(&wire) } else { None };
    match (known, board, arena) {
        (Some(known), Some(board), Some(arena)) => Ok((known, Met { line, board, arena })),
        _ => Err(io::Error::other("a process that is no rank of this ring called")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rank::{Generation, Rank, WorldSize};
    use crate::shm::board::{Board, View};

    const LIMIT: Duration = Duration::from_secs(20);

    fn ring(rank: u32, ranks: u32) -> Ring {
        Ring::new(Rank(rank), WorldSize::new(ranks).unwrap(), Generation(3)).unwrap()
    }

    #[test]
    fn cards_come_back() {
        let card = Host::listen(0).unwrap().card;
        assert_eq!(Card::decode(&card.encode()), Some(card));
        assert_eq!(card.apart(&card), None);
        assert!(card.apart(&Card { user: card.user + 1, ..card }).unwrap().contains("users"));
        assert!(card.apart(&Card { boot: [0; 16], ..card }).unwrap().contains("hosts"));
        assert!(card.apart(&Host::listen(1).unwrap().card).unwrap().contains("hosts"));
        assert_eq!(card.apart(&Host::listen(0).unwrap().card), None);
        assert!(card.apart(&Card::unwilling()).is_some());
    }

    #[test]
    fn every_rank_gets_what_every_other_shares() {
        let boards: Vec<_> = (0..3).map(|_| Board::new().unwrap()).collect();
        for (rank, board) in boards.iter().enumerate() {
            (0..=rank).for_each(|_| board.add_tick());
        }
        let hosts: Vec<_> = (0..3).map(|_| Host::listen(0).unwrap()).collect();
        let cards: Vec<_> = hosts.iter().map(|host| host.card).collect();
        std::thread::scope(|scope| {
            for (own, (host, board)) in (0u32..).zip(hosts.into_iter().zip(&boards)) {
                let cards = &cards;
                scope.spawn(move || {
                    let share = [board.file().as_fd(); 2];
                    let met = host.meet(ring(own, 3), cards, share, LIMIT).unwrap();
                    for (rank, peer) in (0u32..).zip(met) {
                        assert_eq!(peer.is_none(), rank == own);
                        let Some(peer) = peer else { continue };
                        let ticks =
                            View::of(&peer.board).unwrap().ticks().load(std::sync::atomic::Ordering::Acquire);
                        assert_eq!(ticks, rank + 1);
                    }
                });
            }
        });
    }

    #[test]
    fn strangers_are_turned_away() {
        let (host, other) = (Host::listen(0).unwrap(), Host::listen(0).unwrap());
        let (board, cards) = (Board::new().unwrap(), [host.card, other.card]);
        // Queued before the rank itself calls: one that talks nonsense, one that hangs up.
        let address = host.card.address().unwrap();
        let stranger = UnixStream::connect_addr(&address).unwrap();
        send(&stranger, &[7; HELLO_BYTES], [board.file().as_fd(); 2]).unwrap();
        drop(UnixStream::connect_addr(&address).unwrap());
        let share = [board.file().as_fd(); 2];
        std::thread::scope(|scope| {
            scope.spawn(|| other.meet(ring(1, 2), &cards, share, LIMIT).unwrap());
            assert!(host.meet(ring(0, 2), &cards, share, LIMIT).unwrap()[1].is_some());
        });
    }

    #[test]
    fn a_rank_that_does_not_come_is_waited_for_no_longer_than_the_limit() {
        let (host, other) = (Host::listen(0).unwrap(), Host::listen(0).unwrap());
        let (board, cards) = (Board::new().unwrap(), [host.card, other.card]);
        let error =
            host.meet(ring(0, 2), &cards, [board.file().as_fd(); 2], Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_queue_that_strangers_have_filled_is_not_waited_for_longer_than_the_limit() {
        let host = Host::listen(0).unwrap();
        rustix::net::listen(&host.listener, 0).unwrap();
        let call = || host.card.call(Instant::now() + Duration::from_millis(20));
        let callers: Vec<_> = (0..10).map(|_| call()).collect();
        assert!(callers[0].is_ok() && callers[9].is_err(), "{callers:?}");
    }
}
