//! A connection with a container's monitor.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use picovm_guest_protocol::{ContainerExit, Helper, ProcessSpec, TerminalSize};
use rustix::process::{Pid, WaitOptions, waitpid};
use serde::de::DeserializeOwned;

use super::protocol::{Ending, FromMonitor, ToMonitor};
use super::record::Record;
use crate::error::EngineError;
use crate::messages;
use crate::store;

/// What a container's streams are connected with, on this side.
#[derive(Clone, Copy, Default)]
pub struct Attachment<'fd> {
    /// Read, and given to the container, if it has standard input.
    pub stdin: Option<BorrowedFd<'fd>>,
    /// Written.
    pub stdout: Option<BorrowedFd<'fd>>,
    /// Written.
    pub stderr: Option<BorrowedFd<'fd>>,
    /// Size of the terminal of a container that has one.
    pub terminal: Option<TerminalSize>,
    /// Whether [`ClientNews::Started`] is to tell that the container's program runs.
    pub announce: bool,
}

/// What a monitor tells.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientNews {
    /// The container's program runs.
    Started,
    /// The process that was executed on this connection has ended, and its output is out.
    Exited(ContainerExit),
    /// The container has ended, and its output is out.
    Ended(Ending),
    /// The monitor is gone: it was killed.
    Gone,
}

/// A connection with a container's monitor. Dropping it ends what it is attached with, and not the container.
pub struct Client {
    socket: UnixStream,
    name: String,
    /// The monitor, if it is a child of this process.
    child: Option<Pid>,
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(child) = self.child {
            // One that goes on is the init process's when this one has ended.
            let _ = waitpid(Some(child), WaitOptions::NOHANG);
        }
    }
}

impl AsFd for Client {
    /// Readable when there is something to tell: [`Client::news`] then does not wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Where a monitor listens.
pub(super) fn socket_path(directory: &File) -> PathBuf {
    store::socket_path(directory, "monitor.sock")
}

impl Client {
    pub(super) fn new(socket: UnixStream, name: String, child: Option<Pid>) -> Self {
        Self { socket, name, child }
    }

    pub(super) fn connect(record: &Record) -> Result<Self, EngineError> {
        let not_running = || EngineError::NotRunning {
            name: record.name.clone(),
        };
        let directory = match File::open(&record.directory) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_running()),
            Err(error) => return Err(EngineError::store("open", &record.directory)(error)),
        };
        match UnixStream::connect(socket_path(&directory)) {
            Ok(socket) => Ok(Self::new(socket, record.name.clone(), None)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(not_running())
            }
            Err(error) => Err(EngineError::host("connect to the container's monitor")(error)),
        }
    }

    fn send(&self, message: &ToMonitor, descriptors: &[BorrowedFd<'_>]) -> Result<(), EngineError> {
        messages::send(&self.socket, message, descriptors).map_err(|error| match error.kind() {
            // It has ended since it let this connection in.
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => self.not_running(),
            _ => EngineError::host("ask the container's monitor")(error),
        })
    }

    fn not_running(&self) -> EngineError {
        EngineError::NotRunning {
            name: self.name.clone(),
        }
    }

    fn receive(&self) -> Result<Option<FromMonitor>, EngineError> {
        match messages::receive(&self.socket) {
            Ok(received) => Ok(received.map(|(message, _)| message)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(EngineError::host("hear from the container's monitor")(error)),
        }
    }

    /// Asks for something and waits until it is done.
    fn ask(&self, message: &ToMonitor, descriptors: &[BorrowedFd<'_>]) -> Result<(), EngineError> {
        self.send(message, descriptors)?;
        match self.receive()? {
            Some(FromMonitor::Done) => Ok(()),
            Some(FromMonitor::Refused(reason)) => Err(EngineError::Refused(reason)),
            Some(FromMonitor::Ended(_)) | None => Err(self.not_running()),
            Some(other) => Err(EngineError::Refused(format!(
                "the monitor of container {} answered {other:?}",
                self.name
            ))),
        }
    }

    /// Connects the container's streams, from now on. [`ClientNews::Ended`] follows.
    ///
    /// # Errors
    /// [`EngineError::Refused`], [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn attach(&self, attachment: &Attachment<'_>) -> Result<(), EngineError> {
        let (message, descriptors) = attach_message(attachment);
        self.ask(&message, &descriptors)?;
        match attachment.terminal {
            Some(size) => self.resize(size),
            None => Ok(()),
        }
    }

    /// Delivers a signal to the container. On a connection that is attached nothing answers.
    ///
    /// # Errors
    /// [`EngineError::Refused`], [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn signal(&self, signal: u8) -> Result<(), EngineError> {
        self.send(&ToMonitor::Signal(signal), &[])
    }

    /// Delivers a signal to the container of this name, on a connection for nothing else.
    ///
    /// # Errors
    /// [`EngineError::Refused`], [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn kill(self, signal: u8) -> Result<(), EngineError> {
        self.send(&ToMonitor::Signal(signal), &[])?;
        // The monitor takes messages in their order, and says when it has come to this one.
        self.ask(&ToMonitor::Wait, &[]).or_else(|error| match error {
            // It was quick to end.
            EngineError::NotRunning { .. } => Ok(()),
            error => Err(error),
        })
    }

    /// Ends the container: by this signal, or that of its configuration; and after so many seconds by `SIGKILL`.
    ///
    /// # Errors
    /// [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn stop(self, signal: Option<u8>, timeout: Option<u32>) -> Result<Ending, EngineError> {
        self.send(&ToMonitor::Stop { signal, timeout }, &[])?;
        self.until_ended()
    }

    /// Waits until the container has ended.
    ///
    /// # Errors
    /// [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn wait(self) -> Result<Ending, EngineError> {
        self.send(&ToMonitor::Wait, &[])?;
        self.until_ended()
    }

    /// Asks to be told when the container has ended: [`ClientNews::Ended`].
    ///
    /// # Errors
    /// [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn watch(&self) -> Result<(), EngineError> {
        self.ask(&ToMonitor::Wait, &[])
    }

    fn until_ended(&self) -> Result<Ending, EngineError> {
        loop {
            match self.receive()? {
                Some(FromMonitor::Ended(ending)) => return Ok(ending),
                Some(FromMonitor::Refused(reason)) => return Err(EngineError::Refused(reason)),
                Some(_) => {}
                None => return Err(self.not_running()),
            }
        }
    }

    /// Lets the container stand still.
    ///
    /// # Errors
    /// [`EngineError::Refused`] if it does, [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn pause(&self) -> Result<(), EngineError> {
        self.ask(&ToMonitor::Pause, &[])
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// [`EngineError::Refused`] if it does, [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn unpause(&self) -> Result<(), EngineError> {
        self.ask(&ToMonitor::Unpause, &[])
    }

    /// Begins a process in the container, with these descriptors as its streams. [`ClientNews::Exited`] follows.
    ///
    /// # Errors
    /// [`EngineError::Refused`] if the container stands still, [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn exec(&self, spec: ProcessSpec, streams: [BorrowedFd<'_>; 3]) -> Result<(), EngineError> {
        self.ask(&ToMonitor::Exec(spec), &streams)
    }

    /// Delivers a signal to the process that was executed on this connection.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    pub fn signal_own(&self, signal: u8) -> Result<(), EngineError> {
        self.send(&ToMonitor::SignalOwn(signal), &[])
    }

    /// Has the container's agent do something, with these descriptors as streams. [`ClientNews::Exited`] follows.
    ///
    /// # Errors
    /// As [`Client::exec`].
    pub fn help(&self, helper: Helper, streams: [BorrowedFd<'_>; 3]) -> Result<(), EngineError> {
        self.ask(&ToMonitor::Help(helper), &streams)
    }

    /// The terminal of who has attached or executed on this connection has this size.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    pub fn resize(&self, size: TerminalSize) -> Result<(), EngineError> {
        self.send(&ToMonitor::Resize(size), &[])
    }

    /// Waits for the next thing that there is to tell.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    pub fn news(&self) -> Result<ClientNews, EngineError> {
        loop {
            return Ok(match self.receive()? {
                Some(FromMonitor::Started) => ClientNews::Started,
                Some(FromMonitor::Exited(exit)) => ClientNews::Exited(exit),
                Some(FromMonitor::Ended(ending)) => ClientNews::Ended(ending),
                Some(FromMonitor::Done | FromMonitor::Refused(_)) => continue,
                None => ClientNews::Gone,
            });
        }
    }

    /// Asks the agent something, on a connection for nothing else.
    ///
    /// # Errors
    /// As [`Client::exec`]; [`EngineError::Agent`].
    pub fn query<T: DeserializeOwned>(
        self,
        attempted: &'static str,
        helper: Helper,
    ) -> Result<T, EngineError> {
        let (out, out_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|error| EngineError::host("make a pipe")(error.into()))?;
        let (err, err_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|error| EngineError::host("make a pipe")(error.into()))?;
        let null = null()?;
        self.help(helper, [null.as_fd(), out_end.as_fd(), err_end.as_fd()])?;
        drop((out_end, err_end));
        let answer = read_all(out, QUERY_MAX)?;
        let told = read_all(err, QUERY_MAX)?;
        let failed = |reason: String| EngineError::Agent {
            attempted,
            name: self.name.clone(),
            reason,
        };
        match self.news()? {
            ClientNews::Exited(ContainerExit::Code(0)) => {
                postcard::from_bytes(&answer).map_err(|error| failed(error.to_string()))
            }
            ClientNews::Exited(exit) => Err(failed(reason(&exit, &told))),
            ClientNews::Started | ClientNews::Ended(_) | ClientNews::Gone => Err(EngineError::NotRunning {
                name: self.name.clone(),
            }),
        }
    }
}

/// Most bytes that an agent may answer. What is made of them is larger by some.
pub(super) const QUERY_MAX: u64 = 16 << 20;

/// Why a helper has failed.
pub(super) fn reason(exit: &ContainerExit, told: &[u8]) -> String {
    let told = crate::printable_text(String::from_utf8_lossy(told).trim());
    match exit {
        ContainerExit::NotStarted(failure) => {
            format!(
                "{}: {}",
                crate::printable(&failure.attempted),
                crate::printable(&failure.message)
            )
        }
        _ if !told.is_empty() => told.to_string(),
        ContainerExit::Code(code) => format!("it ended with status {code}"),
        ContainerExit::Signal(signal) => format!("it was ended by signal {signal}"),
    }
}

pub(super) fn null() -> Result<File, EngineError> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(EngineError::host("open /dev/null"))
}

pub(super) fn read_all(from: OwnedFd, limit: u64) -> Result<Vec<u8>, EngineError> {
    let mut bytes = Vec::new();
    File::from(from)
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(EngineError::host("read what the agent answers"))?;
    Ok(bytes)
}

/// The message that asks for an attachment, and its descriptors.
pub(super) fn attach_message<'fd>(attachment: &Attachment<'fd>) -> (ToMonitor, Vec<BorrowedFd<'fd>>) {
    let message = ToMonitor::Attach {
        stdin: attachment.stdin.is_some(),
        stdout: attachment.stdout.is_some(),
        stderr: attachment.stderr.is_some(),
    };
    let descriptors = [attachment.stdin, attachment.stdout, attachment.stderr];
    (message, descriptors.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_that_ends_at_this_moment_is_one_of_a_container_that_does_not_run() {
        let client = || {
            let (socket, monitors) = UnixStream::pair().unwrap();
            drop(monitors);
            Client::new(socket, "box".into(), None)
        };
        let refused = [
            client().wait().map(|_| ()),
            client().stop(None, None).map(|_| ()),
            client().signal(15),
            client().pause(),
        ];
        for result in refused {
            assert!(
                matches!(result, Err(EngineError::NotRunning { .. })),
                "{result:?}"
            );
        }
        assert!(client().kill(15).is_err());
    }
}
