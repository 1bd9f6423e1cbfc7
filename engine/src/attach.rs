//! Connects a container's streams with descriptors of the host until it ends.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use picovm_guest_protocol::ContainerExit;
use picovm_guest_protocol::frame::MAIN;

use crate::container::Container;
use crate::error::EngineError;
use crate::serve::{Command, Director, News, Service};
use crate::streams::{Channel, Descriptor};

/// What a container's streams are connected with.
pub struct Stdio<'fd> {
    /// Read, if the container was started with its standard input connected.
    pub stdin: BorrowedFd<'fd>,
    /// Written.
    pub stdout: BorrowedFd<'fd>,
    /// Written.
    pub stderr: BorrowedFd<'fd>,
    /// Readable when something is to interrupt the wait; see [`Container::attach`].
    pub wake: Option<BorrowedFd<'fd>>,
    /// When the container is ended with [`Interruption::Kill`].
    pub deadline: Option<Instant>,
}

impl Stdio<'static> {
    /// The streams of this process.
    #[must_use]
    pub fn inherit() -> Self {
        Self {
            stdin: rustix::stdio::stdin(),
            stdout: rustix::stdio::stdout(),
            stderr: rustix::stdio::stderr(),
            wake: None,
            deadline: None,
        }
    }
}

/// What is to happen to a container that is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interruption {
    /// Deliver this signal to it.
    Signal(u8),
    /// End its clone at once; it counts as ended by this signal.
    Kill(u8),
}

/// Why [`Container::attach`] asks what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// [`Stdio::wake`] is readable.
    Descriptor,
    /// [`Stdio::deadline`] has passed.
    Deadline,
}

/// One that is asked what to do with the main process.
struct Asked<'asked>(&'asked mut dyn FnMut(Wake) -> Option<Interruption>);

impl Director for Asked<'_> {
    fn wake(&mut self, why: Wake) -> Option<Command> {
        Some(match (self.0)(why)? {
            Interruption::Signal(signal) => Command::Signal {
                process: MAIN,
                signal,
            },
            Interruption::Kill(signal) => Command::Kill(signal),
        })
    }

    fn news(&mut self, _: News) {}
}

impl Container {
    /// Serves the container's streams until it has ended and every byte of its output is out, then ends its clone.
    ///
    /// When [`Stdio::wake`] becomes readable or [`Stdio::deadline`] passes, `interrupted` is asked what to do; it has
    /// to make `wake` unreadable again.
    ///
    /// An output that cannot be written any more (a closed pipe) is closed in the container too, whose next write to
    /// it fails as it would without a VM in between.
    ///
    /// # Errors
    /// [`EngineError::CloneEnded`] if the clone ends without saying how its container did (kernel panic, reboot),
    /// [`EngineError::Protocol`] and [`EngineError::Credit`] for an agent that misbehaves, [`EngineError::Host`].
    pub fn attach(
        mut self,
        stdio: Stdio<'_>,
        interrupted: &mut dyn FnMut(Wake) -> Option<Interruption>,
    ) -> Result<ContainerExit, EngineError> {
        self.serve_stdio(stdio, interrupted)
    }

    /// As [`Container::attach`], and leaves the clone to be looked at.
    pub(crate) fn serve_stdio(
        &mut self,
        stdio: Stdio<'_>,
        interrupted: &mut dyn FnMut(Wake) -> Option<Interruption>,
    ) -> Result<ContainerExit, EngineError> {
        let stdin = Some(Descriptor::Borrowed(stdio.stdin)).filter(|_| self.stdin);
        let service = Service {
            main: Channel::new(
                MAIN,
                stdin,
                Descriptor::Borrowed(stdio.stdout),
                Descriptor::Borrowed(stdio.stderr),
            ),
            layer: self.layer.take(),
            wake: stdio.wake.map(Descriptor::Borrowed),
            deadline: stdio.deadline,
        };
        self.serve(service, &mut Asked(interrupted))
    }
}
