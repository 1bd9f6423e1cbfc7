//! The agent: PID 1 after the freeze point. Serves one container over the control connection until it has ended and
//! its last byte is with the host.
//!
//! One thread, one epoll with edge-triggered events: each descriptor is registered once, before the freeze, and from
//! then on an event only says that a descriptor may be ready again.

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

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use picovm_guest_protocol::frame::{DATA_MAX, MAIN};
use picovm_guest_protocol::{ContainerExit, Frame, FrameDecoder, FrameError, StartFailure, Stream};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};

use crate::console;
use crate::error::{Attempt, InitError};
use crate::streams::{Input, InputViolation, Outgoing, Output};
use crate::stub::Container;

/// Why the agent cannot go on; the host gets no exit status then.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The host's side of the control connection is closed.
    #[error("the host has closed the control connection")]
    HostGone,
    /// The control connection failed.
    #[error("{attempted} the control connection: {source}")]
    Control {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The host's bytes are not a frame, or ours did not become one.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The host sent a frame that it must not send.
    #[error("the host {0}")]
    Protocol(&'static str),
    /// The kernel refused something that it cannot refuse.
    #[error("{attempted}: {source}")]
    System {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

const CONTROL: u64 = 0;
const CHILDREN: u64 = 1;
const STDIN: u64 = 2;
const STDOUT: u64 = 3;
const STDERR: u64 = 4;

/// Reads from the control connection before the other descriptors have their turn.
const READS_AT_ONCE: u32 = 8;
/// How long a frame that nobody waits for stays here for another to go with.
const LEISURE: rustix::event::Timespec = rustix::event::Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};
const NO_WAIT: rustix::event::Timespec = rustix::event::Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// Keeps the out-of-memory killer from the agent; the container's processes do not inherit that.
pub fn shield_from_oom() -> Result<(), InitError> {
    crate::identity::set_oom_score(-1000).attempt(|| "set oom_score_adj to -1000".into())
}

/// The agent of one container.
pub struct Agent {
    epoll: OwnedFd,
    control: OwnedFd,
    readable: bool,
    hung_up: bool,
    decoder: FrameDecoder,
    outgoing: Outgoing,
    children: OwnedFd,
    children_changed: bool,
    /// The container's main process, once it is there.
    pid: Option<Pid>,
    stdin: Input,
    stdout: Output,
    stderr: Output,
    failure: OwnedFd,
    ended: Option<ContainerExit>,
    exit_queued: bool,
    scratch: Vec<u8>,
}

impl Agent {
    /// Prepares everything for a container that is yet to come. SIGCHLD must be blocked.
    pub fn new(control: OwnedFd, container: Container) -> Result<Self, AgentError> {
        let because = system;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(because("create an epoll"))?;
        let children = child_signals().map_err(because("create a signalfd"))?;
        let both = epoll::EventFlags::IN | epoll::EventFlags::OUT;
        let sources = [
            (CONTROL, control.as_fd(), both | epoll::EventFlags::RDHUP),
            (CHILDREN, children.as_fd(), epoll::EventFlags::IN),
            (STDIN, container.stdin.as_fd(), epoll::EventFlags::OUT),
            (STDOUT, container.stdout.as_fd(), epoll::EventFlags::IN),
            (STDERR, container.stderr.as_fd(), epoll::EventFlags::IN),
        ];
        for (key, source, flags) in sources {
            let flags = flags | epoll::EventFlags::ET;
            epoll::add(&epoll, source, epoll::EventData::new_u64(key), flags)
                .map_err(because("register an event source"))?;
        }
        Ok(Self {
            epoll,
            control,
            readable: true,
            hung_up: false,
            decoder: FrameDecoder::default(),
            outgoing: Outgoing::new(),
            children,
            children_changed: true,
            pid: None,
            stdin: Input::new(MAIN, container.stdin),
            stdout: Output::new(MAIN, Stream::Stdout, container.stdout),
            stderr: Output::new(MAIN, Stream::Stderr, container.stderr),
            failure: container.failure,
            ended: None,
            exit_queued: false,
            // Not zero, so that its pages are present before the freeze.
            scratch: vec![1; DATA_MAX],
        })
    }

    /// The control connection.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// Serves the container whose main process, and process group, is `pid` until it has ended, its output and
    /// [`Frame::Exit`] have been sent.
    ///
    /// Every child of this process is reaped; as PID 1, everything that outlives the container's main process is killed.
    pub fn serve(mut self, pid: Pid) -> Result<(), AgentError> {
        self.pid = Some(pid);
        let mut events = Vec::with_capacity(8);
        loop {
            self.move_all()?;
            if self.is_done() {
                return Ok(());
            }
            events.clear();
            // A host that never stops sending must not keep the container's end from being noticed.
            let leisure = self.outgoing.is_at_leisure();
            let timeout = match self.readable {
                true => Some(&NO_WAIT),
                false => leisure.then_some(&LEISURE),
            };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(system("wait for events")(error)),
            }
            if leisure && events.is_empty() {
                self.outgoing.hurry();
            }
            for event in &events {
                self.note(event.data.u64(), event.flags);
            }
        }
    }

    fn note(&mut self, source: u64, flags: epoll::EventFlags) {
        let over = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
        match source {
            CONTROL => {
                self.hung_up |= flags.intersects(over);
                self.readable |= flags.intersects(over | epoll::EventFlags::IN);
                self.outgoing.writable |= flags.intersects(over | epoll::EventFlags::OUT);
            }
            CHILDREN => self.children_changed = true,
            STDIN => self.stdin.writable = true,
            STDOUT => self.stdout.note(flags.intersects(over)),
            _ => self.stderr.note(flags.intersects(over)),
        }
    }

    fn is_done(&self) -> bool {
        self.exit_queued && self.outgoing.is_empty()
    }

    /// Moves everything that can move, until nothing can without a new event.
    fn move_all(&mut self) -> Result<(), AgentError> {
        loop {
            self.receive()?;
            self.reap()?;
            self.stdin.pump(&mut self.outgoing)?;
            self.stdout.pump(&mut self.outgoing, &mut self.scratch)?;
            self.stderr.pump(&mut self.outgoing, &mut self.scratch)?;
            self.finish()?;
            self.outgoing
                .flush(&self.control)
                .map_err(|source| match source {
                    Errno::PIPE | Errno::CONNRESET | Errno::NODEV => AgentError::HostGone,
                    source => AgentError::Control {
                        attempted: "write to",
                        source,
                    },
                })?;
            if !self.stdout.can_move(&self.outgoing) && !self.stderr.can_move(&self.outgoing) {
                return Ok(());
            }
        }
    }

    /// Takes what the host has sent, for a while.
    fn receive(&mut self) -> Result<(), AgentError> {
        for _ in 0..READS_AT_ONCE {
            if !self.readable {
                break;
            }
            match rustix::io::read(&self.control, &mut *self.scratch) {
                Ok(0) => return Err(AgentError::HostGone),
                Ok(count) => self.decoder.push(self.scratch.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    if self.hung_up {
                        return Err(AgentError::HostGone);
                    }
                }
                Err(Errno::INTR) => {}
                Err(source) => {
                    return Err(AgentError::Control {
                        attempted: "read from",
                        source,
                    });
                }
            }
            while let Some((process, frame)) = self.decoder.next_frame()? {
                self.obey(process, frame)?;
            }
        }
        Ok(())
    }

    fn obey(&mut self, process: u16, frame: Frame) -> Result<(), AgentError> {
        let violation = |violation| match violation {
            InputViolation::BeyondCredit => {
                AgentError::Protocol("sent more standard input than it had credit for")
            }
            InputViolation::AfterClose => AgentError::Protocol("sent standard input after its end"),
        };
        if process != MAIN {
            return Ok(());
        }
        match frame {
            // The stub has read the first one.
            Frame::Spec(_) => Err(AgentError::Protocol("said twice what to run")),
            Frame::Data(Stream::Stdin, bytes) => self.stdin.push(&bytes).map_err(violation),
            Frame::Close(Stream::Stdin) => self.stdin.close().map_err(violation),
            Frame::Credit(Stream::Stdout, bytes) => credit(&mut self.stdout, bytes),
            Frame::Credit(Stream::Stderr, bytes) => credit(&mut self.stderr, bytes),
            Frame::Signal(signal) => {
                self.signal(signal);
                Ok(())
            }
            Frame::Close(Stream::Stdout) => Ok(self.stdout.abandon(&mut self.outgoing)?),
            Frame::Close(Stream::Stderr) => Ok(self.stderr.abandon(&mut self.outgoing)?),
            Frame::Data(..) => Err(AgentError::Protocol("sent a stream that is the container's")),
            Frame::Credit(..) => Err(AgentError::Protocol("gave credit for a stream that is its own")),
            Frame::Exit(_) | Frame::OutOfMemory | Frame::Started => {
                Err(AgentError::Protocol("sent an exit status"))
            }
            Frame::Exec(_) | Frame::Help(_) | Frame::Resize(_) => Ok(()),
        }
    }

    /// Signals the container's process group. Before its execve the stub holds signals back for it; after its end
    /// there may be nobody left, which is no error.
    fn signal(&self, signal: u8) {
        let (false, Some(pid)) = (signal == 0 || self.ended.is_some(), self.pid) else {
            return;
        };
        let pid = pid.as_raw_nonzero().get();
        // SAFETY: plain system calls; the process is not reaped yet, so its id is its own. It has no group only while
        // it is so young that nothing but itself could be in it.
        let result = unsafe {
            match libc::kill(pid.wrapping_neg(), i32::from(signal)) {
                0 => 0,
                _ => libc::kill(pid, i32::from(signal)),
            }
        };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::ESRCH) {
                console::report(&format!("deliver signal {signal}: {error}"));
            }
        }
    }

    /// Reaps whatever has ended, the container's main process and orphans alike.
    fn reap(&mut self) -> Result<(), AgentError> {
        if !std::mem::take(&mut self.children_changed) {
            return Ok(());
        }
        // One record per pending signal, of which there is at most one.
        let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.children, &mut record) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(system("read from the signalfd")(error)),
        }
        let had_ended = self.ended.is_some();
        let others_live = loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if Some(pid) == self.pid && self.ended.is_none() => self.end(status),
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => break true,
                Err(Errno::CHILD) => break false,
                Err(error) => return Err(system("wait for children")(error)),
            }
        };
        // All orphans are children of PID 1: without a child there is no other process, and no need to look at each of
        // the kernel's own.
        let is_init = rustix::process::getpid() == Pid::INIT;
        if self.ended.is_some() && !had_ended && (others_live || !is_init) {
            self.kill_what_is_left(is_init);
        }
        Ok(())
    }

    /// The container's main process has ended: the container ends with it.
    fn end(&mut self, status: WaitStatus) {
        let exit = match (status.exit_status(), status.terminating_signal()) {
            (_, Some(signal)) => ContainerExit::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
            (code, None) => ContainerExit::Code(u8::try_from(code.unwrap_or_default()).unwrap_or(u8::MAX)),
        };
        self.ended = Some(self.start_failure().map_or(exit, ContainerExit::NotStarted));
        self.stdin.abandon();
        // What it has written is still in the pipes, and so is their end as soon as the last writer has died.
        self.stdout.readable = true;
        self.stderr.readable = true;
    }

    /// The container ends with its main process, so whatever else it has started ends now.
    fn kill_what_is_left(&self, is_init: bool) {
        // Only PID 1 has a machine of its own; anywhere else that would be everything on the developer's machine.
        let rest = match self.pid {
            _ if is_init => -1,
            Some(pid) => pid.as_raw_nonzero().get().wrapping_neg(),
            None => return,
        };
        // SAFETY: plain system call. It fails only if nothing is left, which is what is wanted.
        unsafe { libc::kill(rest, libc::SIGKILL) };
    }

    /// What the stub said if it could not become the container. Its end of the pipe is closed: it has ended.
    fn start_failure(&mut self) -> Option<StartFailure> {
        let count = rustix::io::read(&self.failure, &mut *self.scratch).ok()?;
        let mut decoder = FrameDecoder::default();
        decoder.push(self.scratch.get(..count)?);
        match decoder.next_frame() {
            Ok(Some((_, Frame::Exit(ContainerExit::NotStarted(failure))))) => Some(failure),
            _ => None,
        }
    }

    /// Once the container has ended and its output is queued, its exit status follows, as the last frame.
    fn finish(&mut self) -> Result<(), AgentError> {
        if self.exit_queued || !self.stdout.is_closed() || !self.stderr.is_closed() {
            return Ok(());
        }
        if let Some(exit) = &self.ended {
            self.outgoing.push(MAIN, &Frame::Exit(exit.clone()))?;
            self.exit_queued = true;
        }
        Ok(())
    }
}

fn credit(output: &mut Output, bytes: u32) -> Result<(), AgentError> {
    if output.add_credit(bytes) {
        Ok(())
    } else {
        Err(AgentError::Protocol("gave more credit than there is"))
    }
}

fn system(attempted: &'static str) -> impl FnOnce(Errno) -> AgentError {
    move |source| AgentError::System { attempted, source }
}

fn child_signals() -> rustix::io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before it is used, and outlives the call.
    let descriptor = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
    };
    if descriptor < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
