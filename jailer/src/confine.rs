//! What a process does to itself right after it was forked, in this order.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::Mode;
use rustix::process::Rlimit;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

use crate::policy::{self, Policy};
use crate::root::{self, Failure};
use crate::slot::Slot;
use crate::sys;

/// What the process was given by the one that forked it.
pub(crate) struct Confinement<'a> {
    pub(crate) policy: &'a Policy,
    pub(crate) slot: &'a Slot,
    /// Whether there is no root anywhere.
    pub(crate) rootless: bool,
    /// Descriptors to keep, sorted.
    pub(crate) keep: &'a [RawFd],
    /// /proc of the host.
    pub(crate) proc: BorrowedFd<'a>,
    /// The process that forked this one.
    pub(crate) parent: &'a OwnedFd,
    /// Whether the one that forked it has given up ahead what can be: see [`give_up_ahead`].
    pub(crate) server: bool,
    /// User and group id of the caller, as they are before there is a user namespace.
    pub(crate) own_ids: (u32, u32),
}

fn failed<E: Into<io::Error>>(attempted: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| (attempted, error.into())
}

impl Confinement<'_> {
    pub(crate) fn confine(&self) -> Result<(), Failure> {
        if let Some(cgroup) = &self.slot.cgroup {
            for mut procs in cgroup.to_enter() {
                procs.write_all(b"0").map_err(failed("enter a cgroup"))?;
            }
        }
        if self.rootless {
            self.map_ids()?;
        }
        if !self.slot.prepared {
            if self.policy.namespaces.mount {
                root::build(&self.policy.root)?;
            }
            if self.policy.namespaces.uts {
                rustix::system::sethostname(b"jail").map_err(failed("set the host name"))?;
            }
        }
        for namespace in &self.slot.namespaces {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), None)
                .map_err(failed("enter a namespace"))?;
        }
        // No controlling terminal: what is pushed into its input would be read by others.
        rustix::process::setsid().map_err(failed("leave the session"))?;
        for (resource, value) in &self.policy.rlimits {
            let limit = Rlimit {
                current: Some(*value),
                maximum: Some(*value),
            };
            rustix::process::setrlimit(rlimit(*resource), limit).map_err(failed("set a resource limit"))?;
        }
        self.drop_rights()?;
        // Below here, because a change of ids resets it.
        if !self.policy.outlives_parent {
            die_with(self.parent)?;
        }
        rustix::process::umask(Mode::from_raw_mode(0o077));
        close_others(self.keep, self.slot.complaint.1.as_raw_fd()).map_err(failed("close other descriptors"))
    }

    /// Ids, capabilities, and whatever could bring them back.
    fn drop_rights(&self) -> Result<(), Failure> {
        if !self.server {
            lock_capabilities()?;
        }
        if self.slot.id.is_some() && !self.server {
            sys::clear_groups().map_err(failed("leave all groups"))?;
        }
        if let Some(id) = self.slot.id.as_ref().filter(|_| !self.keeps_user()) {
            let gid = rustix::process::Gid::from_raw(id.number());
            rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("change the group id"))?;
            let uid = rustix::process::Uid::from_raw(id.number());
            rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("change the user id"))?;
            if self.policy.namespaces.user {
                self.enter_user_namespace()?;
            }
        }
        // The change of ids has dropped them all where there was nothing else to drop.
        let kept = if self.rootless {
            CapabilitySet::empty()
        } else {
            self.policy.capabilities.iter().copied().map(capability).collect()
        };
        let kept = CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        };
        if rustix::thread::capabilities(None).map_err(failed("read the capabilities"))? != kept {
            rustix::thread::set_capabilities(None, kept).map_err(failed("drop capabilities"))?;
        }
        if !self.server {
            rustix::thread::clear_ambient_capability_set().map_err(failed("drop ambient capabilities"))?;
            rustix::thread::set_no_new_privs(true).map_err(failed("refuse new privileges"))?;
        }
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
            .map_err(failed("refuse to be traced"))
    }

    /// Whether it stays the caller's user.
    fn keeps_user(&self) -> bool {
        !self.policy.capabilities.is_empty()
    }

    /// A user namespace, made by an id that has no rights outside of it.
    fn enter_user_namespace(&self) -> Result<(), Failure> {
        use rustix::process::DumpableBehavior::{Dumpable, NotDumpable};
        // Only then are the files in /proc its own.
        let attempted = "make a user namespace";
        rustix::process::set_dumpable_behavior(Dumpable).map_err(failed(attempted))?;
        // SAFETY: it only makes a namespace; descriptors and memory stay as they are.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }.map_err(failed(attempted))?;
        self.map_ids()?;
        rustix::process::set_dumpable_behavior(NotDumpable).map_err(failed(attempted))?;
        // A new user namespace begins with all of them.
        lock_capabilities()
    }

    /// In a new user namespace: the own ids stand for themselves.
    fn map_ids(&self) -> Result<(), Failure> {
        let write = |name: &str, content: &str| -> io::Result<()> {
            use rustix::fs::{Mode, OFlags};
            let file = rustix::fs::openat(
                self.proc,
                format!("self/{name}"),
                OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            File::from(file).write_all(content.as_bytes())
        };
        let (uid, gid) = match &self.slot.id {
            Some(id) => (id.number(), id.number()),
            None => self.own_ids,
        };
        write("setgroups", "deny").map_err(failed("refuse groups in a user namespace"))?;
        write("uid_map", &format!("{uid} {uid} 1")).map_err(failed("map the user id"))?;
        write("gid_map", &format!("{gid} {gid} 1")).map_err(failed("map the group id"))
    }
}

/// Lets no change of ids and no program bring capabilities back.
fn lock_capabilities() -> Result<(), Failure> {
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .map_err(failed("lock the capabilities"))?;
    drop_bounding_set().map_err(failed("empty the bounding set of capabilities"))
}

/// What a process can give up for those that it will fork, and still fork them.
pub(crate) fn give_up_ahead() -> Result<(), Failure> {
    lock_capabilities()?;
    sys::clear_groups().map_err(failed("leave all groups"))?;
    rustix::thread::clear_ambient_capability_set().map_err(failed("drop ambient capabilities"))?;
    let mut sets = rustix::thread::capabilities(None).map_err(failed("read the capabilities"))?;
    sets.inheritable = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, sets).map_err(failed("drop inheritable capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("refuse new privileges"))
}

/// One by one: there is no other way.
fn drop_bounding_set() -> io::Result<()> {
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel has no more.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Has this process killed when its parent ends.
fn die_with(parent: &OwnedFd) -> Result<(), Failure> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(failed("ask for a signal at the parent's death"))?;
    // It may have ended before it was asked for. Its id would not tell: it is in another namespace.
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut [PollFd::new(parent, PollFlags::IN)], Some(&now)) {
        Ok(0) => Ok(()),
        Ok(_) => Err(("outlive the parent", io::Error::from_raw_os_error(libc::ESRCH))),
        Err(error) => Err(failed("look after the parent")(error)),
    }
}

/// Closes every descriptor but those to keep (sorted) and one more.
fn close_others(keep: &[RawFd], also: RawFd) -> io::Result<()> {
    let mut from = 0u32;
    let mut close_until = |kept: u32| -> io::Result<()> {
        if kept > from {
            sys::close_range(from, kept.saturating_sub(1))?;
        }
        from = from.max(kept.saturating_add(1));
        Ok(())
    };
    let (below, above) = keep.split_at(keep.partition_point(|&kept| kept < also));
    for kept in below.iter().chain([&also]).chain(above) {
        close_until(u32::try_from(*kept).map_err(|_| io::ErrorKind::InvalidInput)?)?;
    }
    sys::close_range(from, u32::MAX)
}

fn capability(capability: policy::Capability) -> CapabilitySet {
    use policy::Capability as Ours;
    match capability {
        Ours::Chown => CapabilitySet::CHOWN,
        Ours::DacOverride => CapabilitySet::DAC_OVERRIDE,
        Ours::Fowner => CapabilitySet::FOWNER,
        Ours::Fsetid => CapabilitySet::FSETID,
        Ours::Setgid => CapabilitySet::SETGID,
        Ours::Setuid => CapabilitySet::SETUID,
        Ours::Setfcap => CapabilitySet::SETFCAP,
    }
}

fn rlimit(resource: policy::Resource) -> rustix::process::Resource {
    use policy::Resource as Ours;
    use rustix::process::Resource;
    match resource {
        Ours::AddressSpace => Resource::As,
        Ours::Core => Resource::Core,
        Ours::Cpu => Resource::Cpu,
        Ours::Data => Resource::Data,
        Ours::FileSize => Resource::Fsize,
        Ours::LockedMemory => Resource::Memlock,
        Ours::MessageQueues => Resource::Msgqueue,
        Ours::OpenFiles => Resource::Nofile,
        Ours::Processes => Resource::Nproc,
        Ours::PendingSignals => Resource::Sigpending,
        Ours::Stack => Resource::Stack,
    }
}
