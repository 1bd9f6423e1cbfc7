//! The store: one directory that holds images and templates.
//!
//! ```text
//! images/names/NAME.json    what a name stands for
//! images/files/KEY.erofs    an image's root file system, and KEY.json what is known of it
//! images/blobs/sha256/HEX   manifests, configurations and layers; HEX.partial while they are fetched
//! images/.lock              held shared while content is added, exclusively while it is collected
//! images/.unpack-lock       held while one is unpacked
//! templates/KEY/            one template each
//! templates/KEY.lock        held while it is built
//! pools/KEY/                the pool of one template, if there is one: see `pools`
//! containers/ID/            one container each: see `containers`
//! containers/.lock          held while a container gets its name
//! containers/events.json    what has happened to containers
//! ```
//!
//! State changes by write-new-then-rename: a crash at any instant leaves a store that opens.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::EngineError;

/// Environment variable that names another directory.
pub const HOME_VARIABLE: &str = "PICOVM_HOME";

/// The store.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store at `PICOVM_HOME`, else `/var/lib/picovm` for root and `~/.local/share/picovm` for others. It is made
    /// if it does not exist.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn open_default() -> Result<Self, EngineError> {
        Self::open(&Self::default_root())
    }

    /// Where the store of [`Store::open_default`] is, or would be made.
    #[must_use]
    pub fn default_root() -> PathBuf {
        root_for(
            |name| std::env::var_os(name).map(PathBuf::from),
            rustix::process::geteuid().is_root(),
        )
    }

    /// The store in a directory, which is made if it does not exist.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn open(root: &Path) -> Result<Self, EngineError> {
        let store = Self {
            // Processes that outlive the caller leave its directory.
            root: std::path::absolute(root).map_err(EngineError::store("open", root))?,
        };
        for directory in [store.names(), store.files(), store.templates_directory()] {
            if !directory.is_dir() {
                fs::create_dir_all(&directory).map_err(EngineError::store("create", &directory))?;
            }
        }
        Ok(store)
    }

    /// Its directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn names(&self) -> PathBuf {
        self.root.join("images/names")
    }

    pub(crate) fn files(&self) -> PathBuf {
        self.root.join("images/files")
    }

    pub(crate) fn blobs_directory(&self) -> PathBuf {
        self.root.join("images/blobs/sha256")
    }

    pub(crate) fn images_lock(&self) -> PathBuf {
        self.root.join("images/.lock")
    }

    pub(crate) fn unpack_lock(&self) -> PathBuf {
        self.root.join("images/.unpack-lock")
    }

    pub(crate) fn names_lock(&self) -> PathBuf {
        self.root.join("images/names/.lock")
    }

    pub(crate) fn containers_directory(&self) -> PathBuf {
        self.root.join("containers")
    }

    pub(crate) fn pools_directory(&self) -> PathBuf {
        self.root.join("pools")
    }

    pub(crate) fn volumes_directory(&self) -> PathBuf {
        self.root.join("volumes")
    }

    pub(crate) fn templates_directory(&self) -> PathBuf {
        self.root.join("templates")
    }
}

/// Where the default store is, for these environment variables and this user.
fn root_for(variable: impl Fn(&str) -> Option<PathBuf>, is_root: bool) -> PathBuf {
    let variable = |name| variable(name).filter(|value| !value.as_os_str().is_empty());
    if let Some(home) = variable(HOME_VARIABLE) {
        return home;
    }
    if is_root {
        return "/var/lib/picovm".into();
    }
    variable("XDG_DATA_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(std::env::temp_dir)
        .join("picovm")
}

/// Makes a directory, with those above it, that is nobody else's; one that is there is left as it is.
pub(crate) fn make_private(directory: &Path) -> Result<(), EngineError> {
    if directory.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(EngineError::store("create", directory))
}

/// Writes a small file as a whole or not at all.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), EngineError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(EngineError::store("write", path))
}

/// Writes a small file as a whole or not at all, without waiting until it is on the disk: for what a power failure may take back.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), EngineError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(EngineError::store("write", path))
}

/// A socket's path by way of its directory's descriptor: a path of any length fits.
pub(crate) fn socket_path(directory: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

/// Removes a file or directory, one that is already gone included.
pub(crate) fn remove(path: &Path) -> Result<(), EngineError> {
    let result = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(EngineError::store("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes files and directories whose names begin with `prefix`. What cannot be removed only takes room.
pub(crate) fn remove_leftovers(directory: &Path, prefix: &str) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            let _ = remove(&entry.path());
        }
    }
}

/// A lock on a file, held until dropped, by this process against others and itself.
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Waits for the lock.
    pub(crate) fn take(path: &Path) -> Result<Self, EngineError> {
        let file = Self::open(path)?;
        file.lock().map_err(EngineError::store("lock", path))?;
        Ok(Self { file })
    }

    /// Waits until nobody has the lock but such as share it too.
    pub(crate) fn share(path: &Path) -> Result<Self, EngineError> {
        let file = Self::open(path)?;
        file.lock_shared().map_err(EngineError::store("lock", path))?;
        Ok(Self { file })
    }

    /// Takes the lock if nobody has it.
    pub(crate) fn try_take(path: &Path) -> Result<Option<Self>, EngineError> {
        let file = Self::open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(EngineError::store("lock", path)(error)),
        }
    }

    /// Shares the lock if nobody has it for itself.
    pub(crate) fn try_share(path: &Path) -> Result<Option<Self>, EngineError> {
        let file = Self::open(path)?;
        match file.try_lock_shared() {
            Ok(()) => Ok(Some(Self { file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(EngineError::store("lock", path)(error)),
        }
    }

    /// Whether it is still the lock at this path: not that of a file which was removed.
    pub(crate) fn is_of(&self, path: &Path) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        match (self.file.metadata(), path.metadata()) {
            (Ok(ours), Ok(there)) => identity(ours) == identity(there),
            _ => false,
        }
    }

    fn open(path: &Path) -> Result<File, EngineError> {
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(EngineError::store("open the lock", path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_store_is_the_users_own() {
        let with = |set: &'static str, value: &'static str| {
            move |name: &str| (name == set).then(|| PathBuf::from(value))
        };
        assert_eq!(root_for(with("PICOVM_HOME", "/srv/p"), true), Path::new("/srv/p"));
        assert_eq!(
            root_for(with("PICOVM_HOME", ""), true),
            Path::new("/var/lib/picovm")
        );
        assert_eq!(
            root_for(with("HOME", "/home/me"), false),
            Path::new("/home/me/.local/share/picovm")
        );
        assert_eq!(
            root_for(with("XDG_DATA_HOME", "/data"), false),
            Path::new("/data/picovm")
        );
    }
}
