//! A program in a jail: process 1 of it, which is ours, and the program as its child.
//!
//! A program that is process 1 itself would not get the signals that it does not handle, and would have to reap orphans.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};

use crate::error::JailError;
use crate::policy::SeccompMode;
use crate::seccomp::ProgramFilter;
use crate::sys::{self, Forked, SharedWord};

/// A program and its arguments.
pub struct Program {
    /// Where it may be, in order.
    paths: Vec<CString>,
    name: String,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// Where its filter is heard of, for the processes forked from here.
    listener: Arc<SharedWord>,
}

/// Statuses as a shell has them.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
const OWN_ERROR: u8 = 125;

impl Program {
    /// A program by its path, or looked for in `PATH`, with the environment of the calling process. What is found, is found in the
    /// jail.
    ///
    /// # Errors
    /// [`JailError::Policy`] for a zero byte in what is given; [`JailError::Host`].
    pub fn new(name: &OsStr, arguments: &[impl AsRef<OsStr>]) -> Result<Self, JailError> {
        let text = |text: &OsStr| {
            CString::new(text.as_bytes())
                .map_err(|_| JailError::Policy("an argument has a zero byte in it".into()))
        };
        let paths: Vec<PathBuf> = if name.as_bytes().contains(&b'/') {
            vec![name.into()]
        } else {
            let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
            std::env::split_paths(&path)
                .map(|directory| directory.join(name))
                .collect()
        };
        let mut all = vec![text(name)?];
        for argument in arguments {
            all.push(text(argument.as_ref())?);
        }
        let mut environment = Vec::new();
        for (key, value) in std::env::vars_os() {
            environment.push(text(&[key.as_os_str(), value.as_os_str()].join(OsStr::new("=")))?);
        }
        Ok(Self {
            paths: paths
                .iter()
                .map(|path: &PathBuf| text(Path::as_os_str(path)))
                .collect::<Result<_, _>>()?,
            name: name.to_string_lossy().into_owned(),
            arguments: all,
            environment,
            listener: Arc::new(SharedWord::new().map_err(JailError::host("map a page"))?),
        })
    }

    /// Executes it; returns only if that is not possible.
    fn execute(&self) -> u8 {
        let pointers = |all: &[CString]| -> Vec<*const libc::c_char> {
            all.iter()
                .map(|text| text.as_ptr())
                .chain([std::ptr::null()])
                .collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let mut last = io::Error::from_raw_os_error(libc::ENOENT);
        for path in &self.paths {
            let error = sys::execute(path, &arguments, &environment);
            if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) {
                last = error;
            }
        }
        if last.raw_os_error() == Some(libc::ENOENT) {
            eprintln!(
                "picovm-jailer: there is no {} in the jail (or not what it needs to start: its interpreter and libraries); \
                 the policy's `root` lists what there is",
                self.name
            );
            return NOT_FOUND;
        }
        eprintln!("picovm-jailer: cannot execute {}: {last}", self.name);
        NOT_EXECUTABLE
    }
}

/// Runs a program to its end, under its filter, passing on every signal that arrives; its status, 128 + N if signal N ended it. To
/// be called by a confined process, with all signals blocked: it is then process 1 of the jail.
pub(crate) fn run_program(program: &Program, filter: &ProgramFilter) -> u8 {
    match start(program, filter) {
        Ok(child) => serve(child),
        Err(error) => {
            eprintln!(
                "picovm-jailer: cannot start {} in the jail: {error}",
                program.name
            );
            OWN_ERROR
        }
    }
}

fn start(program: &Program, filter: &ProgramFilter) -> io::Result<Pid> {
    let log = filter.mode() == SeccompMode::Log;
    let listener = (*program.listener).as_ref();
    listener.store(-1, Ordering::SeqCst);
    // The descriptor of a filter that hands calls over appears in this process too.
    let flags = if log { libc::CLONE_FILES } else { 0 };
    // SAFETY: this process has one thread.
    let child = match unsafe { sys::fork(flags, None) }? {
        Forked::Parent(child, _) => child,
        Forked::Child => {
            let filtered = match filter.mode() {
                SeccompMode::Kill => filter.apply(),
                SeccompMode::Log => filter.hand_over(listener),
                SeccompMode::Off => Ok(()),
            };
            if let Err(error) = filtered {
                eprintln!("picovm-jailer: cannot install the filter of system calls: {error}");
                sys::exit_now(OWN_ERROR);
            }
            sys::reset_sigpipe();
            sys::block_signals(false);
            sys::exit_now(program.execute())
        }
    };
    match filter.mode() {
        // What the program can make of this process, if it can, is no more than itself.
        SeccompMode::Kill => filter.apply()?,
        SeccompMode::Log => ProgramFilter::tell(program.listener.clone())?,
        SeccompMode::Off => {}
    }
    Ok(child)
}

/// Passes signals on and reaps orphans until the program has ended.
fn serve(program: Pid) -> u8 {
    loop {
        let signal = sys::next_signal();
        if signal != libc::SIGCHLD {
            let _ = sys::signal_process(program, signal);
            continue;
        }
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == program => return status_of(&status),
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => break,
                Err(_) => return OWN_ERROR,
            }
        }
    }
}

fn status_of(status: &WaitStatus) -> u8 {
    let ended = status
        .exit_status()
        .or_else(|| Some(status.terminating_signal()?.saturating_add(128)));
    ended.map_or(OWN_ERROR, |status| status as u8)
}

/// The signals that arrive at a process which passes them on: blocked from here on, for it and what it forks.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks all, and opens what they are read from.
    ///
    /// # Errors
    /// As signalfd(2).
    pub fn block() -> io::Result<Self> {
        sys::block_signals(true);
        sys::signal_descriptor().map(Self)
    }

    /// The next one that has arrived and is to be passed on: all but SIGCHLD.
    #[must_use]
    pub fn take(&self) -> Option<i32> {
        /// `struct signalfd_siginfo`: the number is its first field.
        const SIZE: usize = 128;
        let mut record = [0u8; SIZE];
        loop {
            match rustix::io::read(&self.0, &mut record) {
                Ok(SIZE) => {}
                Err(Errno::INTR) => continue,
                _ => return None,
            }
            let signal = i32::from_ne_bytes(*record.first_chunk()?);
            if signal != libc::SIGCHLD {
                return Some(signal);
            }
        }
    }
}

impl AsFd for Signals {
    /// Readable when one has arrived.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
