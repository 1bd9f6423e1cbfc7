//! The files of a container that does not run: a clone with its root file system, and nothing that runs in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use picovm_guest_protocol::{ContainerExit, Helper};
use picovm_vmm::Template;
use serde::de::DeserializeOwned;

use super::client::{QUERY_MAX, null, read_all, reason};
use super::record::Record;
use super::storage;
use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::running::{News, RunningContainer};
use crate::store::Lock;

/// A clone with the files of a container that does not run. Nobody else can start or remove the container while this lives.
pub struct Idle {
    record: Record,
    running: RunningContainer,
    _lock: Lock,
}

/// The number of the process that does what is asked: one after the other.
const HELPER: u16 = 1;

impl Idle {
    pub(super) fn open(record: Record, template: &Template, lock: Lock) -> Result<Self, EngineError> {
        let options = ContainerOptions {
            args: Vec::new(),
            stay: true,
            layer: open_layer(&record)?,
            storage: storage::open(&record)?,
            console_log: None,
            stdin: false,
            terminal: None,
            ..record.config.options(None)
        };
        let null = null()?;
        let running = RunningContainer::start(
            template,
            &options,
            [null.as_fd(), null.as_fd(), null.as_fd()],
            record.config.confinement,
        )?;
        Ok(Self {
            record,
            running,
            _lock: lock,
        })
    }

    /// Has the agent do something, with these descriptors as streams, and waits until it has.
    ///
    /// # Errors
    /// [`EngineError::Vmm`] if the clone ends.
    pub fn help(
        &mut self,
        helper: &Helper,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<ContainerExit, EngineError> {
        self.running.help(HELPER, helper, streams)?;
        loop {
            match self.running.news() {
                News::ProcessExit(HELPER, exit) => return Ok(exit),
                // Its layer could not be loaded.
                News::Exit(exit) => return Ok(exit),
                News::Gone(reason) => return Err(EngineError::Vmm(reason)),
                _ => {}
            }
        }
    }

    /// Asks the agent something.
    ///
    /// # Errors
    /// [`EngineError::Agent`], [`EngineError::Vmm`].
    pub fn query<T: DeserializeOwned>(
        &mut self,
        attempted: &'static str,
        helper: &Helper,
    ) -> Result<T, EngineError> {
        let failed = |error: io::Error| EngineError::host("take the agent's answer")(error);
        // Files and not pipes: nobody reads these while the agent writes.
        let (mut out, mut err) = (
            tempfile::tempfile().map_err(failed)?,
            tempfile::tempfile().map_err(failed)?,
        );
        let null = null()?;
        let exit = self.help(helper, [null.as_fd(), out.as_fd(), err.as_fd()])?;
        let rewound = |file: &mut File| -> Result<Vec<u8>, EngineError> {
            io::Seek::rewind(file).map_err(failed)?;
            read_all(file.try_clone().map_err(failed)?.into(), QUERY_MAX)
        };
        let answer = rewound(&mut out)?;
        let told = rewound(&mut err)?;
        let agent = |reason: String| EngineError::Agent {
            attempted,
            name: self.record.name.clone(),
            reason,
        };
        match exit {
            ContainerExit::Code(0) => postcard::from_bytes(&answer).map_err(|error| agent(error.to_string())),
            exit => Err(agent(reason(&exit, &told))),
        }
    }

    /// Keeps what was changed of the container's files.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Agent`], [`EngineError::Vmm`]; the container's files are then what they were.
    pub fn save(mut self) -> Result<(), EngineError> {
        if self.record.config.storage.is_some() {
            return self.sync();
        }
        let path = self.record.layer();
        let failed = || EngineError::store("write", &path);
        let file = tempfile::NamedTempFile::new_in(&self.record.directory).map_err(failed())?;
        let err = tempfile::tempfile().map_err(failed())?;
        let null = null()?;
        let exit = self.help(
            &Helper::SaveLayer,
            [null.as_fd(), file.as_file().as_fd(), err.as_fd()],
        )?;
        if exit != ContainerExit::Code(0) {
            return Err(EngineError::Agent {
                attempted: "save the files",
                name: self.record.name.clone(),
                reason: reason(&exit, &[]),
            });
        }
        file.persist(&path).map_err(|error| failed()(error.error))?;
        Ok(())
    }

    /// Waits until what was changed is on the container's storage.
    fn sync(&mut self) -> Result<(), EngineError> {
        let mut err = tempfile::tempfile().map_err(EngineError::host("take the agent's answer"))?;
        let null = null()?;
        let exit = self.help(&Helper::Sync, [null.as_fd(), null.as_fd(), err.as_fd()])?;
        if exit == ContainerExit::Code(0) {
            return Ok(());
        }
        io::Seek::rewind(&mut err).map_err(EngineError::host("take the agent's answer"))?;
        Err(EngineError::Agent {
            attempted: "save the files",
            name: self.record.name.clone(),
            reason: reason(&exit, &read_all(err.into(), QUERY_MAX)?),
        })
    }
}

/// The writable layer that the last run has left, if there was one.
pub(super) fn open_layer(record: &Record) -> Result<Option<File>, EngineError> {
    let path = record.layer();
    match File::open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(EngineError::store("open", &path)(error)),
    }
}
