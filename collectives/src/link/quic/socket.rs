//! The UDP socket under an endpoint: large buffers, and no more segments per call than fit.
//!
//! quinn sizes its receive buffer as datagram size x segments x batch: with datagrams of 64 KB and the 64 segments
//! that Linux may merge, that is 128 MB and misses every cache. The kernel never hands over more than 64 KB at
//! once, so [`TunedSocket`] reports as many segments as that takes.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};

use super::obituary::{self, Obituaries};
use super::steady::Paces;
use super::tuning::{LOOPBACK_PAYLOAD_MAX, Path};

/// What is asked of the kernel for each direction; it may give less.
const BUFFER_BYTES: usize = 8 << 20;

/// Binds a socket; must run within the runtime that is to drive it.
///
/// Peers whose ports turn out to be closed are told to `obituaries` for as long as the runtime lives.
pub(crate) fn bind(
    address: SocketAddr,
    path: Path,
    paces: Arc<Paces>,
    obituaries: Arc<Obituaries>,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    enlarge_buffers(&socket);
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    #[cfg(target_os = "linux")]
    {
        obituary::ask_for_errors(&socket)?;
        tokio::spawn(obituary::read_obituaries(socket.try_clone()?, obituaries.clone()));
    }
    let inner = TokioRuntime.wrap_udp_socket(socket.into())?;
    let datagram_bytes = AtomicUsize::new(path.payload_min().into());
    Ok(Arc::new(TunedSocket { inner, path, paces, obituaries, datagram_bytes }))
}

/// As large as the kernel allows: beyond its limit for those with the privilege, up to it for others.
fn enlarge_buffers(socket: &Socket) {
    #[cfg(target_os = "linux")]
    {
        use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
        let forced = set_socket_recv_buffer_size_force(socket, BUFFER_BYTES)
            .and_then(|()| set_socket_send_buffer_size_force(socket, BUFFER_BYTES));
        if forced.is_ok() {
            return;
        }
    }
    let set =
        socket.set_recv_buffer_size(BUFFER_BYTES).and_then(|()| socket.set_send_buffer_size(BUFFER_BYTES));
    if let Err(error) = set {
        tracing::debug!(%error, "the socket keeps its small buffers");
    }
}

#[derive(Debug)]
struct TunedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    path: Path,
    paces: Arc<Paces>,
    obituaries: Arc<Obituaries>,
    /// What was last sent several of at once: all must fit together.
    datagram_bytes: AtomicUsize,
}

/// Datagrams of such a size in one call of the kernel.
fn transmit_segments_max(datagram_bytes: usize) -> usize {
    (usize::from(LOOPBACK_PAYLOAD_MAX) / datagram_bytes).max(1)
}

fn part<'a>(transmit: &Transmit, contents: &'a [u8]) -> Transmit<'a> {
    let Transmit { destination, ecn, segment_size, src_ip, .. } = *transmit;
    Transmit { destination, ecn, contents, segment_size, src_ip }
}

impl AsyncUdpSocket for TunedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.paces.poller(self.inner.clone().create_io_poller())
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        let Some(size) = transmit.segment_size else { return self.inner.try_send(transmit) };
        self.datagram_bytes.store(size, Ordering::Relaxed);
        let fits = transmit_segments_max(size) * size;
        if transmit.contents.len() <= fits {
            return self.inner.try_send(transmit);
        }
        // Datagrams have just become larger, so this is rare.
        let (first, rest) = transmit.contents.split_at(fits);
        self.inner.try_send(&part(transmit, first))?;
        // What the socket does not take now is lost, as datagrams may be: the first part must not be sent again.
        let _ = self.inner.try_send(&part(transmit, rest));
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let received = self.inner.poll_recv(cx, bufs, meta);
        if let Poll::Ready(Ok(count)) = received {
            meta[..count].iter().for_each(|datagram| self.obituaries.heard(datagram.addr));
        }
        received
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner
            .max_transmit_segments()
            .min(transmit_segments_max(self.datagram_bytes.load(Ordering::Relaxed)))
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments().min(self.path.receive_segments_max())
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
