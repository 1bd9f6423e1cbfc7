//! The store: one directory that holds images and templates.
//!
//! ```text
//! images/names/NAME.json   what a name stands for
//! images/files/DIGEST.erofs
//! templates/KEY/           one template each
//! templates/KEY.lock       held while it is built
//! ```
//!
//! State changes by write-new-then-rename: a crash at any instant leaves a store that opens.

use std::fs::{self, File};
use std::io::Write;
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
        Self::open(&default_root())
    }

    /// The store in a directory, which is made if it does not exist.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn open(root: &Path) -> Result<Self, EngineError> {
        let store = Self { root: root.to_owned() };
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

    pub(crate) fn templates_directory(&self) -> PathBuf {
        self.root.join("templates")
    }
}

fn default_root() -> PathBuf {
    if let Some(root) = std::env::var_os(HOME_VARIABLE).filter(|root| !root.is_empty()) {
        return root.into();
    }
    if rustix::process::geteuid().is_root() {
        return "/var/lib/picovm".into();
    }
    let data = std::env::var_os("XDG_DATA_HOME")
        .filter(|data| !data.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share")));
    data.unwrap_or_else(std::env::temp_dir).join("picovm")
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

/// Removes a file or directory, one that is already gone included.
pub(crate) fn remove(path: &Path) -> Result<(), EngineError> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(EngineError::store("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// A lock on a file, held until dropped, by this process against others and itself.
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock.
    pub(crate) fn take(path: &Path) -> Result<Self, EngineError> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(EngineError::store("open the lock", path))?;
        file.lock().map_err(EngineError::store("lock", path))?;
        Ok(Self { _file: file })
    }
}
