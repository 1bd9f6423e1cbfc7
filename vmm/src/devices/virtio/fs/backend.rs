//! What the file system lies on: a socket of packets to a share server, which has the files. Never blocks.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// Longest packet, either way: 128 KiB of data, as a FUSE file system has them that agrees on no more, with headers and names.
pub const PACKET_MAX: usize = (128 << 10) + (8 << 10);

/// The device's end of a connection with a share server, if there is one.
#[derive(Default)]
pub struct ShareBackend {
    socket: Option<OwnedFd>,
    packet: Vec<u8>,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Whole,
    /// There is no room for it now.
    Full,
    /// Nobody is there who could receive it.
    Gone,
}

impl ShareBackend {
    /// One end of a pair of sockets (`SOCK_SEQPACKET`), the other end of which a share server has.
    ///
    /// # Errors
    /// As `fcntl(2)`.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket: Some(socket),
            packet: Vec::new(),
        })
    }

    /// The descriptor to wait on, while there is a server.
    #[must_use]
    pub fn descriptor(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Sends a packet.
    pub fn send(&mut self, packet: &[u8]) -> Sent {
        let Some(socket) = &self.socket else {
            return Sent::Gone;
        };
        match rustix::io::retry_on_intr(|| rustix::net::send(socket, packet, SendFlags::NOSIGNAL)) {
            Ok(_) => Sent::Whole,
            Err(Errno::AGAIN | Errno::NOBUFS) => Sent::Full,
            Err(_) => {
                self.socket = None;
                Sent::Gone
            }
        }
    }

    /// The next packet that is there: `None` if there is none now, or the server has gone.
    pub fn receive(&mut self) -> Option<&[u8]> {
        let socket = self.socket.as_ref()?;
        self.packet.resize(PACKET_MAX, 0);
        let packet = self.packet.as_mut_slice();
        match rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *packet, RecvFlags::empty())) {
            Ok((length, _)) if length > 0 => self.packet.get(..length),
            Err(Errno::AGAIN) => None,
            _ => {
                self.socket = None;
                None
            }
        }
    }
}
