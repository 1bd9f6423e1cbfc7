//! The agent: PID 1 after the freeze point. Serves the processes of one container over the control connection until the main
//! one has ended and its last byte is with the host.
//!
//! One thread, one epoll with edge-triggered events: each descriptor is registered once, before the freeze where it can be, and
//! from then on an event only says that a descriptor may be ready again.

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

mod helpers;
mod hooks;
mod process;
mod terminal;
mod warm;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use picovm_guest_protocol::frame::{DATA_MAX, LAYER, MAIN, PROCESSES_MAX};
use picovm_guest_protocol::{
    ContainerExit, Frame, FrameDecoder, FrameError, Helper, ProcessSpec, StartFailure, Stream,
};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, WaitOptions};

use crate::cgroup::{self, Cgroup, KernelLog};
use crate::console;
use crate::container::Ground;
use crate::error::{Attempt, InitError};
use crate::start::failure;
use crate::streams::Outgoing;
use crate::stub::{self, Begun, Ends, Pipes};
use process::{Process, Role};
pub use terminal::Terminal;
pub use warm::FreezePoint;
use warm::Freezing;

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
    /// The machine could not be frozen, or not become a clone.
    #[error("cannot freeze the machine with its container: {0}")]
    Freeze(String),
    /// The kernel refused something that it cannot refuse.
    #[error("{attempted}: {source}")]
    System {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

// Keys of events; all above the reserved ones are those of processes.
const CONTROL: u64 = 0;
const CHILDREN: u64 = 1;
const MEMORY: u64 = 2;
/// Serial number of the main process.
const FIRST_SERIAL: u64 = 1;

/// Open files of the agent: each process has up to seven.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(4096),
    maximum: Some(4096),
};

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

/// Lets this process have as many open files as an agent may need.
pub fn allow_open_files() -> Result<(), InitError> {
    rustix::process::setrlimit(Resource::Nofile, OPEN_FILES).attempt(|| "set the limit of open files".into())
}

/// The agent of one container.
pub struct Agent<'a> {
    ground: &'a Ground,
    epoll: OwnedFd,
    control: OwnedFd,
    readable: bool,
    hung_up: bool,
    decoder: FrameDecoder,
    outgoing: Outgoing,
    children: OwnedFd,
    children_changed: bool,
    processes: BTreeMap<u16, Process>,
    /// The process whose outputs have the first turn, so that one that never ends does not keep others from theirs.
    turn: u16,
    next_serial: u64,
    /// A terminal that nobody has yet, registered for the main process. Another may have it if that does not want it.
    spare: Option<Terminal>,
    /// Whether the agent goes on after the main process's end.
    stays: bool,
    /// Whether the container has ended, with its main process.
    has_ended: bool,
    exit_queued: bool,
    /// Events of the container's memory, if that is limited.
    memory: Option<File>,
    /// What tells of it if it is not.
    kernel_log: Option<KernelLog>,
    /// Processes that were killed for it, as far as was heard.
    memory_changed: bool,
    oom_kills: u64,
    /// The way to a freeze point with a running container, where there is one.
    freeze_point: Option<FreezePoint<'a>>,
    freezing: Freezing,
    scratch: Vec<u8>,
}

impl<'a> Agent<'a> {
    /// Prepares everything for a container that is yet to come. SIGCHLD must be blocked.
    pub fn new(control: OwnedFd, pipes: Pipes, ground: &'a Ground) -> Result<Self, AgentError> {
        let because = system;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(because("create an epoll"))?;
        let children = child_signals().map_err(because("create a signalfd"))?;
        let both = epoll::EventFlags::IN | epoll::EventFlags::OUT;
        let sources = [
            (CONTROL, control.as_fd(), both | epoll::EventFlags::RDHUP),
            (CHILDREN, children.as_fd(), epoll::EventFlags::IN),
        ];
        for (key, source, flags) in sources {
            let flags = flags | epoll::EventFlags::ET;
            epoll::add(&epoll, source, epoll::EventData::new_u64(key), flags)
                .map_err(because("register an event source"))?;
        }
        let main = Process::new(&epoll, MAIN, FIRST_SERIAL, Role::Main, pipes)?;
        // Ready for a container that wants one. Where there are no terminals it is told so.
        let spare = Terminal::open().and_then(|terminal| {
            Process::register_terminal(&epoll, FIRST_SERIAL, &terminal)?;
            Ok(terminal)
        });
        Ok(Self {
            ground,
            epoll,
            control,
            readable: true,
            hung_up: false,
            decoder: FrameDecoder::default(),
            outgoing: Outgoing::new(),
            children,
            children_changed: true,
            processes: BTreeMap::from([(MAIN, main)]),
            turn: MAIN,
            next_serial: FIRST_SERIAL.saturating_add(1),
            spare: spare.ok(),
            stays: false,
            has_ended: false,
            exit_queued: false,
            memory: None,
            memory_changed: false,
            oom_kills: 0,
            freeze_point: None,
            freezing: Freezing::No,
            kernel_log: ground.is_guest.then(KernelLog::open).flatten(),
            // Not zero, so that its pages are present before the freeze.
            scratch: vec![1; DATA_MAX],
        })
    }

    /// One that can be asked to freeze the machine with its container.
    #[must_use]
    pub fn with_freeze_point(self, freeze_point: FreezePoint<'a>) -> Self {
        Self {
            freeze_point: Some(freeze_point),
            ..self
        }
    }

    /// The control connection.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// The terminal that is ready for the main process.
    pub fn terminal(&self) -> Option<&Terminal> {
        self.spare.as_ref()
    }

    /// Serves the container whose main process was begun, until that has ended, its output and
    /// [`Frame::Exit`] have been sent; one that is idle, or stays, until the host ends it.
    ///
    /// Every child of this process is reaped; as PID 1, everything that outlives the container's main process is killed.
    pub fn serve(mut self, begun: Begun) -> Result<(), AgentError> {
        self.take_on(begun)?;
        let mut events = Vec::with_capacity(8);
        loop {
            self.move_all()?;
            if self.is_done() {
                return Ok(());
            }
            if self.go_on_freezing()? {
                continue;
            }
            events.clear();
            // A host that never stops sending must not keep the container's end from being noticed.
            let leisure = self.outgoing.is_at_leisure();
            let stuck = self.processes.values().any(Process::is_stuck);
            let timeout = match self.readable {
                true => Some(&NO_WAIT),
                false => (leisure || stuck).then_some(&LEISURE),
            };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(system("wait for events")(error)),
            }
            if events.is_empty() {
                if leisure {
                    self.outgoing.hurry();
                }
                for process in self.processes.values_mut().filter(|process| process.is_stuck()) {
                    process.retry();
                }
            }
            for event in &events {
                self.note(event.data.u64(), event.flags);
            }
        }
    }

    /// Learns what the stub has become.
    fn take_on(&mut self, begun: Begun) -> Result<(), AgentError> {
        let Begun { pid, taken } = begun;
        self.stays = taken.stays;
        if taken.limits_memory {
            self.watch_memory();
        }
        if taken.is_idle {
            // The stub is reaped as any orphan is.
            self.processes.remove(&MAIN);
        } else if let Some(main) = self.processes.get_mut(&MAIN) {
            main.pid = Some(pid);
            if taken.has_terminal
                && let Some(terminal) = self.spare.take()
            {
                main.take_terminal(terminal, &mut self.outgoing)?;
            }
            if taken.announces && !main.has_failed() {
                self.outgoing.push(MAIN, &Frame::Started)?;
            }
        }
        for (process, frame) in taken.early {
            self.obey(process, frame)?;
        }
        Ok(())
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
            MEMORY => self.memory_changed = true,
            // One of a process that is gone is nobody's.
            _ => {
                let mut processes = self.processes.values_mut();
                let _ = processes.any(|process| process.note(source, flags));
            }
        }
    }

    fn is_done(&self) -> bool {
        self.exit_queued && !self.stays && self.outgoing.is_empty()
    }

    /// Moves everything that can move, until nothing can without a new event.
    fn move_all(&mut self) -> Result<(), AgentError> {
        loop {
            self.receive()?;
            self.reap()?;
            if std::mem::take(&mut self.memory_changed) {
                self.look_for_oom()?;
            }
            let mut next = None;
            let turns = [
                (Bound::Included(self.turn), Bound::Unbounded),
                (Bound::Unbounded, Bound::Excluded(self.turn)),
            ];
            for turn in turns {
                for (number, process) in self.processes.range_mut(turn) {
                    process.pump(&mut self.outgoing, &mut self.scratch)?;
                    if !self.outgoing.has_room() {
                        next = next.or(number.checked_add(1));
                    }
                }
            }
            self.turn = next.unwrap_or(MAIN);
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
            if !self
                .processes
                .values()
                .any(|process| process.can_move(&self.outgoing))
            {
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

    fn obey(&mut self, number: u16, frame: Frame) -> Result<(), AgentError> {
        match frame {
            // The stub has read the first one.
            Frame::Spec(_) => Err(AgentError::Protocol("said twice what to run")),
            Frame::Data(Stream::Stdout | Stream::Stderr, _) => {
                Err(AgentError::Protocol("sent a stream that is the container's"))
            }
            Frame::Credit(Stream::Stdin, _) => {
                Err(AgentError::Protocol("gave credit for a stream that is its own"))
            }
            Frame::Exit(_) => Err(AgentError::Protocol("sent an exit status")),
            Frame::Started => Err(AgentError::Protocol("said that a program runs")),
            Frame::OutOfMemory => Err(AgentError::Protocol("said that memory has run out")),
            Frame::Exec(_) | Frame::Help(_) if matches!(number, MAIN | LAYER) => Err(AgentError::Protocol(
                "began a process under a number that is not its own",
            )),
            Frame::Freeze if number == MAIN => self.freeze(),
            Frame::Freeze => Err(AgentError::Protocol(
                "asked to freeze another process than the main one",
            )),
            Frame::Exec(spec) => self.exec(number, &spec),
            Frame::Help(helper) => self.help(number, &helper),
            frame => match self.processes.get_mut(&number) {
                Some(process) => process.obey(frame, &mut self.outgoing),
                // Its last frame may be on its way.
                None => Ok(()),
            },
        }
    }

    /// Begins another process of the container.
    fn exec(&mut self, number: u16, spec: &ProcessSpec) -> Result<(), AgentError> {
        let begun = if self.has_ended {
            Err(failure("execute in the container", libc::ESRCH, "it has ended"))
        } else {
            self.begin_other(number, spec)
        };
        self.refuse(number, begun)
    }

    fn begin_other(&mut self, number: u16, spec: &ProcessSpec) -> Result<(), StartFailure> {
        let (mut process, ends) = self.prepare(number, Role::Other)?;
        let terminal = match spec.terminal {
            Some(_) => match self.spare.take() {
                // The main process does not want it.
                Some(spare) => Some(spare),
                None => Some(Terminal::open().map_err(cannot("open a terminal"))?),
            },
            None => None,
        };
        let serial = process.serial();
        process.pid = Some(
            stub::begin_other(spec, &ends, self.ground, terminal.as_ref())
                .map_err(cannot("begin a process"))?,
        );
        if let Some(terminal) = terminal {
            let connected = Process::register_terminal(&self.epoll, serial, &terminal)
                .map_err(system("register a terminal"))
                .and_then(|()| process.take_terminal(terminal, &mut self.outgoing));
            if let Err(error) = connected {
                // It is reaped as an orphan.
                process.signal(9);
                return Err(failure("open a terminal", 0, error));
            }
        }
        self.processes.insert(number, process);
        Ok(())
    }

    /// Begins a process that is a copy of this one.
    fn help(&mut self, number: u16, helper: &Helper) -> Result<(), AgentError> {
        let begun = self.begin_helper(number, helper);
        self.refuse(number, begun)
    }

    fn begin_helper(&mut self, number: u16, helper: &Helper) -> Result<(), StartFailure> {
        let (mut process, ends) = self.prepare(number, Role::Helper)?;
        let Some(pid) = stub::fork(None).map_err(cannot("begin a process"))? else {
            stub::end_with(|| {
                // What it has of others would hold up their ends.
                self.processes.clear();
                drop(process);
                match stub::become_helper(ends, self.ground.is_guest) {
                    Ok(nothing) => {
                        for own in [&mut self.control, &mut self.epoll, &mut self.children] {
                            let _ = rustix::io::dup2(&nothing, own);
                        }
                        helpers::run(helper, self.ground)
                    }
                    Err(failed) => {
                        eprintln!("{}: {}", failed.attempted, failed.message);
                        1
                    }
                }
            })
        };
        process.pid = Some(pid);
        self.processes.insert(number, process);
        Ok(())
    }

    /// Makes the streams of a process, if there may be one of this number.
    fn prepare(&mut self, number: u16, role: Role) -> Result<(Process, Ends), StartFailure> {
        let refused = |message: &str| failure("begin a process", 0, message);
        if self.processes.contains_key(&number) {
            return Err(refused("its number is in use"));
        }
        if self.processes.len() >= PROCESSES_MAX {
            return Err(refused("there are too many"));
        }
        let (pipes, ends) = stub::pipes().map_err(|error| failure("begin a process", 0, error))?;
        let serial = self.next_serial;
        self.next_serial = serial.saturating_add(1);
        let process = Process::new(&self.epoll, number, serial, role, pipes)
            .map_err(|error| failure("begin a process", 0, error))?;
        Ok((process, ends))
    }

    /// Tells the host of a process that could not be begun.
    fn refuse(&mut self, number: u16, begun: Result<(), StartFailure>) -> Result<(), AgentError> {
        if let Err(failure) = begun {
            let exit = Frame::Exit(ContainerExit::NotStarted(failure));
            self.outgoing.push(number, &exit)?;
        }
        Ok(())
    }

    /// Reaps whatever has ended, the container's processes and orphans alike.
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
        let had_ended = self.has_ended;
        let mut killed = false;
        let others_live = loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    killed |= status.terminating_signal() == Some(libc::SIGKILL);
                    let mut processes = self.processes.values_mut();
                    if let Some(process) = processes.find(|process| process.is(pid)) {
                        process.end(status, &mut self.scratch);
                        self.has_ended |= process.role == Role::Main;
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) => break true,
                Err(Errno::CHILD) => break false,
                Err(error) => return Err(system("wait for children")(error)),
            }
        };
        if self.has_ended && !had_ended {
            return self.container_ended(others_live);
        }
        // Without a limit nothing else tells of it.
        if killed && self.memory.is_none() && !self.has_ended {
            self.look_for_oom()?;
        }
        Ok(())
    }

    /// The main process has ended, and the container ends with it.
    fn container_ended(&mut self, others_live: bool) -> Result<(), AgentError> {
        // All orphans are children of PID 1: without a child there is no other process, and no need to look at each of
        // the kernel's own.
        let is_init = rustix::process::getpid() == Pid::INIT;
        if others_live || !is_init {
            self.kill_what_is_left(is_init);
        }
        // What ends well has not been killed; the event of anything else may still be on its way.
        let main = self.processes.get(&MAIN);
        if main.is_some_and(|main| main.ended != Some(ContainerExit::Code(0))) {
            self.look_for_oom()?;
        }
        Ok(())
    }

    /// Whatever else the container has started ends now.
    fn kill_what_is_left(&self, is_init: bool) {
        if let Some(group) = &self.ground.cgroup {
            match group.kill() {
                Ok(()) => return,
                Err(error) => console::report(&format!("kill the container's processes: {error}")),
            }
        }
        if !is_init {
            // Only PID 1 has a machine of its own; anywhere else that would be everything on the developer's machine.
            for process in self
                .processes
                .values()
                .filter(|process| process.role != Role::Helper)
            {
                process.kill_group();
            }
            return;
        }
        // SAFETY: plain system call. It fails only if nothing is left, which is what is wanted.
        unsafe { libc::kill(-1, libc::SIGKILL) };
    }

    /// Hears of processes that are killed because the container has reached its limit of memory. Without, only their ends tell.
    fn watch_memory(&mut self) {
        let Some(group) = &self.ground.cgroup else { return };
        let flags = epoll::EventFlags::PRI | epoll::EventFlags::ET;
        let watched = group.events().and_then(|events| {
            epoll::add(&self.epoll, &events, epoll::EventData::new_u64(MEMORY), flags)?;
            Ok(events)
        });
        match watched {
            Ok(events) => {
                self.memory = Some(events);
                self.oom_kills = 0;
                // It may have come before.
                self.memory_changed = true;
            }
            Err(error) => console::report(&format!("watch the container's memory: {error}")),
        }
    }

    /// Tells the host if the kernel has killed a process of the container because memory had run out.
    fn look_for_oom(&mut self) -> Result<(), AgentError> {
        let more = match (&self.memory, &mut self.kernel_log) {
            (Some(events), _) => {
                let kills = cgroup::oom_kills(events);
                kills > std::mem::replace(&mut self.oom_kills, kills)
            }
            (None, Some(log)) => log.tells_of_a_kill(),
            (None, None) => false,
        };
        if more && !self.exit_queued {
            self.outgoing.push(MAIN, &Frame::OutOfMemory)?;
        }
        Ok(())
    }

    /// Once a process has ended and its output is queued, its exit status follows, as its last frame; the main process's after
    /// those of the container's others.
    fn finish(&mut self) -> Result<(), AgentError> {
        let over = |process: &Process| process.role != Role::Main && process.is_over();
        while let Some((&number, process)) = self.processes.iter().find(|(_, process)| over(process)) {
            if let Some(exit) = &process.ended {
                self.outgoing.push(number, &Frame::Exit(exit.clone()))?;
            }
            self.processes.remove(&number);
        }
        let is_container = |process: &Process| process.role == Role::Other;
        if !self.processes.get(&MAIN).is_some_and(Process::is_over)
            || self.processes.values().any(is_container)
            || (self.stays && !self.ground.cgroup.as_ref().is_none_or(Cgroup::is_empty))
        {
            return Ok(());
        }
        if let Some(exit) = self.processes.remove(&MAIN).and_then(|main| main.ended) {
            self.outgoing.push(MAIN, &Frame::Exit(exit))?;
            self.exit_queued = true;
        }
        Ok(())
    }
}

fn cannot(attempted: &'static str) -> impl FnOnce(Errno) -> StartFailure {
    move |error| failure(attempted, error.raw_os_error(), error)
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
