//! A process that outlives the command that made it, a monitor or a pool: out of reach of the terminal, and with nothing open
//! that it was not given.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::FdFlags;
use rustix::process::Pid;

use crate::error::EngineError;

/// Forks this process, which has to have one thread; `None` in the child.
pub(crate) fn fork(attempted: &'static str) -> Result<Option<Pid>, EngineError> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        return Err(EngineError::Threads { threads });
    }
    let failed = || EngineError::host(attempted);
    // SAFETY: this process has one thread, so its child may do whatever it may.
    match unsafe { libc::fork() } {
        -1 => Err(failed()(io::Error::last_os_error())),
        0 => Ok(None),
        child => Pid::from_raw(child)
            .map(Some)
            .ok_or_else(|| failed()(io::ErrorKind::InvalidData.into())),
    }
}

/// Ends this process, which is a child that shares what it has with its parent: nothing is to be cleaned up twice.
pub(crate) fn exit() -> ! {
    // SAFETY: ends this process at once.
    unsafe { libc::_exit(0) }
}

/// Copies of descriptors that survive [`leave_caller`].
pub(crate) fn keep(fds: &[Option<BorrowedFd<'_>>; 3]) -> io::Result<[Option<OwnedFd>; 3]> {
    let copy = |fd: &Option<BorrowedFd<'_>>| {
        fd.map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(io::Error::from))
            .transpose()
    };
    Ok([copy(&fds[0])?, copy(&fds[1])?, copy(&fds[2])?])
}

/// Leaves the caller's session, terminal and directory, and closes what this process has inherited of those who started the caller: a shell
/// that waits for the end of a pipe does not wait for it. Standard error stays if `keep_errors`.
pub(crate) fn leave_caller(keep_errors: bool) -> io::Result<()> {
    let _ = rustix::process::setsid();
    // What is mounted where the caller stands can be unmounted.
    std::env::set_current_dir("/")?;
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    if !keep_errors {
        rustix::stdio::dup2_stderr(&null)?;
    }
    // What this program has opened itself is closed by an execve, and is needed or harmless; all else came from outside.
    let mut foreign = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok());
        let Some(number) = number.filter(|number| *number > 2) else {
            continue;
        };
        // SAFETY: only looked at; one that is closed meanwhile is an error of the call.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        if rustix::io::fcntl_getfd(fd.as_fd()).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
            foreign.push(number);
        }
    }
    for number in foreign {
        // SAFETY: a descriptor without the flag that all of this program's own have: no value here owns it.
        unsafe { libc::close(number) };
    }
    Ok(())
}
