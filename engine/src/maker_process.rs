//! The jailed process in which a template's machine is booted and saved, and the process that starts it: one that has a
//! single thread, opens whatever is needed, and sees to it that the jailed one ends.
//!
//! A guest may take that process over. What it can do then is to write what it likes into the files that it was given, and to
//! say what it likes about them: both are looked at by who asked for the template.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use picovm_jailer::{Cgroup, Jailer, Mode, Policy, Resource, Seccomp, SeccompMode, Work};
use picovm_vmm::{BootFiles, ForkOptions, FrozenFiles, Machine, MachineConfig, Outcome, Template};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use crate::confinement::{self, Confinement, OPEN_FILES, OVERHEAD, ThreadFilters, VmmProcess};
use crate::container::{Container, Start};
use crate::error::EngineError;
use crate::maker::{FromMaker, Order};
use crate::messages;
use crate::templates;
use crate::timeout;
use crate::warming::{Until, Warming};

/// How long a guest may take to its freeze point. It takes under a second on a real host.
const BOOT_MAX: Duration = Duration::from_secs(120);
/// How long a process may take in all, saving included, before it is killed.
pub(crate) const MAKE_MAX: Duration = Duration::from_secs(180);
/// How long it may take to end when it has said that it is done.
pub(crate) const END_MAX: Duration = Duration::from_secs(5);
/// Largest message of a jailed process.
const MESSAGE_MAX: usize = 64 << 10;
/// Largest reason that it gives, in bytes: the rest of it is not of interest.
const REASON_MAX: usize = 32 << 10;
/// Largest file beside the memory.
const SMALL_FILE: u64 = 16 << 20;

/// From the jailed process: a packet each.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Said {
    /// The machine has reached its freeze point.
    FreezePoint,
    /// The files are written, or cannot be for this reason.
    Done(Result<(), String>),
}

fn failed(attempted: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::host(attempted)
}

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

/// In the jailed process: boots a machine, and saves it at its freeze point.
fn boot(
    config: &MachineConfig,
    sources: BootFiles,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    let machine = Machine::boot_from(config, sources, filters.threads())?;
    freeze(machine, files, filters, pagemap, say)
}

/// In the jailed process: lets a clone of a base mount its image and warm up, and saves it.
fn take_image(
    base: &Template,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    let machine = base.fork(ForkOptions {
        threads: filters.threads(),
        ..ForkOptions::default()
    })?;
    freeze(machine, files, filters, pagemap, say)
}

/// In the jailed process: starts an application in a clone of an image's template, and saves that when it is warm.
#[expect(clippy::too_many_arguments, reason = "each is what this process was given")]
fn warm_up(
    template: &Template,
    start: Start,
    until: &Until,
    timeout: Duration,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    let mut machine = template.fork(ForkOptions {
        threads: filters.threads(),
        ..ForkOptions::default()
    })?;
    machine.prepare_save()?;
    filters.seal()?;
    let env = start.spec.process.env.clone();
    let container = Container::start_parked(template, machine, start, None)?;
    let mut machine = Warming::new(container, until, env)?.freeze(until, timeout)?;
    send(say, &Said::FreezePoint);
    machine.freeze_into(files, pagemap.as_ref())?;
    Ok(())
}

fn freeze(
    mut machine: Machine,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    machine.prepare_save()?;
    filters.seal()?;
    to_freeze_point(&mut machine)?;
    send(say, &Said::FreezePoint);
    machine.freeze_into(files, pagemap.as_ref())?;
    Ok(())
}

fn to_freeze_point(machine: &mut Machine) -> Result<(), EngineError> {
    let reason = match machine.run(Some(BOOT_MAX))? {
        Some(Outcome::FreezePoint) => return Ok(()),
        Some(outcome) => outcome.to_string(),
        None => format!("it took longer than {} s", BOOT_MAX.as_secs()),
    };
    Err(EngineError::NotFrozen {
        reason,
        tail: machine.console_tail(),
    })
}

/// In the jailed process: runs a container, and writes which pages that touched.
fn try_a_start(
    template: &Template,
    file: &File,
    null: &File,
    filters: &ThreadFilters,
    pagemap: Option<File>,
) -> Result<(), EngineError> {
    let set = templates::try_a_start(template, filters, pagemap.as_ref(), null)?;
    let bytes = postcard::to_stdvec(&set).map_err(io::Error::other);
    bytes
        .and_then(|bytes| file.write_all_at(&bytes, 0))
        .map_err(failed("write which pages a start touches"))
}

fn tell(say: &OwnedFd, done: Result<(), EngineError>) {
    let done = done.map_err(|error| {
        let mut reason = error.to_string();
        let end = (0..=REASON_MAX).rev().find(|&end| reason.is_char_boundary(end));
        reason.truncate(end.unwrap_or(0));
        reason
    });
    send(say, &Said::Done(done));
}

/// Who does not listen any more does not need to know.
fn send(say: &OwnedFd, said: &Said) {
    if let Ok(bytes) = postcard::to_stdvec(said) {
        let _ = rustix::net::send(say, &bytes, SendFlags::NOSIGNAL);
    }
}

/// What a jailed process has said, if it has said anything more; `Err` if it will not.
fn receive(said: &OwnedFd) -> Result<Option<Said>, ()> {
    let mut bytes = vec![0u8; MESSAGE_MAX];
    match rustix::net::recv(said, bytes.as_mut_slice(), RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(()),
        Ok((count, _)) => Ok(bytes
            .get(..count)
            .and_then(|bytes| postcard::from_bytes(bytes).ok())),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(_) => Err(()),
    }
}

/// What has been heard of a jailed process.
#[derive(Default)]
struct Heard {
    at_freeze_point: bool,
    done: Option<Result<(), String>>,
    /// Whether it has closed its end.
    all: bool,
}

impl Heard {
    /// Takes what it has said next. It is told once that it is at the freeze point, and what it says after that it is done does
    /// not count.
    fn next(&mut self, said: &OwnedFd, control: &UnixStream) {
        match receive(said) {
            Ok(Some(Said::FreezePoint)) if !self.at_freeze_point => {
                self.at_freeze_point = true;
                // Who does not listen has closed the other end, which is noticed.
                let _ = messages::send(control, &FromMaker::FreezePoint, &[]);
            }
            Ok(Some(Said::Done(done))) if self.done.is_none() => self.done = Some(done),
            Ok(_) => {}
            Err(()) => self.all = true,
        }
    }
}

/// Waits until a jailed process has ended. It is killed if it takes longer than `limit`, or if who asked for the template is gone.
fn supervise(
    control: &UnixStream,
    said: &OwnedFd,
    process: VmmProcess,
    limit: Duration,
) -> Result<(), EngineError> {
    let begun = Instant::now();
    let mut deadline = begun.checked_add(limit);
    let mut heard = Heard::default();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            process.kill();
            process.wait();
            return match heard.done {
                Some(Err(reason)) => Err(EngineError::Vmm(reason)),
                _ => Err(EngineError::Vmm(format!(
                    "cannot make the template: the process that does it did not end within {} s, and was killed",
                    begun.elapsed().as_secs()
                ))),
            };
        }
        let timeout = left.map(timeout::timespec);
        let mut fds = vec![
            PollFd::new(&process, PollFlags::IN),
            PollFd::new(control, PollFlags::IN),
        ];
        if !heard.all {
            fds.push(PollFd::new(said, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed("wait for the process that makes a template")(error.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let ready = |index: usize| ready.get(index).copied().unwrap_or(false);
        if ready(1) {
            // Nobody says anything here until it is answered: who asked has ended.
            process.kill();
            process.wait();
            return Err(EngineError::Vmm("who asked for the template has ended".into()));
        }
        if ready(2) {
            heard.next(said, control);
            if heard.done.is_some() {
                let soon = Instant::now().checked_add(END_MAX);
                deadline = deadline.min(soon);
            }
        }
        if ready(0) {
            // The last that it said, of which there are two at most that count.
            for _ in 0..2 {
                heard.next(said, control);
            }
            let how = process.wait();
            return match heard.done {
                Some(done) => done.map_err(EngineError::Vmm),
                None => Err(EngineError::Vmm(format!("cannot make the template: {how}"))),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::process::Command;

    const LONG: Duration = Duration::from_secs(60);

    /// A process in the place of a jailed one, which does what this script does, and both ends of what it says.
    #[expect(clippy::zombie_processes, reason = "it is reaped by its descriptor")]
    fn process(script: &str) -> (VmmProcess, OwnedFd, OwnedFd) {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let (said, say) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (VmmProcess::plain(process), said, say)
    }

    fn told(result: Result<(), EngineError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn one_that_hangs_is_killed_in_time_and_told_as_such() {
        let (control, _theirs) = UnixStream::pair().unwrap();
        let (process, said, _say) = process("exec sleep 1000");
        let begun = Instant::now();
        let error = told(supervise(&control, &said, process, Duration::from_secs(1)));
        assert!(error.contains("did not end within 1 s"), "{error}");
        assert!(begun.elapsed() < LONG);
    }

    #[test]
    fn one_that_dies_is_told_by_how_it_did() {
        let (control, _theirs) = UnixStream::pair().unwrap();
        for (script, how) in [
            ("kill -SYS $$", "system call that its jail does not allow"),
            ("kill -KILL $$", "ended by signal 9"),
            ("exit 0", "has ended"),
        ] {
            let (process, said, say) = process(script);
            drop(say);
            let error = told(supervise(&control, &said, process, LONG));
            assert!(
                error.contains("cannot make the template") && error.contains(how),
                "{error}"
            );
        }
    }

    #[test]
    fn what_it_says_is_told_once_and_its_reason_is_the_error() {
        let (control, theirs) = UnixStream::pair().unwrap();
        let (process, said, say) = process("exit 0");
        // More than it has to say, and what is no message at all.
        for _ in 0..3 {
            send(&say, &Said::FreezePoint);
        }
        rustix::net::send(&say, &[0xff; 100], SendFlags::empty()).unwrap();
        let mut heard = Heard::default();
        for _ in 0..4 {
            heard.next(&said, &control);
        }
        assert!(heard.at_freeze_point && heard.done.is_none() && !heard.all);
        tell(&say, Err(EngineError::Vmm("x".repeat(1 << 20))));
        let error = told(supervise(&control, &said, process, LONG));
        assert!(
            error.starts_with("xxx") && error.len() <= REASON_MAX,
            "{}",
            error.len()
        );
        drop(control);
        let first = messages::receive::<FromMaker>(&theirs).unwrap();
        assert_eq!(first.map(|(told, _)| told), Some(FromMaker::FreezePoint));
        assert!(messages::receive::<FromMaker>(&theirs).unwrap().is_none());
    }

    #[test]
    fn one_that_is_done_but_does_not_end_is_not_waited_for_long() {
        let (control, _theirs) = UnixStream::pair().unwrap();
        let (process, said, say) = process("exec sleep 1000");
        tell(&say, Ok(()));
        let begun = Instant::now();
        // It may still write: so it is no template.
        assert!(supervise(&control, &said, process, LONG).is_err());
        assert!(begun.elapsed() < LONG);
    }

    #[test]
    fn it_ends_with_who_asked_for_the_template() {
        let (control, theirs) = UnixStream::pair().unwrap();
        let (process, said, _say) = process("exec sleep 1000");
        drop(theirs);
        let begun = Instant::now();
        assert!(supervise(&control, &said, process, LONG).is_err());
        assert!(begun.elapsed() < LONG);
    }

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
