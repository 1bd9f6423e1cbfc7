//! One turn of a monitor: wait for what it watches, and move what can be moved.

use std::time::Instant;

use picovm_guest_protocol::{ContainerExit, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::super::protocol::FromMonitor;
use super::super::record::Status;
use super::keeping::Keeping;
use super::peers::{Peer, Role};
use super::{Monitor, Purpose, Running};
use crate::running::News;
use crate::streams::Sink;
use crate::timeout;

/// Bytes that wait for who has attached, from which on nothing more is read of the container.
const BACKLOG: usize = 64 << 10;
/// Bytes that are moved at once.
pub(super) const CHUNK: usize = 64 << 10;

/// What is ready.
#[derive(Clone, Copy)]
enum Ready {
    Listener,
    Peer(u64),
    Input(u64),
    Sink(u64),
    Vmm,
    Output(usize),
    Feed,
    Layer,
    Check,
}

impl Monitor<'_> {
    /// Waits until something is ready, or until then, and deals with it.
    pub(super) fn turn(&mut self, until: Option<Instant>) {
        let (tokens, mut fds) = self.sources();
        let timeout = until.map(timeout::until);
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return;
        }
        let ready: Vec<Ready> = tokens
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(token, _)| token)
            .collect();
        drop(fds);
        // From the last to the first: what an index stands for does not change before its turn.
        for token in ready.into_iter().rev() {
            match token {
                Ready::Listener => self.accept(),
                Ready::Peer(id) => self.hear(id),
                Ready::Input(id) => self.take_input(id),
                Ready::Sink(id) => {
                    let works = self
                        .peers
                        .iter_mut()
                        .find(|peer| peer.id == id)
                        .is_none_or(Peer::write);
                    if !works {
                        self.reader_has_left(id);
                    }
                }
                Ready::Vmm => self.take_news(),
                Ready::Output(index) => self.take_output(index),
                Ready::Feed => self.write_feed(),
                Ready::Layer => self.take_layer(),
                Ready::Check => self.take_check_output(),
            }
        }
    }

    fn sources(&self) -> (Vec<Ready>, Vec<PollFd<'_>>) {
        let mut tokens = Vec::with_capacity(8);
        let mut fds = Vec::with_capacity(8);
        if let Some(listener) = &self.listener {
            tokens.push(Ready::Listener);
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let feed = self.running.as_ref().and_then(|running| running.feed.as_ref());
        let takes_input = feed.is_some_and(|feed| feed.waiting() < BACKLOG);
        let mut backlog = 0;
        for peer in &self.peers {
            tokens.push(Ready::Peer(peer.id));
            fds.push(PollFd::new(&peer.socket, PollFlags::IN));
            if let Some(stdin) = peer.stdin().filter(|_| takes_input) {
                tokens.push(Ready::Input(peer.id));
                fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
            }
            for sink in peer.sinks().iter().filter(|sink| sink.waits()) {
                tokens.push(Ready::Sink(peer.id));
                fds.push(PollFd::from_borrowed_fd(sink.fd(), PollFlags::OUT));
            }
            backlog = backlog.max(peer.backlog());
        }
        let Some(running) = &self.running else {
            return (tokens, fds);
        };
        if running.gone.is_none() {
            tokens.push(Ready::Vmm);
            fds.push(PollFd::new(&running.vmm, PollFlags::IN));
        }
        // Nobody's output is thrown away, and none of it fills this process's memory: the container waits for a slow reader.
        if backlog < BACKLOG || running.gone.is_some() {
            for (index, (_, fd)) in running.outputs.iter().enumerate() {
                tokens.push(Ready::Output(index));
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        if let Some(feed) = running.feed.as_ref().filter(|feed| feed.waits()) {
            tokens.push(Ready::Feed);
            fds.push(PollFd::from_borrowed_fd(feed.fd(), PollFlags::OUT));
        }
        if let Some(from) = running.keeping.as_ref().and_then(Keeping::source) {
            tokens.push(Ready::Layer);
            fds.push(PollFd::new(from, PollFlags::IN));
        }
        let check = running.checks.as_ref().and_then(|checks| checks.current.as_ref());
        if let Some(output) = check.and_then(|check| check.output.as_ref()) {
            tokens.push(Ready::Check);
            fds.push(PollFd::new(output, PollFlags::IN));
        }
        (tokens, fds)
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        // A client that has gone again is no error of this process.
        if let Ok((socket, _)) = listener.accept() {
            self.peers.push(Peer::new(self.next_peer, socket, false));
            self.next_peer = self.next_peer.wrapping_add(1);
        }
    }

    /// Who has started the container does not read an output of it any more: its next write fails, as it would without a VM in
    /// between. Others only see what comes while they look.
    fn reader_has_left(&mut self, id: u64) {
        let Some(peer) = self.peers.iter().find(|peer| peer.id == id && peer.starter) else {
            return;
        };
        let left: Vec<Stream> = peer.sinks().iter().map(Sink::stream).collect();
        let others = self
            .peers
            .iter()
            .any(|peer| peer.id != id && !peer.sinks().is_empty());
        if let Some(running) = self.running.as_mut().filter(|_| !others) {
            running.outputs.retain(|(stream, _)| left.contains(stream));
        }
    }

    /// Moves output into the log and to those who have attached.
    fn take_output(&mut self, index: usize) {
        let Some(running) = &mut self.running else { return };
        let Some((stream, fd)) = running.outputs.get(index) else {
            return;
        };
        let stream = *stream;
        let mut bytes = Vec::with_capacity(CHUNK);
        match rustix::io::read(fd, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(count) if count > 0 => {}
            Err(Errno::INTR | Errno::AGAIN) => return,
            Ok(_) | Err(_) => {
                running.outputs.remove(index);
                return;
            }
        }
        if let Err(error) = self.log.write(stream, &bytes) {
            self.record.state.error = format!("its log is not whole: {error}");
        }
        let mut left = Vec::new();
        for peer in &mut self.peers {
            if !peer.give(stream, &bytes) {
                left.push(peer.id);
            }
        }
        for id in left {
            self.reader_has_left(id);
        }
    }

    /// Takes what is left of the output of a main process that has ended: all of it was written before that was told. Its VMM
    /// process may keep its ends of the pipes for as long as it is needed.
    fn drain_outputs(&mut self) {
        let outputs = self.running.as_ref().map_or(0, |running| running.outputs.len());
        for index in (0..outputs).rev() {
            loop {
                let Some(running) = self.running.as_mut() else {
                    return;
                };
                let Some((_, fd)) = running.outputs.get(index) else {
                    break;
                };
                let now = Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)) {
                    Ok(0) => {
                        running.outputs.remove(index);
                        break;
                    }
                    Ok(_) => self.take_output(index),
                    Err(Errno::INTR) => {}
                    Err(_) => break,
                }
            }
        }
    }

    /// Takes standard input of who has attached.
    fn take_input(&mut self, id: u64) {
        let Some(feed) = self.running.as_mut().and_then(|running| running.feed.as_mut()) else {
            return;
        };
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) else {
            return;
        };
        let Some(stdin) = peer.stdin() else { return };
        let mut bytes = Vec::with_capacity(CHUNK);
        match rustix::io::read(stdin, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(count) if count > 0 => feed.push(&bytes),
            Err(Errno::INTR | Errno::AGAIN) => return,
            // An input that cannot be read has ended, as for a program that reads it itself.
            Ok(_) | Err(_) => {
                peer.end_stdin();
                // That of the container ends with that of who has started it; another may come and go.
                if peer.starter
                    && let Some(running) = &mut self.running
                {
                    running.feed_ends = true;
                }
            }
        }
        self.write_feed();
    }

    fn write_feed(&mut self) {
        let Some(running) = &mut self.running else { return };
        let Some(feed) = &mut running.feed else { return };
        if feed.write().is_err() || running.feed_ends && !feed.waits() {
            running.feed = None;
        }
    }

    fn take_news(&mut self) {
        let Some(running) = &mut self.running else { return };
        match running.vmm.news() {
            // One that was kept for its layer says so once more when it is let go.
            News::Exit(_) if running.exit.is_some() => {}
            News::Exit(exit) => {
                running.exit = Some(exit);
                running.feed = None;
                // It has ended: what is left to do has limits of its own.
                self.kill_at = None;
                self.force_at = None;
                self.drain_outputs();
                if !self.record.config.auto_remove {
                    self.begin_keeping();
                }
            }
            News::ProcessExit(process, exit) => self.process_ended(process, exit),
            News::OutOfMemory => {
                self.change(|state| state.oom_killed = true);
                self.containers.tell(&self.record, "oom", &[]);
            }
            News::Started => {
                for peer in self.peers.iter().filter(|peer| peer.starter) {
                    peer.tell(&FromMonitor::Started);
                }
            }
            News::Paused(paused) => {
                let asked = running.pausing.take();
                self.change(|state| {
                    state.status = if paused { Status::Paused } else { Status::Running };
                });
                let action = if paused { "pause" } else { "unpause" };
                self.containers.tell(&self.record, action, &[]);
                if let Some(peer) = asked.and_then(|id| self.peers.iter().find(|peer| peer.id == id)) {
                    peer.tell(&FromMonitor::Done);
                }
            }
            News::Gone(reason) => {
                let why = format!("the clone has ended before it was saved: {reason}");
                running.gone = Some(reason);
                running.feed = None;
                self.end_keeping(Err(why));
            }
        }
    }

    fn process_ended(&mut self, process: u16, exit: ContainerExit) {
        let Some(running) = &mut self.running else { return };
        match running.processes.remove(&process) {
            Some(Purpose::Peer(id)) => {
                if let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) {
                    let code = exit.shell_status().to_string();
                    peer.tell(&FromMonitor::Exited(exit));
                    peer.role = Role::New;
                    self.containers
                        .tell(&self.record, "exec_die", &[("exitCode", code)]);
                }
            }
            Some(Purpose::Check) => self.end_check(&exit),
            Some(Purpose::Keep) => self.helper_ended(exit),
            None => {}
        }
    }

    /// A number for a process.
    pub(super) fn free_number(running: &mut Running) -> Option<u16> {
        // 0 is the main process, the last is its layer.
        for _ in 0..u16::MAX {
            let number = running.next_process;
            running.next_process = number.checked_add(1).filter(|next| *next < u16::MAX).unwrap_or(1);
            if !running.processes.contains_key(&number) {
                return Some(number);
            }
        }
        None
    }
}
