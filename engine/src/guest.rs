//! Where kernel and initramfs of the guests are.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::EngineError;

/// Environment variable that names another directory with `vmlinux` and `initramfs.cpio`.
pub const GUEST_VARIABLE: &str = "PICOVM_GUEST";

const KERNEL: &str = "vmlinux";
const INITRAMFS: &str = "initramfs.cpio";

/// Kernel and initramfs of the guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    /// The pico kernel.
    pub kernel: PathBuf,
    /// The initramfs with `init`.
    pub initramfs: PathBuf,
}

impl GuestFiles {
    /// Looks in `PICOVM_GUEST` if it is set, else beside the running binary (`guest/`), and where an installation
    /// puts them (`../lib/picovm/`).
    ///
    /// # Errors
    /// [`EngineError::NoGuest`] says where it looked.
    pub fn find() -> Result<Self, EngineError> {
        let directories = match std::env::var_os(GUEST_VARIABLE).filter(|directory| !directory.is_empty()) {
            Some(directory) => vec![PathBuf::from(directory)],
            None => std::env::current_exe()
                .ok()
                .and_then(|binary| binary.parent().map(Path::to_owned))
                // Tests and examples lie one directory deeper than the binaries.
                .map(|beside| {
                    vec![
                        beside.join("guest"),
                        beside.join("../guest"),
                        beside.join("../lib/picovm"),
                    ]
                })
                .unwrap_or_default(),
        };
        Self::find_in(&directories)
    }

    fn find_in(directories: &[PathBuf]) -> Result<Self, EngineError> {
        let find = |name, what| {
            let looked: Vec<PathBuf> = directories.iter().map(|directory| directory.join(name)).collect();
            match looked
                .iter()
                .find_map(|path| path.canonicalize().ok().filter(|path| path.is_file()))
            {
                // Canonical, so that whoever finds the same file by another way finds the same template.
                Some(path) => Ok(path),
                None => Err(EngineError::NoGuest { what, looked }),
            }
        };
        Ok(Self {
            kernel: find(KERNEL, "the pico kernel (vmlinux)")?,
            initramfs: find(INITRAMFS, "the initramfs (initramfs.cpio)")?,
        })
    }

    /// What tells these files from others: place, size and time of change. Their content is not read, for this is on
    /// the path of every start.
    pub(crate) fn fingerprint(&self) -> Result<String, EngineError> {
        let mut print = String::new();
        for path in [&self.kernel, &self.initramfs] {
            let metadata = path.metadata().map_err(EngineError::store("read", path))?;
            print.push_str(&format!(
                "{}:{}:{}.{};",
                path.display(),
                metadata.size(),
                metadata.mtime(),
                metadata.mtime_nsec()
            ));
        }
        Ok(print)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_every_place_looked_at() {
        let error = GuestFiles::find_in(&["/nowhere/a".into(), "/nowhere/b".into()])
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nowhere/a/vmlinux, /nowhere/b/vmlinux"));
        assert!(error.contains("make build"));
    }
}
