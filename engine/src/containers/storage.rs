//! Storage of a container: the file that its writable layer lies on, if that is not to lie in memory. It is sparse, holds an ext4 file
//! system as large as the container may write, and takes of this machine's disk what has been written.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use picovm_vmm::STORAGE_SECTORS;

use super::record::Record;
use crate::error::EngineError;

/// Fewest bytes of storage: a file system and its journal fit in it.
const STORAGE_MIN: u64 = 16 << 20;
/// Most bytes of storage: what the guest sees of its disk.
const STORAGE_MAX: u64 = STORAGE_SECTORS * 512;
/// A block of the file system.
const BLOCK: u64 = 4096;
/// How long a VMM process may take to end that was killed with its monitor.
const IN_USE_MAX: Duration = Duration::from_secs(10);

/// Whether storage of so many bytes can be made.
///
/// # Errors
/// [`EngineError::Refused`], with what is possible.
pub fn check(bytes: u64) -> Result<(), EngineError> {
    if (STORAGE_MIN..=STORAGE_MAX).contains(&bytes) {
        return Ok(());
    }
    Err(EngineError::Refused(format!(
        "storage of {bytes} bytes cannot be made: 16m to 1024g are possible"
    )))
}

/// Makes a file of so many bytes, in whole blocks, with an empty file system, where there is none.
pub(super) fn make(path: &Path, bytes: u64) -> Result<(), EngineError> {
    check(bytes)?;
    let failed = || EngineError::store("make the storage", path);
    // It is the guest's to write what it likes in it: nobody else is to mount or read it.
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed())?;
    file.set_len(bytes.next_multiple_of(BLOCK)).map_err(failed())?;
    let made = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"])
        // The file is all zeros: none are written, by mke2fs now or by the guest later.
        .args(["-E", "nodiscard,assume_storage_prezeroed=1"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .map_err(|error| {
            failed()(match error.kind() {
                io::ErrorKind::NotFound => io::Error::other(
                    "mke2fs is not installed: `apt-get install e2fsprogs`, and look whether PATH has /usr/sbin",
                ),
                _ => error,
            })
        })?;
    if !made.status.success() {
        let told = String::from_utf8_lossy(&made.stderr);
        let told = told
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect::<Vec<_>>();
        let reason = format!(
            "mke2fs failed ({}). Is there room on this machine's disk?",
            told.join("; ")
        );
        return Err(failed()(io::Error::other(reason)));
    }
    Ok(())
}

/// The storage of a container, if it has any, for one clone alone: whoever has had it before may just be ending.
pub(super) fn open(record: &Record) -> Result<Option<File>, EngineError> {
    if record.config.storage.is_none() {
        return Ok(None);
    }
    let path = record.storage();
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(EngineError::store("open the storage", &path))?;
    let give_up = Instant::now() + IN_USE_MAX;
    // The lock is that of the open file, which the VMM process has too: it outlives a monitor that is killed.
    while let Err(error) = file.try_lock() {
        match error {
            TryLockError::WouldBlock if Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(5));
            }
            TryLockError::WouldBlock => {
                return Err(EngineError::Refused(format!(
                    "the storage of container {} is in use by a VMM process that was killed and does not end",
                    record.name
                )));
            }
            TryLockError::Error(error) => return Err(EngineError::store("lock", &path)(error)),
        }
    }
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn storage_is_sparse_private_and_of_whole_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("storage");
        make(&path, (10 << 30) - 1).unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (10 << 30, 0o600));
        let taken = metadata.blocks() * 512;
        assert!(taken < 32 << 20, "{taken} bytes");
        // There is one already.
        assert!(make(&path, 1 << 30).is_err());
        // The smallest is one, too.
        make(&directory.path().join("small"), STORAGE_MIN).unwrap();
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("storage");
        for bytes in [0, STORAGE_MIN - 1, STORAGE_MAX + 1, u64::MAX] {
            assert!(make(&path, bytes).unwrap_err().to_string().contains("16m"));
        }
        assert!(!path.exists());
    }
}
