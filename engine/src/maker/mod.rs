//! Making templates, seen from who needs one: the machine of a template is booted, and saved, in a jailed process that a
//! `picovm-vmm make-template` starts. What it writes is looked at here before it becomes a template.

mod jailed;
mod process;
mod supervision;

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use picovm_guest_protocol::ContainerSpec;
use picovm_vmm::MachineConfig;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::confinement::Confinement;
use crate::error::EngineError;
use crate::messages;
use crate::pool::{self, wait_readable};
use crate::warming::Until;

pub use process::serve;

/// The first argument of `picovm-vmm` for this.
pub const MAKE_TEMPLATE: &str = "make-template";
/// How long a process may take in all, saving included, before it is killed.
const MAKE_MAX: Duration = Duration::from_secs(180);
/// How long it may take to end when it has said that it is done.
const END_MAX: Duration = Duration::from_secs(5);
/// How long after the time that a process has its starter may take to say that it has killed it.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// What a process is to do, in the order in which a template of an image comes about. The descriptors of the files that it
/// fills come with it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Boot a machine to its first freeze point and save it: memory, then state.
    Boot {
        /// The machine.
        config: MachineConfig,
        /// Where the files are, for messages.
        directory: PathBuf,
    },
    /// Let a clone of a base go on to its freeze point with an image, and save it: memory, then state.
    Image {
        /// The base.
        base: PathBuf,
        /// The image.
        image: PathBuf,
        /// Where the files are, for messages.
        directory: PathBuf,
    },
    /// Start an application in a clone of an image's template, and save that when it is warm: memory, then state.
    Warm {
        /// The image's template.
        template: PathBuf,
        /// The application.
        container: Box<ContainerSpec>,
        /// Its host name, if it is to have one.
        hostname: Option<String>,
        /// What says that it is warm.
        until: Until,
        /// How long it may take to that.
        timeout: Duration,
        /// Where the files are, for messages.
        directory: PathBuf,
    },
    /// Run a container, and write which pages that touched.
    Try {
        /// The template.
        template: PathBuf,
    },
}

impl Order {
    /// How long carrying it out may take.
    pub(crate) fn limit(&self) -> Duration {
        match self {
            Self::Warm { timeout, .. } => MAKE_MAX.saturating_add(*timeout),
            _ => MAKE_MAX,
        }
    }
}

/// From the one who starts the jailed process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromMaker {
    /// The machine has reached its freeze point; it is being saved.
    FreezePoint,
    /// The process has ended, and its files are written, or are not for this reason.
    Ended(Result<(), String>),
}

fn failed(attempted: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::host(attempted)
}

/// Who starts jailed processes that make templates: a process with one thread, which this one need not be. Dropping it ends it,
/// and whatever it has started.
pub(crate) struct Maker {
    control: UnixStream,
    process: Child,
}

impl Maker {
    /// # Errors
    /// [`EngineError::NoVmm`], [`EngineError::Host`].
    pub(crate) fn start(confinement: Confinement) -> Result<Self, EngineError> {
        let (control, theirs) = UnixStream::pair().map_err(failed("create a socket pair"))?;
        let process = pool::program(Some(MAKE_TEMPLATE), confinement, theirs)?
            .spawn()
            .map_err(failed("start picovm-vmm, which makes templates"))?;
        Ok(Self { control, process })
    }

    /// Has an order carried out, into these files. When it returns nobody writes to them any more.
    ///
    /// # Errors
    /// [`EngineError::Vmm`] with what went wrong in the process, or how that ended; [`EngineError::Host`].
    pub(crate) fn carry_out(
        &mut self,
        order: &Order,
        files: &[BorrowedFd<'_>],
        at_freeze_point: &mut dyn FnMut(),
    ) -> Result<(), EngineError> {
        let gone =
            || EngineError::Vmm("cannot make the template: picovm-vmm, which makes it, has ended".into());
        messages::send(&self.control, order, files).map_err(|_| gone())?;
        loop {
            let told = wait_readable(&self.control, order.limit().saturating_add(ANSWER_MAX))
                .and_then(|()| messages::receive(&self.control));
            match told {
                Ok(Some((FromMaker::FreezePoint, _))) => at_freeze_point(),
                Ok(Some((FromMaker::Ended(ended), _))) => return ended.map_err(EngineError::Vmm),
                Ok(None) => return Err(gone()),
                Err(error) => {
                    // Its children end with it.
                    let _ = self.process.kill();
                    return Err(failed("wait for the process that makes a template")(error));
                }
            }
        }
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        let _ = self.control.shutdown(std::net::Shutdown::Both);
        // It ends at once, unless it has a process to take down. One that cannot be waited for is not waited for long.
        let ended = pidfd_open(Pid::from_child(&self.process), PidfdFlags::empty())
            .map_err(io::Error::from)
            .and_then(|process| wait_readable(&process, END_MAX.saturating_add(ANSWER_MAX)));
        if ended.is_err() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}
