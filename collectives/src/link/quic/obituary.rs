//! Peers whose host answers that nobody listens where they were.
//!
//! A process that is killed says nothing. Its host does: it answers a datagram for a closed port with an ICMP message, which
//! the kernel hands over on the socket's error queue. A link sends at least every `KEEP_ALIVE_MAX` of `tuning.rs`, so
//! the death of a process is known in well under a second, whatever the timeout.
//!
//! Such a message is a hint and no proof, for nobody signs it. So one alone means nothing: a peer is gone after [`TIMES_MIN`]
//! of them and [`SILENCE`] without a datagram from it, during which several of ours, each of which a live peer would have
//! answered, were not. Whoever can keep a peer's datagrams from us for so long can end the link without any message.
//! A datagram from the peer takes everything back.
//!
//! Deliberately absent: hosts and networks that are unreachable. They may come back, and the timeout says how long to wait.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Messages that count.
const TIMES_MIN: u32 = 2;
/// How long a peer must have been silent since the first one.
const SILENCE: Duration = Duration::from_millis(300);
/// Peers that are looked after; beyond that, further ones are left to the timeout.
const SUSPECTS_MAX: usize = 1024;

/// Who may be gone, and who is.
#[derive(Debug, Default)]
pub(crate) struct Obituaries {
    suspects: Mutex<HashMap<SocketAddr, Suspect>>,
    /// Whether there are any: datagrams are many, suspects few.
    any: AtomicBool,
    changed: Notify,
}

#[derive(Debug)]
struct Suspect {
    first: Instant,
    times: u32,
    gone: bool,
}

impl Obituaries {
    /// A peer's host says that nobody listens there.
    fn told(&self, peer: SocketAddr, now: Instant) {
        let mut suspects = self.lock();
        if suspects.len() < SUSPECTS_MAX || suspects.contains_key(&canonical(peer)) {
            let suspect =
                suspects.entry(canonical(peer)).or_insert(Suspect { first: now, times: 0, gone: false });
            suspect.times = suspect.times.saturating_add(1);
        }
        self.any.store(true, Ordering::Relaxed);
    }

    /// A datagram came from a peer: it lives.
    pub(crate) fn heard(&self, peer: SocketAddr) {
        if self.any.load(Ordering::Relaxed) {
            let mut suspects = self.lock();
            suspects.remove(&canonical(peer));
            self.any.store(!suspects.is_empty(), Ordering::Relaxed);
        }
    }

    /// Decides about all who were silent for long enough; returns when to decide again.
    fn settle(&self, now: Instant) -> Option<Instant> {
        let mut suspects = self.lock();
        for suspect in suspects.values_mut() {
            if suspect.times >= TIMES_MIN && now >= suspect.first + SILENCE {
                suspect.gone = true;
            }
        }
        let next =
            suspects.values().filter(|suspect| !suspect.gone).map(|suspect| suspect.first + SILENCE).min();
        drop(suspects);
        self.changed.notify_waiters();
        // One message alone waits for the next, not for the time.
        next.filter(|&next| next > now)
    }

    /// Waits until a peer is gone.
    pub(crate) async fn gone(&self, peer: SocketAddr) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before looking, so that no change is missed.
            changed.as_mut().enable();
            if self.lock().get(&canonical(peer)).is_some_and(|suspect| suspect.gone) {
                return;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Suspect>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same for a peer however the socket writes its address.
fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

#[cfg(target_os = "linux")]
pub(crate) use errors::{ask_for_errors, read_obituaries};

#[cfg(target_os = "linux")]
mod errors {
    use std::io;
    use std::mem::size_of;
    use std::net::SocketAddr;
    use std::os::fd::AsRawFd;
    use std::ptr;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use socket2::{SockAddr, Socket};
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    use super::Obituaries;

    /// Room for the two control messages of an error, and more; in words, for their alignment.
    const CONTROL_WORDS: usize = 64;
    /// When nothing is to be decided.
    const FOREVER: Duration = Duration::from_secs(86_400);

    /// From now on the kernel keeps what is said about this socket's datagrams.
    pub(crate) fn ask_for_errors(socket: &Socket) -> io::Result<()> {
        let (level, option) = match socket.local_addr()?.is_ipv6() {
            true => (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
            false => (libc::IPPROTO_IP, libc::IP_RECVERR),
        };
        let (on, length) = (1, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: the option is an integer, `on` is one and lives during the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                ptr::from_ref::<libc::c_int>(&on).cast(),
                length,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads the errors of a socket, another handle of which is in use, for as long as it is polled.
    pub(crate) async fn read_obituaries(socket: Socket, obituaries: Arc<Obituaries>) {
        // SAFETY: a socket names the same descriptor for as long as it lives, and nobody else has this one.
        let socket = match unsafe { AsyncFd::register_with_interest(socket, Interest::ERROR) } {
            Ok(socket) => socket,
            Err(error) => {
                return tracing::warn!(error = %error.into_parts().1, "deaths of peers are left to the timeout");
            }
        };
        let mut settle = None;
        loop {
            let timer = tokio::time::sleep_until(settle.unwrap_or_else(|| Instant::now() + FOREVER).into());
            tokio::select! {
                ready = socket.ready(Interest::ERROR) => {
                    let Ok(mut ready) = ready else { return };
                    while let Ok(Ok(peer)) = ready.try_io(|socket| next_error(socket.get_ref())) {
                        if let Some(peer) = peer {
                            tracing::debug!(%peer, "its host says that nobody listens there");
                            obituaries.told(peer, Instant::now());
                        }
                    }
                }
                () = timer => {}
            }
            settle = obituaries.settle(Instant::now());
        }
    }

    /// Takes one error off the queue: the peer it is about, if its port is closed.
    fn next_error(socket: &Socket) -> io::Result<Option<SocketAddr>> {
        let mut control = [0u64; CONTROL_WORDS];
        let receive = |name: *mut socket2::SockAddrStorage, name_length: *mut libc::socklen_t| {
            // SAFETY: all zeros is a message without buffers.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_name = name.cast();
            // SAFETY: `try_init` gives pointers to an address and its length.
            message.msg_namelen = unsafe { *name_length };
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control) as _;
            // SAFETY: name and control are buffers of the lengths given, and live during the call; there is no other buffer.
            let received = unsafe {
                libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT)
            };
            if received < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: as above; the kernel has set the length of the address that it wrote.
            unsafe { *name_length = message.msg_namelen };
            Ok(is_closed_port(&message))
        };
        // SAFETY: `receive` sets the address and its length, or fails.
        let (closed, peer) = unsafe { SockAddr::try_init(receive) }?;
        Ok(peer.as_socket().filter(|_| closed))
    }

    /// Whether a host said that a port is closed: not a router that it does not know the way, nor this kernel that a
    /// datagram is too large.
    fn is_closed_port(message: &libc::msghdr) -> bool {
        // SAFETY: the message and its control buffer are as the kernel filled them; the macros stay within.
        let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
        while !header.is_null() {
            // SAFETY: a header that the macros return lies within the buffer.
            let (level, kind, length) =
                unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len as usize) };
            let of_ip = (level, kind) == (libc::IPPROTO_IP, libc::IP_RECVERR);
            let of_ipv6 = (level, kind) == (libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
            // SAFETY: computes a length.
            let enough = unsafe { libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as u32) } as usize;
            if (of_ip || of_ipv6) && length >= enough {
                // SAFETY: the data is as long as an error, and read without regard to alignment.
                let error: libc::sock_extended_err =
                    unsafe { ptr::read_unaligned(libc::CMSG_DATA(header).cast()) };
                let by_icmp = [libc::SO_EE_ORIGIN_ICMP, libc::SO_EE_ORIGIN_ICMP6].contains(&error.ee_origin);
                return by_icmp && error.ee_errno == libc::ECONNREFUSED as u32;
            }
            // SAFETY: as for the first.
            header = unsafe { libc::CMSG_NXTHDR(message, header) };
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> SocketAddr {
        ([10, 0, 0, 1], 7000).into()
    }

    fn is_gone(obituaries: &Obituaries) -> bool {
        obituaries.lock().get(&peer()).is_some_and(|suspect| suspect.gone)
    }

    #[test]
    fn repeated_messages_and_silence_end_a_peer() {
        let (obituaries, start) = (Obituaries::default(), Instant::now());
        obituaries.told(peer(), start);
        obituaries.told("[::ffff:10.0.0.1]:7000".parse().unwrap(), start);
        assert_eq!(obituaries.settle(start), Some(start + SILENCE));
        assert!(!is_gone(&obituaries), "it may still speak");
        assert_eq!(obituaries.settle(start + SILENCE), None);
        assert!(is_gone(&obituaries));
    }

    #[test]
    fn one_message_ends_nobody_until_another_comes() {
        let (obituaries, start) = (Obituaries::default(), Instant::now());
        obituaries.told(peer(), start);
        assert_eq!(obituaries.settle(start + 10 * SILENCE), None);
        assert!(!is_gone(&obituaries));
        obituaries.told(peer(), start + 10 * SILENCE);
        obituaries.settle(start + 10 * SILENCE);
        assert!(is_gone(&obituaries));
    }

    #[test]
    fn whoever_speaks_is_no_longer_suspected() {
        let (obituaries, start) = (Obituaries::default(), Instant::now());
        for _ in 0..TIMES_MIN {
            obituaries.told(peer(), start);
        }
        obituaries.heard(peer());
        obituaries.settle(start + SILENCE);
        assert!(!is_gone(&obituaries));
        obituaries.told(peer(), start + SILENCE);
        obituaries.settle(start + 2 * SILENCE);
        assert!(!is_gone(&obituaries), "what was said before it spoke does not count");
    }

    #[test]
    fn suspects_are_bounded() {
        let (obituaries, start) = (Obituaries::default(), Instant::now());
        for port in 1..=2 * SUSPECTS_MAX as u16 {
            obituaries.told(([10, 0, 0, 2], port).into(), start);
        }
        assert_eq!(obituaries.lock().len(), SUSPECTS_MAX);
    }
}
