//! A confined process, as the one that spawned it sees it.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, waitid};

use crate::error::JailError;
use crate::jailer::Shared;
use crate::slot::Slot;
use crate::sys;

/// How a confined process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Code(u8),
    /// By this signal; 31 (SIGSYS) for a system call that is not in the list.
    Signal(i32),
}

/// A confined process. Dropping it ends it. Its descriptor is readable when it has ended.
pub struct Jail {
    pid: Pid,
    descriptor: OwnedFd,
    slot: Option<Slot>,
    shared: Arc<Shared>,
    ended: bool,
}

/// Status of a process that could not be confined, together with a complaint.
pub(crate) const NOT_CONFINED: u8 = 125;

impl Jail {
    pub(crate) fn new(pid: Pid, descriptor: OwnedFd, slot: Slot, shared: Arc<Shared>) -> Self {
        Self {
            pid,
            descriptor,
            slot: Some(slot),
            shared,
            ended: false,
        }
    }

    /// Its process id, as the caller's pid namespace has it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends it a signal. In a pid namespace of its own it gets only those that it handles, and SIGKILL and SIGSTOP.
    ///
    /// # Errors
    /// [`JailError::Host`] if it has ended.
    pub fn signal(&self, signal: i32) -> Result<(), JailError> {
        sys::send_signal(self.descriptor.as_fd(), signal).map_err(JailError::host("signal a jail"))
    }

    /// Ends it, and all that it has started. [`Jail::wait`] tells when it is gone.
    pub fn kill(&self) {
        if let Some(cgroup) = self.slot.as_ref().and_then(|slot| slot.cgroup.as_ref()) {
            cgroup.kill();
        }
        let _ = sys::send_signal(self.descriptor.as_fd(), libc::SIGKILL);
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// [`JailError::Confine`] if it could not be confined and ran nothing; [`JailError::Host`] if the caller ignores SIGCHLD.
    pub fn wait(mut self) -> Result<Ended, JailError> {
        let status = reap(&self.descriptor)?;
        self.end(&status)
    }

    /// How it has ended, if it has.
    ///
    /// # Errors
    /// As [`Jail::wait`].
    pub fn try_wait(&mut self) -> Result<Option<Ended>, JailError> {
        match poll(&self.descriptor, WaitIdOptions::EXITED | WaitIdOptions::NOHANG)? {
            Some(status) => self.end(&status).map(Some),
            None => Ok(None),
        }
    }

    fn end(&mut self, status: &WaitIdStatus) -> Result<Ended, JailError> {
        self.ended = true;
        let complaint = self.slot.as_mut().and_then(|slot| {
            let mut bytes = [0; 512];
            let count = slot.complaint.0.read(&mut bytes).ok()?;
            decode_complaint(bytes.get(..count)?)
        });
        self.give_back();
        let code = status.exit_status().map(|code| code as u8);
        match (code, complaint) {
            (Some(NOT_CONFINED), Some(complaint)) => Err(complaint),
            (Some(code), _) => Ok(Ended::Code(code)),
            (None, _) => Ok(Ended::Signal(
                status.terminating_signal().unwrap_or(libc::SIGKILL),
            )),
        }
    }

    fn give_back(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.shared.give_back(slot);
        }
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
            let _ = reap(&self.descriptor);
            self.give_back();
        }
    }
}

impl AsFd for Jail {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn poll(descriptor: &OwnedFd, options: WaitIdOptions) -> Result<Option<WaitIdStatus>, JailError> {
    loop {
        match waitid(WaitId::PidFd(descriptor.as_fd()), options) {
            Ok(status) => return Ok(status),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(JailError::host(
                    "learn how a jail has ended (SIGCHLD must not be ignored)",
                )(error));
            }
        }
    }
}

/// Waits for a child.
pub(crate) fn reap(descriptor: &OwnedFd) -> Result<WaitIdStatus, JailError> {
    loop {
        if let Some(status) = poll(descriptor, WaitIdOptions::EXITED)? {
            return Ok(status);
        }
    }
}

/// What a process that could not be confined says: the error's number, then what was attempted.
pub(crate) fn encode_complaint(attempted: &str, error: &io::Error) -> Vec<u8> {
    let mut bytes = error.raw_os_error().unwrap_or(0).to_le_bytes().to_vec();
    bytes.extend_from_slice(attempted.as_bytes());
    bytes
}

pub(crate) fn decode_complaint(bytes: &[u8]) -> Option<JailError> {
    let (number, attempted) = bytes.split_first_chunk()?;
    Some(JailError::Confine {
        attempted: String::from_utf8_lossy(attempted).into_owned(),
        source: io::Error::from_raw_os_error(i32::from_le_bytes(*number)),
    })
}
