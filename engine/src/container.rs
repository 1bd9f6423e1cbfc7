//! A container: a clone with an identity, and the session with its agent.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use picovm_guest_protocol::{
    ContainerSpec, Identity, IdentityError, Limits, Mount, ProcessSpec, TerminalSize,
};
use picovm_vmm::{ForkOptions, Machine, Outcome, Template};
use rustix::event::{PollFd, PollFlags, poll};

use crate::confinement::ThreadFilters;
use crate::error::EngineError;
use crate::session::Session;
use crate::share::{self, Shared};
use crate::timeout;

/// What to run and how.
#[derive(Debug, Default)]
pub struct ContainerOptions {
    /// Its id, printable ASCII; 12 random hexadecimal digits if there is none.
    pub id: Option<String>,
    /// Program and arguments. None: the clone only serves to look at the container's files, until it is ended.
    pub args: Vec<OsString>,
    /// Environment as `NAME=value`.
    pub env: Vec<OsString>,
    /// Working directory in the container; `/` if empty.
    pub workdir: OsString,
    /// `user[:group]` by name or number; root if empty.
    pub user: OsString,
    /// Further groups, by name or number.
    pub groups: Vec<OsString>,
    /// Host name; the first 12 characters of the container's id if there is none.
    pub hostname: Option<String>,
    /// Whether standard input is connected.
    pub stdin: bool,
    /// A terminal of this size for all three streams, instead of a pipe for each.
    pub terminal: Option<TerminalSize>,
    /// Resource limits: number of the resource (`setrlimit(2)`), soft, hard; `u64::MAX` is none.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// Capabilities that are taken from it, a bit for each (`capabilities(7)`).
    pub drop_capabilities: u64,
    /// Whether no program gives it privileges (setuid, file capabilities).
    pub no_new_privileges: bool,
    /// What all its processes together may take.
    pub limits: Limits,
    /// Whether its root file system refuses to be written to.
    pub read_only: bool,
    /// File systems in memory: where, and the options of `mount(8)`.
    pub tmpfs: Vec<(OsString, OsString)>,
    /// Directories and files of the host. Only a container that is started cold can have them.
    pub shared: Vec<Shared>,
    /// The disk that its writable layer lies on, with a file system, if that is not to lie in memory. Only a container that is started
    /// cold can have it.
    pub storage: Option<File>,
    /// Addresses and names for its `/etc/hosts`.
    pub hosts: Vec<(String, String)>,
    /// The writable layer that an earlier run has left, as [`Helper::SaveLayer`](picovm_guest_protocol::Helper::SaveLayer)
    /// gives it.
    pub layer: Option<File>,
    /// Whether the clone outlives the container's main process, to be asked for the writable layer.
    pub stay: bool,
    /// Whether [`News::Started`](crate::News::Started) is to tell that its program runs.
    pub announce: bool,
    /// Whether the clone shares no page with others of its template: see [`ForkOptions::isolate_memory`]. Only a container that is
    /// started cold can.
    pub isolate_memory: bool,
    /// Where the guest's console output goes, beside the tail that is kept in memory.
    pub console_log: Option<File>,
}

impl ContainerOptions {
    /// A command with everything else by default.
    #[must_use]
    pub fn command<I>(args: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<OsString>,
    {
        Self {
            args: args.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    pub(crate) fn request(&self) -> Start {
        Start {
            id: self.id.clone(),
            spec: self.spec(),
            hostname: self.hostname.clone(),
        }
    }

    fn spec(&self) -> ContainerSpec {
        let bytes = |strings: &[OsString]| strings.iter().map(|string| string.clone().into_vec()).collect();
        ContainerSpec {
            process: ProcessSpec {
                args: bytes(&self.args),
                env: bytes(&self.env),
                cwd: self.workdir.clone().into_vec(),
                user: self.user.clone().into_vec(),
                groups: bytes(&self.groups),
                stdin: self.stdin,
                terminal: self.terminal,
                rlimits: self.rlimits.clone(),
                drop_capabilities: self.drop_capabilities,
                no_new_privileges: self.no_new_privileges,
            },
            limits: self.limits,
            read_only: self.read_only,
            tmpfs: self
                .tmpfs
                .iter()
                .map(|(place, options)| (place.clone().into_vec(), options.clone().into_vec()))
                .collect(),
            mounts: self
                .shared
                .iter()
                .enumerate()
                .map(|(index, one)| Mount {
                    name: share::name(index).into_bytes(),
                    target: one.target.clone().into_vec(),
                    read_only: one.read_only,
                    fill: one.fill && !one.read_only,
                })
                .collect(),
            hosts: self
                .hosts
                .iter()
                .map(|(address, name)| (address.clone().into_bytes(), name.clone().into_bytes()))
                .collect(),
            layer: self.layer.is_some(),
            storage: self.storage.is_some(),
            stay: self.stay,
            announce: self.announce,
        }
    }
}

/// What a container is started with.
pub(crate) struct Start {
    /// Its id; a random one if there is none.
    pub(crate) id: Option<String>,
    /// What to run.
    pub(crate) spec: ContainerSpec,
    /// Host name; the beginning of the container's id if there is none.
    pub(crate) hostname: Option<String>,
}

/// How much of an id is shown, and is the host name of who has no other.
const SHORT_ID: usize = 12;

/// A container that has an id and an identity, and no clone yet.
struct Identified {
    id: String,
    identity: Vec<u8>,
    session: Session,
    stdin: bool,
    stay: bool,
    announce: bool,
}

impl Identified {
    fn new(template: &Template, start: Start) -> Result<Self, EngineError> {
        let mut entropy = [0u8; 32];
        fill_random(&mut entropy)?;
        let id = match start.id {
            Some(id) => id,
            None => random_id::<6>()?,
        };
        let (stdin, stay) = (start.spec.process.stdin, start.spec.stay);
        let announce = start.spec.announce;
        let has_layer = start.spec.layer;
        let mut identity = Identity {
            hostname: start
                .hostname
                .unwrap_or_else(|| id.chars().take(SHORT_ID).collect()),
            id: id.clone(),
            entropy,
            realtime_ns: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)),
            container: Some(start.spec),
        };
        let mut session = Session::default();
        let bytes = match identity.encode(template.identity_area()) {
            Err(IdentityError::TooLarge { .. }) => {
                // It goes over the connection instead: slower, but as large as exec takes.
                if let Some(spec) = identity.container.take() {
                    session.send_spec(&spec)?;
                }
                identity.encode(template.identity_area())
            }
            encoded => encoded,
        }
        .map_err(|error| EngineError::host("encode the clone's identity")(io::Error::other(error)))?;
        if has_layer {
            session.expect_layer();
        }
        Ok(Self {
            id,
            identity: bytes,
            session,
            stdin,
            stay,
            announce,
        })
    }

    /// Lets a clone run that has this identity.
    fn run(self, mut machine: Machine) -> Result<Container, EngineError> {
        let connection = machine
            .take_connection()
            .ok_or_else(|| EngineError::host("connect to the clone")(io::ErrorKind::NotConnected.into()))?;
        connection
            .set_nonblocking(true)
            .map_err(EngineError::host("set up the control connection"))?;
        machine.start()?;
        tracing::info!(id = self.id, "container started");
        Ok(Container {
            machine,
            connection,
            session: self.session,
            stdin: self.stdin,
            stay: self.stay,
            announce: self.announce,
            layer: None,
            id: self.id,
        })
    }
}

/// How long after a machine has raised its descriptor it may take until it tells why it stopped: a moment, if the thread that
/// tells is not held up by others.
const STOP_MAX: Duration = Duration::from_secs(5);

/// A container that runs. Dropping it ends its clone and leaves nothing.
pub struct Container {
    pub(crate) machine: Machine,
    pub(crate) connection: UnixStream,
    pub(crate) session: Session,
    pub(crate) stdin: bool,
    /// Whether it is served on after its end.
    pub(crate) stay: bool,
    /// Whether it is still to be told that its program runs.
    pub(crate) announce: bool,
    /// Its writable layer, until that is sent.
    pub(crate) layer: Option<OwnedFd>,
    id: String,
}

impl Container {
    /// Forks a clone in this very process, gives it its identity and lets it run. Nothing but the wall of its VM confines it:
    /// [`RunningContainer`](crate::RunningContainer) has one in a jailed process of its own.
    ///
    /// # Errors
    /// [`EngineError::Template`], [`EngineError::Machine`] for what the host refuses.
    pub fn start(template: &Template, options: &ContainerOptions) -> Result<Self, EngineError> {
        Self::start_confined(template, options, None, &ThreadFilters::default())
    }

    /// As [`Container::start`], with a connection to a share server, and with every thread of this process confined before the guest runs.
    pub(crate) fn start_confined(
        template: &Template,
        options: &ContainerOptions,
        share: Option<&OwnedFd>,
        filters: &ThreadFilters,
    ) -> Result<Self, EngineError> {
        let mut identified = Identified::new(template, options.request())?;
        let once_more = |file: &Option<File>, attempted| {
            let copy = file.as_ref().map(File::try_clone).transpose();
            copy.map_err(EngineError::host(attempted))
        };
        let layer = once_more(&options.layer, "hand over the container's writable layer")?.map(OwnedFd::from);
        let storage = once_more(&options.storage, "hand over the container's storage")?;
        let machine = template.fork(ForkOptions {
            identity: std::mem::take(&mut identified.identity),
            console_log: options.console_log.as_ref().and_then(|log| log.try_clone().ok()),
            threads: filters.threads(),
            isolate_memory: options.isolate_memory,
            share: share::once_more(share)?,
            storage,
            ..ForkOptions::default()
        })?;
        if let Some(set) = template.working_set() {
            set.populate_written(machine.memory());
        }
        filters.seal()?;
        let mut container = identified.run(machine)?;
        container.layer = layer;
        Ok(container)
    }

    /// Gives a clone, which was forked without an identity and stands at its freeze point, its identity and lets it run.
    pub(crate) fn start_parked(
        template: &Template,
        machine: Machine,
        start: Start,
        layer: Option<OwnedFd>,
    ) -> Result<Self, EngineError> {
        let identified = Identified::new(template, start)?;
        template.write_identity(&machine, &identified.identity)?;
        let mut container = identified.run(machine)?;
        container.layer = layer;
        Ok(container)
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The machine that it runs in.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Waits until the container has written something, or has ended. Nothing of it is taken.
    ///
    /// # Errors
    /// [`EngineError::Host`] if `timeout` passes before.
    pub fn wait_for_output(&self, timeout: Duration) -> Result<(), EngineError> {
        let failed = EngineError::host("wait for output of the container");
        let timeout = timeout::timespec(timeout);
        let stopped = self.machine.stopped_descriptor();
        let mut fds = [
            PollFd::new(&self.connection, PollFlags::IN),
            PollFd::new(&stopped, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => Err(failed(io::ErrorKind::TimedOut.into())),
            Ok(_) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The error for a clone that has ended before its container told how it ended.
    pub(crate) fn ended(&mut self) -> EngineError {
        // The machine's descriptor is raised just before the stop itself is told.
        let reason = match self.machine.wait(Some(STOP_MAX)) {
            Ok(Some(Outcome::FreezePoint)) => "it went back to its freeze point".to_owned(),
            Ok(Some(outcome)) => outcome.to_string(),
            Ok(None) => "it stopped without a reason".to_owned(),
            Err(error) => error.to_string(),
        };
        EngineError::CloneEnded {
            reason,
            tail: self.machine.console_tail(),
        }
    }
}

/// A random id of `N` bytes in hexadecimal digits.
pub(crate) fn random_id<const N: usize>() -> Result<String, EngineError> {
    let mut id = [0u8; N];
    fill_random(&mut id)?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn fill_random(bytes: &mut [u8]) -> Result<(), EngineError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let filled = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| EngineError::host("read random bytes")(error.into()))?;
        rest = rest.get_mut(filled..).unwrap_or_default();
    }
    Ok(())
}
