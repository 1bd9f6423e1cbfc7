//! The control group of a container: what its processes may take together, what they take, and their end.

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

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use picovm_guest_protocol::{Limits, StartFailure};
use rustix::fs::{Mode, OFlags};
use rustix::mount::mount_bind;

use crate::console;
use crate::error::{Attempt, InitError};
use crate::start::failure;

/// Where the hierarchy is mounted. A container sees its own group there, as if that were all.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Name of the container's group in the hierarchy.
pub const CONTAINER: &str = "container";
const CONTROLLERS: &str = "+memory +pids +cpu";

/// A control group.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    /// `memory.events`, which tells of changes by `EPOLLPRI`.
    events: File,
    /// Files of the limits. Who sees the group as the root of all cannot open them for writing: they are the machine's.
    limits: Limited<File>,
}

/// One for each kind of limit.
#[derive(Debug)]
struct Limited<T> {
    pids: T,
    cpu: T,
    memory: T,
}

/// The groups that a guest has.
pub struct Cgroups {
    /// For rehearsals, so that the container is not charged with what they have read.
    pub rehearsal: Cgroup,
    /// The container's.
    pub container: Cgroup,
}

impl Cgroups {
    /// Makes the groups and shows the container its own. `None` if the kernel has no control groups.
    pub fn make() -> Result<Option<Self>, InitError> {
        let controllers = Path::new(ROOT).join("cgroup.subtree_control");
        if !controllers.exists() {
            console::report(&"this kernel has no control groups: a container has no limits");
            return Ok(None);
        }
        std::fs::write(&controllers, CONTROLLERS)
            .attempt(|| format!("write {CONTROLLERS} to {}", controllers.display()))?;
        let groups = Self {
            rehearsal: Cgroup::make("rehearsal")?,
            container: Cgroup::make(CONTAINER)?,
        };
        let own = Path::new(ROOT).join(CONTAINER);
        mount_bind(&own, ROOT).attempt(|| format!("show {} at {ROOT}", own.display()))?;
        Ok(Some(groups))
    }
}

impl Cgroup {
    fn make(name: &str) -> Result<Self, InitError> {
        let path = Path::new(ROOT).join(name);
        std::fs::create_dir(&path).attempt(|| format!("make control group {}", path.display()))?;
        let directory = rustix::fs::open(
            &path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .attempt(|| format!("open control group {}", path.display()))?;
        let events = path.join("memory.events");
        let events = File::open(&events).attempt(|| format!("open {}", events.display()))?;
        let limit = |name: &str| {
            let path = path.join(name);
            let file = File::options().write(true).open(&path);
            file.attempt(|| format!("open {}", path.display()))
        };
        let group = Self {
            directory,
            events,
            limits: Limited {
                pids: limit("pids.max")?,
                cpu: limit("cpu.max")?,
                memory: limit("memory.max")?,
            },
        };
        // What is there at the beginning is no event.
        group.oom_kills();
        Ok(group)
    }

    /// The group's directory, to begin a process in it.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// What has an exceptional condition when a process of the group was killed for memory, until
    /// [`Self::oom_kills`] is asked for.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Moves this process into the group.
    pub fn enter(&self) -> io::Result<()> {
        self.write("cgroup.procs", b"0")
    }

    /// Kills every process of the group.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", b"1")
    }

    /// Whether the group and those below it have no process.
    pub fn is_empty(&self) -> bool {
        self.value_of("cgroup.events", "populated") != Some(1)
    }

    /// How many processes of the group were killed because memory had run out.
    pub fn oom_kills(&self) -> u64 {
        let mut bytes = [0; 512];
        let count = self.events.read_at(&mut bytes, 0).unwrap_or_default();
        value(bytes.get(..count).unwrap_or_default(), "oom_kill").unwrap_or_default()
    }

    /// Sets what is limited.
    pub fn limit(&self, limits: &Limits) -> Result<(), StartFailure> {
        let set = |mut file: &File, what: &str, value: Option<String>| {
            let Some(value) = value else { return Ok(()) };
            file.write_all(value.as_bytes()).map_err(|error| {
                let attempted = format!("limit {what} to {value}");
                failure(attempted, error.raw_os_error().unwrap_or(0), error)
            })
        };
        let cpu = limits.cpu.map(|cpu| format!("{cpu} {}", Limits::CPU_PERIOD));
        let files = &self.limits;
        set(&files.pids, "processes", limits.pids.map(|pids| pids.to_string()))?;
        set(&files.cpu, "processor time", cpu)?;
        // The last, as it may be what ends this process.
        set(
            &files.memory,
            "memory",
            limits.memory.map(|memory| memory.to_string()),
        )
    }

    /// What a file of the group says.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty())?;
        let mut bytes = Vec::new();
        File::from(file).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The number that a file of lines `KEY NUMBER` has for a key.
    pub fn value_of(&self, name: &str, key: &str) -> Option<u64> {
        value(&self.read(name).ok()?, key)
    }

    /// The number that a file consists of; `None` for `max`, too.
    pub fn number(&self, name: &str) -> Option<u64> {
        let bytes = self.read(name).ok()?;
        std::str::from_utf8(&bytes).ok()?.trim().parse().ok()
    }

    fn write(&self, name: &str, value: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty())?;
        File::from(file).write_all(value)
    }
}

/// The number behind a key, in lines `KEY NUMBER`.
pub fn value(lines: &[u8], key: &str) -> Option<u64> {
    lines.split(|&byte| byte == b'\n').find_map(|line| {
        let rest = line.strip_prefix(key.as_bytes())?.strip_prefix(b" ")?;
        std::str::from_utf8(rest).ok()?.trim().parse().ok()
    })
}

/// Makes the group that this process is in the root of what it and its descendants see.
pub fn own_namespace() -> rustix::io::Result<()> {
    // SAFETY: with this flag nothing is taken apart that another thread or the parent shares; it only changes what
    // this process sees of control groups.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) }
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn a_value_is_found_by_its_whole_key() {
        let lines = b"oom 3\noom_kill 2\nlow 0\n";
        assert_eq!(value(lines, "oom_kill"), Some(2));
        assert_eq!(value(lines, "oom"), Some(3));
        assert_eq!(value(lines, "kill"), None);
        assert_eq!(value(b"low many", "low"), None);
    }
}
