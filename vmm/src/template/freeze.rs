//! Freezing: a machine that stands still becomes a template.

// Sizes of regions and chunks of this process, none of them from a guest or a file.
#![allow(clippy::arithmetic_side_effects)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::checksum::{self, CHUNK, MemoryChecksum};
use super::format::{self, FORMAT_VERSION, FileRecord, MEMORY, METADATA, Metadata, STATE, TemplateError};
use super::open::{self, Template};
use crate::machine::{Machine, MachineError};

/// Begins the name of the directory, beside a template's own, into which the template is written before it gets its
/// name. A freeze that is killed leaves it.
#[must_use]
pub fn partial_prefix(directory: &Path) -> String {
    format!(
        ".freezing-{}-",
        directory.file_name().unwrap_or_default().to_string_lossy()
    )
}

/// Pages of a chunk.
const CHUNK_PAGES: u64 = CHUNK as u64 / 4096;

/// What is written beside the machine itself.
#[derive(Clone, Debug, Default)]
pub struct FreezeOptions {
    /// Kept in the metadata; read back with [`Template::metadata`].
    pub notes: BTreeMap<String, String>,
}

impl Machine {
    /// Freezes a machine that stands still into a new directory and opens it. The machine is not consumed: start it
    /// again to reach a later freeze point.
    ///
    /// # Errors
    /// [`TemplateError::Exists`], [`TemplateError::Io`] (a full disk among them), [`TemplateError::Machine`]. Nothing
    /// is left at the directory or beside it.
    pub fn freeze(&mut self, directory: &Path, options: &FreezeOptions) -> Result<Template, TemplateError> {
        if directory.exists() {
            return Err(TemplateError::Exists {
                path: directory.to_owned(),
            });
        }
        let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(TemplateError::io("create the directory", parent))?;
        // Removed when dropped, so on every error.
        let partial = tempfile::Builder::new()
            .prefix(&partial_prefix(directory))
            .tempdir_in(parent)
            .map_err(TemplateError::io("create a directory in", parent))?;

        let state = self.save()?;
        let state_bytes =
            postcard::to_stdvec(&state).map_err(|_| MachineError::State("it cannot be encoded"))?;
        let state_record = FileRecord {
            bytes: state_bytes.len() as u64,
            checksum: checksum::of(&state_bytes),
        };
        write(&partial.path().join(STATE), &state_bytes)?;

        let memory_path = partial.path().join(MEMORY);
        let (memory, memory_data_bytes) = self.write_memory(&memory_path)?;

        let metadata = Metadata {
            format: FORMAT_VERSION,
            protocol: picovm_guest_protocol::PROTOCOL_VERSION,
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            memory_mib: state.memory_mib,
            vcpus: u8::try_from(state.vcpus.len()).unwrap_or(u8::MAX),
            processor: self.processor().clone(),
            memory,
            memory_data_bytes,
            state: state_record,
            notes: options.notes.clone(),
        };
        let metadata_path = partial.path().join(METADATA);
        let bytes = format::encode(&metadata).map_err(TemplateError::io("encode", &metadata_path))?;
        write(&metadata_path, &bytes)?;
        // What was just written is known to be right: spare the first opening the comparison.
        open::record_written(partial.path(), &metadata.memory.checksum);

        // Opened before it has its name: what cannot be opened is not left there.
        let template = Template::open(partial.path())?;
        publish(partial, directory, parent)?;
        Ok(template.renamed(directory))
    }

    /// Chunks of memory that may hold something: touched by this machine, or data of the file that it was forked from. All
    /// others were never more than zeros, and reading them would cost a fault for each page. `None` if that cannot be told.
    fn touched_chunks(&self, total: u64) -> Option<BTreeSet<u64>> {
        let set = self.working_set().ok()?;
        let mut chunks = match self.origin() {
            Some(file) => checksum::data_chunks(file, total).ok()?,
            None => BTreeSet::new(),
        };
        for pages in set.written.iter().chain(&set.read) {
            let last = pages.first.saturating_add(pages.count.saturating_sub(1));
            chunks.extend(pages.first / CHUNK_PAGES..=last / CHUNK_PAGES);
        }
        Some(chunks)
    }

    /// Writes guest memory, zeros as holes, and returns its record and the bytes that are not holes.
    fn write_memory(&self, path: &Path) -> Result<(FileRecord, u64), TemplateError> {
        let error = || TemplateError::io("write", path);
        let file = File::create_new(path).map_err(error())?;
        let total: u64 = self.memory().iter().map(GuestMemoryRegion::len).sum();
        file.set_len(total).map_err(error())?;
        let mut checksum = MemoryChecksum::new(total);
        let mut chunk = vec![0u8; CHUNK];
        let mut data_bytes = 0u64;
        let mut base = 0u64;
        let touched = self.touched_chunks(total);
        for region in self.memory().iter() {
            let mut offset = 0u64;
            while offset < region.len() {
                let length = usize::try_from(region.len() - offset).unwrap_or(CHUNK).min(CHUNK);
                let index = (base + offset) / CHUNK as u64;
                if touched.as_ref().is_some_and(|touched| !touched.contains(&index)) {
                    offset += length as u64;
                    continue;
                }
                let bytes = chunk.get_mut(..length).unwrap_or_default();
                region
                    .read_slice(bytes, MemoryRegionAddress(offset))
                    .map_err(|source| error()(std::io::Error::other(source)))?;
                if !checksum::is_zero(bytes) {
                    checksum.chunk(index, bytes);
                    data_bytes += write_pages(&file, bytes, base + offset).map_err(error())?;
                }
                offset += length as u64;
            }
            base += region.len();
        }
        file.sync_all().map_err(error())?;
        Ok((
            FileRecord {
                bytes: total,
                checksum: checksum.finish(),
            },
            data_bytes,
        ))
    }
}

/// Writes the pages of a chunk that are not all zero, runs of them at once.
fn write_pages(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<u64> {
    const PAGE: usize = 4096;
    let mut written = 0;
    let mut start = 0;
    while start < bytes.len() {
        let rest = bytes.get(start..).unwrap_or_default();
        let run: usize = rest
            .chunks(PAGE)
            .take_while(|page| !checksum::is_zero(page))
            .map(<[u8]>::len)
            .sum();
        if run > 0 {
            file.write_all_at(rest.get(..run).unwrap_or_default(), offset + start as u64)?;
            written += run as u64;
        }
        start += run.max(PAGE);
    }
    Ok(written)
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
    sync_directory(partial.path())?;
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
    sync_directory(parent)
}

fn sync_directory(path: &Path) -> Result<(), TemplateError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(TemplateError::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

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
