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
use std::time::{Duration, Instant};

use picovm_guest_protocol::{Limits, StartFailure};
use rustix::fs::{Mode, OFlags};
use rustix::mount::mount_bind;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::console;
use crate::error::{Attempt, InitError};
use crate::start::failure;

/// Where the hierarchy is mounted. A container sees its own group there, as if that were all.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Name of the container's group in the hierarchy.
pub const CONTAINER: &str = "container";
/// How long a group's processes may take to stand still: one that waits for a disk does so when that has answered.
const FREEZE_MAX: Duration = Duration::from_secs(20);
/// What this process sees of control groups.
const NAMESPACE: &str = "/proc/self/ns/cgroup";

/// The control group of a container. It has no controller until something is limited: each costs every start, in pages that it
/// counts in and page faults that it takes part in.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    /// The group of all others.
    root: OwnedFd,
    /// What PID 1 sees of control groups: all. Limits are the machine's, and who sees the container's group as the root of all
    /// cannot set them.
    whole: OwnedFd,
}

impl Cgroup {
    /// Makes the container's group and shows the container its own. `None` if the kernel has no control groups.
    pub fn make() -> Result<Option<Self>, InitError> {
        if !Path::new(ROOT).join("cgroup.subtree_control").exists() {
            console::report(&"this kernel has no control groups: a container has no limits");
            return Ok(None);
        }
        let path = Path::new(ROOT).join(CONTAINER);
        std::fs::create_dir(&path).attempt(|| format!("make control group {}", path.display()))?;
        let open = |path: &Path, flags| {
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
                .attempt(|| format!("open {}", path.display()))
        };
        let group = Self {
            directory: open(&path, OFlags::PATH | OFlags::DIRECTORY)?,
            root: open(Path::new(ROOT), OFlags::PATH | OFlags::DIRECTORY)?,
            whole: open(Path::new(NAMESPACE), OFlags::RDONLY)?,
        };
        mount_bind(&path, ROOT).attempt(|| format!("show {} at {ROOT}", path.display()))?;
        Ok(Some(group))
    }

    /// The group's directory, to begin a process in it.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// What has an exceptional condition when a process of the group was killed for memory, until [`oom_kills`] is asked for. Only a
    /// group whose memory is limited has it.
    pub fn events(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.directory, "memory.events", flags, Mode::empty())?.into())
    }

    /// Moves this process into the group.
    pub fn enter(&self) -> io::Result<()> {
        write(&self.directory, "cgroup.procs", b"0")
    }

    /// Kills every process of the group.
    pub fn kill(&self) -> io::Result<()> {
        write(&self.directory, "cgroup.kill", b"1")
    }

    /// Lets no process of the group run, and waits until none does.
    pub fn freeze(&self) -> Result<(), StartFailure> {
        self.set_frozen(true)?;
        let give_up = Instant::now().checked_add(FREEZE_MAX);
        while self.value_of("cgroup.events", "frozen") != Some(1) {
            if give_up.is_none_or(|give_up| Instant::now() >= give_up) {
                let message = format!("not all of them stand still after {} s", FREEZE_MAX.as_secs());
                return Err(failure("stop the container's processes", 0, message));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<(), StartFailure> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), StartFailure> {
        let value: &[u8] = if frozen { b"1" } else { b"0" };
        write(&self.directory, "cgroup.freeze", value).map_err(|error| {
            let attempted = "let the container's processes stand still, or go on";
            failure(attempted, error.raw_os_error().unwrap_or(0), error)
        })
    }

    /// Makes another group beside this one.
    pub fn beside(&self, name: &str) -> io::Result<Self> {
        match rustix::fs::mkdirat(&self.root, name, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: rustix::fs::openat(&self.root, name, flags, Mode::empty())?,
            root: rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?,
            whole: rustix::io::fcntl_dupfd_cloexec(&self.whole, 0)?,
        })
    }

    /// Whether the group and those below it have no process.
    pub fn is_empty(&self) -> bool {
        self.value_of("cgroup.events", "populated") != Some(1)
    }

    /// Sets what is limited, and switches on what counts it. To be called by a process of the container: it then sees its own group
    /// again.
    pub fn limit(&self, limits: &Limits) -> Result<(), StartFailure> {
        let because = |error: io::Error| {
            let errno = error.raw_os_error().unwrap_or(0);
            failure("see all control groups", errno, error)
        };
        let own = rustix::fs::open(NAMESPACE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| because(error.into()))?;
        let enter = |namespace: &OwnedFd| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ControlGroup))
                .map_err(|error| because(error.into()))
        };
        enter(&self.whole)?;
        let set = self.set(limits);
        enter(&own)?;
        set
    }

    fn set(&self, limits: &Limits) -> Result<(), StartFailure> {
        let cpu = limits.cpu.map(|cpu| format!("{cpu} {}", Limits::CPU_PERIOD));
        let all = [
            (
                "+pids",
                "pids.max",
                "processes",
                limits.pids.map(|pids| pids.to_string()),
            ),
            ("+cpu", "cpu.max", "processor time", cpu),
            // The last, as it may be what ends this process.
            (
                "+memory",
                "memory.max",
                "memory",
                limits.memory.map(|memory| memory.to_string()),
            ),
        ];
        for (controller, file, what, value) in all {
            let Some(value) = value else { continue };
            write(&self.root, "cgroup.subtree_control", controller.as_bytes())
                .and_then(|()| write(&self.directory, file, value.as_bytes()))
                .map_err(|error| {
                    let attempted = format!("limit {what} to {value}");
                    failure(attempted, error.raw_os_error().unwrap_or(0), error)
                })?;
        }
        Ok(())
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

    /// How many processes it has, threads counted.
    pub fn threads(&self) -> u64 {
        let threads = self.read("cgroup.threads").unwrap_or_default();
        threads.iter().filter(|&&byte| byte == b'\n').count() as u64
    }
}

fn write(directory: &OwnedFd, name: &str, value: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    File::from(file).write_all(value)
}

/// How many processes of the group whose events these are were killed because memory had run out.
pub fn oom_kills(events: &File) -> u64 {
    let mut bytes = [0; 512];
    let count = events.read_at(&mut bytes, 0).unwrap_or_default();
    value(bytes.get(..count).unwrap_or_default(), "oom_kill").unwrap_or_default()
}

/// What the kernel says from now on, for a container without a limit of memory: there its log alone tells of a process that was
/// killed because the machine's memory had run out.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// Opens it. `None` if the kernel keeps none.
    pub fn open() -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).ok()?;
        rustix::fs::seek(&log, rustix::fs::SeekFrom::End(0)).ok()?;
        Some(Self(log.into()))
    }

    /// Whether it has told of a kill since this was asked last.
    pub fn tells_of_a_kill(&mut self) -> bool {
        /// More than are kept.
        const RECORDS_MAX: u32 = 10_000;
        let mut record = [0; 8192];
        let mut found = false;
        for _ in 0..RECORDS_MAX {
            match self.0.read(&mut record) {
                Ok(count) => found |= is_a_kill(record.get(..count).unwrap_or_default()),
                // Some were overwritten before they were read; the next one is there.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(_) => break,
            }
        }
        found
    }
}

/// Whether a record is the kernel's, and says that it has killed a process: `PRIORITY,NUMBER,TIME,FLAGS;TEXT`, with a priority
/// below 8 for what no process has written.
fn is_a_kill(record: &[u8]) -> bool {
    let mut parts = record.splitn(2, |&byte| byte == b';');
    let (Some(head), Some(text)) = (parts.next(), parts.next()) else {
        return false;
    };
    matches!(head, [b'0'..=b'7', b',', ..]) && text.starts_with(b"Out of memory: Killed process")
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
    use super::{is_a_kill, value};

    #[test]
    fn only_the_kernel_tells_of_a_kill() {
        assert!(is_a_kill(
            b"3,512,9000000,-;Out of memory: Killed process 44 (tail) total-vm:1kB\n"
        ));
        // A process has written that.
        assert!(!is_a_kill(
            b"12,512,9000000,-;Out of memory: Killed process 44 (tail)\n"
        ));
        for other in [
            &b"6,1,2,-;usb 1-1: new device\n"[..],
            b"",
            b"3",
            b"3;Out of memory: Killed process",
        ] {
            assert!(!is_a_kill(other));
        }
    }

    #[test]
    fn a_value_is_found_by_its_whole_key() {
        let lines = b"oom 3\noom_kill 2\nlow 0\n";
        assert_eq!(value(lines, "oom_kill"), Some(2));
        assert_eq!(value(lines, "oom"), Some(3));
        assert_eq!(value(lines, "kill"), None);
        assert_eq!(value(b"low many", "low"), None);
    }
}
