//! A container that runs in a VMM process of its own, seen from the process that started it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use picovm_guest_protocol::ContainerExit;
use picovm_vmm::Template;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process, pidfd_open, waitpid};

use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::messages::{self, FromVmm, ToVmm};
use crate::vmm_process;

fn failed(attempted: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::host(attempted)
}

/// How long a VMM process may take to end that is to end: it takes its clone down, which is a matter of milliseconds. One that
/// its guest has taken over may not want to.
const END_MAX: Duration = Duration::from_secs(5);

/// A container in a VMM process of its own. Dropping it ends it.
pub struct RunningContainer {
    socket: UnixStream,
    /// If it is a child of this process, and not of a pool's fork server.
    child: Option<Pid>,
}

impl RunningContainer {
    /// Starts a container in a clone that is forked now. Its standard streams are these descriptors;
    /// [`ContainerOptions::stdin`] says whether the first one is read.
    ///
    /// To be called by a process with one thread: the VMM process is a `fork(2)` of it. Others start containers from a
    /// [`Pool`](crate::Pool), whose fork server is such a process.
    ///
    /// # Errors
    /// [`EngineError::Threads`], [`EngineError::Host`]. What happens in the VMM process is told by
    /// [`RunningContainer::wait`].
    pub fn start(
        template: &Template,
        options: &ContainerOptions,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<Self, EngineError> {
        let (socket, theirs) = UnixStream::pair().map_err(failed("create a socket pair"))?;
        let mut socket = Some(socket);
        let child = vmm_process::fork(|| {
            // Its end is how the VMM process notices that nobody is left.
            socket = None;
            vmm_process::run_at_once(template, options, streams, &theirs);
        })?;
        let socket =
            socket.ok_or_else(|| failed("fork a VMM process")(io::ErrorKind::NotConnected.into()))?;
        Ok(Self {
            socket,
            child: Some(child),
        })
    }

    /// One that was started in a VMM process of a pool.
    pub(crate) fn of_pool(socket: UnixStream) -> Self {
        Self { socket, child: None }
    }

    /// Delivers a signal to the container.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn signal(&self, signal: u8) -> Result<(), EngineError> {
        messages::send(&self.socket, &ToVmm::Signal(signal), &[]).map_err(failed("signal a container"))
    }

    /// Ends the container's clone at once; it counts as ended by this signal.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn kill(&self, signal: u8) -> Result<(), EngineError> {
        messages::send(&self.socket, &ToVmm::Kill(signal), &[]).map_err(failed("end a container"))
    }

    /// Kills the VMM process itself, if it is a child of this one: for one that does not do what [`RunningContainer::kill`] says.
    pub fn kill_vmm_process(&self) {
        if let Some(child) = self.child {
            // It is not reaped yet, so that the id is its own.
            let _ = kill_process(child, Signal::KILL);
        }
    }

    /// Waits until the container has ended and every byte of its output is out.
    ///
    /// # Errors
    /// [`EngineError::Vmm`] if its clone ended before it told how the container did.
    pub fn wait(mut self) -> Result<ContainerExit, EngineError> {
        let told = messages::receive(&self.socket);
        let ended = self.reap();
        match told {
            Ok(Some((FromVmm::Exit(exit), _))) => Ok(exit),
            Ok(Some((FromVmm::Failed(reason), _))) => Err(EngineError::Vmm(reason)),
            Ok(Some((FromVmm::Parked, _)) | None) => Err(EngineError::Vmm(ended)),
            Err(error) => Err(EngineError::Vmm(error.to_string())),
        }
    }

    /// Waits for the end of a VMM process that is a child; tells how it ended.
    fn reap(&mut self) -> String {
        // It ends when nobody listens any more, if it has not.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if self.child.is_some_and(|child| !ends_within(child, END_MAX)) {
            self.kill_vmm_process();
        }
        let status = self.child.take().and_then(|child| {
            loop {
                match waitpid(Some(child), WaitOptions::empty()) {
                    Err(rustix::io::Errno::INTR) => {}
                    ended => break ended.ok().flatten(),
                }
            }
        });
        how_it_ended(status.map(|(_, status)| status))
    }
}

/// Whether a child ends by itself in time.
fn ends_within(child: Pid, limit: Duration) -> bool {
    // Without a descriptor, on a host before Linux 5.3, it is trusted to end.
    let Ok(descriptor) = pidfd_open(child, PidfdFlags::empty()) else {
        return true;
    };
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) | Err(_) => return true,
        }
    }
}

/// How a VMM process ended that has said nothing.
fn how_it_ended(status: Option<WaitStatus>) -> String {
    match status.and_then(WaitStatus::terminating_signal) {
        Some(libc::SIGSYS) => {
            "its VMM process made a system call that its jail does not allow, and was killed for it".into()
        }
        Some(signal) => format!("its VMM process was ended by signal {signal}"),
        None => "its VMM process has ended".into(),
    }
}

impl Drop for RunningContainer {
    fn drop(&mut self) {
        self.reap();
    }
}

impl AsFd for RunningContainer {
    /// Readable when the container has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
