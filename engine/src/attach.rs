//! Connects a container's streams with descriptors of the host until it ends.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use picovm_guest_protocol::{ContainerExit, Stream};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::container::Container;
use crate::error::EngineError;
use crate::scheduling::Prompt;
use crate::session::{Event, Session};

/// What a container's streams are connected with.
pub struct Stdio<'fd> {
    /// Read, if the container was started with its standard input connected.
    pub stdin: BorrowedFd<'fd>,
    /// Written.
    pub stdout: BorrowedFd<'fd>,
    /// Written.
    pub stderr: BorrowedFd<'fd>,
    /// Readable when something is to interrupt the wait; see [`Container::attach`].
    pub wake: Option<BorrowedFd<'fd>>,
    /// When the container is ended with [`Interruption::Kill`].
    pub deadline: Option<Instant>,
}

impl Stdio<'static> {
    /// The streams of this process.
    #[must_use]
    pub fn inherit() -> Self {
        Self {
            stdin: rustix::stdio::stdin(),
            stdout: rustix::stdio::stdout(),
            stderr: rustix::stdio::stderr(),
            wake: None,
            deadline: None,
        }
    }
}

/// What is to happen to a container that is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interruption {
    /// Deliver this signal to it.
    Signal(u8),
    /// End its clone at once; it counts as ended by this signal.
    Kill(u8),
}

/// Why [`Container::attach`] asks what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// [`Stdio::wake`] is readable.
    Descriptor,
    /// [`Stdio::deadline`] has passed.
    Deadline,
}

/// Bytes that a write to a pipe takes without blocking once it polls as writable (`PIPE_BUF`).
const ATOMIC: usize = 4096;

/// Bytes that are taken from the connection at once.
const RECEIVED_AT_ONCE: usize = 64 << 10;

/// Bytes that are taken from the connection before they are looked at.
const RECEIVED_MAX: usize = 256 << 10;

/// How long to wait at once for what a clone that has ended said last.
const LAST_WORDS: Duration = Duration::from_millis(5);

/// One output on its way to a descriptor.
struct Sink<'fd> {
    stream: Stream,
    fd: BorrowedFd<'fd>,
    waiting: Vec<u8>,
    broken: bool,
}

impl<'fd> Sink<'fd> {
    fn new(stream: Stream, fd: BorrowedFd<'fd>) -> Self {
        Self {
            stream,
            fd,
            waiting: Vec::new(),
            broken: false,
        }
    }

    /// Writes what the descriptor takes without blocking; returns the bytes that went.
    fn write(&mut self) -> io::Result<usize> {
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
            match rustix::io::write(self.fd, part) {
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

impl Container {
    /// Serves the container's streams until it has ended and every byte of its output is out, then ends its clone.
    ///
    /// When [`Stdio::wake`] becomes readable or [`Stdio::deadline`] passes, `interrupted` is asked what to do; it has
    /// to make `wake` unreadable again.
    ///
    /// An output that cannot be written any more (a closed pipe) is closed in the container too, whose next write to
    /// it fails as it would without a VM in between.
    ///
    /// # Errors
    /// [`EngineError::CloneEnded`] if the clone ends without saying how its container did (kernel panic, reboot),
    /// [`EngineError::Protocol`] and [`EngineError::Credit`] for an agent that misbehaves, [`EngineError::Host`].
    pub fn attach(
        mut self,
        stdio: Stdio<'_>,
        interrupted: &mut dyn FnMut(Wake) -> Option<Interruption>,
    ) -> Result<ContainerExit, EngineError> {
        self.serve(stdio, interrupted)
    }

    /// As [`Container::attach`], and leaves the clone to be looked at.
    pub(crate) fn serve(
        &mut self,
        stdio: Stdio<'_>,
        interrupted: &mut dyn FnMut(Wake) -> Option<Interruption>,
    ) -> Result<ContainerExit, EngineError> {
        let _prompt = Prompt::begin();
        let mut sinks = [
            Sink::new(Stream::Stdout, stdio.stdout),
            Sink::new(Stream::Stderr, stdio.stderr),
        ];
        let mut stdin_open = self.stdin;
        let mut deadline = stdio.deadline;
        let mut exit: Option<ContainerExit> = None;
        let mut ended = false;
        // Not closed before the end: poll must not be given a descriptor that has become another file.
        let stopped = rustix::io::dup(self.machine.stopped_descriptor())
            .map_err(|error| EngineError::host("watch the clone")(error.into()))?;

        loop {
            self.flush()?;
            for sink in &mut sinks {
                if sink.waiting.is_empty() {
                    continue;
                }
                match sink.write() {
                    Ok(0) => {}
                    Ok(count) => self.session.consumed(sink.stream, count),
                    Err(_) => {
                        sink.broken = true;
                        self.session.close_output(sink.stream);
                    }
                }
            }
            if let Some(exit) = &exit
                && sinks.iter().all(|sink| sink.waiting.is_empty())
            {
                return Ok(exit.clone());
            }
            self.flush()?;

            let ready = {
                let mut fds = Vec::with_capacity(6);
                let connection = if self.session.to_send().is_empty() {
                    PollFlags::IN
                } else {
                    PollFlags::IN | PollFlags::OUT
                };
                let live = exit.is_none();
                fds.push((
                    Source::Connection,
                    PollFd::new(&self.connection, connection),
                    live,
                ));
                fds.push((
                    Source::Stopped,
                    PollFd::new(&stopped, PollFlags::IN),
                    live && !ended,
                ));
                let read_stdin = live && stdin_open && self.session.stdin_room() > 0;
                fds.push((
                    Source::Stdin,
                    PollFd::new(&stdio.stdin, PollFlags::IN),
                    read_stdin,
                ));
                for sink in &sinks {
                    fds.push((
                        Source::Sink,
                        PollFd::new(&sink.fd, PollFlags::OUT),
                        !sink.waiting.is_empty(),
                    ));
                }
                if let Some(wake) = &stdio.wake {
                    fds.push((Source::Wake, PollFd::new(wake, PollFlags::IN), true));
                }
                // What a clone that has ended said last comes in without delay.
                let patience = if ended && live {
                    Some(Instant::now() + LAST_WORDS)
                } else {
                    deadline
                };
                wait(fds, patience)?
            };

            if ready.is_empty() && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                deadline = None;
                if let Some(exit) = self.interrupt(interrupted(Wake::Deadline)) {
                    return Ok(exit);
                }
            }
            for source in ready {
                match source {
                    Source::Connection => {
                        self.receive()?;
                    }
                    Source::Stdin => stdin_open = self.forward_stdin(stdio.stdin)?,
                    Source::Sink => {}
                    Source::Wake => {
                        if let Some(exit) = self.interrupt(interrupted(Wake::Descriptor)) {
                            return Ok(exit);
                        }
                    }
                    Source::Stopped => ended = true,
                }
            }
            self.take_events(&mut sinks, &mut exit)?;
            if ended && exit.is_none() && !self.machine.output_waits() {
                // The device has handed everything over: what is not in the connection now never comes.
                let more = self.receive()?;
                if !self.take_events(&mut sinks, &mut exit)? && !more {
                    return Err(self.ended());
                }
            }
        }
    }

    /// Moves events out of the session; whether the container has ended.
    fn take_events(
        &mut self,
        sinks: &mut [Sink<'_>; 2],
        exit: &mut Option<ContainerExit>,
    ) -> Result<bool, EngineError> {
        while let Some(event) = self.session.next_event()? {
            match event {
                Event::Output(stream, bytes) => {
                    let Some(sink) = sinks.iter_mut().find(|sink| sink.stream == stream) else {
                        continue;
                    };
                    if sink.broken {
                        self.session.consumed(stream, bytes.len());
                    } else {
                        sink.waiting.extend_from_slice(&bytes);
                    }
                }
                Event::Exit(how) => *exit = Some(how),
            }
        }
        Ok(exit.is_some())
    }

    fn interrupt(&mut self, interruption: Option<Interruption>) -> Option<ContainerExit> {
        match interruption? {
            Interruption::Signal(signal) => {
                self.session.signal(signal);
                None
            }
            Interruption::Kill(signal) => Some(ContainerExit::Signal(signal)),
        }
    }

    fn flush(&mut self) -> Result<(), EngineError> {
        while !self.session.to_send().is_empty() {
            match self.connection.write(self.session.to_send()) {
                Ok(count) => self.session.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The clone has gone; how, `Stopped` tells.
                Err(_) => {
                    let rest = self.session.to_send().len();
                    self.session.sent(rest);
                }
            }
        }
        Ok(())
    }

    /// Takes what has come in, as much as is to be looked at before anything else; whether there may be more.
    fn receive(&mut self) -> Result<bool, EngineError> {
        receive(&self.connection, &mut self.session)
    }

    /// Reads standard input once; whether more may follow.
    fn forward_stdin(&mut self, stdin: BorrowedFd<'_>) -> Result<bool, EngineError> {
        let mut bytes = [0u8; 32 << 10];
        let room = self.session.stdin_room().min(bytes.len());
        let part = bytes.get_mut(..room).unwrap_or_default();
        match rustix::io::read(stdin, &mut *part) {
            Ok(0) => {
                self.session.close_stdin();
                Ok(false)
            }
            Ok(count) => {
                self.session.send_stdin(part.get(..count).unwrap_or_default());
                Ok(true)
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => Ok(true),
            Err(_) => {
                // An input that cannot be read has ended, as for a program that reads it itself.
                self.session.close_stdin();
                Ok(false)
            }
        }
    }
}

/// Moves bytes from the connection into the session, [`RECEIVED_MAX`] at most: a clone may send as fast as they are taken.
/// Whether there may be more.
fn receive(connection: &UnixStream, session: &mut Session) -> Result<bool, EngineError> {
    // Not an array: it would be filled with zeros, page by page, to receive a few bytes.
    let mut bytes = Vec::with_capacity(RECEIVED_AT_ONCE);
    let mut received = 0;
    while received < RECEIVED_MAX {
        bytes.clear();
        match rustix::io::read(connection, spare_capacity(&mut bytes)) {
            Ok(0) => return Ok(false),
            Ok(count) => {
                session.received(&bytes);
                received += count;
                if count < RECEIVED_AT_ONCE {
                    return Ok(false);
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(false),
            Err(error) => return Err(EngineError::host("read from the clone")(error.into())),
        }
    }
    Ok(true)
}

#[derive(Clone, Copy)]
enum Source {
    Connection,
    Stopped,
    Stdin,
    Sink,
    Wake,
}

/// Waits for those that are wanted, until the deadline; returns those that are ready.
fn wait(fds: Vec<(Source, PollFd<'_>, bool)>, deadline: Option<Instant>) -> Result<Vec<Source>, EngineError> {
    let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) = fds
        .into_iter()
        .filter(|(_, _, wanted)| *wanted)
        .map(|(source, fd, _)| (source, fd))
        .unzip();
    let timeout = deadline.map(|deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    });
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(EngineError::host("wait for the container")(error.into())),
    }
    Ok(sources
        .into_iter()
        .zip(&fds)
        .filter(|(_, fd)| !fd.revents().is_empty())
        .map(|(source, _)| source)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_that_sends_without_end_is_looked_at_after_a_while() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let flood = std::thread::spawn(move || while there.write_all(&[0; 256 << 10]).is_ok() {});
        let (sender, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // One that gets ahead of the sender has taken all there was, and says so; sooner or later one does not.
            let more = (0..10_000).any(|_| receive(&here, &mut Session::default()).unwrap());
            sender.send(more).unwrap();
        });
        let more = done.recv_timeout(Duration::from_secs(20)).expect("it comes back");
        assert!(more);
        flood.join().unwrap();
    }
}
