//! The container stub: the child that is forked before the freeze and becomes the container's process after it.
//!
//! Everything that forking a process takes is so done once, in the template. The stub holds all signals back until
//! its `execve`, so that one which comes early waits for the container.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use picovm_guest_protocol::{ContainerExit, ContainerSpec, Frame, FrameDecoder, StartFailure};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::accounts::Accounts;
use crate::error::{Attempt, InitError};
use crate::start::{self, failure};

/// What the agent holds of the container: its process and its own ends of the pipes.
pub struct Container {
    /// The container's main process, and its process group.
    pub pid: Pid,
    /// Where its standard input is written; non-blocking.
    pub stdin: OwnedFd,
    /// Where its standard output is read; non-blocking.
    pub stdout: OwnedFd,
    /// Where its standard error is read; non-blocking.
    pub stderr: OwnedFd,
    /// Where an encoded [`Frame::Exit`] comes from if it could not be started; closed by a successful `execve`.
    pub failure: OwnedFd,
    /// Where an encoded [`Frame::Spec`] goes if the identity had no container.
    pub spec: OwnedFd,
}

/// Soft and hard limit of open files, as service managers have it.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

/// What a container's root must not do, even in its own machine: reach physical memory and with it the trap
/// (`SYS_RAWIO`), halt the kernel unseen by the VMM (`SYS_BOOT`), load code into it (`SYS_MODULE`), or take over the
/// agent (`SYS_PTRACE`).
const WITHHELD: [CapabilitySet; 4] = [
    CapabilitySet::SYS_RAWIO,
    CapabilitySet::SYS_BOOT,
    CapabilitySet::SYS_MODULE,
    CapabilitySet::SYS_PTRACE,
];

/// Blocks SIGCHLD, which the agent takes from a signalfd. To be called before the first fork, so that none is lost.
pub fn block_child_signal() -> Result<(), InitError> {
    // SAFETY: the set is initialised by sigemptyset before it is used, and outlives the calls.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error()).attempt(|| "block SIGCHLD".into())
}

/// Forks the stub. In it, `life` runs and gives what to run, or `None` if that comes from the agent
/// ([`Container::spec`]).
pub fn fork(
    accounts: &Accounts,
    life: impl FnOnce() -> Result<Option<ContainerSpec>, StartFailure>,
) -> Result<Container, InitError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).attempt(|| "make a pipe".into());
    let (stdin_read, stdin) = pipe()?;
    let (stdout, stdout_write) = pipe()?;
    let (stderr, stderr_write) = pipe()?;
    let (failure, failure_write) = pipe()?;
    let (spec_read, spec) = pipe()?;
    for end in [&stdin, &stdout, &stderr, &failure] {
        rustix::io::ioctl_fionbio(end, true).attempt(|| "make a pipe non-blocking".into())?;
    }

    // SAFETY: init has one thread, so its child may do whatever it may; the tests' harness forks first for that.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).attempt(|| "fork the container stub".into()),
        0 => {
            let _no_return = NoReturn;
            drop((stdin, stdout, stderr, failure, spec));
            let streams = [stdin_read, stdout_write, stderr_write];
            let failed = match prepare(streams) {
                Ok(no_input) => match life().and_then(|spec| spec.map_or_else(|| receive(spec_read), Ok)) {
                    Ok(spec) => start::exec(&spec, accounts, no_input.as_fd()),
                    Err(failed) => failed,
                },
                Err(failed) => failed,
            };
            report(&failure_write, failed);
            exit()
        }
        pid => Ok(Container {
            pid: Pid::from_raw(pid)
                .ok_or_else(|| InitError::Machine("fork returned no process id".into()))?,
            stdin,
            stdout,
            stderr,
            failure,
            spec,
        }),
    }
}

/// Ends a stub that would otherwise, by a panic, live on as a second init.
struct NoReturn;

impl Drop for NoReturn {
    fn drop(&mut self) {
        exit()
    }
}

fn exit() -> ! {
    // SAFETY: ends this process at once; nothing of what it shares with its parent needs its destructors.
    unsafe { libc::_exit(125) }
}

/// All that is the same for every container. Gives `/dev/null`, for one without standard input.
fn prepare(streams: [OwnedFd; 3]) -> Result<OwnedFd, StartFailure> {
    let because = |attempted: &'static str| {
        move |error: rustix::io::Errno| failure(attempted, error.raw_os_error(), error)
    };
    hold_signals();
    rustix::process::setsid().map_err(because("begin a session"))?;
    let [stdin, stdout, stderr] = streams;
    rustix::stdio::dup2_stdin(stdin).map_err(because("connect standard input"))?;
    rustix::stdio::dup2_stdout(stdout).map_err(because("connect standard output"))?;
    rustix::stdio::dup2_stderr(stderr).map_err(because("connect standard error"))?;
    rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(because("open /dev/null"))
}

/// Gives the stub the limits of a container.
pub fn confine() -> Result<(), StartFailure> {
    rustix::process::setrlimit(Resource::Nofile, OPEN_FILES)
        .map_err(|error| failure("set the limit of open files", error.raw_os_error(), error))?;
    crate::identity::set_oom_score(0)
        .map_err(|error| failure("set oom_score_adj", error.raw_os_error().unwrap_or(0), error))?;
    withhold_capabilities()
}

/// Takes [`WITHHELD`] from what the stub executes; the stub itself keeps them until then.
pub fn withhold_capabilities() -> Result<(), StartFailure> {
    for capability in WITHHELD {
        rustix::thread::remove_capability_from_bounding_set(capability)
            .map_err(|error| failure("withhold a capability", error.raw_os_error(), error))?;
    }
    Ok(())
}

/// Blocks every signal and lets SIGPIPE, which Rust programs ignore, do what it does by default.
fn hold_signals() {
    // SAFETY: the set is initialised by sigfillset before it is used; SIG_DFL is a valid disposition.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Waits for the spec from the agent.
fn receive(spec: OwnedFd) -> Result<ContainerSpec, StartFailure> {
    let attempted = "receive what to run";
    let mut pipe = std::fs::File::from(spec);
    let mut decoder = FrameDecoder::default();
    let mut buffer = [0; 4096];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return Err(failure(attempted, 0, "the agent has gone")),
            Ok(count) => decoder.push(buffer.get(..count).unwrap_or_default()),
            Err(error) => return Err(failure(attempted, error.raw_os_error().unwrap_or(0), error)),
        }
        match decoder.next_frame() {
            Ok(Some(Frame::Spec(spec))) => return Ok(spec),
            Ok(None) => {}
            Ok(Some(_)) => return Err(failure(attempted, 0, "the agent sent another frame")),
            Err(error) => return Err(failure(attempted, 0, error)),
        }
    }
}

/// Tells the agent why there is no container. Both texts are short enough for the pipe to take them at once.
fn report(pipe: &OwnedFd, failed: StartFailure) {
    let mut bytes = Vec::new();
    if Frame::Exit(ContainerExit::NotStarted(failed))
        .encode(&mut bytes)
        .is_ok()
    {
        // If the agent has gone, there is nobody to tell.
        let _ = rustix::io::write(pipe, &bytes);
    }
}

/// Lets other work settle before the freeze: what runs at the freeze point runs again in every clone.
const SETTLE: std::time::Duration = std::time::Duration::from_millis(1);

/// Waits until a process, which is not to be woken by anything yet, sleeps (the agent in its `epoll_wait`).
pub fn wait_until_asleep(process: Pid) -> Result<(), StartFailure> {
    let path = format!("/proc/{process}/stat");
    loop {
        let stat = std::fs::read(&path)
            .map_err(|error| failure(format!("read {path}"), error.raw_os_error().unwrap_or(0), error))?;
        // `PID (NAME) STATE ...`, and the name may contain anything.
        let after_name = stat.iter().rposition(|&byte| byte == b')').map(|end| end + 2);
        if after_name.and_then(|state| stat.get(state)) == Some(&b'S') {
            break;
        }
        // On one CPU this is what lets it get there.
        // SAFETY: takes no argument and cannot fail on Linux.
        unsafe { libc::sched_yield() };
    }
    std::thread::sleep(SETTLE);
    Ok(())
}
