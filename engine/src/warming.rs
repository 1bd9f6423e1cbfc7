//! Starting an application in a clone and waiting until it is warm, in the jailed process that makes a warm template of it.

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

use std::io::{self, Write};
use std::time::{Duration, Instant};

use picovm_guest_protocol::frame::MAIN;
use picovm_guest_protocol::{ContainerExit, FrameError, Helper, ProcessSpec, Stream};
use picovm_vmm::{Machine, Outcome};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::container::Container;
use crate::error::EngineError;
use crate::printable::printable_text;
use crate::session::Event;
use crate::timeout;

/// What says that an application is warm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Until {
    /// A line of its output matches this regular expression.
    Log(String),
    /// Somebody in its machine listens on this TCP port.
    Port(u16),
    /// This process in the container ends with 0. It is begun again until it does.
    Exec(Vec<Vec<u8>>),
}

impl std::fmt::Display for Until {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Log(pattern) => write!(f, "a line of its output matched {pattern:?}"),
            Self::Port(port) => write!(f, "somebody listened on port {port}"),
            Self::Exec(args) => {
                let words: Vec<_> = args.iter().map(|word| String::from_utf8_lossy(word)).collect();
                write!(f, "{:?} ended with 0", words.join(" "))
            }
        }
    }
}

/// The number of a process that finds out whether it is warm.
const PROBE: u16 = 1;
/// Between two of them.
const PROBE_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of an unfinished line that are looked at.
const LINE_MAX: usize = 64 << 10;
/// Bytes of the last output that are told.
const TAIL_MAX: usize = 2048;
/// How long the agent may take to freeze its container, and the machine with it.
const FREEZE_MAX: Duration = Duration::from_secs(60);

/// A regular expression, or what is wrong with it.
///
/// # Errors
/// [`EngineError::Refused`].
pub(crate) fn pattern(text: &str) -> Result<regex::bytes::Regex, EngineError> {
    regex::bytes::Regex::new(text)
        .map_err(|error| EngineError::Refused(format!("{text:?} is no regular expression: {error}")))
}

/// An application that gets warm.
pub(crate) struct Warming {
    container: Container,
    tail: Vec<u8>,
    /// What its lines are compared with, and the lines that have not ended, by stream.
    pattern: Option<regex::bytes::Regex>,
    lines: [Vec<u8>; 2],
    seen: bool,
    /// Variables of a process that finds out whether it is warm.
    env: Vec<Vec<u8>>,
}

impl Warming {
    pub(crate) fn new(container: Container, until: &Until, env: Vec<Vec<u8>>) -> Result<Self, EngineError> {
        let pattern = match until {
            Until::Log(text) => Some(pattern(text)?),
            Until::Port(_) | Until::Exec(_) => None,
        };
        Ok(Self {
            container,
            tail: Vec::new(),
            pattern,
            lines: [Vec::new(), Vec::new()],
            seen: false,
            env,
        })
    }

    /// Serves it until it is warm, and has the agent freeze its machine, which then stands at its freeze point.
    pub(crate) fn freeze(mut self, until: &Until, limit: Duration) -> Result<Machine, EngineError> {
        let deadline = Instant::now().checked_add(limit);
        let mut probe_at = Some(Instant::now()).filter(|_| self.pattern.is_none());
        let mut probing = false;
        while !self.seen {
            if probe_at.is_some_and(|at| Instant::now() >= at) {
                probe_at = None;
                probing = true;
                self.probe(until)?;
            }
            let wake = [deadline, probe_at].into_iter().flatten().min();
            let event = self.next(wake)?;
            match event {
                Some(Event::Exit(PROBE, exit)) if probing => {
                    probing = false;
                    self.seen |= exit == ContainerExit::Code(0);
                    probe_at = Instant::now().checked_add(PROBE_PAUSE);
                }
                Some(Event::Frozen) => return Err(FrameError::Payload(0).into()),
                _ => {}
            }
            if !self.seen && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let reason = format!("not before {} s had passed", limit.as_secs());
                return Err(self.not_warm(reason));
            }
        }
        self.freeze_now()
    }

    fn probe(&mut self, until: &Until) -> Result<(), EngineError> {
        match until {
            Until::Log(_) => Ok(()),
            Until::Port(port) => Ok(self.container.session.help(PROBE, &Helper::Listens(*port))?),
            Until::Exec(args) => {
                let spec = ProcessSpec {
                    args: args.clone(),
                    env: self.env.clone(),
                    ..ProcessSpec::default()
                };
                Ok(self.container.session.exec(PROBE, &spec)?)
            }
        }
    }

    fn freeze_now(mut self) -> Result<Machine, EngineError> {
        let deadline = Instant::now().checked_add(FREEZE_MAX);
        let late = || EngineError::host("have the agent freeze its machine")(io::ErrorKind::TimedOut.into());
        self.container.session.freeze();
        while !matches!(self.next(deadline)?, Some(Event::Frozen)) {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(late());
            }
        }
        self.container.session.freeze();
        self.send()?;
        let mut container = self.container;
        // It is small, and nothing else waits in the connection: all of it went.
        match container.machine.wait(Some(FREEZE_MAX))? {
            Some(Outcome::FreezePoint) => Ok(container.machine),
            Some(outcome) => Err(EngineError::NotFrozen {
                reason: outcome.to_string(),
                tail: container.machine.console_tail(),
            }),
            None => Err(late()),
        }
    }

    /// The next thing that happens, other than output, or none once it is this late.
    fn next(&mut self, until: Option<Instant>) -> Result<Option<Event>, EngineError> {
        loop {
            while let Some(event) = self.container.session.next_event()? {
                match event {
                    Event::Output(process, stream, bytes) => {
                        if process == MAIN {
                            self.take(stream, &bytes);
                        }
                        self.container.session.consumed(process, stream, bytes.len());
                        if self.seen {
                            return Ok(None);
                        }
                    }
                    Event::Exit(MAIN, exit) => return Err(self.ended(&exit)),
                    Event::OutOfMemory => return Err(self.not_warm("memory had run out".into())),
                    event => return Ok(Some(event)),
                }
            }
            self.send()?;
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.wait(left)?;
        }
    }

    /// Sends what the connection takes.
    fn send(&mut self) -> Result<(), EngineError> {
        self.container.flush()
    }

    /// Waits until something has come in, and takes it.
    fn wait(&mut self, left: Option<Duration>) -> Result<(), EngineError> {
        let failed = |error: rustix::io::Errno| EngineError::host("wait for the application")(error.into());
        let container = &mut self.container;
        let timeout = left.map(timeout::timespec);
        let mut waits_for = PollFlags::IN;
        waits_for.set(PollFlags::OUT, !container.session.to_send().is_empty());
        let stopped = {
            let stopped = container.machine.stopped_descriptor();
            let mut fds = [
                PollFd::new(&container.connection, waits_for),
                PollFd::new(&stopped, PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
            }
            let [connection, stopped] = &fds;
            !stopped.revents().is_empty() && !connection.revents().contains(PollFlags::IN)
        };
        if stopped {
            return Err(container.ended());
        }
        container.receive()?;
        Ok(())
    }

    /// Shows what the application writes, and looks whether it is what is waited for.
    fn take(&mut self, stream: Stream, bytes: &[u8]) {
        // Who does not want to see it does not hold it up.
        let _ = io::stderr().write_all(bytes);
        self.tail.extend_from_slice(bytes);
        let start = self.tail.len().saturating_sub(TAIL_MAX);
        self.tail.drain(..start);
        let Some(pattern) = &self.pattern else { return };
        let [out, err] = &mut self.lines;
        let lines = if stream == Stream::Stderr { err } else { out };
        lines.extend_from_slice(bytes);
        self.seen |= lines
            .split(|&byte| byte == b'\n')
            .any(|line| pattern.is_match(line));
        let unfinished = lines
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |end| end.saturating_add(1));
        lines.drain(..unfinished);
        let start = lines.len().saturating_sub(LINE_MAX);
        lines.drain(..start);
    }

    fn ended(&self, exit: &ContainerExit) -> EngineError {
        self.not_warm(match exit {
            ContainerExit::Code(code) => format!("it ended with status {code} before"),
            ContainerExit::Signal(signal) => format!("signal {signal} ended it before"),
            ContainerExit::NotStarted(failed) => {
                format!(
                    "it could not be started: cannot {}: {}",
                    failed.attempted, failed.message
                )
            }
        })
    }

    fn not_warm(&self, reason: String) -> EngineError {
        EngineError::NotWarm {
            reason,
            tail: printable_text(&String::from_utf8_lossy(&self.tail))
                .trim_end()
                .to_owned(),
        }
    }
}
