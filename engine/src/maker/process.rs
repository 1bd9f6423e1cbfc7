//! The process that starts the jailed ones in which a template's machine is booted and saved: one that has a single thread, opens
//! whatever is needed, and sees to it that the jailed one ends.
//!
//! A guest may take that one over. What it can do then is to write what it likes into the files that it was given, and to
//! say what it likes about them: both are looked at by who asked for the template.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use picovm_jailer::{Cgroup, Jailer, Mode, Policy, Resource, Seccomp, SeccompMode, Work};
use picovm_vmm::{BootFiles, FrozenFiles, Template};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::jailed::{boot, take_image, tell, try_a_start, warm_up};
use super::supervision::supervise;
use super::{FromMaker, Order, failed};
use crate::confinement::{self, Confinement, OPEN_FILES, OVERHEAD, ThreadFilters, VmmProcess};
use crate::container::Start;
use crate::error::EngineError;
use crate::messages;

/// Largest file beside the memory.
const SMALL_FILE: u64 = 16 << 20;

/// Starts a jailed process for each template that is asked for, until who asks closes `control`.
///
/// To be called by a process that has one thread and nothing else to do: `picovm-vmm make-template`.
///
/// # Errors
/// [`EngineError::Host`].
pub fn serve(control: OwnedFd, confinement: Confinement) -> Result<(), EngineError> {
    // Out of the terminal's process group: Ctrl-C is for who makes a template. When that ends, so does this.
    let _ = rustix::process::setsid();
    let control = UnixStream::from(control);
    while let Some((order, files)) =
        messages::receive::<Order>(&control).map_err(failed("receive what to make a template of"))?
    {
        let ended = carry_out(&control, order, files, confinement).map_err(|error| error.to_string());
        messages::send(&control, &FromMaker::Ended(ended), &[])
            .map_err(failed("tell how making a template ended"))?;
    }
    Ok(())
}

/// Opens what the order needs, and has a jailed process carry it out.
fn carry_out(
    control: &UnixStream,
    order: Order,
    files: Vec<OwnedFd>,
    confinement: Confinement,
) -> Result<(), EngineError> {
    let (said, say) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| failed("create a socket pair")(error.into()))?;
    let mut files = files.into_iter().map(File::from);
    let mut file = || {
        files
            .next()
            .ok_or_else(|| failed("take the files of a new template")(io::ErrorKind::InvalidData.into()))
    };
    let limit = order.limit();
    let mut keep = numbers(&[say.as_fd(), rustix::stdio::stderr()]);
    let process = match order {
        Order::Boot { config, directory } => {
            let sources = BootFiles::open(&config)?;
            let written = FrozenFiles::new(file()?, file()?, &directory);
            keep.extend(numbers(&sources.descriptors()));
            keep.extend(numbers(&[written.memory().as_fd(), written.state().as_fd()]));
            let size = Size::to_freeze(config.memory_mib, config.vcpus);
            fork(confinement, size, &keep, |filters, pagemap| {
                tell(&say, boot(&config, sources, &written, filters, pagemap, &say));
            })
        }
        Order::Image {
            base,
            image,
            directory,
        } => {
            let base = Template::open(&base)?.on_disks(&[image])?;
            let written = FrozenFiles::new(file()?, file()?, &directory);
            keep.extend(numbers(&base.descriptors()));
            keep.extend(numbers(&[written.memory().as_fd(), written.state().as_fd()]));
            let size = Size::to_freeze(base.metadata().memory_mib, base.metadata().vcpus);
            fork(confinement, size, &keep, |filters, pagemap| {
                tell(&say, take_image(&base, &written, filters, pagemap, &say));
            })
        }
        Order::Warm {
            template,
            container,
            hostname,
            until,
            timeout,
            directory,
        } => {
            let template = Template::open(&template)?;
            let written = FrozenFiles::new(file()?, file()?, &directory);
            keep.extend(numbers(&template.descriptors()));
            keep.extend(numbers(&[written.memory().as_fd(), written.state().as_fd()]));
            let size = Size::to_freeze(template.metadata().memory_mib, template.metadata().vcpus);
            let start = Start {
                id: None,
                spec: *container,
                hostname,
            };
            fork(confinement, size, &keep, |filters, pagemap| {
                let done = warm_up(
                    &template, start, &until, timeout, &written, filters, pagemap, &say,
                );
                tell(&say, done);
            })
        }
        Order::Try { template } => {
            let template = Template::open(&template)?;
            let written = file()?;
            let null = File::options().read(true).write(true).open("/dev/null");
            let null = null.map_err(failed("open /dev/null"))?;
            keep.extend(numbers(&template.descriptors()));
            keep.extend(numbers(&[written.as_fd(), null.as_fd()]));
            let size = Size::to_run(template.metadata().memory_mib, template.metadata().vcpus);
            fork(confinement, size, &keep, |filters, pagemap| {
                tell(&say, try_a_start(&template, &written, &null, filters, pagemap));
            })
        }
    }?;
    // Its end is how this process notices that nobody says anything any more.
    drop(say);
    supervise(control, &said, process, limit)
}

fn numbers(descriptors: &[BorrowedFd<'_>]) -> Vec<RawFd> {
    descriptors.iter().map(AsRawFd::as_raw_fd).collect()
}

/// What a jailed process may take of the host.
#[derive(Clone, Copy)]
struct Size {
    memory: u64,
    file: u64,
    vcpus: u8,
}

impl Size {
    /// For a machine that is saved: what was written counts as the process's until it is on disk, for ever on a file system in
    /// memory.
    fn to_freeze(memory_mib: u64, vcpus: u8) -> Self {
        let memory = memory_mib.saturating_mul(1 << 20);
        Self {
            memory: memory.saturating_mul(2).saturating_add(OVERHEAD),
            file: memory.max(SMALL_FILE),
            vcpus,
        }
    }

    /// For a clone that runs.
    fn to_run(memory_mib: u64, vcpus: u8) -> Self {
        Self {
            memory: memory_mib.saturating_mul(1 << 20).saturating_add(OVERHEAD),
            file: SMALL_FILE,
            vcpus,
        }
    }

    /// All that the process needs it is born with, so its root is empty.
    fn policy(self, mode: SeccompMode) -> Policy {
        Policy {
            cgroup: Some(Cgroup {
                memory: Some(self.memory),
                pids: Some(confinement::tasks(self.vcpus, mode)),
                ..Cgroup::default()
            }),
            seccomp: Seccomp {
                mode,
                ..Seccomp::default()
            },
            rlimits: BTreeMap::from([
                (Resource::Core, 0),
                (Resource::FileSize, self.file),
                (Resource::OpenFiles, OPEN_FILES),
            ]),
            ..Policy::default()
        }
    }
}

/// Forks a process that lives this life, with these descriptors, and ends. It is given its own `/proc/self/pagemap`, which it
/// cannot open any more.
fn fork(
    confinement: Confinement,
    size: Size,
    keep: &[RawFd],
    life: impl FnOnce(&ThreadFilters, Option<File>),
) -> Result<VmmProcess, EngineError> {
    let mode = match confinement {
        Confinement::Jailed => SeccompMode::Kill,
        Confinement::CallsLogged => SeccompMode::Log,
        Confinement::Unconfined => {
            return confinement::fork_unconfined(|filters| {
                // As a jailed one ends with this process.
                let _ = set_parent_process_death_signal(Some(Signal::KILL));
                life(filters, None);
            });
        }
    };
    let mut jailer = Jailer::for_work(size.policy(mode), Mode::of_caller(), Work::Template)?;
    let filters = ThreadFilters::of(jailer.filters());
    let pagemap = || Ok(vec![File::open("/proc/self/pagemap")?.into()]);
    let jail = jailer.spawn_with(keep, pagemap, |own| {
        confinement::forget_environment();
        life(&filters, own.into_iter().next().map(File::from));
        0
    })?;
    Ok(jail.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_limits_are_those_of_its_machine() {
        let policy = Size::to_freeze(256, 8).policy(SeccompMode::Kill);
        let cgroup = policy.cgroup.unwrap();
        assert_eq!(cgroup.memory, Some((512 << 20) + OVERHEAD));
        assert_eq!(policy.rlimits.get(&Resource::FileSize), Some(&(256 << 20)));
        // Eight vCPUs, devices, control, a thread of the kernel's for each of two VMs.
        assert!(cgroup.pids >= Some(12));
        let logged = Size::to_run(256, 8).policy(SeccompMode::Log);
        assert!(logged.cgroup.unwrap().pids >= Some(2 * 12));
        assert!(policy.root.is_empty());
    }
}
