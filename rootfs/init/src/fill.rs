//! An empty volume gets what the image has at its place, with owners, modes, times, links and extended attributes.

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

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, Timespec, Timestamps, XattrFlags};

/// Longest value and list of extended attributes (xattr(7)).
const XATTR_MAX: usize = 64 << 10;

/// Copies what is in `from` to `to`, unless there is something in that already. Both are ways into a directory that may be links.
pub fn fill(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (from.join("."), to.join("."));
    if fs::read_dir(&to)?.next().is_some() {
        return Ok(());
    }
    let mut links: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let mut directories = vec![(from.clone(), to.clone())];
    // Directories get their times and modes when they are full, the innermost first.
    let mut done = 0usize;
    while let Some((source, place)) = directories.get(done).cloned() {
        done = done.saturating_add(1);
        for entry in fs::read_dir(&source)? {
            let entry = entry?;
            let (one, other) = (entry.path(), place.join(entry.file_name()));
            let metadata = fs::symlink_metadata(&one)?;
            if metadata.is_dir() {
                fs::create_dir(&other)?;
                directories.push((one, other));
                continue;
            }
            let key = (metadata.dev(), metadata.ino());
            match links.get(&key) {
                Some(first) if metadata.nlink() > 1 => fs::hard_link(first, &other)?,
                _ => {
                    copy_one(&one, &other, &metadata)?;
                    links.insert(key, other);
                }
            }
        }
    }
    for (source, place) in directories.iter().rev() {
        dress(source, place, &fs::metadata(source)?)?;
    }
    Ok(())
}

fn copy_one(one: &Path, other: &Path, metadata: &Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_symlink() {
        symlink(fs::read_link(one)?, other)?;
    } else if kind.is_file() {
        fs::copy(one, other)?;
    } else if kind.is_fifo() {
        let mode = Mode::from_raw_mode(metadata.mode());
        rustix::fs::mknodat(CWD, other, rustix::fs::FileType::Fifo, mode, 0)?;
    } else {
        // A socket nobody listens at, or a device: a volume has none.
        return Ok(());
    }
    dress(one, other, metadata)
}

/// Gives a copy what belongs to a file beside its content.
fn dress(one: &Path, other: &Path, metadata: &Metadata) -> io::Result<()> {
    lchown(other, Some(metadata.uid()), Some(metadata.gid()))?;
    copy_attributes(one, other)?;
    if !metadata.is_symlink() {
        fs::set_permissions(other, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    }
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: metadata.atime(),
            tv_nsec: metadata.atime_nsec(),
        },
        last_modification: Timespec {
            tv_sec: metadata.mtime(),
            tv_nsec: metadata.mtime_nsec(),
        },
    };
    Ok(rustix::fs::utimensat(
        CWD,
        other,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Extended attributes, as far as the volume's file system takes them.
fn copy_attributes(one: &Path, other: &Path) -> io::Result<()> {
    let mut names = vec![0u8; XATTR_MAX];
    let length = match rustix::fs::llistxattr(one, names.as_mut_slice()) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    names.truncate(length);
    let mut value = vec![0u8; XATTR_MAX];
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let length = rustix::fs::lgetxattr(one, name, value.as_mut_slice())?;
        let value = value.get(..length).unwrap_or_default();
        match rustix::fs::lsetxattr(other, name, value, XattrFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_directory_is_filled_and_another_is_left_alone() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::write(from.path().join("a/b/file"), "text").unwrap();
        fs::hard_link(from.path().join("a/b/file"), from.path().join("linked")).unwrap();
        symlink("a/b", from.path().join("link")).unwrap();
        fs::set_permissions(from.path().join("a"), fs::Permissions::from_mode(0o1701)).unwrap();
        fill(from.path(), to.path()).unwrap();
        let copy = to.path();
        assert_eq!(fs::read_to_string(copy.join("link/file")).unwrap(), "text");
        assert_eq!(fs::metadata(copy.join("linked")).unwrap().nlink(), 2);
        assert_eq!(fs::metadata(copy.join("a")).unwrap().mode() & 0o7777, 0o1701);
        fs::remove_file(copy.join("linked")).unwrap();
        fill(from.path(), to.path()).unwrap();
        assert!(!copy.join("linked").exists());
    }
}
