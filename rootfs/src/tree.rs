//! The tree that archives are unpacked into. Nothing is created, changed or removed outside of it.
//!
//! Every entry is created relative to a descriptor of its parent directory, and that is opened by `openat2(2)` with
//! `RESOLVE_BENEATH`: the kernel refuses whatever would lead out of the directory, by `..`, by an absolute path or by
//! a symbolic link that an earlier entry made. A link whose target is absolute, as `/var/run` often is, means a directory of the
//! image; it is followed here, by name.

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

pub(crate) mod attributes;
mod removal;

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tar::EntryType;

use crate::archive::{Entry, Reader, has_content};
use crate::unpack::UnpackError;

/// Directories that may lie in each other, so that whatever walks a tree later comes to its end.
const DEPTH_MAX: usize = 256;
/// Bytes of the path of a directory inside the tree. With what is before and behind it, a path has 4,096 at most.
const PATH_MAX: usize = 3072;
/// Symbolic links on the way to one directory, as the kernel has it.
const LINKS_MAX: usize = 40;

/// Begins the name of an entry that takes away what lower layers have (OCI image specification, "Layer", "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Takes away all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Begins other names that one union file system kept for itself.
const RESERVED: &[u8] = b".wh..wh.";

/// The tree that is being unpacked.
pub(crate) struct Tree {
    root: OwnedFd,
    /// Parent directory of the last entry; the next one mostly has the same.
    last_parent: Option<(PathBuf, OwnedFd)>,
    /// Modification times of directories, to be set when nothing is created in them any more.
    directory_times: HashMap<PathBuf, (i64, u32)>,
    /// What the layer that is unpacked now has made, by inode of the directory and name.
    own: HashSet<(u64, OsString)>,
    /// Layers that have begun.
    layers: usize,
}

/// Where an entry goes.
enum Place<'a> {
    Root,
    Below(&'a Path, &'a OsStr),
}

impl Tree {
    pub(crate) fn open(root: &Path) -> Result<Self, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |attempted: &'static str| {
            move |error: Errno| UnpackError::Entry {
                entry: "/".into(),
                attempted,
                source: error.into(),
            }
        };
        let root = rustix::fs::open(root, flags, Mode::empty()).map_err(failed("open the directory"))?;
        // What an archive without an entry for its root gets.
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(failed("chmod"))?;
        Ok(Self {
            root,
            last_parent: None,
            directory_times: HashMap::from([(PathBuf::from("."), (0, 0))]),
            own: HashSet::new(),
            layers: 0,
        })
    }

    /// From here on, entries are those of the next layer.
    pub(crate) fn begin_layer(&mut self) {
        self.layers = self.layers.saturating_add(1);
        self.own.clear();
        self.last_parent = None;
    }

    /// Makes what an entry describes; its content comes from `archive`.
    pub(crate) fn add<R: Read>(&mut self, entry: &Entry, archive: &mut Reader<R>) -> Result<(), UnpackError> {
        let kind = entry.kind;
        let shown = String::from_utf8_lossy(&entry.name).into_owned();
        let failed = |attempted: &'static str| {
            let entry = shown.clone();
            move |error: Errno| UnpackError::Entry {
                entry,
                attempted,
                source: error.into(),
            }
        };
        let path = inner_path(&entry.name).map_err(|why| UnpackError::Hostile {
            entry: shown.clone(),
            why,
        })?;
        let (uid, gid) = (id(entry.uid, &shown)?, id(entry.gid, &shown)?);

        let (parent, last) = match place(&path) {
            Place::Root if kind.is_dir() => {
                self.directory_times.insert(PathBuf::from("."), entry.modified);
                let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
                rustix::fs::fchown(&self.root, owner.0, owner.1).map_err(failed("chown"))?;
                attributes::set(&self.root, OsStr::new("."), &entry.attributes, kind)
                    .map_err(failed("set attributes"))?;
                return rustix::fs::fchmod(&self.root, Mode::from_raw_mode(entry.mode))
                    .map_err(failed("chmod"));
            }
            Place::Root => {
                return Err(UnpackError::Hostile {
                    entry: shown,
                    why: "it would replace the root directory",
                });
            }
            Place::Below(parent, last) if last.as_bytes().starts_with(WHITEOUT) => {
                return self.white_out(parent, last, &shown);
            }
            Place::Below(parent, last) => (self.parent(parent, &shown)?, last),
        };
        self.own.insert((
            inode(&parent).map_err(failed("look at the directory"))?,
            last.into(),
        ));
        if !kind.is_dir() {
            self.remove_older(&parent, last)
                .map_err(failed("replace the older entry"))?;
        }
        match kind {
            EntryType::Directory => {
                self.make_directory(&parent, last).map_err(failed("mkdir"))?;
                self.directory_times.insert(path.clone(), entry.modified);
            }
            EntryType::Symlink => {
                let target = OsStr::from_bytes(&entry.link);
                rustix::fs::symlinkat(target, &parent, last).map_err(failed("link"))?;
            }
            // The link has the metadata of what it links to.
            EntryType::Link => return self.hard_link(&entry.link, &parent, last, &shown),
            EntryType::Char | EntryType::Block => {
                let file_type = match kind {
                    EntryType::Char => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                make_node(&parent, last, file_type, device).map_err(failed("mknod"))?;
            }
            EntryType::Fifo => make_node(&parent, last, FileType::Fifo, 0).map_err(failed("mkfifo"))?,
            kind if has_content(kind) => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, last, flags, Mode::from_raw_mode(0o600))
                    .map_err(failed("create the file"))?;
                write_content(entry, archive, &File::from(file), &shown)?;
            }
            _ => {
                return Err(UnpackError::Hostile {
                    entry: shown,
                    why: "it is of a kind that is no file",
                });
            }
        }

        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(&parent, last, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("chown"))?;
        // After chown, which takes set-uid bits and file capabilities away.
        if kind != EntryType::Symlink {
            rustix::fs::chmodat(&parent, last, Mode::from_raw_mode(entry.mode), AtFlags::empty())
                .map_err(failed("chmod"))?;
        }
        attributes::set(&parent, last, &entry.attributes, kind)
            .map_err(failed("set an extended attribute"))?;
        rustix::fs::utimensat(&parent, last, &times(entry.modified), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("set the modification time"))
    }

    /// A directory that is there already keeps what is in it, and loses its attributes.
    fn make_directory(&mut self, parent: &OwnedFd, last: &OsStr) -> rustix::io::Result<()> {
        let made = rustix::fs::mkdirat(parent, last, Mode::from_raw_mode(0o700));
        if made != Err(Errno::EXIST) {
            return made;
        }
        if is_directory(parent, last) {
            return attributes::clear(parent, last);
        }
        self.remove_older(parent, last)?;
        rustix::fs::mkdirat(parent, last, Mode::from_raw_mode(0o700))
    }

    /// Opens the parent directory of an entry, making what is missing on the way.
    fn parent(&mut self, path: &Path, shown: &str) -> Result<OwnedFd, UnpackError> {
        let failed = |error: Errno| {
            outside(
                error,
                shown,
                "a symbolic link on its path leads outside of the image",
            )
        };
        let duplicated = |descriptor: &OwnedFd| {
            descriptor.try_clone().map_err(|source| UnpackError::Entry {
                entry: shown.into(),
                attempted: "open the directory",
                source,
            })
        };
        if let Some((last, descriptor)) = &self.last_parent
            && last == path
        {
            return duplicated(descriptor);
        }
        let descriptor = match self.directory(path) {
            Err(Errno::NOENT) => {
                let mut so_far = PathBuf::new();
                for component in path.components() {
                    let above = self.directory(&so_far).map_err(failed)?;
                    self.check_depth(&above, shown)?;
                    so_far.push(component);
                    match rustix::fs::mkdirat(&above, component.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) => {
                            self.directory_times.insert(so_far.clone(), (0, 0));
                        }
                        Err(Errno::EXIST) => {}
                        Err(error) => return Err(failed(error)),
                    }
                }
                self.directory(path).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        self.check_depth(&descriptor, shown)?;
        self.last_parent = Some((path.into(), duplicated(&descriptor)?));
        Ok(descriptor)
    }

    /// Refuses what would make a tree too deep to be walked; links can lead on from a directory that is deep already.
    fn check_depth(&self, directory: &OwnedFd, shown: &str) -> Result<(), UnpackError> {
        let path = |of: &OwnedFd| {
            rustix::fs::readlink(format!("/proc/self/fd/{}", of.as_raw_fd()), Vec::new()).map_err(|error| {
                UnpackError::Entry {
                    entry: shown.into(),
                    attempted: "find out where its directory lies",
                    source: error.into(),
                }
            })
        };
        let (root, directory) = (path(&self.root)?, path(directory)?);
        let inside = directory
            .as_bytes()
            .get(root.as_bytes().len()..)
            .unwrap_or_default();
        let depth = inside.iter().filter(|byte| **byte == b'/').count();
        if depth > DEPTH_MAX || inside.len() > PATH_MAX {
            return Err(UnpackError::Hostile {
                entry: shown.into(),
                why: "its directory lies too deep",
            });
        }
        Ok(())
    }

    /// Opens a directory of the tree.
    fn directory(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        match self.beneath(path) {
            Err(Errno::XDEV) => self.beneath(&self.resolve(path)?),
            result => result,
        }
    }

    /// Opens a directory of the tree; the kernel sees to it that it is one of the tree.
    fn beneath(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)
    }

    /// The path without any link, where a target that begins with `/` begins at the tree's root. What leads above it, or to
    /// where there is nothing, is `XDEV`.
    fn resolve(&self, path: &Path) -> rustix::io::Result<PathBuf> {
        let mut pending: Vec<OsString> = path.iter().rev().map(OsString::from).collect();
        let mut resolved = PathBuf::new();
        let mut links = 0;
        while let Some(part) = pending.pop() {
            match Path::new(&part).components().next() {
                Some(Component::Normal(_)) => {}
                Some(Component::ParentDir) if !resolved.pop() => return Err(Errno::XDEV),
                Some(Component::RootDir) => {
                    resolved.clear();
                    continue;
                }
                _ => continue,
            }
            let above = self.beneath(&resolved)?;
            match rustix::fs::readlinkat(&above, &part, Vec::new()) {
                Ok(target) => {
                    if links == LINKS_MAX {
                        return Err(Errno::LOOP);
                    }
                    links = links.saturating_add(1);
                    let target = PathBuf::from(OsStr::from_bytes(target.as_bytes()));
                    pending.extend(target.iter().rev().map(OsString::from));
                }
                Err(Errno::INVAL) => resolved.push(part),
                Err(Errno::NOENT) if links > 0 => return Err(Errno::XDEV),
                Err(error) => return Err(error),
            }
        }
        Ok(resolved)
    }

    fn hard_link(
        &mut self,
        target: &[u8],
        parent: &OwnedFd,
        last: &OsStr,
        shown: &str,
    ) -> Result<(), UnpackError> {
        let hostile = |why| UnpackError::Hostile {
            entry: shown.into(),
            why,
        };
        let path = inner_path(target).map_err(hostile)?;
        let Place::Below(target_parent, target_last) = place(&path) else {
            return Err(hostile("it is a hard link to the root directory"));
        };
        let failed = |error: Errno| match outside(error, shown, "it is a hard link to outside of the image") {
            UnpackError::Entry { entry, source, .. } => UnpackError::Entry {
                entry,
                attempted: "make a hard link",
                source,
            },
            hostile => hostile,
        };
        let target_parent = self.directory(target_parent).map_err(failed)?;
        rustix::fs::linkat(&target_parent, target_last, parent, last, AtFlags::empty()).map_err(failed)
    }

    /// Takes away what lower layers have.
    fn white_out(&mut self, parent: &Path, last: &OsStr, shown: &str) -> Result<(), UnpackError> {
        let name = last.as_bytes();
        if self.layers < 2 || (name.starts_with(RESERVED) && name != OPAQUE) {
            return Ok(());
        }
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(UnpackError::Hostile {
                entry: shown.into(),
                why: "it would take away a directory that it lies in",
            });
        }
        let directory = match self.directory(parent) {
            Ok(directory) => directory,
            // Then there is nothing to take away.
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(error) => {
                return Err(outside(
                    error,
                    shown,
                    "a symbolic link on its path leads outside of the image",
                ));
            }
        };
        self.last_parent = None;
        let own = Some(&self.own);
        let removed = if name == OPAQUE {
            removal::remove_children(&directory, own).map(|_| ())
        } else {
            removal::remove(&directory, OsStr::from_bytes(hidden), own).map(|_| ())
        };
        removed.map_err(|error| UnpackError::Entry {
            entry: shown.into(),
            attempted: "remove what lower layers have",
            source: error.into(),
        })
    }

    /// Of two entries of one name the later one counts.
    fn remove_older(&mut self, parent: &OwnedFd, last: &OsStr) -> rustix::io::Result<()> {
        match rustix::fs::unlinkat(parent, last, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            Ok(()) => {
                self.last_parent = None;
                Ok(())
            }
            Err(Errno::ISDIR) => {
                self.last_parent = None;
                removal::remove(parent, last, None).map(|_| ())
            }
            Err(error) => Err(error),
        }
    }

    /// Sets the modification times of directories, the last word on each.
    pub(crate) fn finish(&mut self) -> Result<(), UnpackError> {
        self.last_parent = None;
        for (path, modified) in std::mem::take(&mut self.directory_times) {
            // A directory may have been replaced by a later entry; then there is nothing to set.
            let Ok(directory) = self.directory(&path) else {
                continue;
            };
            rustix::fs::futimens(&directory, &times(modified)).map_err(|error| UnpackError::Entry {
                entry: path.display().to_string(),
                attempted: "set the modification time",
                source: error.into(),
            })?;
        }
        Ok(())
    }
}

/// The error for a directory that cannot be opened.
fn outside(error: Errno, shown: &str, why: &'static str) -> UnpackError {
    match error {
        Errno::XDEV | Errno::LOOP => UnpackError::Hostile {
            entry: shown.into(),
            why,
        },
        error => UnpackError::Entry {
            entry: shown.into(),
            attempted: "open the directory",
            source: error.into(),
        },
    }
}

/// The path of an entry inside the image. `./` and a leading `/` mean the image's root; `..` is refused.
pub(crate) fn inner_path(name: &[u8]) -> Result<PathBuf, &'static str> {
    let mut path = PathBuf::new();
    if name.contains(&0) {
        return Err("its name contains a zero byte");
    }
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err("its path contains `..`"),
        }
    }
    Ok(path)
}

/// Whether an entry of a layer takes away what lower ones have, and makes nothing.
pub(crate) fn is_whiteout(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_bytes().starts_with(WHITEOUT))
}

fn place(path: &Path) -> Place<'_> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(last)) => Place::Below(parent, last),
        _ => Place::Root,
    }
}

fn inode(directory: &OwnedFd) -> rustix::io::Result<u64> {
    Ok(rustix::fs::fstat(directory)?.st_ino)
}

fn is_directory(parent: &OwnedFd, last: &OsStr) -> bool {
    rustix::fs::statat(parent, last, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

fn make_node(parent: &OwnedFd, last: &OsStr, kind: FileType, device: u64) -> rustix::io::Result<()> {
    rustix::fs::mknodat(parent, last, kind, Mode::from_raw_mode(0o600), device)
}

fn write_content<R: Read>(
    entry: &Entry,
    archive: &mut Reader<R>,
    file: &File,
    shown: &str,
) -> Result<(), UnpackError> {
    let failed = |source| UnpackError::Entry {
        entry: shown.into(),
        attempted: "write the file",
        source,
    };
    let whole = [(0, entry.size)];
    let pieces = entry.pieces.as_deref().unwrap_or(&whole);
    let mut buffer = vec![0; 1 << 16];
    for (offset, length) in pieces {
        let (mut at, mut left) = (*offset, *length);
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let count = archive.read_content(buffer.get_mut(..most).unwrap_or_default())?;
            if count == 0 {
                return Err(UnpackError::Truncated);
            }
            file.write_all_at(buffer.get(..count).unwrap_or_default(), at)
                .map_err(failed)?;
            at = at.saturating_add(count as u64);
            left = left.saturating_sub(count as u64);
        }
    }
    if entry.pieces.is_some() {
        file.set_len(entry.size).map_err(failed)?;
    }
    Ok(())
}

fn id(value: u64, shown: &str) -> Result<u32, UnpackError> {
    u32::try_from(value)
        .ok()
        // -1 means "do not change" to chown(2).
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| UnpackError::Entry {
            entry: shown.into(),
            attempted: "chown",
            source: std::io::Error::other(format!("the owner {value} is no user or group id")),
        })
}

fn times(modified: (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: modified.0,
        tv_nsec: modified.1.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}
