//! The host's ends of a process's streams: descriptors that are read and written without ever blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use picovm_guest_protocol::{ContainerExit, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::session::Session;

/// Bytes that a write to a pipe takes without blocking once it polls as writable (`PIPE_BUF`).
const ATOMIC: usize = 4096;

/// A descriptor that is somebody else's, or is closed with the process whose stream it is.
pub(crate) enum Descriptor<'fd> {
    Borrowed(BorrowedFd<'fd>),
    Owned(OwnedFd),
}

impl AsFd for Descriptor<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Borrowed(fd) => *fd,
            Self::Owned(fd) => fd.as_fd(),
        }
    }
}

/// One output on its way to a descriptor.
pub(crate) struct Sink<'fd> {
    stream: Stream,
    fd: Descriptor<'fd>,
    waiting: Vec<u8>,
    broken: bool,
}

impl<'fd> Sink<'fd> {
    pub(crate) fn new(stream: Stream, fd: Descriptor<'fd>) -> Self {
        Self {
            stream,
            fd,
            waiting: Vec::new(),
            broken: false,
        }
    }

    /// Whether bytes wait for the descriptor to take them.
    pub(crate) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Which output it is.
    pub(crate) fn stream(&self) -> Stream {
        self.stream
    }

    /// Bytes that wait for the descriptor to take them.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Adds bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Writes what the descriptor takes without blocking; returns the bytes that went.
    pub(crate) fn write(&mut self) -> io::Result<usize> {
        let mut done = 0;
        while done < self.waiting.len() {
            // The descriptor is shared with others and so must stay blocking: write only what it says it takes.
            let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            match poll(&mut fds, Some(&now)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => break,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            let rest = self.waiting.get(done..).unwrap_or_default();
            let part = rest.get(..rest.len().min(ATOMIC)).unwrap_or_default();
            match rustix::io::write(&self.fd, part) {
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => {
                    self.waiting.clear();
                    return Err(error.into());
                }
            }
        }
        self.waiting.drain(..done);
        Ok(done)
    }
}

/// A process and the descriptors that its streams are connected with.
pub(crate) struct Channel<'fd> {
    pub(crate) process: u16,
    /// Until its end.
    pub(crate) stdin: Option<Descriptor<'fd>>,
    pub(crate) sinks: Vec<Sink<'fd>>,
    /// How it ended, once it has.
    pub(crate) exit: Option<ContainerExit>,
}

impl<'fd> Channel<'fd> {
    /// `stdin` is read, if there is one.
    pub(crate) fn new(
        process: u16,
        stdin: Option<Descriptor<'fd>>,
        stdout: Descriptor<'fd>,
        stderr: Descriptor<'fd>,
    ) -> Self {
        Self {
            process,
            stdin,
            sinks: vec![
                Sink::new(Stream::Stdout, stdout),
                Sink::new(Stream::Stderr, stderr),
            ],
            exit: None,
        }
    }

    /// One that only gives.
    pub(crate) fn source(process: u16, stdin: Descriptor<'fd>) -> Self {
        Self {
            process,
            stdin: Some(stdin),
            sinks: Vec::new(),
            exit: None,
        }
    }

    /// Writes what can be written.
    pub(crate) fn write(&mut self, session: &mut Session) {
        for sink in &mut self.sinks {
            if sink.waiting.is_empty() {
                continue;
            }
            match sink.write() {
                Ok(0) => {}
                Ok(count) => session.consumed(self.process, sink.stream, count),
                Err(_) => {
                    sink.broken = true;
                    session.close_output(self.process, sink.stream);
                }
            }
        }
    }

    /// Takes output of the process.
    pub(crate) fn take(&mut self, stream: Stream, bytes: &[u8], session: &mut Session) {
        let Some(sink) = self.sinks.iter_mut().find(|sink| sink.stream == stream) else {
            return;
        };
        if sink.broken {
            session.consumed(self.process, stream, bytes.len());
        } else {
            sink.waiting.extend_from_slice(bytes);
        }
    }

    /// Whether the process has ended and all of its output is out.
    pub(crate) fn is_done(&self) -> bool {
        self.exit.is_some() && !self.sinks.iter().any(Sink::waits)
    }

    /// Whether its standard input can be read and sent on.
    pub(crate) fn takes_input(&self, session: &Session) -> bool {
        self.exit.is_none() && self.stdin.is_some() && session.stdin_room(self.process) > 0
    }

    /// Reads standard input once.
    pub(crate) fn forward_stdin(&mut self, session: &mut Session) {
        let Some(stdin) = &self.stdin else { return };
        let mut bytes = [0u8; 32 << 10];
        let room = session.stdin_room(self.process).min(bytes.len());
        let part = bytes.get_mut(..room).unwrap_or_default();
        if part.is_empty() {
            return;
        }
        match rustix::io::read(stdin, &mut *part) {
            Ok(count) if count > 0 => {
                session.send_stdin(self.process, part.get(..count).unwrap_or_default());
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            // An input that cannot be read has ended, as for a program that reads it itself.
            Ok(_) | Err(_) => {
                session.close_stdin(self.process);
                self.stdin = None;
            }
        }
    }
}
