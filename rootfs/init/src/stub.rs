//! Children of the agent: the container stub, which is begun before the freeze and becomes the container's main process after
//! it, and the copies of the agent that become its other processes.
//!
//! Everything that forking a process takes is so done once, in the template. The stub holds all signals back until
//! its `execve`, so that one which comes early waits for the container.

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

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use picovm_guest_protocol::frame::MAIN;
use picovm_guest_protocol::{ContainerExit, ContainerSpec, Frame, FrameDecoder, ProcessSpec, StartFailure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::accounts::Accounts;
use crate::agent::Terminal;
use crate::cgroup::{self, Cgroup};
use crate::container::{self, Ground};
use crate::error::{Attempt, InitError};
use crate::start::{self, Connections, failure};

/// What the agent holds of a process: its own ends of the pipes.
pub struct Pipes {
    /// Where its standard input is written; non-blocking.
    pub stdin: OwnedFd,
    /// Where its standard output is read; non-blocking.
    pub stdout: OwnedFd,
    /// Where its standard error is read; non-blocking.
    pub stderr: OwnedFd,
    /// Where an encoded [`Frame::Exit`] comes from if it could not be started; closed by a successful `execve`.
    pub failure: OwnedFd,
}

/// The other ends, which are the stub's.
pub struct Ends {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    failure: OwnedFd,
}

/// Makes the pipes between agent and a process.
pub fn pipes() -> Result<(Pipes, Ends), InitError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).attempt(|| "make a pipe".into());
    let (stdin_read, stdin) = pipe()?;
    let (stdout, stdout_write) = pipe()?;
    let (stderr, stderr_write) = pipe()?;
    let (failure, failure_write) = pipe()?;
    for end in [&stdin, &stdout, &stderr, &failure] {
        rustix::io::ioctl_fionbio(end, true).attempt(|| "make a pipe non-blocking".into())?;
    }
    let pipes = Pipes {
        stdin,
        stdout,
        stderr,
        failure,
    };
    let ends = Ends {
        stdin: stdin_read,
        stdout: stdout_write,
        stderr: stderr_write,
        failure: failure_write,
    };
    Ok((pipes, ends))
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

/// The stack of a stub; the first one's is used again by the next.
pub struct Stack {
    top: NonNull<u8>,
}

const STACK_SIZE: usize = 256 << 10;

impl Stack {
    /// Allocates it.
    pub fn allocate() -> Result<Self, InitError> {
        let attempted = || "allocate the stub's stack".into();
        // SAFETY: a new mapping at an address of the kernel's choice; it is never unmapped.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                STACK_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::STACK,
            )
        }
        .attempt(attempted)?;
        let top = NonNull::new(start.cast::<u8>().wrapping_add(STACK_SIZE))
            .ok_or_else(|| InitError::Machine("the stub's stack ends at address zero".into()))?;
        Ok(Self { top })
    }
}

/// What a stub is made with.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    /// Where it runs.
    pub stack: &'a Stack,
    /// The image's account files.
    pub accounts: &'a Accounts,
    /// What the container gets of the machine.
    pub ground: &'a Ground,
    /// The control connection.
    pub control: BorrowedFd<'a>,
    /// The terminal that is ready for it.
    pub terminal: Option<&'a Terminal>,
}

/// What the agent has to know of the spec that its stub has taken. The stub sets it, in the memory that both share.
#[derive(Debug, Default)]
pub struct Taken {
    /// Whether there is no main process, and the agent serves without.
    pub is_idle: bool,
    /// Whether the main process has a terminal.
    pub has_terminal: bool,
    /// Whether the agent goes on after the main process's end.
    pub stays: bool,
    /// Whether the agent says when the main process's program runs.
    pub announces: bool,
    /// Whether the container's memory is limited.
    pub limits_memory: bool,
    /// What the host has sent for the agent while the stub read from the connection.
    pub early: Vec<(u16, Frame)>,
}

/// A stub that has become the container's main process, or has ended.
#[derive(Debug)]
pub struct Begun {
    /// Its process.
    pub pid: Pid,
    /// What it was to run.
    pub taken: Taken,
}

/// Begins the stub, a child in the memory of this process, which waits until the stub has called `execve` or ended
/// (`vfork(2)`). So a stub has no memory of its own that its `execve` would have to take down in each clone.
///
/// In it, `life` runs and gives what to run, or `None` if that comes as the first frame from the control connection.
pub fn begin(
    setting: Setting<'_>,
    ends: Ends,
    life: impl FnOnce() -> Result<Option<ContainerSpec>, StartFailure>,
) -> Result<Begun, InitError> {
    let taken = RefCell::new(Taken::default());
    let run = || {
        let begun =
            prepare(&ends).and_then(|no_input| become_container(setting, no_input.as_fd(), &taken, life));
        match begun {
            // The agent needs nobody in the stub's place.
            Ok(Idle) => {}
            Err(failed) => report(&ends.failure, failed),
        }
    };
    let pid = clone(setting.stack, run)?;
    let taken = taken.into_inner();
    Ok(Begun { pid, taken })
}

/// There is nothing to execute.
struct Idle;

fn become_container(
    setting: Setting<'_>,
    no_input: BorrowedFd<'_>,
    taken: &RefCell<Taken>,
    life: impl FnOnce() -> Result<Option<ContainerSpec>, StartFailure>,
) -> Result<Idle, StartFailure> {
    let spec = life()?.map_or_else(|| receive(setting.control), Ok)?;
    {
        let mut taken = taken.borrow_mut();
        taken.stays = spec.stay;
        taken.announces = spec.announce;
        taken.limits_memory = spec.limits.memory.is_some();
        taken.has_terminal = spec.process.terminal.is_some();
    }
    let early = container::arrange(&spec, setting.ground, setting.control)?;
    // Users may have come with the writable layer.
    let own_accounts = (spec.layer || spec.storage).then(Accounts::read);
    {
        let mut taken = taken.borrow_mut();
        taken.early = early;
        taken.is_idle = spec.process.args.is_empty();
        if taken.is_idle {
            return Ok(Idle);
        }
    }
    let connections = Connections {
        no_input,
        terminal: setting.terminal,
        is_console: true,
    };
    let accounts = own_accounts.as_ref().unwrap_or(setting.accounts);
    Err(start::exec(&spec.process, accounts, connections))
}

/// Begins a further process of the container, as a copy of this one that becomes it.
pub fn begin_other(
    spec: &ProcessSpec,
    ends: &Ends,
    ground: &Ground,
    terminal: Option<&Terminal>,
) -> rustix::io::Result<Pid> {
    let group = ground.cgroup.as_ref();
    if let Some(pid) = fork(group.map(Cgroup::directory))? {
        return Ok(pid);
    }
    end_with(|| {
        let exec = || {
            let no_input = prepare(ends)?;
            if group.is_some() {
                own_namespace()?;
            }
            if ground.is_guest {
                confine()?;
            }
            let connections = Connections {
                no_input: no_input.as_fd(),
                terminal,
                is_console: false,
            };
            Err::<std::convert::Infallible, _>(start::exec(spec, &Accounts::read(), connections))
        };
        let Err(failed) = exec();
        report(&ends.failure, failed);
        NOT_STARTED
    })
}

/// Makes a copy of this process the agent's helper, with the streams, the signals and the chances of any process. Gives a
/// descriptor of nothing.
pub fn become_helper(ends: Ends, is_guest: bool) -> Result<OwnedFd, StartFailure> {
    let nothing = prepare(&ends)?;
    if is_guest {
        crate::identity::set_oom_score(0)
            .map_err(|error| failure("set oom_score_adj", error.raw_os_error().unwrap_or(0), error))?;
    }
    start::unblock_signals()?;
    Ok(nothing)
}

/// Exit status of a child that has not become what it was to.
const NOT_STARTED: u8 = 125;

/// Ends a copy of this process with the status that `run` gives: it never returns into the life of what it was copied from.
pub fn end_with(run: impl FnOnce() -> u8) -> ! {
    let _no_return = NoReturn;
    let status = run();
    // SAFETY: ends this process at once; the destructors' work is that of what it was copied from.
    unsafe { libc::_exit(status.into()) }
}

/// Makes a copy of this process, in a control group if one is given. Gives the copy's id, or `None` in the copy, which has to end
/// by [`end_with`].
pub fn fork(group: Option<BorrowedFd<'_>>) -> rustix::io::Result<Option<Pid>> {
    const INTO_CGROUP: u64 = 0x2_0000_0000;
    /// `struct clone_args`: flags, four others, exit signal, five others, group.
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: [u64; 2],
        tls: u64,
        set_tid: [u64; 2],
        cgroup: u64,
    }
    let group = group.map(|group| u64::try_from(group.as_raw_fd()).unwrap_or(u64::MAX));
    let arguments = CloneArgs {
        flags: group.map_or(0, |_| INTO_CGROUP),
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        cgroup: group.unwrap_or_default(),
        ..CloneArgs::default()
    };
    // To be born in a group takes nothing; to be moved there waits for a grace period.
    // SAFETY: the structure is laid out as the call reads it and outlives it. Without a flag that shares memory the child is
    // a copy of this process, which has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>()) };
    match i32::try_from(pid) {
        Ok(pid) if pid >= 0 => Ok(Pid::from_raw(pid)),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}

/// Runs `run` as a child process on `stack` and in the memory of this one, which goes on when the child has called
/// `execve` or ended. The child has descriptors, signal mask and credentials of its own.
fn clone<F: FnOnce()>(stack: &Stack, run: F) -> Result<Pid, InitError> {
    extern "C" fn enter<F: FnOnce()>(run: *mut libc::c_void) -> libc::c_int {
        let _no_return = NoReturn;
        // SAFETY: the pointer is that to the option below, whose owner stands still meanwhile.
        if let Some(run) = unsafe { (*run.cast::<Option<F>>()).take() } {
            run();
        }
        exit()
    }
    let mut run = Some(run);
    // SAFETY: the stack is a live mapping that no other process uses, as each stub before this one has ended or called
    // `execve`; this process has one thread, which stands still while the child uses its memory.
    let pid = unsafe {
        libc::clone(
            enter::<F>,
            stack.top.as_ptr().cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            (&raw mut run).cast(),
        )
    };
    if pid == -1 {
        return Err(io::Error::last_os_error()).attempt(|| "begin the container stub".into());
    }
    Pid::from_raw(pid).ok_or_else(|| InitError::Machine("clone returned no process id".into()))
}

/// Ends a stub that would otherwise, by a panic, return into the life of its parent.
struct NoReturn;

impl Drop for NoReturn {
    fn drop(&mut self) {
        exit()
    }
}

fn exit() -> ! {
    // SAFETY: ends this process at once; nothing of what it shares with its parent needs its destructors.
    unsafe { libc::_exit(NOT_STARTED.into()) }
}

/// All that is the same for every container. Gives `/dev/null`, for one without standard input.
fn prepare(ends: &Ends) -> Result<OwnedFd, StartFailure> {
    let because = |attempted: &'static str| {
        move |error: rustix::io::Errno| failure(attempted, error.raw_os_error(), error)
    };
    hold_signals();
    rustix::process::setsid().map_err(because("begin a session"))?;
    rustix::stdio::dup2_stdin(&ends.stdin).map_err(because("connect standard input"))?;
    rustix::stdio::dup2_stdout(&ends.stdout).map_err(because("connect standard output"))?;
    rustix::stdio::dup2_stderr(&ends.stderr).map_err(because("connect standard error"))?;
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

/// Moves the stub into its control group, which is then all that it sees of control groups.
pub fn enter_group(group: Option<&Cgroup>) -> Result<(), StartFailure> {
    let Some(group) = group else { return Ok(()) };
    group.enter().map_err(|error| {
        failure(
            "enter the control group",
            error.raw_os_error().unwrap_or(0),
            error,
        )
    })?;
    own_namespace()
}

fn own_namespace() -> Result<(), StartFailure> {
    cgroup::own_namespace()
        .map_err(|error| failure("make a namespace of control groups", error.raw_os_error(), error))
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

/// Receives the spec, the first frame from the host, and not a byte of what follows, which is the agent's.
pub fn receive(control: BorrowedFd<'_>) -> Result<ContainerSpec, StartFailure> {
    let failed = |message: &dyn std::fmt::Display| failure("receive what to run", 0, message);
    match receive_frame(control) {
        Ok((MAIN, Frame::Spec(spec))) => Ok(spec),
        Ok(_) => Err(failed(&"the host sent another frame")),
        Err(error) => Err(failed(&error)),
    }
}

/// Receives one frame, and not a byte of what follows.
pub fn receive_frame(control: BorrowedFd<'_>) -> io::Result<(u16, Frame)> {
    let mut decoder = FrameDecoder::default();
    loop {
        let missing = decoder.missing().map_err(io::Error::other)?;
        if missing == 0 {
            break;
        }
        let mut part = vec![0; missing];
        read_exactly(control, &mut part)?;
        decoder.push(&part);
    }
    let frame = decoder.next_frame().map_err(io::Error::other)?;
    frame.ok_or_else(|| io::Error::other("half a frame"))
}

/// Sends one frame, however long that takes.
pub fn send_frame(control: BorrowedFd<'_>, process: u16, frame: &Frame) -> io::Result<()> {
    let mut bytes = Vec::new();
    frame.encode(process, &mut bytes).map_err(io::Error::other)?;
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match rustix::io::write(control, rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(control, PollFlags::OUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn wait_for(control: BorrowedFd<'_>, what: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(&control, what)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Fills `bytes` from a non-blocking descriptor.
fn read_exactly(from: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::io::read(from, &mut *rest) {
            Ok(0) => return Err(io::Error::other("the host has gone")),
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(from, PollFlags::IN)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Tells the agent why there is no container. Both texts are short enough for the pipe to take them at once.
fn report(pipe: &OwnedFd, failed: StartFailure) {
    let mut bytes = Vec::new();
    if Frame::Exit(ContainerExit::NotStarted(failed))
        .encode(MAIN, &mut bytes)
        .is_ok()
    {
        // If the agent has gone, there is nobody to tell.
        let _ = rustix::io::write(pipe, &bytes);
    }
}

/// Lets other work settle before the freeze: what runs at the freeze point runs again in every clone.
const SETTLE: std::time::Duration = std::time::Duration::from_millis(1);

/// Waits until a process sleeps: the agent, which waits for its stub.
pub fn wait_until_asleep(process: Pid) -> Result<(), StartFailure> {
    let path = format!("/proc/{process}/stat");
    loop {
        let stat = std::fs::read(&path)
            .map_err(|error| failure(format!("read {path}"), error.raw_os_error().unwrap_or(0), error))?;
        // `PID (NAME) STATE ...`, and the name may contain anything.
        let after_name = stat
            .iter()
            .rposition(|&byte| byte == b')')
            .map(|end| end.saturating_add(2));
        if matches!(after_name.and_then(|state| stat.get(state)), Some(b'S' | b'D')) {
            break;
        }
        // On one CPU this is what lets it get there.
        // SAFETY: takes no argument and cannot fail on Linux.
        unsafe { libc::sched_yield() };
    }
    std::thread::sleep(SETTLE);
    Ok(())
}
