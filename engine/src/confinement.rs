//! Forking a VMM process, and the jail that it is confined in before its guest runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use picovm_jailer::{
    Cgroup, Ended, Filters, Jail, Jailer, Mode, Policy, Resource, Seccomp, SeccompMode, ThreadKind,
};
use picovm_vmm::{OnThread, Template, Threads};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal, waitid,
};

use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::timeout;

/// What stands between a VMM process and the host, beside the wall of its VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confinement {
    /// A jail: own ids, namespaces, an empty root, a cgroup, no capabilities, and a list of system calls for each thread.
    #[default]
    Jailed,
    /// The same, but a system call that is not in its list is told on standard error and let through: for finding out what is
    /// missing in a list.
    CallsLogged,
    /// Nothing. For debugging alone.
    Unconfined,
}

/// What a VMM process may take of the host's memory beside that of its guest, in bytes: its own, and the page tables and kernel
/// structures that are charged to it.
pub(crate) const OVERHEAD: u64 = 64 << 20;
/// What a VMM process may take in bytes: its guest's memory twice, as a page that lies in a hole of the template's file and is read
/// before it is written is there twice where the store itself lies in memory, and what it takes of its own.
fn memory_limit(memory_mib: u64) -> u64 {
    (memory_mib << 20).saturating_mul(2).saturating_add(OVERHEAD)
}

/// What of a container's storage counts as memory of its VMM process, in bytes: all of it where the store may itself lie in memory. On
/// a disk the kernel gives its cache up when the process has no more memory.
fn storage_in_memory(storage: &File) -> io::Result<u64> {
    /// `TMPFS_MAGIC`, `RAMFS_MAGIC`, `OVERLAYFS_SUPER_MAGIC` (statfs(2)); of the last, only its layers know.
    const MEMORY: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x794c_7630];
    match MEMORY.contains(&rustix::fs::fstatfs(storage)?.f_type) {
        true => Ok(storage.metadata()?.len()),
        false => Ok(0),
    }
}

/// Threads of a VMM process beside those of its vCPUs, with room for those that the kernel makes for it.
const THREADS: u64 = 8;
/// How many threads there may be for each where calls are told of: who tells, and those that are just being made or end, which on
/// a slow host are several.
const LOGGED: u64 = 8;
/// Descriptors that a VMM process may have open: its own, and three for each process that is executed in its container.
pub(crate) const OPEN_FILES: u64 = 1024;

/// Threads that a VMM process may have.
pub(crate) fn tasks(vcpus: u8, mode: SeccompMode) -> u64 {
    let threads = THREADS.saturating_add(u64::from(vcpus));
    match mode {
        SeccompMode::Log => threads.saturating_mul(LOGGED),
        SeccompMode::Kill | SeccompMode::Off => threads,
    }
}

/// What a VMM process of this template may have. All that it needs it is born with, so its root is empty.
fn policy(template: &Template, more_memory: u64, mode: SeccompMode) -> Policy {
    let machine = template.metadata();
    Policy {
        cgroup: Some(Cgroup {
            memory: Some(memory_limit(machine.memory_mib).saturating_add(more_memory)),
            pids: Some(tasks(machine.vcpus, mode)),
            ..Cgroup::default()
        }),
        seccomp: Seccomp {
            mode,
            ..Seccomp::default()
        },
        rlimits: BTreeMap::from([(Resource::Core, 0), (Resource::OpenFiles, OPEN_FILES)]),
        ..Policy::default()
    }
}

/// Forks VMM processes of one template.
pub(crate) struct Forker {
    jailer: Option<Jailer>,
}

impl Forker {
    /// `storage` is that of the container whose process is to be forked, if it has any.
    pub(crate) fn new(
        template: &Template,
        storage: Option<&File>,
        confinement: Confinement,
    ) -> Result<Self, EngineError> {
        let mode = match confinement {
            Confinement::Jailed => SeccompMode::Kill,
            Confinement::CallsLogged => SeccompMode::Log,
            Confinement::Unconfined => return Ok(Self { jailer: None }),
        };
        let more = storage
            .map_or(Ok(0), storage_in_memory)
            .map_err(EngineError::host("look at the container's storage"))?;
        let jailer = Jailer::new(policy(template, more, mode), Mode::of_caller())?;
        Ok(Self { jailer: Some(jailer) })
    }

    /// Does now what would otherwise be done for each process: for a process that does nothing but fork them.
    pub(crate) fn become_server(&mut self) -> Result<(), EngineError> {
        if let Some(jailer) = &mut self.jailer {
            jailer.become_server()?;
        }
        Ok(())
    }

    /// Forks a VMM process: one that lives this life and ends. It keeps these descriptors and those of the template.
    ///
    /// # Errors
    /// [`EngineError::Threads`] if this process has more than one thread, whose locks would stay locked in the child;
    /// [`EngineError::Jail`], [`EngineError::Host`].
    pub(crate) fn fork(
        &mut self,
        template: &Template,
        keep: &[BorrowedFd<'_>],
        life: impl FnOnce(&ThreadFilters),
    ) -> Result<VmmProcess, EngineError> {
        let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
        if threads > 1 {
            return Err(EngineError::Threads { threads });
        }
        let Some(jailer) = &mut self.jailer else {
            return fork_unconfined(life);
        };
        let filters = ThreadFilters(Some(jailer.filters().clone()));
        let own = template.descriptors();
        let mut keep: Vec<i32> = keep.iter().chain(&own).map(AsRawFd::as_raw_fd).collect();
        keep.dedup();
        let jail = jailer.spawn(&keep, || {
            forget_environment();
            life(&filters);
            0
        })?;
        Ok(VmmProcess(Process::Jailed(jail)))
    }
}

pub(crate) fn fork_unconfined(life: impl FnOnce(&ThreadFilters)) -> Result<VmmProcess, EngineError> {
    let failed = || EngineError::host("fork a VMM process");
    // SAFETY: the caller has one thread, so its child may do whatever it may.
    match unsafe { libc::fork() } {
        -1 => Err(failed()(io::Error::last_os_error())),
        0 => {
            // Out of the terminal's process group: Ctrl-C is for who started it.
            let _ = rustix::process::setsid();
            life(&ThreadFilters(None));
            // SAFETY: ends this process at once; what it shares with its parent needs none of its destructors.
            unsafe { libc::_exit(0) }
        }
        child => {
            let child = Pid::from_raw(child).ok_or_else(|| failed()(io::ErrorKind::InvalidData.into()))?;
            let descriptor =
                pidfd_open(child, PidfdFlags::empty()).map_err(|error| failed()(error.into()))?;
            Ok(VmmProcess(Process::Plain(descriptor)))
        }
    }
}

/// Overwrites this process's copy of the environment: what the caller keeps there (keys, tokens) is not for a guest that
/// takes the process over.
pub(crate) fn forget_environment() {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: this process has one thread. `environ` (environ(7)) is null or a list of C strings that ends with a null pointer;
    // each is written within its length, and whoever still points to one finds it empty.
    unsafe {
        let mut variable = environ;
        while !variable.is_null() && !(*variable).is_null() {
            let length = libc::strlen(*variable);
            (*variable).write_bytes(0, length);
            variable = variable.add(1);
        }
    }
}

/// The filters of system calls for the threads of a VMM process, if it has any.
#[derive(Default)]
pub(crate) struct ThreadFilters(Option<Filters>);

impl ThreadFilters {
    /// Those of a jailer.
    pub(crate) fn of(filters: &Filters) -> Self {
        Self(Some(filters.clone()))
    }

    /// Threads for its machine, each of which confines itself.
    pub(crate) fn threads(&self) -> Threads {
        Threads::calling(self.on_thread())
    }

    /// What a thread of its machine does first.
    pub(crate) fn on_thread(&self) -> Option<OnThread> {
        let filters = self.0.clone()?;
        Some(Arc::new(move |kind| {
            let kind = match kind {
                picovm_vmm::ThreadKind::Vcpu => ThreadKind::Vcpu,
                picovm_vmm::ThreadKind::Device => ThreadKind::Device,
            };
            if let Err(error) = filters.apply(kind) {
                // No guest may run in this process.
                eprintln!("picovm: cannot filter the system calls of a {kind:?} thread: {error}");
                std::process::abort();
            }
        }))
    }

    /// For the thread that made the machine. To be called before that runs.
    pub(crate) fn seal(&self) -> Result<(), EngineError> {
        match &self.0 {
            Some(filters) => filters
                .apply(ThreadKind::Control)
                .map_err(EngineError::host("filter the system calls of a VMM process")),
            None => Ok(()),
        }
    }
}

/// A VMM process that is a child of this one. Its descriptor is readable when it has ended.
pub(crate) struct VmmProcess(Process);

enum Process {
    Jailed(Jail),
    Plain(OwnedFd),
}

impl From<Jail> for VmmProcess {
    fn from(jail: Jail) -> Self {
        Self(Process::Jailed(jail))
    }
}

impl VmmProcess {
    /// One without a jail, by the descriptor of its process.
    #[cfg(test)]
    pub(crate) fn plain(process: OwnedFd) -> Self {
        Self(Process::Plain(process))
    }

    /// Kills it, and all that it has started: for one that does not end when it is told to.
    pub(crate) fn kill(&self) {
        match &self.0 {
            Process::Jailed(jail) => jail.kill(),
            Process::Plain(process) => {
                // Unless it has ended already.
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
        }
    }

    /// Whether it ends by itself in time.
    pub(crate) fn ends_within(&self, limit: Duration) -> bool {
        let timeout = timeout::timespec(limit);
        loop {
            match poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                ended => return ended != Ok(0),
            }
        }
    }

    /// Waits for its end, and tells how that was.
    pub(crate) fn wait(self) -> String {
        let signal = match self.0 {
            Process::Jailed(jail) => match jail.wait() {
                Ok(Ended::Signal(signal)) => Some(signal),
                Ok(Ended::Code(_)) => None,
                Err(error) => return error.to_string(),
            },
            Process::Plain(process) => reap(&process).and_then(|status| status.terminating_signal()),
        };
        match signal {
            Some(libc::SIGSYS) => {
                "its VMM process made a system call that its jail does not allow, and was killed for it: the log of the host's \
                 kernel has the call's number (`dmesg`, type=1326, syscall=)"
                    .into()
            }
            Some(signal) => format!("its VMM process was ended by signal {signal}"),
            None => "its VMM process has ended".into(),
        }
    }
}

impl AsFd for VmmProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Process::Jailed(jail) => jail.as_fd(),
            Process::Plain(process) => process.as_fd(),
        }
    }
}

fn reap(process: &OwnedFd) -> Option<WaitIdStatus> {
    loop {
        match waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED) {
            Err(rustix::io::Errno::INTR) => {}
            ended => return ended.ok().flatten(),
        }
    }
}
