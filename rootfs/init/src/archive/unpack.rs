//! Makes files of the entries of an archive.

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

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use tar::EntryType;

use super::read::{self, Entry};
use super::{OPAQUE, WHITEOUT};

/// How entries meet what is there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// As a layer: what it has replaces what was there, and whiteouts take away.
    Layer,
    /// As what a user copies to a place: a directory does not replace a file, nor a file a directory.
    Copy {
        /// Whether files get the owners that the archive names, or root.
        keep_owners: bool,
    },
}

/// Unpacks an archive in a directory.
///
/// # Errors
/// The sentence for people, with the entry.
pub fn unpack(archive: impl Read, base: &Path, manner: Manner) -> Result<(), String> {
    let mut unpacker = Unpacker {
        base,
        manner,
        directories: Vec::new(),
    };
    read::each(archive, |entry, content| {
        unpacker.entry(entry, content).map_err(|error| {
            let text = format!("{}: {error}", String::from_utf8_lossy(&entry.name));
            io::Error::other(text)
        })
    })
    .and_then(|()| unpacker.finish())
    .map_err(|error| error.to_string())
}

struct Unpacker<'a> {
    base: &'a Path,
    manner: Manner,
    /// Directories whose times are set when nothing is put in them any more.
    directories: Vec<(PathBuf, (i64, u32))>,
}

/// A relative path without what would lead out of its base.
fn relative(name: &[u8]) -> io::Result<PathBuf> {
    if name.contains(&0) {
        return Err(io::Error::other("its name contains a zero byte"));
    }
    let mut clean = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(name)).components() {
        match part {
            Component::CurDir => {}
            Component::Normal(part) => clean.push(part),
            Component::ParentDir => return Err(io::Error::other("its path contains ..")),
            Component::RootDir | Component::Prefix(_) => {
                return Err(io::Error::other("its path is absolute"));
            }
        }
    }
    Ok(clean)
}

impl Unpacker<'_> {
    fn entry(&mut self, entry: &Entry, content: &mut dyn Read) -> io::Result<()> {
        let relative_path = relative(&entry.name)?;
        let path = self.base.join(&relative_path);
        if let (Manner::Layer, Some(name), Some(parent)) =
            (self.manner, relative_path.file_name(), path.parent())
        {
            if name.as_bytes() == OPAQUE {
                return self.empty(parent);
            }
            if let Some(gone) = name.as_bytes().strip_prefix(WHITEOUT) {
                return remove(&parent.join(OsStr::from_bytes(gone)));
            }
        }
        let is_root = relative_path.as_os_str().is_empty();
        if !is_root && let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let existing = fs::symlink_metadata(&path).ok();
        let is_there = existing.is_some();
        let was_directory = existing.is_some_and(|existing| existing.is_dir());
        let is_directory = entry.kind.is_dir();
        if is_root && !is_directory {
            return Err(io::Error::other("it has no name"));
        }
        if is_there && !(is_directory && was_directory) {
            match self.manner {
                Manner::Copy { .. } if is_directory => {
                    return Err(io::Error::other("cannot replace a non-directory by a directory"));
                }
                Manner::Copy { .. } if was_directory => {
                    return Err(io::Error::other("cannot replace a directory by a non-directory"));
                }
                _ => remove(&path)?,
            }
        }
        let file = match entry.kind {
            EntryType::Directory => {
                if !was_directory {
                    fs::create_dir(&path)?;
                }
                self.directories.push((path.clone(), entry.modified));
                None
            }
            EntryType::Regular | EntryType::Continuous => {
                let mut file = fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .custom_flags(libc::O_NOFOLLOW)
                    .open(&path)?;
                io::copy(content, &mut file)?;
                Some(file)
            }
            EntryType::Link => {
                fs::hard_link(self.base.join(relative(&entry.link)?), &path)?;
                // The file itself has been there with all that it has.
                return Ok(());
            }
            EntryType::Symlink => {
                std::os::unix::fs::symlink(OsStr::from_bytes(&entry.link), &path)?;
                None
            }
            EntryType::Char => {
                make_node(&path, FileType::CharacterDevice, entry.device)?;
                None
            }
            EntryType::Block => {
                make_node(&path, FileType::BlockDevice, entry.device)?;
                None
            }
            EntryType::Fifo => {
                make_node(&path, FileType::Fifo, (0, 0))?;
                None
            }
            other => {
                let kind = char::from(other.as_byte());
                return Err(io::Error::other(format!(
                    "an entry of kind {kind:?} is not supported"
                )));
            }
        };
        drop(file);
        self.describe(entry, &path)
    }

    /// Gives a file what belongs to it. The owner comes first: a change of it takes privileges away.
    fn describe(&self, entry: &Entry, path: &Path) -> io::Result<()> {
        let (uid, gid) = match self.manner {
            Manner::Copy { keep_owners: false } => (0, 0),
            _ => (entry.uid, entry.gid),
        };
        std::os::unix::fs::lchown(path, Some(uid), Some(gid))?;
        if !entry.kind.is_symlink() {
            rustix::fs::chmodat(
                CWD,
                path,
                Mode::from_raw_mode(entry.mode & 0o7777),
                AtFlags::empty(),
            )?;
        }
        for (name, value) in &entry.attributes {
            match rustix::fs::lsetxattr(path, name.as_slice(), value, XattrFlags::empty()) {
                Ok(()) => {}
                // A file system that has none, or a name that only another kind of machine knows.
                Err(Errno::NOTSUP | Errno::PERM) if self.manner != Manner::Layer => {}
                Err(error) => {
                    let name = String::from_utf8_lossy(name);
                    return Err(io::Error::other(format!("set its attribute {name}: {error}")));
                }
            }
        }
        if entry.kind.is_dir() {
            return Ok(());
        }
        set_time(path, entry.modified)
    }

    /// Takes all that is in a directory away.
    fn empty(&self, directory: &Path) -> io::Result<()> {
        if directory == self.base {
            return Err(io::Error::other("the root of a layer cannot hide all others"));
        }
        for child in fs::read_dir(directory)? {
            remove(&child?.path())?;
        }
        Ok(())
    }

    /// Sets the times of directories, the innermost first.
    fn finish(self) -> io::Result<()> {
        for (path, modified) in self.directories.iter().rev() {
            match set_time(path, *modified) {
                // A later entry has taken its place.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
        Ok(())
    }
}

fn make_node(path: &Path, kind: FileType, (major, minor): (u32, u32)) -> io::Result<()> {
    let device = rustix::fs::makedev(major, minor);
    Ok(rustix::fs::mknodat(
        CWD,
        path,
        kind,
        Mode::from_raw_mode(0o600),
        device,
    )?)
}

fn set_time(path: &Path, (seconds, nanoseconds): (i64, u32)) -> io::Result<()> {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// Removes whatever is there, or not.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}
