//! The last thing that the agent is asked: to hand over what the container has written to its files, for the machine's memory goes
//! with its clone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use picovm_guest_protocol::{ContainerExit, Helper};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::client::{null, reason};
use super::turn::CHUNK;
use super::{KILL, Monitor, Purpose};
use crate::error::EngineError;

/// How long saving the writable layer may stand still.
const LAYER_STALL: Duration = Duration::from_secs(20);
/// How long what storage lacks may take to get there: all of a machine's memory, on a slow disk.
const SYNC_MAX: Duration = Duration::from_secs(120);
/// How large a writable layer may become, in sizes of the machine's memory: in that it lies, but for what archives add.
const LAYER_MAX: u64 = 2;

/// What the agent was asked.
pub(super) struct Keeping {
    /// The writable layer, unless the container has storage: what that lacks goes there by itself.
    layer: Option<Layer>,
    /// Until when it may go on like this.
    until: Instant,
    /// How the agent has said that it has ended.
    ended: Option<ContainerExit>,
}

/// The writable layer on its way into a file.
struct Layer {
    from: Option<OwnedFd>,
    file: tempfile::NamedTempFile,
    size: u64,
    /// Whether it is all zeros so far: an archive without an entry.
    is_empty: bool,
}

impl Keeping {
    /// Where the writable layer comes from, if there is more of it.
    pub(super) fn source(&self) -> Option<&OwnedFd> {
        self.layer.as_ref()?.from.as_ref()
    }

    pub(super) fn until(&self) -> Instant {
        self.until
    }
}

impl Layer {
    /// Puts it into its place.
    fn place(self, path: &Path) -> io::Result<()> {
        if self.is_empty {
            return match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        self.file.persist(path).map(drop).map_err(|error| error.error)
    }
}

impl Monitor<'_> {
    /// Asks the agent, when the container has ended.
    pub(super) fn begin_keeping(&mut self) {
        if let Err(error) = self.ask_to_keep() {
            self.note_lost(&error.to_string());
            self.let_go();
        }
    }

    fn ask_to_keep(&mut self) -> Result<(), EngineError> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let null = null()?;
        let (helper, layer, to, limit) = if self.record.config.storage.is_some() {
            (Helper::Sync, None, None, SYNC_MAX)
        } else {
            if matches!(running.exit, Some(ContainerExit::NotStarted(_))) && !self.record.layer().exists() {
                // Nothing of it ran.
                self.let_go();
                return Ok(());
            }
            let failed = EngineError::host("make a pipe");
            let (from, to) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
            let layer = Layer {
                from: Some(from),
                file: tempfile::NamedTempFile::new_in(&self.record.directory)
                    .map_err(EngineError::store("write in", &self.record.directory))?,
                size: 0,
                is_empty: true,
            };
            (Helper::SaveLayer, Some(layer), Some(to), LAYER_STALL)
        };
        let process = Self::free_number(running)
            .ok_or_else(|| EngineError::Refused("its container has too many processes".into()))?;
        let output = to.as_ref().map_or(null.as_fd(), AsFd::as_fd);
        running
            .vmm
            .help(process, &helper, [null.as_fd(), output, null.as_fd()])?;
        running.processes.insert(process, Purpose::Keep);
        running.keeping = Some(Keeping {
            layer,
            until: Instant::now() + limit,
            ended: None,
        });
        Ok(())
    }

    /// Moves a part of the writable layer.
    pub(super) fn take_layer(&mut self) {
        let limit = (self.record.config.memory_mib << 20).saturating_mul(LAYER_MAX);
        let Some(keeping) = self.running.as_mut().and_then(|running| running.keeping.as_mut()) else {
            return;
        };
        let Some(layer) = &mut keeping.layer else { return };
        let Some(from) = &layer.from else { return };
        let mut bytes = Vec::with_capacity(CHUNK);
        match rustix::io::read(from, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(count) if count > 0 => {}
            Err(Errno::INTR | Errno::AGAIN) => return,
            Ok(_) | Err(_) => {
                layer.from = None;
                self.settle_keeping();
                return;
            }
        }
        keeping.until = Instant::now() + LAYER_STALL;
        layer.size = layer.size.saturating_add(bytes.len() as u64);
        layer.is_empty &= bytes.iter().all(|&byte| byte == 0);
        let written = match layer.size > limit {
            true => Err(io::Error::other("it is larger than the container's memory")),
            false => io::Write::write_all(layer.file.as_file_mut(), &bytes),
        };
        if let Err(error) = written {
            self.end_keeping(Err(error.to_string()));
        }
    }

    /// The agent has done what it was asked, or has failed.
    pub(super) fn helper_ended(&mut self, exit: ContainerExit) {
        if let Some(keeping) = self.running.as_mut().and_then(|running| running.keeping.as_mut()) {
            keeping.ended = Some(exit);
        }
        self.settle_keeping();
    }

    /// Ends it if all has come.
    fn settle_keeping(&mut self) {
        let Some(keeping) = self.running.as_ref().and_then(|running| running.keeping.as_ref()) else {
            return;
        };
        if keeping.source().is_some() {
            return;
        }
        match &keeping.ended {
            Some(ContainerExit::Code(0)) => self.end_keeping(Ok(())),
            Some(exit) => {
                let why = reason(exit, &[]);
                self.end_keeping(Err(why));
            }
            None => {}
        }
    }

    /// The clone has done what it was kept for. A layer is put into its place, unless something went wrong; then the container keeps
    /// what it had before it was started.
    pub(super) fn end_keeping(&mut self, result: Result<(), String>) {
        let Some(keeping) = self.running.as_mut().and_then(|running| running.keeping.take()) else {
            return;
        };
        self.let_go();
        let kept = result.and_then(|()| match keeping.layer {
            Some(layer) => layer
                .place(&self.record.layer())
                .map_err(|error| error.to_string()),
            None => Ok(()),
        });
        if let Err(why) = kept {
            self.note_lost(&why);
        }
    }

    fn note_lost(&mut self, why: &str) {
        let what = match self.record.config.storage {
            Some(_) => "what it has written last may not be on its storage",
            None => "what it has written to its files is lost",
        };
        self.record.state.error = format!("{what}: {why}");
    }

    fn let_go(&mut self) {
        if let Some(running) = &mut self.running {
            let _ = running.vmm.kill(KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_replaces_the_one_before_and_an_empty_one_removes_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer.tar");
        let layer = |bytes: &[u8]| {
            let mut file = tempfile::NamedTempFile::new_in(&directory).unwrap();
            io::Write::write_all(&mut file, bytes).unwrap();
            Layer {
                from: None,
                file,
                size: bytes.len() as u64,
                is_empty: bytes.iter().all(|&byte| byte == 0),
            }
        };
        for content in ["first", "second"] {
            layer(content.as_bytes()).place(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
        // There is nothing to remove the second time.
        for _ in 0..2 {
            layer(&[0; 1024]).place(&path).unwrap();
            assert!(!path.exists());
        }
    }
}
