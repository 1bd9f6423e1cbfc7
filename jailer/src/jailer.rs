//! Prepares jails and spawns confined processes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode as FileMode, OFlags};

use crate::cgroup::Cgroups;
use crate::confine::{self, Confinement};
use crate::error::JailError;
use crate::exec::{self, Program};
use crate::ids::{IdRange, Locks};
use crate::jail::{self, Jail};
use crate::policy::{Policy, SeccompMode};
use crate::seccomp::{Filters, Work};
use crate::slot::{self, Slot};
use crate::sys::{self, Forked};

/// With which rights jails are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As root: everything that the policy asks for, with an id that no other jail has.
    Privileged,
    /// Without root anywhere: a user namespace with the caller's id in it, and a cgroup only if one was delegated.
    Rootless,
}

impl Mode {
    /// What the calling process can do: [`Mode::Privileged`] for root.
    #[must_use]
    pub fn of_caller() -> Self {
        if rustix::process::geteuid().is_root() {
            Self::Privileged
        } else {
            Self::Rootless
        }
    }
}

/// What a process opens for itself before it is confined: see [`Jailer::spawn_with`].
pub trait Opened {
    /// The descriptors of it that stay open.
    fn descriptors(&self) -> Vec<RawFd>;
}

impl Opened for Vec<OwnedFd> {
    fn descriptors(&self) -> Vec<RawFd> {
        self.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

/// What jails need of their jailer for as long as they live.
pub(crate) struct Shared {
    cgroups: Option<Cgroups>,
    /// Which ids are in use on this host; absent without root.
    ids: Option<Arc<Locks>>,
    /// Slots that wait for a jail.
    free: Mutex<Vec<Slot>>,
    /// Whether a slot can be used again: if nothing of a jail can stay in it.
    reusable: bool,
}

impl Shared {
    /// Takes the slot of a jail that has ended.
    pub(crate) fn give_back(&self, slot: Slot) {
        if self.reusable {
            self.free().push(slot);
        }
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<Slot>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.free().clear();
        if let Some(cgroups) = &self.cgroups {
            // Here, and not when one is made: it is on nobody's path.
            cgroups.sweep(self.ids.as_deref());
            cgroups.remove_parents();
        }
    }
}

/// Spawns confined processes after one policy. Dropping it removes what was prepared and is not in use; what is used goes with
/// the last [`Jail`].
pub struct Jailer {
    policy: Policy,
    mode: Mode,
    work: Work,
    filters: Filters,
    shared: Arc<Shared>,
    ids: Option<IdRange>,
    /// /proc, and this process.
    proc: OwnedFd,
    own_process: OwnedFd,
    own_id: u32,
    /// Whether what can be given up ahead was.
    server: bool,
}

impl Jailer {
    /// Checks the policy and compiles its filters. Nothing is made yet.
    ///
    /// # Errors
    /// [`JailError`] says what the host does not have.
    pub fn new(policy: Policy, mode: Mode) -> Result<Self, JailError> {
        Self::for_work(policy, mode, Work::Clone)
    }

    /// The same with the filters of a VMM process that does this work.
    ///
    /// # Errors
    /// As [`Jailer::new`].
    pub fn for_work(policy: Policy, mode: Mode, work: Work) -> Result<Self, JailError> {
        policy.check()?;
        let rootless = mode == Mode::Rootless;
        let cgroups = match &policy.cgroup {
            Some(limits) => Cgroups::find(limits, rootless)?,
            None => None,
        };
        let ids = (!rootless).then(|| IdRange::open(&policy.ids)).transpose()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc =
            rustix::fs::open("/proc", flags, FileMode::empty()).map_err(JailError::host("open /proc"))?;
        let own = rustix::process::getpid();
        let own_process = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty())
            .map_err(JailError::host("open the own process"))?;
        Ok(Self {
            filters: Filters::new(&policy.seccomp, work)?,
            shared: Arc::new(Shared {
                cgroups,
                ids: ids.as_ref().map(IdRange::locks),
                free: Mutex::default(),
                reusable: !rootless && policy.namespaces.pid && policy.seccomp.mode == SeccompMode::Kill,
            }),
            policy,
            mode,
            work,
            ids,
            proc,
            own_process,
            own_id: std::process::id(),
            server: false,
        })
    }

    /// Makes what `count` jails need at once, so that spawning them is quick. The calling process has one thread.
    ///
    /// # Errors
    /// [`JailError`]; what was made before stays prepared.
    pub fn prepare(&mut self, count: usize) -> Result<(), JailError> {
        while self.shared.free().len() < count {
            let slot = self.make_slot()?;
            self.shared.free().push(slot);
        }
        Ok(())
    }

    /// For a fork server, which has nothing else to do than to spawn jails: gives up in the calling process what no jail has, so that
    /// they need not: the bounding set of capabilities, supplementary groups, and system calls that neither spawning nor a VMM
    /// process needs (`jailer/src/seccomp/setup.json` and the lists beside it). It cannot be undone. What this process
    /// executes from here on gets no capabilities by that.
    ///
    /// # Errors
    /// [`JailError::Host`].
    pub fn become_server(&mut self) -> Result<(), JailError> {
        if self.mode == Mode::Rootless {
            // Its jails begin with a user namespace, in which everything is as new.
            return Ok(());
        }
        confine::give_up_ahead().map_err(|(attempted, error)| JailError::host(attempted)(error))?;
        self.filters
            .apply_outer()
            .map_err(JailError::host("install a filter of system calls"))?;
        sys::allocate_without_files();
        self.server = true;
        Ok(())
    }

    /// The filters for the threads of a confined process.
    #[must_use]
    pub fn filters(&self) -> &Filters {
        &self.filters
    }

    /// Forks a confined process, which runs `work` and ends with the status that it returns. Of this process's descriptors it keeps
    /// `keep`. It has everything of the policy but the filters of system calls of its threads, which each of these applies by itself
    /// ([`Filters::apply`]) once it has made what needs more. Until then it is confined to what setting up a VMM needs.
    ///
    /// A process that cannot be confined runs nothing; [`Jail::wait`] says why.
    ///
    /// # Errors
    /// [`JailError::NotAlone`] if this process has other threads, or is not the one that made the jailer; what [`Jailer::prepare`]
    /// says if nothing was prepared; [`JailError::Host`] if the host refuses the process.
    pub fn spawn(&mut self, keep: &[RawFd], work: impl FnOnce() -> u8) -> Result<Jail, JailError> {
        self.spawn_with(keep, || Ok(Vec::<OwnedFd>::new()), |_| work())
    }

    /// The same for a process that needs descriptors which only it can open, such as those of itself in `/proc`: `open` opens
    /// them, first thing in the process and not confined yet.
    ///
    /// # Errors
    /// As [`Jailer::spawn`].
    pub fn spawn_with<T: Opened>(
        &mut self,
        keep: &[RawFd],
        open: impl FnOnce() -> io::Result<T>,
        work: impl FnOnce(T) -> u8,
    ) -> Result<Jail, JailError> {
        let filters = (!self.server).then(|| self.filters.clone());
        // A share server may open files, and its blocks are large: for each to be a mapping would be slow. Its threads are few.
        let own_allocator = !self.server && self.work != Work::Share;
        self.fork(keep, open, |own| {
            if own_allocator {
                sys::allocate_without_files();
            }
            match filters.map(|filters| filters.apply_outer()) {
                None | Some(Ok(())) => work(own),
                Some(Err(error)) => {
                    eprintln!("picovm-jailer: cannot install a filter of system calls: {error}");
                    jail::NOT_CONFINED
                }
            }
        })
    }

    /// Forks a confined process, in which a program runs under the policy's list of system calls, with this process's standard streams.
    /// All signals that the process gets are passed on to the program; `picovm-jailer` has them blocked ([`Signals::block`])
    /// before. Its status is that of the program; 128 + N if signal N ended it.
    ///
    /// [`Signals::block`]: crate::Signals::block
    ///
    /// # Errors
    /// As [`Jailer::spawn`].
    pub fn spawn_program(&mut self, program: &Program) -> Result<Jail, JailError> {
        let filter = self.filters.of_program()?;
        let nothing = || Ok(Vec::<OwnedFd>::new());
        self.fork(&[0, 1, 2], nothing, |_| exec::run_program(program, &filter))
    }

    fn fork<T: Opened>(
        &mut self,
        keep: &[RawFd],
        open: impl FnOnce() -> io::Result<T>,
        work: impl FnOnce(T) -> u8,
    ) -> Result<Jail, JailError> {
        self.check_alone()?;
        let mut keep = keep.to_vec();
        keep.sort_unstable();
        let free = self.shared.free().pop();
        let slot = match free {
            Some(slot) => slot,
            // Who spawns many uses it again and again.
            None if self.server => self.make_slot()?,
            // The process makes its namespaces itself, which for one is quicker.
            None => self.bare_slot()?,
        };
        let cgroup = slot.cgroup.as_ref().and_then(|cgroup| cgroup.fork_into());
        let own_ids = self.own_ids();
        // SAFETY: this process has one thread, as was just checked.
        let forked = unsafe { sys::fork(self.fork_flags(&slot), cgroup) };
        match forked.map_err(JailError::host("fork a process into its namespaces"))? {
            Forked::Parent(pid, descriptor) => Ok(Jail::new(pid, descriptor, slot, self.shared.clone())),
            Forked::Child => {
                let opened = open();
                if let Ok(opened) = &opened {
                    keep.extend(opened.descriptors());
                    keep.sort_unstable();
                }
                let confinement = Confinement {
                    policy: &self.policy,
                    slot: &slot,
                    rootless: self.mode == Mode::Rootless,
                    keep: &keep,
                    proc: self.proc.as_fd(),
                    parent: &self.own_process,
                    server: self.server,
                    own_ids,
                };
                be_confined(&confinement, opened, work)
            }
        }
    }

    fn own_ids(&self) -> (u32, u32) {
        (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        )
    }

    /// What is made new for each process, and not prepared.
    fn fork_flags(&self, slot: &Slot) -> i32 {
        let namespaces = &self.policy.namespaces;
        let mut flags = if namespaces.pid { libc::CLONE_NEWPID } else { 0 };
        if self.mode == Mode::Rootless {
            flags |= libc::CLONE_NEWUSER;
        }
        if !slot.prepared {
            for (flag, _) in slot::enterable(namespaces) {
                flags |= flag;
            }
        }
        flags
    }

    fn bare_slot(&mut self) -> Result<Slot, JailError> {
        let cgroups = self.shared.cgroups.as_ref();
        let id = self.ids.as_mut().map(IdRange::take).transpose()?;
        Slot::bare(id, cgroups)
    }

    fn make_slot(&mut self) -> Result<Slot, JailError> {
        self.check_alone()?;
        let cgroups = self.shared.cgroups.as_ref();
        match &mut self.ids {
            Some(ids) => Slot::prepare(ids.take()?, &self.policy.namespaces, &self.policy.root, cgroups),
            None => Slot::bare(None, cgroups),
        }
    }

    /// Forking with other threads about would leave their locks taken in the child for ever.
    fn check_alone(&self) -> Result<(), JailError> {
        if std::process::id() != self.own_id {
            return Err(JailError::NotAlone("this is another process"));
        }
        let threads = rustix::fs::statat(&self.proc, "self/task", rustix::fs::AtFlags::empty())
            .map_err(JailError::host("count the threads in /proc/self/task"))?;
        // A directory has two links, and one for each of those in it.
        if threads.st_nlink > 3 {
            return Err(JailError::NotAlone("it has several"));
        }
        Ok(())
    }
}

/// The life of a confined process.
fn be_confined<T>(confinement: &Confinement<'_>, opened: io::Result<T>, work: impl FnOnce(T) -> u8) -> ! {
    let mut complaint: &File = &confinement.slot.complaint.1;
    let confined = opened
        .map_err(|error| ("open what only the process itself can", error))
        .and_then(|opened| confinement.confine().map(|()| opened));
    let opened = match confined {
        Ok(opened) => opened,
        Err((attempted, error)) => {
            let _ = complaint.write_all(&jail::encode_complaint(attempted, &error));
            sys::exit_now(jail::NOT_CONFINED);
        }
    };
    let descriptor = complaint.as_raw_fd().unsigned_abs();
    let _ = sys::close_range(descriptor, descriptor);
    // Nothing of the caller's may run in this process: not even what unwinding would.
    let status = std::panic::catch_unwind(AssertUnwindSafe(|| work(opened))).unwrap_or(PANICKED);
    sys::exit_now(status)
}

/// Status of work that panicked, as the standard library has it.
const PANICKED: u8 = 101;
