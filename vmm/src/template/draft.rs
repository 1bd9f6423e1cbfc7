//! A template that is being written: files that whoever freezes a machine fills, and that get a template's name only after
//! somebody else has looked at them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::checksum;
use super::expected::Expected;
use super::format::{self, FORMAT_VERSION, FileRecord, MEMORY, METADATA, Metadata, STATE, TemplateError};
use super::open::{self, Template};
use crate::arch::cpuid::Processor;
use crate::machine::MachineError;
use crate::vm;

/// Begins the name of the directory, beside a template's own, into which the template is written before it gets its name.
const PARTIAL: &str = ".freezing-";

fn partial_prefix(directory: &Path) -> String {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    format!("{PARTIAL}{name}-")
}

/// The name of the template that a directory of this name was begun for. A freeze that is killed leaves it.
#[must_use]
pub fn unfinished(name: &str) -> Option<&str> {
    let (template, _random) = name.strip_prefix(PARTIAL)?.rsplit_once('-')?;
    Some(template)
}

/// Empty files for a machine's memory and state.
pub struct FrozenFiles {
    pub(super) memory: File,
    pub(super) state: File,
    /// Where they are, for messages.
    directory: PathBuf,
}

impl FrozenFiles {
    /// Files that were made elsewhere ([`Draft::create_files`]).
    #[must_use]
    pub fn new(memory: File, state: File, directory: &Path) -> Self {
        Self {
            memory,
            state,
            directory: directory.to_owned(),
        }
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Everything else of the machine.
    #[must_use]
    pub fn state(&self) -> &File {
        &self.state
    }

    pub(super) fn memory_path(&self) -> PathBuf {
        self.directory.join(MEMORY)
    }

    pub(super) fn state_path(&self) -> PathBuf {
        self.directory.join(STATE)
    }
}

/// A directory beside the template's place, removed when this is dropped, and so on every error.
pub struct Draft {
    partial: tempfile::TempDir,
    directory: PathBuf,
    parent: PathBuf,
}

impl Draft {
    /// Begins a template, whose place is free.
    ///
    /// # Errors
    /// [`TemplateError::Exists`], [`TemplateError::Io`].
    pub fn new(directory: &Path) -> Result<Self, TemplateError> {
        if directory.exists() {
            return Err(TemplateError::Exists {
                path: directory.to_owned(),
            });
        }
        let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(TemplateError::io("create the directory", parent))?;
        let partial = tempfile::Builder::new()
            .prefix(&partial_prefix(directory))
            .tempdir_in(parent)
            .map_err(TemplateError::io("create a directory in", parent))?;
        Ok(Self {
            partial,
            directory: directory.to_owned(),
            parent: parent.to_owned(),
        })
    }

    /// Where it is until it has its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.partial.path()
    }

    /// Makes the files to be filled.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn create_files(&self) -> Result<FrozenFiles, TemplateError> {
        let create = |name| {
            let path = self.path().join(name);
            File::create_new(&path).map_err(TemplateError::io("write", &path))
        };
        Ok(FrozenFiles::new(create(MEMORY)?, create(STATE)?, self.path()))
    }

    /// Makes a template of the files, which nobody writes to any more. What they hold is not trusted: checksums and metadata
    /// are made here, and what cannot be opened, or is not what is `expected`, is removed.
    ///
    /// # Errors
    /// [`TemplateError::Refused`], and as [`Template::open`].
    pub fn seal(
        self,
        notes: BTreeMap<String, String>,
        expected: Option<&Expected<'_>>,
    ) -> Result<Template, TemplateError> {
        let (state_path, memory_path) = (self.path().join(STATE), self.path().join(MEMORY));
        let refused = |reason: &str| TemplateError::Refused {
            reason: reason.to_owned(),
        };
        let bytes = open::read_small(&state_path)?;
        let state: crate::machine::MachineState =
            postcard::from_bytes(&bytes).map_err(|_| refused("its state cannot be read"))?;
        let kvm = vm::open_kvm().map_err(MachineError::from)?;
        let supported = vm::supported_cpuid(&kvm).map_err(MachineError::from)?;
        if let Some(expected) = expected {
            expected
                .check(&state, &supported)
                .map_err(|reason| TemplateError::Refused { reason })?;
        }
        let memory = File::options()
            .read(true)
            .write(true)
            .open(&memory_path)
            .map_err(TemplateError::io("open", &memory_path))?;
        let memory_bytes = state.memory_mib.checked_mul(1 << 20);
        let memory_bytes = memory_bytes.ok_or_else(|| refused("it has more memory than there can be"))?;
        let written = memory
            .metadata()
            .map_err(TemplateError::io("read", &memory_path))?
            .len();
        if written > memory_bytes {
            return Err(refused("its memory is larger"));
        }
        // Zeros at its end were not written.
        memory
            .set_len(memory_bytes)
            .map_err(TemplateError::io("write", &memory_path))?;
        let read = || TemplateError::io("read", &memory_path);
        let (memory_checksum, memory_data_bytes) =
            checksum::of_memory_and_data(&memory, memory_bytes).map_err(read())?;
        memory
            .sync_all()
            .map_err(TemplateError::io("sync", &memory_path))?;
        sync(&state_path)?;

        let metadata = Metadata {
            format: FORMAT_VERSION,
            protocol: picovm_guest_protocol::PROTOCOL_VERSION,
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            memory_mib: state.memory_mib,
            vcpus: u8::try_from(state.vcpus.len()).unwrap_or(u8::MAX),
            processor: Processor::of(&supported),
            memory: FileRecord {
                bytes: memory_bytes,
                checksum: memory_checksum,
            },
            memory_data_bytes,
            state: FileRecord {
                bytes: bytes.len() as u64,
                checksum: checksum::of(&bytes),
            },
            notes,
        };
        let metadata_path = self.path().join(METADATA);
        let bytes = format::encode(&metadata).map_err(TemplateError::io("encode", &metadata_path))?;
        write(&metadata_path, &bytes)?;
        // What was just read is known to be right: spare the first opening the comparison.
        open::record_written(self.path(), &metadata.memory.checksum);

        // Opened before it has its name: what cannot be opened is not left there.
        let template = Template::open(self.path())?;
        publish(self.partial, &self.directory, &self.parent)?;
        Ok(template.renamed(&self.directory))
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), TemplateError> {
    let mut file = File::create_new(path).map_err(TemplateError::io("write", path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(TemplateError::io("write", path))
}

/// Gives a whole directory its name, durably.
fn publish(partial: tempfile::TempDir, directory: &Path, parent: &Path) -> Result<(), TemplateError> {
    // Readable as the parent directory is, not for its maker alone as temporary directories are. Writable for its maker
    // alone, wherever it lies: a template is immutable.
    let mut mode = fs::metadata(parent)
        .map_err(TemplateError::io("read", parent))?
        .permissions();
    mode.set_mode(mode.mode() & 0o755);
    fs::set_permissions(partial.path(), mode).map_err(TemplateError::io("change", partial.path()))?;
    sync(partial.path())?;
    fs::rename(partial.path(), directory).map_err(|source| match source.kind() {
        std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists => TemplateError::Exists {
            path: directory.to_owned(),
        },
        _ => TemplateError::Io {
            attempted: "rename to",
            path: directory.to_owned(),
            source,
        },
    })?;
    // Renamed: there is nothing left to remove.
    let _: PathBuf = partial.keep();
    sync(parent)
}

/// Makes a file or directory durable.
fn sync(path: &Path) -> Result<(), TemplateError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(TemplateError::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_draft_tells_whose_it_was() {
        let parent = tempfile::tempdir().unwrap();
        let draft = Draft::new(&parent.path().join("one-two")).unwrap();
        let name = draft.path().file_name().unwrap().to_str().unwrap();
        assert_eq!(unfinished(name), Some("one-two"));
        for other in ["one-two", ".freezing-", ".freezing-one", "one.lock"] {
            assert_eq!(unfinished(other), None, "{other}");
        }
    }

    #[test]
    fn nobody_but_its_maker_can_write_to_a_template() {
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let partial = tempfile::tempdir_in(parent.path()).unwrap();
        let directory = parent.path().join("template");
        publish(partial, &directory, parent.path()).unwrap();
        assert_eq!(
            fs::metadata(&directory).unwrap().permissions().mode() & 0o7777,
            0o755
        );
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_template_that_came_first_is_kept_and_nothing_is_left() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("template");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(METADATA), "first").unwrap();
        let partial = tempfile::tempdir_in(parent.path()).unwrap();
        let error = publish(partial, &directory, parent.path()).unwrap_err();
        assert!(matches!(error, TemplateError::Exists { .. }));
        assert_eq!(fs::read(directory.join(METADATA)).unwrap(), b"first");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }
}
