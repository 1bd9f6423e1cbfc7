//! Those who are connected with a monitor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use picovm_guest_protocol::Stream;

use super::super::protocol::FromMonitor;
use crate::messages;
use crate::streams::{Descriptor, Sink};

/// How long a client may take to send the rest of a message, or to take one.
const CLIENT_MAX: Duration = Duration::from_secs(2);

/// A client.
pub(super) struct Peer {
    pub(super) id: u64,
    pub(super) socket: UnixStream,
    pub(super) role: Role,
    /// Whether it has started the container, and waits for its end: the container's streams are its own.
    pub(super) starter: bool,
}

/// What a client waits for.
pub(super) enum Role {
    /// It has not said.
    New,
    /// Output, and the end of the container.
    Attached {
        stdin: Option<OwnedFd>,
        sinks: Vec<Sink<'static>>,
    },
    /// The end of a process.
    Executing(u16),
    /// The end of the container.
    Waiting,
}

impl Peer {
    pub(super) fn new(id: u64, socket: UnixStream, starter: bool) -> Self {
        // Without a limit a client that stops in the middle of a message would stop the monitor.
        let _ = socket.set_read_timeout(Some(CLIENT_MAX));
        let _ = socket.set_write_timeout(Some(CLIENT_MAX));
        Self {
            id,
            socket,
            role: Role::New,
            starter,
        }
    }

    /// Tells something. Who does not listen any more does not need to know.
    pub(super) fn tell(&self, message: &FromMonitor) {
        let _ = messages::send(&self.socket, message, &[]);
    }

    pub(super) fn attach(
        &mut self,
        stdin: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) {
        let sinks = [(Stream::Stdout, stdout), (Stream::Stderr, stderr)]
            .into_iter()
            .filter_map(|(stream, fd)| Some(Sink::new(stream, Descriptor::Owned(fd?))))
            .collect();
        self.role = Role::Attached { stdin, sinks };
    }

    pub(super) fn sinks(&self) -> &[Sink<'static>] {
        match &self.role {
            Role::Attached { sinks, .. } => sinks,
            _ => &[],
        }
    }

    /// Bytes that wait for it to take them.
    pub(super) fn backlog(&self) -> usize {
        self.sinks().iter().map(Sink::waiting).max().unwrap_or(0)
    }

    pub(super) fn stdin(&self) -> Option<BorrowedFd<'_>> {
        match &self.role {
            Role::Attached { stdin, .. } => stdin.as_ref().map(AsFd::as_fd),
            _ => None,
        }
    }

    /// Its standard input has come to its end.
    pub(super) fn end_stdin(&mut self) {
        if let Role::Attached { stdin, .. } = &mut self.role {
            *stdin = None;
        }
    }

    /// Gives it output; whether it has taken, or will take it.
    pub(super) fn give(&mut self, stream: Stream, bytes: &[u8]) -> bool {
        let Role::Attached { sinks, .. } = &mut self.role else {
            return true;
        };
        let mut whole = true;
        for sink in sinks.iter_mut().filter(|sink| sink.stream() == stream) {
            sink.push(bytes);
        }
        sinks.retain_mut(|sink| {
            let works = sink.write().is_ok();
            whole &= works;
            works
        });
        whole
    }

    /// Writes what waits; whether all of its outputs work.
    pub(super) fn write(&mut self) -> bool {
        self.give(Stream::Stdout, &[])
    }
}
