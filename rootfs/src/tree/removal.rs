//! Removing what is hidden or replaced, without following any link.

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

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::inode;

/// What a layer has made; nothing of it goes.
pub(super) type Own<'a> = Option<&'a HashSet<(u64, OsString)>>;

/// Removes a name and all below it but what is `own`; whether all of it is gone. Trees are no deeper than [`super::DEPTH_MAX`].
pub(super) fn remove(parent: &OwnedFd, last: &OsStr, own: Own<'_>) -> rustix::io::Result<bool> {
    let kept = match own {
        Some(own) => own.contains(&(inode(parent)?, last.to_owned())),
        None => false,
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, last, flags, Mode::empty()) {
        Ok(directory) => {
            if !remove_children(&directory, own)? || kept {
                return Ok(false);
            }
            rustix::fs::unlinkat(parent, last, AtFlags::REMOVEDIR)?;
        }
        Err(Errno::NOENT) => {}
        Err(_) if kept => return Ok(false),
        // Whatever it is, it is no directory.
        Err(_) => rustix::fs::unlinkat(parent, last, AtFlags::empty())?,
    }
    Ok(true)
}

pub(super) fn remove_children(directory: &OwnedFd, own: Own<'_>) -> rustix::io::Result<bool> {
    let names: Vec<OsString> = rustix::fs::Dir::read_from(directory)?
        .filter_map(|entry| match entry {
            Ok(entry) => match entry.file_name().to_bytes() {
                b"." | b".." => None,
                name => Some(Ok(OsStr::from_bytes(name).to_owned())),
            },
            Err(error) => Some(Err(error)),
        })
        .collect::<rustix::io::Result<_>>()?;
    let mut all = true;
    for name in names {
        all &= remove(directory, &name, own)?;
    }
    Ok(all)
}
