//! Telling of the system calls that are not in a list, and letting them through.
//!
//! The filter hands such a call over to a supervisor (seccomp_unotify(2)), who sees its number and arguments, and the kernel
//! goes on with it afterwards: so it works for every call, `clone` and `execve` among them, and over `execve`.

use std::fmt::Write;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use seccompiler::sock_filter;
use syscalls::Sysno;

use crate::sys;

/// How many different calls are told of.
const REMEMBERED: usize = 512;

/// Installs a filter for the calling thread, with a supervisor beside it: a thread without a filter.
pub(super) fn install(name: &'static str, program: &[sock_filter]) -> io::Result<()> {
    let listener = Arc::new(Word(AtomicI32::new(-1)));
    // Before the filter is there, which threads inherit.
    supervise_from_thread(name, listener.clone())?;
    let installed = sys::listen_to_filter(program, &listener.0);
    if installed.is_err() {
        listener.0.store(GIVEN_UP, Ordering::SeqCst);
    }
    installed
}

struct Word(AtomicI32);

impl AsRef<AtomicI32> for Word {
    fn as_ref(&self) -> &AtomicI32 {
        &self.0
    }
}

/// Starts a thread that supervises once the listener is there.
pub(super) fn supervise_from_thread(
    name: &'static str,
    listener: Arc<impl AsRef<AtomicI32> + Send + Sync + 'static>,
) -> io::Result<()> {
    let supervisor = move || {
        if let Some(listener) = wait_for((*listener).as_ref()) {
            supervise(name, listener);
        }
    };
    let thread = std::thread::Builder::new().name("seccomp-log".into());
    thread.stack_size(128 << 10).spawn(supervisor).map(drop)
}

const GIVEN_UP: i32 = -2;

/// Polls: the other one may not even make the call that would wake us.
fn wait_for(listener: &AtomicI32) -> Option<RawFd> {
    loop {
        match listener.load(Ordering::SeqCst) {
            GIVEN_UP => return None,
            -1 => std::thread::sleep(Duration::from_millis(1)),
            descriptor => return Some(descriptor),
        }
    }
}

/// Tells of each different call once. Allocates nothing: the one that waits may hold the allocator's lock.
fn supervise(name: &str, listener: RawFd) {
    let mut told = [(0i32, 0u64); REMEMBERED];
    let mut count = 0;
    while let Some(notification) = sys::next_notification(listener) {
        let call = notification.data;
        let key = (call.nr, discriminant(call.nr, &call.args));
        let known = told.get(..count).unwrap_or_default().contains(&key);
        if !known {
            if let Some(place) = told.get_mut(count) {
                *place = key;
                count = count.saturating_add(1);
            }
            tell(name, &call);
        }
        sys::let_through(listener, notification.id);
    }
}

/// The argument that makes a call another one.
fn discriminant(number: i32, arguments: &[u64; 6]) -> u64 {
    let [first, second, third, ..] = *arguments;
    match libc::c_long::from(number) {
        libc::SYS_ioctl | libc::SYS_fcntl | libc::SYS_futex => second,
        libc::SYS_mmap | libc::SYS_mprotect | libc::SYS_madvise => third,
        libc::SYS_socket | libc::SYS_prctl | libc::SYS_clone | libc::SYS_rt_sigaction => first,
        _ => 0,
    }
}

fn tell(name: &str, call: &libc::seccomp_data) {
    let mut line = Line {
        bytes: [0; 256],
        used: 0,
    };
    let number = call.nr;
    let _ = write!(line, "picovm-jailer: not in the list of {name}: ");
    let _ = match usize::try_from(number).ok().and_then(Sysno::new) {
        Some(known) => line.write_str(known.name()),
        None => write!(line, "system call {number}"),
    };
    let [a, b, c, d, e, f] = call.args;
    let _ = writeln!(line, "({a:#x}, {b:#x}, {c:#x}, {d:#x}, {e:#x}, {f:#x})");
    // SAFETY: it is only written to, and if there is no standard error nothing is told.
    let stderr = unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
    let _ = rustix::io::write(stderr, line.bytes.get(..line.used).unwrap_or_default());
}

struct Line {
    bytes: [u8; 256],
    used: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.used.saturating_add(text.len());
        let room = self.bytes.get_mut(self.used..end).ok_or(std::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}
