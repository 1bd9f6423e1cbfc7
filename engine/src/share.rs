//! Directories and files of the host in a container: which they are, and the share server that has them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use picovm_jailer::{
    Access, Capability, Cgroup, Jail, Jailer, Mode, Opened, Policy, Resource, RootEntry, Seccomp,
    SeccompMode, ThreadKind, Work,
};
use picovm_share::Directories;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::confinement::{self, Confinement};
use crate::error::EngineError;

/// A directory or file of the host in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Which one: an absolute path.
    pub source: PathBuf,
    /// Where it is in the container: an absolute path, made if it is not there.
    pub target: std::ffi::OsString,
    /// Whether the container can only read it.
    pub read_only: bool,
    /// Whether it gets, if it is an empty directory, what the image has at that place.
    pub fill: bool,
}

/// Memory of a share server in bytes: what the kernel keeps of each file that is open, about 1.8 kB on ext4 with the server's own record of
/// it, perhaps twice that on other file systems; and the page cache of what it writes, which the kernel gives up when it must. A server that
/// took more would be killed: before that comes the limit of open files, which is an error of the container's program.
const MEMORY: u64 = 512 << 20;
/// Files that it may have open: one for each that the guest's kernel remembers.
const OPEN_FILES: u64 = 1 << 17;
/// Threads, with room for those that the kernel makes for it.
const TASKS: u64 = 16;

/// What it needs of the capabilities of root: to be to files what root of a container expects to be.
const CAPABILITIES: [Capability; 7] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
];

/// A share server, a process of its own. Dropping it ends it.
pub(crate) struct ShareServer {
    _jail: Jail,
}

impl ShareServer {
    /// Starts one for a container. Gives the end of the connection that is its VMM process's; when that is closed, the server ends.
    ///
    /// # Errors
    /// [`EngineError::Refused`] without root, [`EngineError::Jail`], [`EngineError::Host`].
    pub(crate) fn start(shared: &[Shared], confinement: Confinement) -> Result<(OwnedFd, Self), EngineError> {
        let (theirs, ours) = connection()?;
        Ok((theirs, Self::start_at(shared, ours, confinement)?))
    }

    /// As [`ShareServer::start`], at an end of a connection whose other end a VMM process has already.
    pub(crate) fn start_at(
        shared: &[Shared],
        ours: OwnedFd,
        confinement: Confinement,
    ) -> Result<Self, EngineError> {
        if Mode::of_caller() == Mode::Rootless {
            return Err(EngineError::Refused(
                "directories and volumes can only be shared with a container by root: the files in them belong to users whom no \
                 other user can act for. Run picovm as root, or copy files with `picovm cp`"
                    .into(),
            ));
        }
        // Found now: what is wrong is told by its name.
        for one in shared {
            std::fs::metadata(&one.source).map_err(EngineError::store("share", &one.source))?;
        }
        let mut jailer = Jailer::for_work(policy(shared, confinement), Mode::of_caller(), Work::Share)?;
        let filters = jailer.filters().clone();
        let keep = [ours.as_raw_fd(), rustix::stdio::stderr().as_raw_fd()];
        let open = || Directories::new().map(Served);
        let jail = jailer.spawn_with(&keep, open, |Served(directories)| {
            confinement::forget_environment();
            picovm_share::serve(
                directories,
                ours.as_fd(),
                &|| match filters.apply(ThreadKind::Control) {
                    Ok(()) => true,
                    Err(error) => {
                        eprintln!("picovm: cannot filter the system calls of a share server: {error}");
                        false
                    }
                },
            );
            0
        })?;
        Ok(Self { _jail: jail })
    }
}

/// A connection between a VMM process and a share server: a socket of packets.
pub(crate) fn connection() -> Result<(OwnedFd, OwnedFd), EngineError> {
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| EngineError::host("connect a share server")(error.into()))
}

/// What the server has open of `/proc` before it is confined.
struct Served(Directories);

impl Opened for Served {
    fn descriptors(&self) -> Vec<RawFd> {
        self.0.descriptors()
    }
}

/// The name of one in the root of what is served, and in the guest.
pub(crate) fn name(index: usize) -> String {
    index.to_string()
}

/// What a share server may have: what is shared and nothing else, each as it may be used.
fn policy(shared: &[Shared], confinement: Confinement) -> Policy {
    let mode = match confinement {
        Confinement::Jailed => SeccompMode::Kill,
        Confinement::CallsLogged => SeccompMode::Log,
        Confinement::Unconfined => SeccompMode::Off,
    };
    let tasks = match mode {
        SeccompMode::Log => TASKS.saturating_mul(4),
        SeccompMode::Kill | SeccompMode::Off => TASKS,
    };
    Policy {
        root: shared
            .iter()
            .enumerate()
            .map(|(index, one)| RootEntry {
                path: PathBuf::from("/").join(name(index)),
                source: Some(one.source.clone()),
                access: if one.read_only {
                    Access::Read
                } else {
                    Access::Write
                },
            })
            .collect(),
        cgroup: (confinement != Confinement::Unconfined).then(|| Cgroup {
            memory: Some(MEMORY),
            pids: Some(tasks),
            ..Cgroup::default()
        }),
        seccomp: Seccomp {
            mode,
            ..Seccomp::default()
        },
        rlimits: BTreeMap::from([(Resource::Core, 0), (Resource::OpenFiles, OPEN_FILES)]),
        capabilities: CAPABILITIES.to_vec(),
        ..Policy::default()
    }
}

/// The clone's end of the connection, once more.
pub(crate) fn once_more(share: Option<&OwnedFd>) -> Result<Option<OwnedFd>, EngineError> {
    share
        .map(OwnedFd::try_clone)
        .transpose()
        .map_err(|error: io::Error| EngineError::host("hand over the connection with a share server")(error))
}
