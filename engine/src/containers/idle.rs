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
        // A file and not a pipe: nobody reads it while the agent writes.
        let mut answer = file()?;
        self.ask(attempted, helper, answer.as_fd())?;
        let bytes = written(&mut answer)?;
        postcard::from_bytes(&bytes).map_err(|error| self.refused(attempted, error.to_string()))
    }

    /// Has the agent do something that may fail, with its answer going there.
    fn ask(
        &mut self,
        attempted: &'static str,
        helper: &Helper,
        answer: BorrowedFd<'_>,
    ) -> Result<(), EngineError> {
        let mut err = file()?;
        let null = null()?;
        match self.help(helper, [null.as_fd(), answer, err.as_fd()])? {
            ContainerExit::Code(0) => Ok(()),
            exit => {
                let told = written(&mut err)?;
                Err(self.refused(attempted, reason(&exit, &told)))
            }
        }
    }

    fn refused(&self, attempted: &'static str, reason: String) -> EngineError {
        EngineError::Agent {
            attempted,
            name: self.record.name.clone(),
            reason,
        }
    }

    /// Keeps what was changed of the container's files.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Agent`], [`EngineError::Vmm`]; the container's files are then what they were.
    pub fn save(mut self) -> Result<(), EngineError> {
        const ATTEMPTED: &str = "save the files";
        if self.record.config.storage.is_some() {
            return self.ask(ATTEMPTED, &Helper::Sync, null()?.as_fd());
        }
        let path = self.record.layer();
        let failed = || EngineError::store("write", &path);
        let file = tempfile::NamedTempFile::new_in(&self.record.directory).map_err(failed())?;
        self.ask(ATTEMPTED, &Helper::SaveLayer, file.as_file().as_fd())?;
        file.persist(&path).map_err(|error| failed()(error.error))?;
        Ok(())
    }
}

/// A file for what the agent writes.
fn file() -> Result<File, EngineError> {
    tempfile::tempfile().map_err(EngineError::host("take the agent's answer"))
}

/// All that the agent has written to it.
fn written(file: &mut File) -> Result<Vec<u8>, EngineError> {
    let failed = |error: io::Error| EngineError::host("take the agent's answer")(error);
    io::Seek::rewind(file).map_err(failed)?;
    read_all(file.try_clone().map_err(failed)?.into(), QUERY_MAX)
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
