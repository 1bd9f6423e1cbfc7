//! A container that runs in a VMM process of its own, seen from the process that started it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use picovm_guest_protocol::ContainerExit;
use picovm_vmm::Template;

use crate::confinement::{Confinement, Forker, VmmProcess};
use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::messages::{self, FromVmm, ToVmm};
use crate::pool::Server;
use crate::vmm_process;

fn failed(attempted: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::host(attempted)
}

/// Starts containers of one template, each in a clone that is forked at the request, in a VMM process of its own.
pub struct Launcher<'template> {
    template: &'template Template,
    forker: Forker,
}

impl<'template> Launcher<'template> {
    /// Compiles the filters of the jail, if there is to be one.
    ///
    /// # Errors
    /// [`EngineError::Jail`].
    pub fn new(template: &'template Template, confinement: Confinement) -> Result<Self, EngineError> {
        Ok(Self {
            template,
            forker: Forker::new(template, confinement)?,
        })
    }

    /// Makes ahead what `count` jails need at once.
    ///
    /// # Errors
    /// [`EngineError::Jail`].
    pub fn prepare(&mut self, count: usize) -> Result<(), EngineError> {
        self.forker.prepare(count)
    }

    /// Starts a container. Its standard streams are these descriptors; [`ContainerOptions::stdin`] says whether the first one is
    /// read.
    ///
    /// To be called by a process with one thread: the VMM process is a `fork(2)` of it. Others start containers from a
    /// [`Pool`](crate::Pool), whose fork server is such a process.
    ///
    /// # Errors
    /// [`EngineError::Threads`], [`EngineError::Jail`], [`EngineError::Host`]. What happens in the VMM process is told by
    /// [`RunningContainer::wait`].
    pub fn start(
        &mut self,
        options: &ContainerOptions,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<RunningContainer, EngineError> {
        let (socket, theirs) = UnixStream::pair().map_err(failed("create a socket pair"))?;
        let mut socket = Some(socket);
        let mut keep = vec![theirs.as_fd()];
        keep.extend(streams);
        keep.extend(options.console_log.as_ref().map(AsFd::as_fd));
        let template = self.template;
        let child = self.forker.fork(template, &keep, |filters| {
            // Its end is how the VMM process notices that nobody is left.
            socket = None;
            vmm_process::run_at_once(template, options, streams, &theirs, filters);
        })?;
        let socket =
            socket.ok_or_else(|| failed("fork a VMM process")(io::ErrorKind::NotConnected.into()))?;
        Ok(RunningContainer {
            socket,
            parent: Parent::Here(Some(child)),
        })
    }
}

/// How long a VMM process may take to end that is to end: it takes its clone down, which is a matter of milliseconds. One that
/// its guest has taken over may not want to.
const END_MAX: Duration = Duration::from_secs(5);

/// A container in a VMM process of its own. Dropping it ends it.
pub struct RunningContainer {
    socket: UnixStream,
    parent: Parent,
}

/// Whose child its VMM process is.
enum Parent {
    /// This process's. Absent once it is reaped.
    Here(Option<VmmProcess>),
    /// A pool's fork server's, which lives until the last container of the pool has ended.
    Server(#[expect(dead_code, reason = "dropping it waits for the server")] Arc<Server>),
}

impl RunningContainer {
    /// Starts a container in a clone that is forked now: see [`Launcher`], which keeps what can be used again.
    ///
    /// # Errors
    /// As [`Launcher::new`] and [`Launcher::start`].
    pub fn start(
        template: &Template,
        options: &ContainerOptions,
        streams: [BorrowedFd<'_>; 3],
        confinement: Confinement,
    ) -> Result<Self, EngineError> {
        Launcher::new(template, confinement)?.start(options, streams)
    }

    /// One that was started in a VMM process of a pool.
    pub(crate) fn of_pool(socket: UnixStream, server: Arc<Server>) -> Self {
        Self {
            socket,
            parent: Parent::Server(server),
        }
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
        if let Parent::Here(Some(child)) = &self.parent {
            child.kill();
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
        let child = match &mut self.parent {
            Parent::Here(child) => child.take(),
            Parent::Server(_) => None,
        };
        match child {
            Some(child) => {
                // It ends when nobody listens any more, if it has not.
                let _ = self.socket.shutdown(std::net::Shutdown::Both);
                if !child.ends_within(END_MAX) {
                    child.kill();
                }
                child.wait()
            }
            None => "its VMM process has ended".into(),
        }
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
