//! What an engine and a VMM process say to each other: over a Unix stream socket, each message a length and postcard, file
//! descriptors with its first byte.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use picovm_guest_protocol::{ContainerExit, ContainerSpec, Helper, ProcessSpec, TerminalSize};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest message in bytes: as much as `execve(2)` takes of arguments and environment, and some.
const MESSAGE_MAX: usize = 8 << 20;
/// Most descriptors with a message: the three standard streams and a writable layer.
const DESCRIPTORS_MAX: usize = 4;

/// How ready a parked clone is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parking {
    /// The pages that a start touches are there, in both stages of page tables: it starts fastest.
    #[default]
    Prefaulted,
    /// It owns next to no page of its memory: it takes least, and faults its pages in when it starts.
    Bare,
}

/// To the fork server, with one descriptor: the socket of the VMM process to fork.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToServer {
    /// Fork a VMM process that parks a clone.
    Fork(Parking),
}

/// To a VMM process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToVmm {
    /// Start this container in the parked clone; with the descriptors of its standard streams, and that of its writable layer if
    /// it brings one.
    Start {
        /// Its id; a random one if there is none.
        id: Option<String>,
        /// What to run.
        spec: ContainerSpec,
        /// Host name; the beginning of the container's id if there is none.
        hostname: Option<String>,
    },
    /// Deliver this signal to the container's main process and its group.
    Signal(u8),
    /// Deliver this signal to a process and its group.
    SignalProcess(u16, u8),
    /// End the clone at once; the container counts as ended by this signal, unless it has ended already.
    Kill(u8),
    /// Begin a process in the container, under a number that no process has; with the descriptors of its standard streams.
    Exec(u16, ProcessSpec),
    /// Begin a process of the agent's own, under a number that no process has; with the descriptors of its standard streams.
    Help(u16, Helper),
    /// The process's terminal has this size.
    Resize(u16, TerminalSize),
    /// Let the clone stand still.
    Pause,
    /// Let it go on.
    Resume,
}

/// From a VMM process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromVmm {
    /// A clone stands at the freeze point, ready to be started; with the descriptor at which a share server is connected with it.
    Parked,
    /// The container has ended, and every byte of its output is out.
    Exit(ContainerExit),
    /// A process other than the main one has ended, and every byte of its output is out. Its number is free.
    ProcessExit(u16, ContainerExit),
    /// Memory has run out in the guest, and a process of the container was killed for it. Told once.
    OutOfMemory,
    /// The container's program runs. Only if it was asked to tell so.
    Started,
    /// The clone stands still, or goes on, as it was told to.
    Paused(bool),
    /// There is no clone any more, for this reason.
    Failed(String),
}

/// Sends a message whole.
pub fn send(socket: &UnixStream, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if body.len() > MESSAGE_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "what is to be run has too many arguments or variables",
        ));
    }
    let mut bytes = Vec::with_capacity(body.len().saturating_add(4));
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&body);

    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let sent = loop {
        let parts = [io::IoSlice::new(&bytes)];
        match rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => break sent?,
        }
    };
    let mut writer = socket;
    writer.write_all(bytes.get(sent..).unwrap_or_default())
}

/// Receives a message whole; `None` if the other end is closed.
pub fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut descriptors = Vec::new();
    let mut header = [0u8; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [io::IoSliceMut::new(&mut header)];
        match rustix::net::recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?.bytes,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received == 0 {
        return Ok(None);
    }
    let mut reader = socket;
    reader.read_exact(header.get_mut(received..).unwrap_or_default())?;
    let length = u32::from_le_bytes(header) as usize;
    if length > MESSAGE_MAX {
        return Err(broken("a message is too long"));
    }
    let mut body = Vec::new();
    reader.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(broken("a message is cut off"));
    }
    let message = postcard::from_bytes(&body).map_err(|error| broken(&error.to_string()))?;
    Ok(Some((message, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn messages_arrive_in_order_with_their_descriptors() {
        let (here, there) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let start = ToVmm::Start {
            id: None,
            spec: ContainerSpec::of(ProcessSpec {
                args: vec![b"x".repeat(100_000)],
                ..ProcessSpec::default()
            }),
            hostname: Some("box".into()),
        };
        let sender = std::thread::spawn(move || {
            send(&here, &start, &[file.as_fd(), file.as_fd(), file.as_fd()]).unwrap();
            send(&here, &ToVmm::Signal(15), &[]).unwrap();
            start
        });
        let (first, descriptors) = receive::<ToVmm>(&there).unwrap().unwrap();
        let (second, none) = receive::<ToVmm>(&there).unwrap().unwrap();
        assert_eq!((first, descriptors.len()), (sender.join().unwrap(), 3));
        assert_eq!((second, none.len()), (ToVmm::Signal(15), 0));
        assert!(receive::<ToVmm>(&there).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        for bytes in [
            &[0xff, 0xff, 0xff, 0xff][..],
            &[5, 0, 0, 0, 1],
            &[1, 0, 0, 0, 77],
            &[1, 0],
        ] {
            let (mut here, there) = UnixStream::pair().unwrap();
            here.write_all(bytes).unwrap();
            drop(here);
            assert!(receive::<ToVmm>(&there).is_err(), "{bytes:?}");
        }
    }
}
