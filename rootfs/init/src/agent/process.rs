//! One process that the agent serves: its streams, its signals, its end.

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

use std::os::fd::{AsFd, OwnedFd};

use picovm_guest_protocol::{
    ContainerExit, Frame, FrameDecoder, FrameError, StartFailure, Stream, TerminalSize,
};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus};

use super::terminal::Terminal;
use super::{AgentError, system};
use crate::console;
use crate::streams::{Input, InputViolation, Outgoing, Output};
use crate::stub::Pipes;

/// What a process is to the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The container ends with it.
    Main,
    /// One of its processes.
    Other,
    /// The agent's own.
    Helper,
}

/// Sources of events of a process, in the lowest bits of an event's key.
const STDIN: u64 = 0;
const STDOUT: u64 = 1;
const STDERR: u64 = 2;
const TERMINAL: u64 = 3;
const SOURCE_BITS: u32 = 2;

/// A process that the agent serves.
pub struct Process {
    number: u16,
    /// Tells its events from those of a process that had its number before.
    serial: u64,
    /// What it is.
    pub role: Role,
    /// Its id, which is its group's. Once it has ended only the group may be left.
    pub pid: Option<Pid>,
    stdin: Input,
    stdout: Output,
    stderr: Output,
    failure: OwnedFd,
    terminal: Option<Terminal>,
    /// Why the container cannot go on with it, if the agent has found that.
    verdict: Option<StartFailure>,
    /// How it ended, once it has.
    pub ended: Option<ContainerExit>,
}

impl Process {
    /// Registers the streams of a process that is yet to come.
    pub fn new(
        epoll: &OwnedFd,
        number: u16,
        serial: u64,
        role: Role,
        pipes: Pipes,
    ) -> Result<Self, AgentError> {
        let sources = [
            (STDIN, pipes.stdin.as_fd(), epoll::EventFlags::OUT),
            (STDOUT, pipes.stdout.as_fd(), epoll::EventFlags::IN),
            (STDERR, pipes.stderr.as_fd(), epoll::EventFlags::IN),
        ];
        for (source, descriptor, flags) in sources {
            let data = epoll::EventData::new_u64(key(serial, source));
            epoll::add(epoll, descriptor, data, flags | epoll::EventFlags::ET)
                .map_err(system("register an event source"))?;
        }
        Ok(Self {
            number,
            serial,
            role,
            pid: None,
            stdin: Input::new(number, pipes.stdin),
            stdout: Output::new(number, Stream::Stdout, pipes.stdout),
            stderr: Output::new(number, Stream::Stderr, pipes.stderr),
            failure: pipes.failure,
            terminal: None,
            verdict: None,
            ended: None,
        })
    }

    /// Registers a terminal for the process that is to have it, which may not be the one that it was ready for.
    pub fn register_terminal(epoll: &OwnedFd, serial: u64, terminal: &Terminal) -> rustix::io::Result<()> {
        let both = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(key(serial, TERMINAL));
        match epoll::add(epoll, terminal.master(), data, both) {
            Err(Errno::EXIST) => epoll::modify(epoll, terminal.master(), data, both),
            result => result,
        }
    }

    /// Serves a terminal in the place of the pipes. It must be registered.
    pub fn take_terminal(&mut self, terminal: Terminal, outgoing: &mut Outgoing) -> Result<(), AgentError> {
        let share = || terminal.share().map_err(system("share a terminal"));
        let mut stdin = Input::of_terminal(self.number, share()?);
        stdin.take_over(&mut self.stdin);
        self.stdin = stdin;
        self.stdout = Output::of_terminal(self.number, share()?);
        // There is one output.
        self.stderr.abandon(outgoing)?;
        self.terminal = Some(terminal);
        Ok(())
    }

    /// Takes an event, if it is one of this process.
    pub fn note(&mut self, event: u64, flags: epoll::EventFlags) -> bool {
        let over = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        if event >> SOURCE_BITS != self.serial {
            return false;
        }
        let hung_up = flags.intersects(over);
        match event & ((1 << SOURCE_BITS) - 1) {
            STDIN => self.stdin.writable = true,
            STDOUT => self.stdout.note(hung_up),
            STDERR => self.stderr.note(hung_up),
            // Registered though not taken: one that is ready for a process that may want it.
            _ if self.terminal.is_none() => {}
            _ => {
                self.stdin.writable |= flags.intersects(over | epoll::EventFlags::OUT);
                self.stdout.note(hung_up);
            }
        }
        true
    }

    /// Moves what can be moved.
    pub fn pump(&mut self, outgoing: &mut Outgoing, scratch: &mut [u8]) -> Result<(), FrameError> {
        self.stdin.pump(outgoing)?;
        self.stdout.pump(outgoing, scratch)?;
        self.stderr.pump(outgoing, scratch)
    }

    /// Whether output could move now.
    pub fn can_move(&self, outgoing: &Outgoing) -> bool {
        self.stdout.can_move(outgoing) || self.stderr.can_move(outgoing)
    }

    /// Whether its terminal is to be asked again whether it takes bytes.
    pub fn is_stuck(&self) -> bool {
        self.stdin.is_stuck()
    }

    /// Asks its terminal again.
    pub fn retry(&mut self) {
        self.stdin.writable = true;
    }

    /// Whether it has ended and its outputs have.
    pub fn is_over(&self) -> bool {
        self.ended.is_some() && self.stdout.is_closed() && self.stderr.is_closed()
    }

    /// Does what the host says to it.
    pub fn obey(&mut self, frame: Frame, outgoing: &mut Outgoing) -> Result<(), AgentError> {
        let violation = |violation| match violation {
            InputViolation::BeyondCredit => {
                AgentError::Protocol("sent more standard input than it had credit for")
            }
            InputViolation::AfterClose => AgentError::Protocol("sent standard input after its end"),
        };
        match frame {
            Frame::Data(Stream::Stdin, bytes) => self.stdin.push(&bytes).map_err(violation),
            Frame::Close(Stream::Stdin) => self.stdin.close().map_err(violation),
            Frame::Credit(Stream::Stdout, bytes) => credit(&mut self.stdout, bytes),
            Frame::Credit(Stream::Stderr, bytes) => credit(&mut self.stderr, bytes),
            Frame::Close(Stream::Stdout) => Ok(self.stdout.abandon(outgoing)?),
            Frame::Close(Stream::Stderr) => Ok(self.stderr.abandon(outgoing)?),
            Frame::Signal(signal) => {
                self.signal(signal);
                Ok(())
            }
            Frame::Resize(size) => {
                self.resize(size);
                Ok(())
            }
            // What is no process's business was taken by the agent.
            _ => Ok(()),
        }
    }

    fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal
            && let Err(error) = terminal.resize(size)
        {
            console::report(&format!("resize a terminal: {error}"));
        }
    }

    /// Tells its events from those of others.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// Whether it is this child, not yet reaped.
    pub fn is(&self, pid: Pid) -> bool {
        self.pid == Some(pid) && self.ended.is_none()
    }

    /// Kills what is left of the process's group.
    pub fn kill_group(&self) {
        if let Some(group) = self.pid {
            // It fails only if nothing is left, which is what is wanted.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }

    /// Signals the process's group. Before its execve the stub holds signals back for it; after its end
    /// there may be nobody left, which is no error.
    pub fn signal(&self, signal: u8) {
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

    /// It has been reaped.
    pub fn end(&mut self, status: WaitStatus, scratch: &mut [u8]) {
        let exit = match (status.exit_status(), status.terminating_signal()) {
            (_, Some(signal)) => ContainerExit::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
            (code, None) => ContainerExit::Code(u8::try_from(code.unwrap_or_default()).unwrap_or(u8::MAX)),
        };
        let failure = self
            .verdict
            .take()
            .or_else(|| told_failure(&self.failure, scratch));
        self.stdin.abandon();
        // Everybody else who could write ends with the main process. Not so with another; and a terminal that was not opened has
        // no end.
        if self.role == Role::Main && (failure.is_none() || self.terminal.is_none()) {
            self.stdout.process_ended();
            self.stderr.process_ended();
        } else {
            self.stdout.process_left();
            self.stderr.process_left();
        }
        self.ended = Some(failure.map_or(exit, ContainerExit::NotStarted));
    }

    /// Whether its child has said that it could not become the process.
    pub fn has_failed(&self) -> bool {
        rustix::io::ioctl_fionread(&self.failure).is_ok_and(|bytes| bytes > 0)
    }

    /// Whatever becomes of it, the container has failed for this reason.
    pub fn fail(&mut self, failed: StartFailure) {
        self.verdict = Some(failed);
    }

    /// Its outputs may hold something, whatever events have said.
    pub fn look_again(&mut self) {
        self.stdout.readable = true;
        self.stderr.readable = true;
    }

    /// Whether nothing waits in its outputs.
    pub fn is_drained(&self) -> bool {
        self.stdout.is_drained() && self.stderr.is_drained()
    }

    /// Nothing was sent to the host that is there now.
    pub fn meet_another_host(&mut self) {
        self.stdout.meet_another_host();
        self.stderr.meet_another_host();
    }

    /// Sends something as if it had written that to its standard error.
    pub fn say(&mut self, bytes: &[u8], outgoing: &mut Outgoing) -> Result<(), FrameError> {
        self.stderr.say(bytes, outgoing)
    }
}

/// The key of an event source of a process.
fn key(serial: u64, source: u64) -> u64 {
    serial << SOURCE_BITS | source
}

fn credit(output: &mut Output, bytes: u32) -> Result<(), AgentError> {
    if output.add_credit(bytes) {
        Ok(())
    } else {
        Err(AgentError::Protocol("gave more credit than there is"))
    }
}

/// What a child said if it could not become its process. Its end of the pipe is closed: it has ended.
pub fn told_failure(pipe: &OwnedFd, scratch: &mut [u8]) -> Option<StartFailure> {
    let count = rustix::io::read(pipe, &mut *scratch).ok()?;
    let mut decoder = FrameDecoder::default();
    decoder.push(scratch.get(..count)?);
    match decoder.next_frame() {
        Ok(Some((_, Frame::Exit(ContainerExit::NotStarted(failure))))) => Some(failure),
        _ => None,
    }
}
