//! Serves the processes of a container until its end: their streams go between the control connection and descriptors of the
//! host, and who has the container says what else is to happen.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use picovm_guest_protocol::frame::{LAYER, MAIN};
use picovm_guest_protocol::{ContainerExit, FrameError, Helper, ProcessSpec, StartFailure, TerminalSize};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, poll};

use crate::attach::Wake;
use crate::container::Container;
use crate::error::EngineError;
use crate::scheduling::Prompt;
use crate::session::{Event, Session};
use crate::streams::{Channel, Descriptor};
use crate::timeout;

/// What is to happen to a container that is served.
pub(crate) enum Command {
    /// Deliver a signal to a process and its group.
    Signal { process: u16, signal: u8 },
    /// End the clone at once; its container counts as ended by this signal, unless it has ended already.
    Kill(u8),
    /// Begin a process in the container, with these descriptors as its standard streams.
    Exec {
        process: u16,
        spec: ProcessSpec,
        streams: [OwnedFd; 3],
    },
    /// Begin a process of the agent's own.
    Help {
        process: u16,
        helper: Helper,
        streams: [OwnedFd; 3],
    },
    /// A process's terminal has this size.
    Resize { process: u16, size: TerminalSize },
    /// Let the machine stand still.
    Pause,
    /// Let it go on.
    Resume,
}

/// What there is to tell of a container that is served.
pub(crate) enum News {
    /// A process has ended, and its output is out. Of the main process only if the container stays.
    Exit(u16, ContainerExit),
    /// Memory has run out, and the guest has killed a process of the container.
    OutOfMemory,
    /// The main process's program runs.
    Started,
    /// The machine stands still, or goes on, as it was told to.
    Paused(bool),
}

/// Who has the container.
pub(crate) trait Director {
    /// Something has happened that the caller of [`Container::serve`] waits for.
    fn wake(&mut self, why: Wake) -> Option<Command>;
    /// Something has happened in the container.
    fn news(&mut self, news: News);
}

/// What a container is served with.
pub(crate) struct Service<'fd> {
    /// The main process's streams.
    pub(crate) main: Channel<'fd>,
    /// Its writable layer, if it brings one.
    pub(crate) layer: Option<OwnedFd>,
    /// Readable when [`Director::wake`] is to be called, which has to make it unreadable again.
    pub(crate) wake: Option<Descriptor<'fd>>,
    /// When it is to be called, at the latest; once.
    pub(crate) deadline: Option<Instant>,
}

/// Bytes that are taken from the connection at once.
const RECEIVED_AT_ONCE: usize = 64 << 10;

/// Bytes that are taken from the connection before they are looked at.
const RECEIVED_MAX: usize = 256 << 10;

/// How long to wait at once for what a clone that has ended said last.
const LAST_WORDS: Duration = Duration::from_millis(5);

/// Whether a container goes on being served.
enum Next {
    Serve,
    End(ContainerExit),
}

impl Container {
    /// Serves the container's processes until the main one has ended and every byte of its output is out; if the container stays
    /// ([`ContainerSpec::stay`](picovm_guest_protocol::ContainerSpec::stay)), until it is killed or its machine stops. The
    /// clone is left to be looked at.
    pub(crate) fn serve(
        &mut self,
        service: Service<'_>,
        director: &mut dyn Director,
    ) -> Result<ContainerExit, EngineError> {
        let _prompt = Prompt::begin();
        let mut deadline = service.deadline;
        let mut channels = vec![service.main];
        if let Some(layer) = service.layer {
            channels.push(Channel::source(LAYER, Descriptor::Owned(layer)));
        }
        let mut exit: Option<ContainerExit> = None;
        let mut ended = false;
        let mut killed_for_memory = false;
        // Not closed before the end: poll must not be given a descriptor that has become another file.
        let stopped = rustix::io::dup(self.machine.stopped_descriptor())
            .map_err(|error| EngineError::host("watch the clone")(error.into()))?;

        loop {
            self.flush()?;
            for channel in &mut channels {
                channel.write(&mut self.session);
            }
            if let Next::End(exit) = self.settle(&mut channels, &mut exit, director) {
                return Ok(exit);
            }
            self.flush()?;

            let ready = {
                let mut fds = Vec::with_capacity(8);
                let connection = if self.session.to_send().is_empty() {
                    PollFlags::IN
                } else {
                    PollFlags::IN | PollFlags::OUT
                };
                let main_lives = exit.is_none() && channels.iter().all(|channel| !is_exited_main(channel));
                let live = main_lives || self.stay;
                if live {
                    fds.push((Source::Connection, PollFd::new(&self.connection, connection)));
                    if !ended {
                        fds.push((Source::Stopped, PollFd::new(&stopped, PollFlags::IN)));
                    }
                }
                for channel in &channels {
                    if let Some(stdin) = channel
                        .stdin
                        .as_ref()
                        .filter(|_| channel.takes_input(&self.session))
                    {
                        fds.push((Source::Stdin(channel.process), PollFd::new(stdin, PollFlags::IN)));
                    }
                    for sink in channel.sinks.iter().filter(|sink| sink.waits()) {
                        fds.push((Source::Sink, PollFd::from_borrowed_fd(sink.fd(), PollFlags::OUT)));
                    }
                }
                if let Some(wake) = &service.wake {
                    fds.push((Source::Wake, PollFd::new(wake, PollFlags::IN)));
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
                if let Next::End(killed) =
                    self.obey(director.wake(Wake::Deadline), &mut channels, director)?
                {
                    return Ok(exit.unwrap_or(killed));
                }
            }
            for source in ready {
                match source {
                    Source::Connection => {
                        self.receive()?;
                    }
                    Source::Stdin(process) => {
                        if let Some(channel) = channels.iter_mut().find(|channel| channel.process == process)
                        {
                            channel.forward_stdin(&mut self.session);
                        }
                    }
                    Source::Sink => {}
                    Source::Wake => {
                        let command = director.wake(Wake::Descriptor);
                        if let Next::End(killed) = self.obey(command, &mut channels, director)? {
                            return Ok(exit.unwrap_or(killed));
                        }
                    }
                    Source::Stopped => ended = true,
                }
            }
            let mut news = self.take_events(&mut channels, &mut killed_for_memory, director)?;
            if ended && !channels.iter().any(is_exited_main) && !self.machine.output_waits() {
                // The device has handed everything over: what is not in the connection now never comes.
                let more = self.receive()?;
                news |= self.take_events(&mut channels, &mut killed_for_memory, director)?;
                if !news && !more {
                    return exit.ok_or_else(|| self.ended());
                }
            }
        }
    }

    /// Tells of processes that have ended and whose output is out.
    fn settle(
        &mut self,
        channels: &mut Vec<Channel<'_>>,
        exit: &mut Option<ContainerExit>,
        director: &mut dyn Director,
    ) -> Next {
        // A layer has no exit: it is over when all of it has gone.
        channels.retain(|channel| channel.process != LAYER || channel.stdin.is_some());
        let main_is_done = channels
            .iter()
            .any(|channel| channel.process == MAIN && channel.is_done());
        // With the main process all others have ended; who does not read what they wrote last does not hold up the end.
        let over = main_is_done && !self.stay;
        let mut index = 0;
        while let Some(channel) = channels.get(index) {
            if !(channel.is_done() || over && channel.exit.is_some()) {
                index += 1;
                continue;
            }
            // Its descriptors are closed before its end is told.
            let channel = channels.remove(index);
            let (process, how) = (channel.process, channel.exit.clone());
            drop(channel);
            let Some(how) = how else { continue };
            if process == MAIN {
                *exit = Some(how.clone());
            }
            if process != MAIN || self.stay {
                director.news(News::Exit(process, how));
            }
        }
        match exit {
            Some(exit) if over => Next::End(exit.clone()),
            _ => Next::Serve,
        }
    }

    /// Moves events out of the session; whether there were any.
    fn take_events(
        &mut self,
        channels: &mut [Channel<'_>],
        killed_for_memory: &mut bool,
        director: &mut dyn Director,
    ) -> Result<bool, EngineError> {
        let mut any = false;
        while let Some(event) = self.session.next_event()? {
            any = true;
            match event {
                Event::Output(process, stream, bytes) => {
                    if let Some(channel) = channels.iter_mut().find(|channel| channel.process == process) {
                        channel.take(stream, &bytes, &mut self.session);
                    }
                }
                Event::Exit(process, how) => {
                    if let Some(channel) = channels.iter_mut().find(|channel| channel.process == process) {
                        channel.exit = Some(how);
                    }
                }
                Event::Started => {
                    // Once, whatever the guest says.
                    if std::mem::take(&mut self.announce) {
                        director.news(News::Started);
                    }
                }
                // Nobody has asked for it.
                Event::Frozen => return Err(FrameError::Payload(0).into()),
                Event::OutOfMemory => {
                    // A guest may say so without end.
                    if !std::mem::replace(killed_for_memory, true) {
                        director.news(News::OutOfMemory);
                    }
                }
            }
        }
        Ok(any)
    }

    fn obey(
        &mut self,
        command: Option<Command>,
        channels: &mut Vec<Channel<'_>>,
        director: &mut dyn Director,
    ) -> Result<Next, EngineError> {
        let Some(command) = command else {
            return Ok(Next::Serve);
        };
        match command {
            Command::Signal { process, signal } => self.session.signal(process, signal),
            Command::Kill(signal) => return Ok(Next::End(ContainerExit::Signal(signal))),
            Command::Resize { process, size } => self.session.resize(process, size),
            Command::Exec {
                process,
                spec,
                streams,
            } => {
                let stdin = spec.stdin;
                self.begin(process, stdin, streams, channels, director, |session| {
                    session.exec(process, &spec)
                });
            }
            Command::Help {
                process,
                helper,
                streams,
            } => {
                self.begin(process, true, streams, channels, director, |session| {
                    session.help(process, &helper)
                });
            }
            Command::Pause => {
                self.machine.pause()?;
                director.news(News::Paused(true));
            }
            Command::Resume => {
                self.machine.start()?;
                director.news(News::Paused(false));
            }
        }
        Ok(Next::Serve)
    }

    fn begin<E: std::fmt::Display>(
        &mut self,
        process: u16,
        has_stdin: bool,
        streams: [OwnedFd; 3],
        channels: &mut Vec<Channel<'_>>,
        director: &mut dyn Director,
        send: impl FnOnce(&mut Session) -> Result<(), E>,
    ) {
        let sent = if self.session.is_live(process) {
            Err("another process has its number".to_owned())
        } else {
            send(&mut self.session).map_err(|error| error.to_string())
        };
        match sent {
            Ok(()) => {
                let [stdin, stdout, stderr] = streams.map(Descriptor::Owned);
                channels.push(Channel::new(
                    process,
                    Some(stdin).filter(|_| has_stdin),
                    stdout,
                    stderr,
                ));
            }
            Err(message) => {
                drop(streams);
                let failure = StartFailure {
                    attempted: "ask the agent for a process".into(),
                    errno: 0,
                    message,
                };
                director.news(News::Exit(process, ContainerExit::NotStarted(failure)));
            }
        }
    }

    pub(crate) fn flush(&mut self) -> Result<(), EngineError> {
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
    pub(crate) fn receive(&mut self) -> Result<bool, EngineError> {
        receive(&self.connection, &mut self.session)
    }
}

fn is_exited_main(channel: &Channel<'_>) -> bool {
    channel.process == MAIN && channel.exit.is_some()
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
    Stdin(u16),
    Sink,
    Wake,
}

/// Waits for these, until the deadline; returns those that are ready.
fn wait(fds: Vec<(Source, PollFd<'_>)>, deadline: Option<Instant>) -> Result<Vec<Source>, EngineError> {
    let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) = fds.into_iter().unzip();
    let timeout = deadline.map(timeout::until);
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
