//! System calls that no crate has in a safe form, each wrapped once.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::Pid;

/// Of clone3(2). The crate `libc` has it as an `int`, which it does not fit in.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What [`fork`] returns.
pub(crate) enum Forked {
    /// In the new process.
    Child,
    /// In the one that called: the child's id and a descriptor of it.
    Parent(Pid, OwnedFd),
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// `clone3(2)` without shared memory and without a stack: a fork with namespaces, into a cgroup.
///
/// # Safety
/// The calling process has one thread, or the child calls only what is async-signal-safe.
pub(crate) unsafe fn fork(flags: i32, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    // What glibc's own fork does: the thread's id in its descriptor is that of the child's.
    let thread_id = rustix::thread::get_clear_child_tid_address().ok().flatten();
    let mut flags = flags as u64 | libc::CLONE_PIDFD as u64;
    if thread_id.is_some() {
        flags |= (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID) as u64;
    }
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let arguments = libc::clone_args {
        flags,
        pidfd: (&raw mut pidfd) as u64,
        child_tid: thread_id.map_or(0, |address| address.as_ptr() as u64),
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
    };
    // SAFETY: the structure is initialised, `pidfd` and the thread's id are written to where they live, and memory is
    // not shared; what the child may do is the caller's promise.
    let result =
        checked(unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) })?;
    if result == 0 {
        return Ok(Forked::Child);
    }
    let pid = Pid::from_raw(result as i32).ok_or(io::ErrorKind::Other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(Forked::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Ends this process at once, without destructors and exit handlers.
pub(crate) fn exit_now(status: u8) -> ! {
    // SAFETY: takes a plain integer and does not return.
    unsafe { libc::_exit(i32::from(status)) }
}

/// Has the C library's allocator do without what no thread of a VMM process may: from here on, and in what is forked, it has one
/// heap for all threads, whose number it would count processors for, and gives nothing of a heap back, before which it would ask
/// how the kernel overcommits memory. For either it opens files (mallopt(3)). Blocks of 128 KiB and more are mappings of their own.
pub(crate) fn allocate_without_files() {
    // SAFETY: takes plain integers; the allocator locks what it changes by them.
    let set = unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1) != 0
            && libc::mallopt(libc::M_TRIM_THRESHOLD, -1) != 0
            && libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) != 0
    };
    debug_assert!(set, "mallopt refuses only parameters that it does not know");
}

/// Closes all descriptors from `first` to `last`.
pub(crate) fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: takes plain integers. Whoever owns one of the descriptors is not going to use it: the caller has listed
    // those that stay.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) }).map(drop)
}

/// Adds attributes (`MOUNT_ATTR_*`) to a mount and, if asked, to those below it.
pub(crate) fn add_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: u64,
    recursive: bool,
) -> io::Result<()> {
    let set = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is empty and terminated, the structure is initialised and of the size that is told.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const set,
            size_of_val(&set),
        )
    })
    .map(drop)
}

/// Gives up supplementary groups.
pub(crate) fn clear_groups() -> io::Result<()> {
    // SAFETY: no group is read through the null pointer. The system call itself: this process has one thread.
    checked(unsafe { libc::syscall(libc::SYS_setgroups, 0usize, std::ptr::null::<libc::gid_t>()) }).map(drop)
}

/// Locks or unlocks one byte of a file for as long as this description of it is open (fcntl(2), `F_OFD_SETLK`). Whether it
/// could be.
pub(crate) fn lock_byte(file: BorrowedFd<'_>, at: u32, lock: bool) -> io::Result<bool> {
    let range = libc::flock {
        l_type: if lock { libc::F_WRLCK } else { libc::F_UNLCK } as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: i64::from(at),
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the structure is initialised and only read.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    match checked(result.into()) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Installs a filter of system calls for the calling thread, which has no new privileges.
pub(crate) fn install_filter(program: &[seccompiler::sock_filter]) -> io::Result<()> {
    set_filter(program, 0).map(drop)
}

/// The same, with a descriptor that hears of each call that the filter hands over. The number of the descriptor is stored at
/// once.
pub(crate) fn listen_to_filter(program: &[seccompiler::sock_filter], listener: &AtomicI32) -> io::Result<()> {
    let descriptor = set_filter(program, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    listener.store(descriptor as i32, Ordering::SeqCst);
    Ok(())
}

fn set_filter(program: &[seccompiler::sock_filter], flags: libc::c_ulong) -> io::Result<libc::c_long> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the program is a slice of instructions of the kernel's layout, which the kernel copies and checks.
    checked(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
}

/// Waits for a call that a filter hands over; `None` when nobody is left who could make one.
pub(crate) fn next_notification(listener: RawFd) -> Option<libc::seccomp_notif> {
    loop {
        let mut waiting = libc::pollfd {
            fd: listener,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure, as told.
        let ready = unsafe { libc::poll(&raw mut waiting, 1, -1) };
        if ready < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return None;
        }
        if waiting.revents & libc::POLLIN == 0 {
            if waiting.revents != 0 {
                return None;
            }
            continue;
        }
        // SAFETY: all zeros is a valid value, and what the kernel asks for.
        let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the ioctl fills in the structure.
        let result = unsafe { libc::ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &raw mut notification) };
        if result == 0 {
            return Some(notification);
        }
        // ENOENT: who made the call has been killed meanwhile.
    }
}

/// Lets a call go on as if there were no filter.
pub(crate) fn let_through(listener: RawFd, id: u64) {
    let response = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // SAFETY: the structure is initialised. It fails only if who made the call is gone.
    unsafe { libc::ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &raw const response) };
}

/// `_IOWR('!', 0, struct seccomp_notif)`, of 80 bytes (linux/seccomp.h).
const SECCOMP_IOCTL_NOTIF_RECV: libc::c_ulong = 0xc050_2100;
/// `_IOWR('!', 1, struct seccomp_notif_resp)`, of 24 bytes.
const SECCOMP_IOCTL_NOTIF_SEND: libc::c_ulong = 0xc018_2101;

/// Blocks every signal, or none, for this thread.
pub(crate) fn block_signals(block: bool) {
    let set = signals(block);
    // SAFETY: the set is initialised; the old one is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

fn signals(full: bool) -> libc::sigset_t {
    // SAFETY: all zeros is a valid value, which the next call overwrites.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: initialises the set.
    unsafe {
        if full {
            libc::sigfillset(&raw mut set);
        } else {
            libc::sigemptyset(&raw mut set);
        }
    }
    set
}

/// Waits for a blocked signal; 0 if the wait was interrupted.
pub(crate) fn next_signal() -> i32 {
    let set = signals(true);
    // SAFETY: the set is initialised; no details are asked for.
    unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) }.max(0)
}

/// A descriptor that all signals arrive at, while they are blocked.
pub(crate) fn signal_descriptor() -> io::Result<OwnedFd> {
    let set = signals(true);
    // SAFETY: the set is initialised.
    let descriptor = checked(
        unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) }.into(),
    )?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) })
}

/// The disposition that a program expects to start with: Rust ignores SIGPIPE.
pub(crate) fn reset_sigpipe() {
    // SAFETY: SIG_DFL is a valid disposition.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Sends any signal to a child that has not been reaped.
pub(crate) fn signal_process(process: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: takes plain integers.
    checked(unsafe { libc::kill(process.as_raw_nonzero().get(), signal) }.into()).map(drop)
}

/// Sends any signal.
pub(crate) fn send_signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: takes plain integers and no details.
    checked(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0u32,
        )
    })
    .map(drop)
}

/// `execve(2)`: returns only what went wrong.
pub(crate) fn execute(
    path: &CStr,
    arguments: &[*const libc::c_char],
    environment: &[*const libc::c_char],
) -> io::Error {
    debug_assert!(arguments.last().is_some_and(|last| last.is_null()));
    debug_assert!(environment.last().is_some_and(|last| last.is_null()));
    // SAFETY: both lists end with a null pointer, and what they point to lives in the caller, as `path` does.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// A word of memory that is shared with processes forked after it was made.
pub(crate) struct SharedWord(std::ptr::NonNull<libc::c_void>);

impl SharedWord {
    pub(crate) fn new() -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        }?;
        let word = std::ptr::NonNull::new(page).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self(word))
    }
}

// SAFETY: the word is atomic, and the mapping belongs to no thread.
unsafe impl Send for SharedWord {}
// SAFETY: as above.
unsafe impl Sync for SharedWord {}

impl AsRef<AtomicI32> for SharedWord {
    fn as_ref(&self) -> &AtomicI32 {
        // SAFETY: the page is mapped and zeroed as long as `self` lives, aligned, and only accessed atomically.
        unsafe { self.0.cast::<AtomicI32>().as_ref() }
    }
}

impl Drop for SharedWord {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr(), 4096) };
    }
}
