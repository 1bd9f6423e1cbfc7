//! What can be prepared for a jail ahead of it: an id, namespaces with the root in them, a cgroup with its limits.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::Pid;

use crate::cgroup::{CgroupDirectory, Cgroups};
use crate::error::JailError;
use crate::ids::Id;
use crate::policy::{Namespaces, RootEntry};
use crate::sys::{self, Forked};
use crate::{jail, root};

/// Used by one jail at a time, and by the next one if nothing can be left in it.
pub(crate) struct Slot {
    /// Absent without root.
    pub(crate) id: Option<Id>,
    /// Whether its namespaces are made. If not, the process makes them itself.
    pub(crate) prepared: bool,
    /// Descriptors of prepared namespaces, in the order in which they are entered.
    pub(crate) namespaces: Vec<OwnedFd>,
    pub(crate) cgroup: Option<CgroupDirectory>,
    /// Where a process that cannot be confined says why, and where that is read.
    pub(crate) complaint: (File, File),
}

/// Flags of clone(2) for those that a process can be moved into later, with their names in /proc/PID/ns. The mount namespace
/// comes last: behind it there is no root of the host's.
pub(crate) fn enterable(namespaces: &Namespaces) -> Vec<(i32, &'static str)> {
    [
        (namespaces.ipc, libc::CLONE_NEWIPC, "ipc"),
        (namespaces.uts, libc::CLONE_NEWUTS, "uts"),
        (namespaces.net, libc::CLONE_NEWNET, "net"),
        (namespaces.mount, libc::CLONE_NEWNS, "mnt"),
    ]
    .into_iter()
    .filter(|(wanted, ..)| *wanted)
    .map(|(_, flag, name)| (flag, name))
    .collect()
}

/// A pipe's ends, for reading without waiting and for writing.
pub(crate) fn complaint() -> Result<(File, File), JailError> {
    use rustix::pipe::{PipeFlags, pipe_with};
    let (read, write) =
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(JailError::host("make a pipe"))?;
    Ok((read.into(), write.into()))
}

impl Slot {
    /// Prepares one for a caller with root.
    pub(crate) fn prepare(
        id: Id,
        namespaces: &Namespaces,
        root: &[RootEntry],
        cgroups: Option<&Cgroups>,
    ) -> Result<Self, JailError> {
        let cgroup = cgroups
            .map(|cgroups| cgroups.create(&id.number().to_string()))
            .transpose()?;
        Ok(Self {
            prepared: true,
            namespaces: make_namespaces(namespaces, root)?,
            id: Some(id),
            cgroup,
            complaint: complaint()?,
        })
    }

    /// For a jail that makes its namespaces itself: as every one does without root, where there is no id either.
    pub(crate) fn bare(id: Option<Id>, cgroups: Option<&Cgroups>) -> Result<Self, JailError> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = match &id {
            Some(id) => id.number().to_string(),
            None => format!(
                "jail-{}-{}",
                std::process::id(),
                MADE.fetch_add(1, Ordering::Relaxed)
            ),
        };
        Ok(Self {
            id,
            prepared: false,
            namespaces: Vec::new(),
            cgroup: cgroups.map(|cgroups| cgroups.create(&name)).transpose()?,
            complaint: complaint()?,
        })
    }
}

/// Has a process make namespaces and the root, opens them, and lets it go.
fn make_namespaces(namespaces: &Namespaces, entries: &[RootEntry]) -> Result<Vec<OwnedFd>, JailError> {
    let wanted = enterable(namespaces);
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let flags = wanted.iter().fold(0, |all, (flag, _)| all | flag);
    let pipe = || std::io::pipe().map_err(JailError::host("make a pipe"));
    let (mut told, mut tell) = pipe()?;
    let (mut held, hold) = pipe()?;
    // SAFETY: the caller has one thread: see `Jailer::prepare`.
    let forked = unsafe { sys::fork(flags, None) }.map_err(JailError::host("make namespaces for a jail"))?;
    let (pid, descriptor) = match forked {
        Forked::Child => {
            drop((told, hold));
            let built = if namespaces.mount {
                root::build(entries)
            } else {
                Ok(())
            };
            let built = built.and_then(|()| {
                let named = if namespaces.uts {
                    rustix::system::sethostname(b"jail")
                } else {
                    Ok(())
                };
                named.map_err(|error| ("set the host name", error.into()))
            });
            match built {
                Ok(()) => drop(tell),
                Err((attempted, error)) => {
                    let _ = tell.write_all(&jail::encode_complaint(attempted, &error));
                    drop(tell);
                }
            }
            // Until the namespaces are open, or nobody is left to open them.
            let _ = held.read(&mut [0]);
            sys::exit_now(0)
        }
        Forked::Parent(pid, descriptor) => (pid, descriptor),
    };
    drop((tell, held));
    let mut complaint = Vec::new();
    let heard = told.read_to_end(&mut complaint);
    let opened = open_namespaces(pid, &wanted);
    drop(hold);
    let ended = jail::reap(&descriptor)?;
    if let Some(signal) = ended.terminating_signal() {
        let error = std::io::Error::other(format!("the process that does it was ended by signal {signal}"));
        return Err(JailError::host("make namespaces for a jail")(error));
    }
    heard.map_err(JailError::host("hear from the process that makes namespaces"))?;
    match jail::decode_complaint(&complaint) {
        Some(failed) => Err(failed),
        None => opened,
    }
}

fn open_namespaces(pid: Pid, wanted: &[(i32, &'static str)]) -> Result<Vec<OwnedFd>, JailError> {
    wanted
        .iter()
        .map(|(_, name)| {
            let path = format!("/proc/{}/ns/{name}", pid.as_raw_nonzero());
            File::open(&path)
                .map(OwnedFd::from)
                .map_err(JailError::host(format!("open the namespace {path}")))
        })
        .collect()
}
