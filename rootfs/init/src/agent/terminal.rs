//! Terminals: a pair of which the agent has the master and a process the other end.

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

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use picovm_guest_protocol::{StartFailure, TerminalSize};
use rustix::fs::Uid;
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::start::failure;

/// The master of a pseudoterminal.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
}

impl Terminal {
    /// Makes one whose other end nobody has opened.
    pub fn open() -> rustix::io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        Ok(Self { master })
    }

    /// Its descriptor.
    pub fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Another descriptor of it.
    pub fn share(&self) -> rustix::io::Result<OwnedFd> {
        rustix::io::fcntl_dupfd_cloexec(&self.master, 0)
    }

    /// Sets its size; who runs in it gets `SIGWINCH`.
    pub fn resize(&self, size: TerminalSize) -> rustix::io::Result<()> {
        let size = Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.master, size)
    }

    /// Makes its other end the controlling terminal of this process, which leads a session, and its three streams.
    pub fn attach(&self, size: TerminalSize, owner: Uid) -> Result<(), StartFailure> {
        let because = |what: &'static str| {
            move |error: Errno| failure(format!("open a terminal: {what}"), error.raw_os_error(), error)
        };
        self.resize(size).map_err(because("set its size"))?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let end = rustix::pty::ioctl_tiocgptpeer(&self.master, flags).map_err(because("open it"))?;
        rustix::process::ioctl_tiocsctty(&end).map_err(because("control it"))?;
        rustix::fs::fchown(&end, Some(owner), None).map_err(because("give it to its user"))?;
        rustix::stdio::dup2_stdin(&end).map_err(because("connect standard input"))?;
        rustix::stdio::dup2_stdout(&end).map_err(because("connect standard output"))?;
        rustix::stdio::dup2_stderr(&end).map_err(because("connect standard error"))
    }

    /// Makes it what `/dev/console` is, as programs like init systems expect. It is no reason not to start.
    pub fn be_console(&self) {
        if let Ok(path) = rustix::pty::ptsname(&self.master, Vec::new())
            && let Err(error) = rustix::mount::mount_bind(path.as_c_str(), c"/dev/console")
        {
            crate::console::report(&format!("make the terminal the console: {error}"));
        }
    }
}
