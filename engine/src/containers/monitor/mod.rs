//! The monitor of a container: the process that has it, from its start until its last restart has ended.
//!
//! One thread and one `poll`. It moves the container's output into the log and to those who have attached, takes requests of
//! clients, and writes down what becomes of the container.

mod health;
mod keeping;
mod peers;
mod requests;
mod turn;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use chrono::Utc;
use picovm_guest_protocol::{ContainerExit, Stream, TerminalSize};
use rustix::pipe::{PipeFlags, pipe_with};

use super::client::{Attachment, Client, null, reason, socket_path};
use super::idle::open_layer;
use super::log::LogWriter;
use super::origin::Origin;
use super::protocol::{Ending, FromMonitor};
use super::record::{ContainerConfig, Record, RestartPolicy, State, Status};
use super::storage;
use super::{Containers, STATE};
use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::forked;
use crate::pools::{self, ParkedClone};
use crate::running::RunningContainer;
use crate::store::{Lock, Store};
use crate::streams::{Descriptor, Sink};
use health::Checks;
use keeping::Keeping;
use peers::{Peer, Role};

const KILL: u8 = 9;
/// How long a container may take to end that was killed, until its VMM process is.
const KILL_MAX: Duration = Duration::from_secs(5);
/// Exit status of a container that could not be started, or whose clone has failed.
const OWN_ERROR: u8 = 125;
/// Before the first restart, and the longest before any.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));
/// A container that ran so long is restarted as if for the first time.
const RAN_WELL: Duration = Duration::from_secs(10);
/// How long those who have attached may take to read the last output of a container that was killed, or whose clone has failed.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// How long a container runs before a pool is begun for those that may follow; if it has ended before, then. Its own start comes first.
const POOL_AFTER: Duration = Duration::from_millis(500);

/// Starts the monitor of a container whose lock is held, as a child of this process; returns a connection with it.
pub(super) fn start(
    containers: &Containers,
    record: Record,
    origin: Origin,
    attachment: &Attachment<'_>,
    lock: Lock,
) -> Result<Client, EngineError> {
    let failed = EngineError::host("make a container's monitor");
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    if let Some(child) = forked::fork("fork the container's monitor")? {
        return Ok(Client::new(ours, record.name, Some(child)));
    }
    drop(ours);
    let pool = Monitor::live(containers, record, origin, attachment, theirs, lock);
    if let Some(pool) = pool {
        pool.begin();
    }
    forked::exit()
}

/// A pool for the starts that may follow a cold one.
struct NextPool {
    store: Store,
    template: PathBuf,
    config: ContainerConfig,
    idle: Duration,
}

impl NextPool {
    fn begin(&self) {
        let begun = pools::begin_unasked(&self.store, &self.template, &self.config, self.idle);
        // The starts that follow are as slow as this one was.
        if let Err(error) = begun {
            tracing::warn!("cannot begin a pool of {}: {error}", self.config.image);
        }
    }
}

/// What a process of the container was begun for.
enum Purpose {
    /// A client.
    Peer(u64),
    /// A health check.
    Check,
    /// Keeping what the container has written to its files.
    Keep,
}

/// A container that runs.
struct Running {
    vmm: RunningContainer,
    outputs: Vec<(Stream, OwnedFd)>,
    /// What goes to its standard input.
    feed: Option<Sink<'static>>,
    /// Whether that ends when what waits has gone.
    feed_ends: bool,
    processes: BTreeMap<u16, Purpose>,
    next_process: u16,
    checks: Option<Checks>,
    exit: Option<ContainerExit>,
    keeping: Option<Keeping>,
    /// Why there is no clone any more, if there is none.
    gone: Option<String>,
    /// Who waits until it stands still, or goes on.
    pausing: Option<u64>,
}

struct Monitor<'m> {
    containers: &'m Containers,
    record: Record,
    origin: Origin,
    /// The pool that is to be begun for the starts that follow, and when.
    pool: Option<(Instant, NextPool)>,
    listener: Option<UnixListener>,
    peers: Vec<Peer>,
    next_peer: u64,
    log: LogWriter,
    running: Option<Running>,
    terminal: Option<TerminalSize>,
    announce: bool,
    console_log: Option<File>,
    /// Whether it was told to end: then it is not started again.
    stopping: bool,
    /// When it is killed that was asked to end.
    kill_at: Option<Instant>,
    /// When its VMM process is told to end its clone, and then killed.
    force_at: Option<Instant>,
    forced: bool,
    /// Whether it was told to end at once: then its last output waits for nobody.
    killed: bool,
}

impl<'m> Monitor<'m> {
    /// The life of a monitor, in its process. Returns the pool that is to be begun when nothing of the container is left.
    fn live(
        containers: &'m Containers,
        record: Record,
        origin: Origin,
        attachment: &Attachment<'_>,
        first: UnixStream,
        lock: Lock,
    ) -> Option<NextPool> {
        let _lock = lock;
        let mut peer = Peer::new(0, first, true);
        match Self::prepare(containers, record, origin, attachment, &mut peer) {
            Ok(mut monitor) => {
                monitor.peers.push(peer);
                monitor.serve();
                return monitor.pool.take().map(|(_, pool)| pool);
            }
            Err(error) => peer.tell(&FromMonitor::Ended(Ending {
                code: OWN_ERROR,
                error: error.to_string(),
                oom_killed: false,
            })),
        }
        None
    }

    fn prepare(
        containers: &'m Containers,
        record: Record,
        origin: Origin,
        attachment: &Attachment<'_>,
        peer: &mut Peer,
    ) -> Result<Self, EngineError> {
        let failed = || EngineError::host("prepare a container's monitor");
        let kept =
            forked::keep(&[attachment.stdin, attachment.stdout, attachment.stderr]).map_err(failed())?;
        // What its jail would refuse is told there.
        let keep_errors = record.config.confinement == crate::Confinement::CallsLogged;
        let console_log = match &record.config.console_log {
            Some(path) => {
                Some(File::create(path).map_err(EngineError::store("write the console log", path))?)
            }
            None => None,
        };
        forked::leave_caller(keep_errors).map_err(failed())?;
        let [stdin, stdout, stderr] = kept;
        peer.attach(stdin, stdout, stderr);
        let directory =
            File::open(&record.directory).map_err(EngineError::store("open", &record.directory))?;
        let path = socket_path(&directory);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(EngineError::store("remove", &record.file("monitor.sock"))(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path)
            .map_err(EngineError::store("listen at", &record.file("monitor.sock")))?;
        let log = LogWriter::open(record.log(), record.config.log)
            .map_err(EngineError::store("write", &record.log()))?;
        Ok(Self {
            containers,
            record,
            origin,
            pool: None,
            listener: Some(listener),
            peers: Vec::new(),
            next_peer: 1,
            log,
            running: None,
            terminal: attachment.terminal,
            announce: attachment.announce,
            console_log,
            stopping: false,
            kill_at: None,
            force_at: None,
            forced: false,
            killed: false,
        })
    }

    fn serve(&mut self) {
        let mut backoff = BACKOFF.0;
        self.record.state.restarts = 0;
        let ending = loop {
            let began = Instant::now();
            let ending = self.run_once();
            let again = self.restarts(&ending);
            self.tell_end(&ending, again);
            if !again {
                break ending;
            }
            // Its clone is taken down before the next one is made.
            self.running = None;
            if began.elapsed() > RAN_WELL {
                backoff = BACKOFF.0;
            }
            self.change(|state| state.restarts = state.restarts.saturating_add(1));
            // Those who waited for its end have seen it; those who watch its output go on.
            self.answer_waiting(&ending);
            let until = Instant::now() + backoff;
            backoff = (backoff * 2).min(BACKOFF.1);
            while Instant::now() < until && !self.stopping {
                self.turn(Some(until));
            }
            if self.stopping {
                break ending;
            }
        };
        self.finish(&ending);
    }

    /// Whether the container is to be started again.
    fn restarts(&self, ending: &Ending) -> bool {
        if self.stopping {
            return false;
        }
        match self.record.config.restart {
            RestartPolicy::No => false,
            RestartPolicy::OnFailure(most) => {
                ending.code != 0 && (most == 0 || self.record.state.restarts < most)
            }
            RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
        }
    }

    /// Changes the state, and writes it down.
    fn change(&mut self, change: impl FnOnce(&mut State)) {
        change(&mut self.record.state);
        if let Err(error) = super::write_json(&self.record.file(STATE), &self.record.state) {
            tracing::warn!("{error}");
        }
    }

    /// The end of a run is written down. A container that is started again does not count as ended in between, or who wants to stop
    /// it would find nothing to do.
    fn tell_end(&mut self, ending: &Ending, again: bool) {
        if let Err(error) = self.log.finish() {
            tracing::warn!("cannot write the log of container {}: {error}", self.record.name);
        }
        let health = self
            .running
            .as_ref()
            .and_then(|running| Some(running.checks.as_ref()?.health.clone()));
        let ending = ending.clone();
        let code = ending.code;
        self.change(|state| {
            state.status = if again { Status::Restarting } else { Status::Exited };
            state.pid = 0;
            state.finished = Some(Utc::now());
            state.exit_code = ending.code;
            state.error = ending.error;
            state.oom_killed = ending.oom_killed;
            state.health = health;
        });
        self.containers
            .tell(&self.record, "die", &[("exitCode", code.to_string())]);
    }

    /// The container has ended for good: those who wait are told when all of its output is out.
    fn finish(&mut self, ending: &Ending) {
        self.listener = None;
        let _ = fs::remove_file(self.record.file("monitor.sock"));
        if self.record.state.status != Status::Exited {
            self.change(|state| state.status = Status::Exited);
        }
        let failed = self.running.as_ref().is_none_or(|running| running.exit.is_none());
        // Who does not read the output of what was ended is not waited for.
        let give_up = (failed || self.killed).then(|| Instant::now() + DRAIN_MAX);
        while self.peers.iter().any(|peer| peer.backlog() > 0)
            && give_up.is_none_or(|give_up| Instant::now() < give_up)
        {
            self.turn(give_up);
        }
        if self.record.config.auto_remove
            && let Err(error) = self
                .containers
                .remove_locked(&self.record)
                .and_then(|()| self.containers.volumes()?.remove_anonymous_of(&self.record))
        {
            tracing::warn!("{error}");
        }
        for peer in std::mem::take(&mut self.peers) {
            if !matches!(peer.role, Role::New) {
                peer.tell(&FromMonitor::Ended(ending.clone()));
            }
        }
    }

    /// Tells those who wait for the end of the container and nothing else.
    fn answer_waiting(&mut self, ending: &Ending) {
        self.peers.retain(|peer| {
            let waits = matches!(peer.role, Role::Waiting);
            if waits {
                peer.tell(&FromMonitor::Ended(ending.clone()));
            }
            !waits
        });
    }

    /// Starts the container, and serves it until it has ended.
    fn run_once(&mut self) -> Ending {
        self.kill_at = None;
        self.force_at = None;
        self.forced = false;
        self.killed = false;
        self.record.state.oom_killed = false;
        match self.start_vmm() {
            Ok(running) => self.running = Some(running),
            Err(error) => {
                return Ending {
                    code: OWN_ERROR,
                    error: error.to_string(),
                    oom_killed: false,
                };
            }
        }
        let health = self
            .running
            .as_ref()
            .and_then(|running| Some(running.checks.as_ref()?.health.clone()));
        self.change(|state| {
            state.status = Status::Running;
            state.pid = std::process::id();
            state.started = Some(Utc::now());
            state.exit_code = 0;
            state.error.clear();
            state.health = health;
        });
        self.containers.tell(&self.record, "start", &[]);
        loop {
            let until = self.next_deadline();
            self.turn(until);
            if let Some(running) = &mut self.running {
                running.vmm.settle();
            }
            self.meet_deadlines();
            if let Some(ending) = self.ending() {
                return ending;
            }
        }
    }

    fn start_vmm(&mut self) -> Result<Running, EngineError> {
        let pipe =
            || pipe_with(PipeFlags::CLOEXEC).map_err(|error| EngineError::host("make a pipe")(error.into()));
        let config = &self.record.config;
        let mut options = match &config.warm {
            // What its last run has written belongs to what ran then: this one begins where the template was frozen.
            Some(warm) => config.warm_options(warm),
            None => config.options(self.terminal),
        };
        if config.warm.is_none() {
            options.layer = open_layer(&self.record)?;
            options.storage = storage::open(&self.record)?;
        }
        options.shared = self.containers.shared(&self.record)?;
        options.announce = self.announce;
        options.console_log = match &self.console_log {
            Some(log) => Some(
                log.try_clone()
                    .map_err(EngineError::host("hand over the console log"))?,
            ),
            None => None,
        };
        let null = null()?;
        let (out, out_end) = pipe()?;
        let (err, err_end) = pipe()?;
        let (feed_end, feed) = match config.stdin {
            true => {
                let (end, feed) = pipe()?;
                (Some(end), Some(feed))
            }
            false => (None, None),
        };
        let stdin = feed_end.as_ref().map_or(null.as_fd(), AsFd::as_fd);
        let streams = [stdin, out_end.as_fd(), err_end.as_fd()];
        let vmm = match self.start_parked(&options, streams)? {
            Some(started) => started,
            None => {
                let confinement = self.record.config.confinement;
                let started =
                    RunningContainer::start(self.origin.template()?, &options, streams, confinement)?;
                self.pool = self
                    .next_pool()
                    .and_then(|pool| Some((Instant::now().checked_add(POOL_AFTER)?, pool)));
                started
            }
        };
        let config = &self.record.config;
        Ok(Running {
            vmm,
            outputs: vec![(Stream::Stdout, out), (Stream::Stderr, err)],
            feed: feed.map(|feed| Sink::new(Stream::Stdin, Descriptor::Owned(feed))),
            feed_ends: false,
            processes: BTreeMap::new(),
            next_process: 1,
            checks: Checks::of(config),
            exit: None,
            keeping: None,
            gone: None,
            pausing: None,
        })
    }

    /// In a clone of a pool, if the container can do with one and a pool has one.
    fn start_parked(
        &mut self,
        options: &ContainerOptions,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<Option<RunningContainer>, EngineError> {
        if !self.record.config.takes_parked() {
            return Ok(None);
        }
        let mut given = self.origin.take_parked();
        while let Some(parked) = given.take().or_else(|| self.ask_for_parked()) {
            // One that has just ended is no matter: the next one will do.
            if let Some(started) = parked.start(options, streams)? {
                return Ok(Some(started));
            }
        }
        Ok(None)
    }

    fn ask_for_parked(&self) -> Option<ParkedClone> {
        ParkedClone::take(&self.containers.store, self.origin.path().file_name()?)
    }

    /// The pool that such a container leaves behind for others.
    fn next_pool(&self) -> Option<NextPool> {
        let idle = self.containers.pools?;
        self.record.config.takes_parked().then(|| NextPool {
            store: self.containers.store.clone(),
            template: self.origin.path().to_owned(),
            config: self.record.config.clone(),
            idle,
        })
    }

    /// How the container has ended, if all of its end has come.
    fn ending(&self) -> Option<Ending> {
        let running = self.running.as_ref()?;
        let oom_killed = self.record.state.oom_killed;
        if let Some(reason) = &running.gone
            && running.exit.is_none()
        {
            if !running.outputs.is_empty() {
                return None;
            }
            return Some(if self.forced {
                Ending {
                    code: 128 + KILL,
                    error: String::new(),
                    oom_killed,
                }
            } else {
                Ending {
                    code: OWN_ERROR,
                    error: reason.clone(),
                    oom_killed,
                }
            });
        }
        let exit = running.exit.as_ref()?;
        if !running.outputs.is_empty() || running.keeping.is_some() {
            return None;
        }
        let error = match exit {
            ContainerExit::NotStarted(_) => format!("cannot {}", reason(exit, &[])),
            _ => self.record.state.error.clone(),
        };
        Some(Ending {
            code: exit.shell_status(),
            error,
            oom_killed,
        })
    }

    fn next_deadline(&self) -> Option<Instant> {
        let running = self.running.as_ref()?;
        let live = running.exit.is_none() && self.record.state.status != Status::Paused;
        let checks = running.checks.as_ref().filter(|_| live).map(Checks::due);
        let keeping = running.keeping.as_ref().map(Keeping::until);
        let pool = self.pool.as_ref().map(|(at, _)| *at);
        [self.kill_at, self.force_at, checks, keeping, pool]
            .into_iter()
            .flatten()
            .min()
    }

    fn meet_deadlines(&mut self) {
        let now = Instant::now();
        if let Some((_, pool)) = self.pool.take_if(|(at, _)| now >= *at) {
            pool.begin();
        }
        let Some(running) = &mut self.running else { return };
        if self.kill_at.is_some_and(|at| now >= at) {
            self.kill_at = None;
            self.killed = true;
            self.force_at = Some(now + KILL_MAX);
            let _ = running.vmm.signal(KILL);
        }
        if self.force_at.is_some_and(|at| now >= at) {
            if self.forced {
                self.force_at = None;
                running.vmm.kill_vmm_process();
            } else {
                self.forced = true;
                self.force_at = Some(now + KILL_MAX);
                let _ = running.vmm.kill(KILL);
            }
        }
        if running
            .keeping
            .as_ref()
            .is_some_and(|keeping| now >= keeping.until())
        {
            self.end_keeping(Err("the guest does not go on with it".into()));
        }
        self.check_health(now);
    }
}
