//! A helper process (QEMU, virtiofsd): started so that it cannot outlive the runner, ended by its own handle.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{CpuSet, sched_getaffinity};

/// The one processor on which all helpers of this runner run.
///
/// QEMU translates an emulated machine that it runs on one thread without memory barriers, for within that thread there
/// is nothing to order. virtiofsd and QEMU's own device threads look at the queues in its memory from outside, though:
/// on another processor they and the emulated kernel can each miss what the other has just written (store before load,
/// the one reordering that x86 does). The notification is then lost, and a read of a file never returns. On one
/// processor that cannot happen. Runners are spread by their process number.
fn common_cpu() -> Option<CpuSet> {
    let allowed = sched_getaffinity(None).ok()?;
    let usable: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let runner = usize::try_from(std::process::id()).ok()?;
    let mut one = CpuSet::new();
    one.set(*usable.get(runner.checked_rem(usable.len())?)?);
    Some(one)
}

/// A running helper. Dropping it kills and reaps it.
pub struct Helper {
    name: &'static str,
    /// Refers to this very process, whatever happens to its number.
    pidfd: OwnedFd,
    waiter: Option<thread::JoinHandle<()>>,
    /// What it prints; taken once.
    pub stderr: Option<ChildStderr>,
}

impl Helper {
    /// Starts `command` with `inherit` open in it under the same numbers. `on_exit` hears of its end, from another thread.
    ///
    /// Call this from the main thread only: the death signal is tied to the thread that started the helper.
    pub fn start(
        name: &'static str,
        mut command: Command,
        inherit: Vec<OwnedFd>,
        on_exit: impl FnOnce(io::Result<ExitStatus>) + Send + 'static,
    ) -> Result<Self> {
        let program = command.get_program().to_owned();
        let runner = rustix::process::getpid();
        let cpu = common_cpu();
        let numbers: Vec<_> = inherit.iter().map(|fd| fd.as_raw_fd()).collect();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // Its own process group: Ctrl-C on the terminal is for the runner, which then ends its helpers in order.
        command.process_group(0);
        // SAFETY: between fork and exec only system calls are made, no memory is allocated and no lock is taken. The
        // descriptors are open: `inherit` is dropped after the spawn.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // The runner may have died before the line above.
                if rustix::process::getppid() != Some(runner) {
                    return Err(io::Error::other("the runner has ended"));
                }
                if let Some(cpu) = &cpu {
                    rustix::thread::sched_setaffinity(None, cpu)?;
                }
                for number in &numbers {
                    let fd = BorrowedFd::borrow_raw(*number);
                    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
                }
                Ok(())
            });
        }
        let mut child: Child = command
            .spawn()
            .with_context(|| format!("cannot start {name} ({})", program.to_string_lossy()))?;
        drop(inherit);
        let stderr = child.stderr.take();
        let pidfd = pidfd_open(rustix::process::Pid::from_child(&child), PidfdFlags::empty());
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e).with_context(|| format!("cannot watch {name}"));
            }
        };
        let waiter = thread::spawn(move || on_exit(child.wait()));
        Ok(Self {
            name,
            pidfd,
            waiter: Some(waiter),
            stderr,
        })
    }

    /// Its name, for messages.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Kills it and waits until it is gone. Returns at once if it is gone already.
    pub fn end(&mut self) {
        // Fails only if it has ended, which is what is wanted.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Some(waiter) = self.waiter.take() {
            let _ = waiter.join();
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.end();
    }
}
