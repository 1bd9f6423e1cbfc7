//! Extended attributes of what is in an image.

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

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use tar::EntryType;

use crate::archive::has_content;

/// Bytes of a value, and of all names together (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX: usize = 64 << 10;

/// Attributes that are the building machine's and not the image's: labels of its security policy, and what its overlay file
/// system noted, which the guest's would take for its own.
fn is_foreign(name: &[u8]) -> bool {
    name == b"security.selinux" || name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// There is no setxattrat(2) in the kernels that we run on; the descriptor's own link stands for its directory.
fn path_of(parent: &OwnedFd, last: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(parent.as_fd().as_raw_fd().to_string())
        .join(last)
}

pub(super) fn set(
    parent: &OwnedFd,
    last: &OsStr,
    attributes: &[(CString, Vec<u8>)],
    kind: EntryType,
) -> rustix::io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let path = path_of(parent, last);
    for (name, value) in attributes.iter().filter(|(name, _)| !is_foreign(name.to_bytes())) {
        match rustix::fs::lsetxattr(&path, name.as_c_str(), value, XattrFlags::empty()) {
            // Only files and directories have attributes of users (xattr(7)); other systems let others have them too.
            Err(Errno::PERM)
                if name.to_bytes().starts_with(b"user.") && !has_content(kind) && !kind.is_dir() => {}
            result => result?,
        }
    }
    Ok(())
}

/// The names of what is set, but for what this machine's security policy sets, which is its own matter.
fn names(path: &Path) -> rustix::io::Result<Vec<CString>> {
    let mut names = vec![0u8; SIZE_MAX];
    let size = match rustix::fs::llistxattr(path, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        size => size?,
    };
    let mut names: Vec<CString> = names
        .get(..size)
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && !is_foreign(name))
        .filter_map(|name| CString::new(name).ok())
        .collect();
    names.sort();
    Ok(names)
}

/// What is set, by name, in order.
pub(crate) fn of(path: &Path) -> rustix::io::Result<Vec<(CString, Vec<u8>)>> {
    let value = |name: CString| {
        let mut value = vec![0u8; SIZE_MAX];
        let size = rustix::fs::lgetxattr(path, name.as_c_str(), &mut value)?;
        value.truncate(size);
        Ok((name, value))
    };
    names(path)?.into_iter().map(value).collect()
}

pub(super) fn clear(parent: &OwnedFd, last: &OsStr) -> rustix::io::Result<()> {
    let path = path_of(parent, last);
    for name in names(&path)? {
        rustix::fs::lremovexattr(&path, name.as_c_str())?;
    }
    Ok(())
}
