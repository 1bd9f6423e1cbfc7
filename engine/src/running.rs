//! A container that runs in a VMM process of its own, seen from the process that started it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use picovm_guest_protocol::{ContainerExit, Helper, ProcessSpec, TerminalSize};
use picovm_vmm::Template;

use crate::confinement::{Confinement, Forker, VmmProcess};
use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::messages::{self, FromVmm, ToVmm};
use crate::pool::Server;
use crate::share::ShareServer;
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
    parent: Parent,
    /// Serves the directories that it shares with the host, if it does. It ends with the VMM process, and after it.
    _share: Option<ShareServer>,
    /// Where a share server would be connected with a clone that was parked, if it has none.
    no_share: Option<OwnedFd>,
}

/// What there is to tell of a container that runs.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// Its main process has ended, and every byte of its output is out. The clone ends too, unless
    /// [`ContainerOptions::stay`].
    Exit(ContainerExit),
    /// Another process has ended, and every byte of its output is out. Its number is free.
    ProcessExit(u16, ContainerExit),
    /// Memory has run out, and the guest has killed a process of the container for it. Told once.
    OutOfMemory,
    /// Its program runs. Only with [`ContainerOptions::announce`].
    Started,
    /// Its clone stands still, or goes on, as it was told to.
    Paused(bool),
    /// There is no clone any more, for this reason.
    Gone(String),
}

/// Whose child its VMM process is.
enum Parent {
    /// This process's. Absent once it is reaped.
    Here(Option<VmmProcess>),
    /// A pool's fork server's, which lives until the last container of the pool has ended.
    Server(#[expect(dead_code, reason = "dropping it waits for the server")] Arc<Server>),
    /// The fork server's of a pool that another process has.
    Elsewhere,
}

impl RunningContainer {
    /// Starts a container in a clone that is forked now. Its standard streams are these descriptors;
    /// [`ContainerOptions::stdin`] says whether the first one is read.
    ///
    /// To be called by a process with one thread: the VMM process is a `fork(2)` of it. Others start containers from a
    /// [`Pool`](crate::Pool), whose fork server is such a process.
    ///
    /// # Errors
    /// [`EngineError::Threads`], [`EngineError::Jail`], [`EngineError::Host`]. What happens in the VMM process is told by
    /// [`RunningContainer::wait`].
    pub fn start(
        template: &Template,
        options: &ContainerOptions,
        streams: [BorrowedFd<'_>; 3],
        confinement: Confinement,
    ) -> Result<Self, EngineError> {
        let (socket, theirs) = UnixStream::pair().map_err(failed("create a socket pair"))?;
        let mut socket = Some(socket);
        let (share, server) = match options.shared.as_slice() {
            [] => (None, None),
            shared => {
                let (share, server) = ShareServer::start(shared, confinement)?;
                (Some(share), Some(server))
            }
        };
        // Standard error too: its number must not become that of another file, into which a message would go.
        let mut keep = vec![theirs.as_fd(), rustix::stdio::stderr()];
        keep.extend(streams);
        keep.extend(options.console_log.as_ref().map(AsFd::as_fd));
        keep.extend(options.layer.as_ref().map(AsFd::as_fd));
        keep.extend(options.storage.as_ref().map(AsFd::as_fd));
        keep.extend(share.as_ref().map(AsFd::as_fd));
        let child = Forker::new(template, options.storage.as_ref(), confinement)?.fork(
            template,
            &keep,
            |filters| {
                // Its end is how the VMM process notices that nobody is left.
                socket = None;
                vmm_process::run_at_once(template, options, share.as_ref(), streams, &theirs, filters);
            },
        )?;
        let socket =
            socket.ok_or_else(|| failed("fork a VMM process")(io::ErrorKind::NotConnected.into()))?;
        Ok(Self {
            socket,
            parent: Parent::Here(Some(child)),
            _share: server,
            no_share: None,
        })
    }

    /// One that was started in a VMM process of a pool.
    pub(crate) fn of_pool(socket: UnixStream, share: Option<OwnedFd>, server: Arc<Server>) -> Self {
        Self {
            socket,
            parent: Parent::Server(server),
            _share: None,
            no_share: share,
        }
    }

    /// One that was started in a VMM process of a pool that another process has; with its share server, or where one would be connected.
    pub(crate) fn of_standing_pool(socket: UnixStream, share: Result<ShareServer, OwnedFd>) -> Self {
        let (share, no_share) = match share {
            Ok(server) => (Some(server), None),
            Err(end) => (None, Some(end)),
        };
        Self {
            socket,
            parent: Parent::Elsewhere,
            _share: share,
            no_share,
        }
    }

    /// Its start is over: what its clone was given for a share server that it does not have is closed. The clone is woken by that, which
    /// would hold the start up.
    pub(crate) fn settle(&mut self) {
        self.no_share = None;
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

    /// Kills the VMM process itself: for one that does not do what [`RunningContainer::kill`] says. A pool's fork server does that
    /// a few seconds after nobody listens to it any more.
    pub fn kill_vmm_process(&self) {
        match &self.parent {
            Parent::Here(Some(child)) => child.kill(),
            Parent::Here(None) => {}
            Parent::Server(_) | Parent::Elsewhere => {
                let _ = self.socket.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// Delivers a signal to one of its processes and that process's group.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn signal_process(&self, process: u16, signal: u8) -> Result<(), EngineError> {
        let message = ToVmm::SignalProcess(process, signal);
        messages::send(&self.socket, &message, &[]).map_err(failed("signal a process of a container"))
    }

    /// Begins a process in the container. Its standard streams are these descriptors. `process` is a number that no other has, but
    /// 0 and 65,535; [`News::ProcessExit`] frees it.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn exec(
        &self,
        process: u16,
        spec: &ProcessSpec,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<(), EngineError> {
        let message = ToVmm::Exec(process, spec.clone());
        messages::send(&self.socket, &message, &streams).map_err(failed("begin a process in a container"))
    }

    /// Has the agent do something, as a process with streams and a number like any other.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn help(
        &self,
        process: u16,
        helper: &Helper,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<(), EngineError> {
        let message = ToVmm::Help(process, helper.clone());
        messages::send(&self.socket, &message, &streams).map_err(failed("ask a container's agent"))
    }

    /// Tells one of its processes that its terminal has this size. Without effect where it has none.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn resize(&self, process: u16, size: TerminalSize) -> Result<(), EngineError> {
        let message = ToVmm::Resize(process, size);
        messages::send(&self.socket, &message, &[]).map_err(failed("resize a container's terminal"))
    }

    /// Lets its clone stand still; [`News::Paused`] tells when it does.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn pause(&self) -> Result<(), EngineError> {
        messages::send(&self.socket, &ToVmm::Pause, &[]).map_err(failed("pause a container"))
    }

    /// Lets its clone go on; [`News::Paused`] tells when it does.
    ///
    /// # Errors
    /// [`EngineError::Host`] if its VMM process has ended.
    pub fn resume(&self) -> Result<(), EngineError> {
        messages::send(&self.socket, &ToVmm::Resume, &[]).map_err(failed("resume a container"))
    }

    /// Waits for the next thing that there is to tell; after [`News::Gone`] nothing more comes.
    pub fn news(&mut self) -> News {
        match messages::receive(&self.socket) {
            Ok(Some((told, _))) => match told {
                FromVmm::Exit(exit) => News::Exit(exit),
                FromVmm::ProcessExit(process, exit) => News::ProcessExit(process, exit),
                FromVmm::OutOfMemory => News::OutOfMemory,
                FromVmm::Started => News::Started,
                FromVmm::Paused(paused) => News::Paused(paused),
                FromVmm::Failed(reason) => News::Gone(reason),
                FromVmm::Parked => News::Gone(self.reap()),
            },
            Ok(None) => News::Gone(self.reap()),
            // It has ended without looking at all that it was told.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => News::Gone(self.reap()),
            Err(error) => News::Gone(error.to_string()),
        }
    }

    /// Waits until the container has ended and every byte of its output is out.
    ///
    /// # Errors
    /// [`EngineError::Vmm`] if its clone ended before it told how the container did.
    pub fn wait(mut self) -> Result<ContainerExit, EngineError> {
        let told = loop {
            match self.news() {
                News::Exit(exit) => break Ok(exit),
                News::Gone(reason) => break Err(EngineError::Vmm(reason)),
                News::ProcessExit(..) | News::OutOfMemory | News::Started | News::Paused(_) => {}
            }
        };
        self.reap();
        told
    }

    /// Waits for the end of a VMM process that is a child; tells how it ended.
    fn reap(&mut self) -> String {
        let child = match &mut self.parent {
            Parent::Here(child) => child.take(),
            Parent::Server(_) | Parent::Elsewhere => None,
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
    /// Readable when there is something to tell: [`RunningContainer::news`] then does not wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
