//! Unpacks a tar archive from an untrusted source into a directory, and nowhere else.
//!
//! Every entry is created relative to a descriptor of its parent directory, and that is opened by `openat2(2)` with
//! `RESOLVE_BENEATH`: the kernel refuses whatever would lead out of the directory, by `..`, by an absolute path or by
//! a symbolic link that an earlier entry made.

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
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

/// Why an archive was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is no tar archive in a compression that is known.
    #[error("it is not a tar archive (plain or compressed by gzip, zstd or xz)")]
    NotAnArchive,
    /// It ends before its end.
    #[error("it is truncated: it ends without the end mark of a tar archive")]
    Truncated,
    /// It cannot be read on.
    #[error("it is damaged or cannot be read after {entries} entries: {source}")]
    Damaged {
        /// Entries read whole.
        entries: u64,
        /// What the decoder or the system said.
        source: io::Error,
    },
    /// An entry would reach outside of the image.
    #[error("refused entry {entry}: {why}")]
    Hostile {
        /// Its name in the archive.
        entry: String,
        /// How it would reach outside.
        why: &'static str,
    },
    /// An entry cannot be created.
    #[error("{attempted} for entry {entry}: {source}{}", hint(.source))]
    Entry {
        /// Its name in the archive.
        entry: String,
        /// What was attempted.
        attempted: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => " (unpacking an archive with its owners and devices needs root)",
        _ => "",
    }
}

/// Calls of `progress` are this many entries apart.
const PROGRESS_EVERY: u64 = 256;
const TAR_BLOCK: u64 = 512;

/// Unpacks `archive` into the empty directory `root`. `progress` gets entries so far and bytes of the archive read.
pub fn unpack(archive: File, root: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<(), UnpackError> {
    let stored = Counter::new(archive);
    let read = stored.count.clone();
    let plain = Counter::new(decompress(BufReader::with_capacity(1 << 17, stored))?);
    let consumed = plain.count.clone();
    let mut archive = Archive::new(plain);
    let mut tree = Tree::open(root)?;

    let mut entries = 0u64;
    let mut end = 0;
    let damaged = |entries| move |source| UnpackError::Damaged { entries, source };
    // The first header decides whether this is a tar archive at all.
    let first = |entries: u64, source: io::Error| match entries {
        0 if source.kind() != io::ErrorKind::UnexpectedEof => UnpackError::NotAnArchive,
        _ => UnpackError::Damaged { entries, source },
    };
    for entry in archive.entries().map_err(damaged(0))? {
        let mut entry = entry.map_err(|source| first(entries, source))?;
        let stored_size = if entry.header().entry_type().is_gnu_sparse() {
            entry.header().entry_size().map_err(damaged(entries))?
        } else {
            entry.size()
        };
        end = entry
            .raw_file_position()
            .saturating_add(stored_size.next_multiple_of(TAR_BLOCK));
        tree.add(&mut entry, entries)?;
        if entries.is_multiple_of(PROGRESS_EVERY) {
            progress(entries, read.load(Ordering::Relaxed));
        }
        entries = entries.saturating_add(1);
    }
    tree.finish()?;
    // The iterator ends at the end mark, a block of zeros, and at the end of the file alike.
    if consumed.load(Ordering::Relaxed) <= end {
        return Err(if consumed.load(Ordering::Relaxed) == 0 {
            UnpackError::NotAnArchive
        } else {
            UnpackError::Truncated
        });
    }
    // What follows is padding, but with it comes the compression's own checksum.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(damaged(entries))?;
    progress(entries, read.load(Ordering::Relaxed));
    Ok(())
}

/// Counts the bytes that are read through it.
struct Counter<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R> Counter<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            count: Arc::default(),
        }
    }
}

impl<R: Read> Read for Counter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

fn decompress(mut stored: BufReader<Counter<File>>) -> Result<Box<dyn Read>, UnpackError> {
    let start = stored
        .fill_buf()
        .map_err(|source| UnpackError::Damaged { entries: 0, source })?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(stored)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(Zstd::Between(stored)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Box::new(lzma_rust2::XzReader::new(stored, true)),
        _ => Box::new(stored),
    })
}

/// A sequence of zstd frames, as parallel compressors write it.
enum Zstd<R: BufRead> {
    Between(R),
    Within(Box<ruzstd::decoding::StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>),
    End,
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match std::mem::replace(self, Self::End) {
                Self::Between(mut source) => {
                    if source.fill_buf()?.is_empty() {
                        return Ok(0);
                    }
                    let decoder =
                        ruzstd::decoding::StreamingDecoder::new(source).map_err(io::Error::other)?;
                    *self = Self::Within(Box::new(decoder));
                }
                Self::Within(mut decoder) => {
                    let count = decoder.read(buffer)?;
                    if count > 0 || buffer.is_empty() {
                        *self = Self::Within(decoder);
                        return Ok(count);
                    }
                    *self = Self::Between(decoder.into_inner());
                }
                Self::End => return Ok(0),
            }
        }
    }
}

/// The tree that is being unpacked.
struct Tree {
    root: OwnedFd,
    /// Parent directory of the last entry; the next one mostly has the same.
    last_parent: Option<(PathBuf, OwnedFd)>,
    /// Modification times of directories, to be set when nothing is created in them any more.
    directory_times: Vec<(PathBuf, i64)>,
}

/// Where an entry goes.
enum Place<'a> {
    Root,
    Below(&'a Path, &'a OsStr),
}

impl Tree {
    fn open(root: &Path) -> Result<Self, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty()).map_err(|error| UnpackError::Entry {
            entry: "/".into(),
            attempted: "open the directory",
            source: error.into(),
        })?;
        // What an archive without an entry for its root gets.
        let tree = Self {
            root,
            last_parent: None,
            directory_times: vec![(PathBuf::from("."), 0)],
        };
        rustix::fs::fchmod(&tree.root, Mode::from_raw_mode(0o755)).map_err(|error| UnpackError::Entry {
            entry: "/".into(),
            attempted: "chmod",
            source: error.into(),
        })?;
        Ok(tree)
    }

    fn add<R: Read>(&mut self, entry: &mut Entry<'_, R>, entries: u64) -> Result<(), UnpackError> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let damaged = |source| UnpackError::Damaged { entries, source };
        let attributes = extended_attributes(entry).map_err(damaged)?;
        let name = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&name).into_owned();
        let failed = |attempted: &'static str| {
            let entry = shown.clone();
            move |error: Errno| UnpackError::Entry {
                entry,
                attempted,
                source: error.into(),
            }
        };
        let path = inner_path(&name).map_err(|why| UnpackError::Hostile {
            entry: shown.clone(),
            why,
        })?;
        let header = entry.header();
        let mode = header.mode().map_err(damaged)? & 0o7777;
        let uid = id(header.uid().map_err(damaged)?).map_err(damaged)?;
        let gid = id(header.gid().map_err(damaged)?).map_err(damaged)?;
        let modified = i64::try_from(header.mtime().map_err(damaged)?).unwrap_or(i64::MAX);

        let (parent, last) = match place(&path) {
            Place::Root if kind.is_dir() => {
                self.directory_times.push((PathBuf::from("."), modified));
                rustix::fs::fchown(&self.root, Some(uid), Some(gid)).map_err(failed("chown"))?;
                set_attributes(&self.root, OsStr::new("."), &attributes).map_err(failed("set attributes"))?;
                return rustix::fs::fchmod(&self.root, Mode::from_raw_mode(mode)).map_err(failed("chmod"));
            }
            Place::Root => {
                return Err(UnpackError::Hostile {
                    entry: shown,
                    why: "it would replace the root directory",
                });
            }
            Place::Below(parent, last) => (self.parent(parent, &shown)?, last),
        };
        if !kind.is_dir() {
            remove_older(&parent, last).map_err(failed("replace the older entry"))?;
        }
        match kind {
            EntryType::Directory => {
                match rustix::fs::mkdirat(&parent, last, Mode::from_raw_mode(0o700)) {
                    Ok(()) => {}
                    Err(Errno::EXIST) if is_directory(&parent, last) => {}
                    Err(Errno::EXIST) => {
                        remove_older(&parent, last).map_err(failed("replace the older entry"))?;
                        rustix::fs::mkdirat(&parent, last, Mode::from_raw_mode(0o700))
                            .map_err(failed("mkdir"))?;
                    }
                    Err(error) => return Err(failed("mkdir")(error)),
                }
                self.directory_times.push((path.clone(), modified));
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default();
                rustix::fs::symlinkat(OsStr::from_bytes(&target), &parent, last).map_err(failed("link"))?;
            }
            EntryType::Link => {
                // The link has the metadata of what it links to.
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                return self.hard_link(&target, &parent, last, &shown);
            }
            EntryType::Char | EntryType::Block => {
                let file_type = match kind {
                    EntryType::Char => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                let major = header.device_major().map_err(damaged)?.unwrap_or(0);
                let minor = header.device_minor().map_err(damaged)?.unwrap_or(0);
                make_node(&parent, last, file_type, rustix::fs::makedev(major, minor))
                    .map_err(failed("mknod"))?;
            }
            EntryType::Fifo => {
                make_node(&parent, last, FileType::Fifo, 0).map_err(failed("mkfifo"))?;
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, last, flags, Mode::from_raw_mode(0o600))
                    .map_err(failed("create the file"))?;
                write_content(entry, File::from(file), entries, &shown)?;
            }
            _ => {
                return Err(UnpackError::Hostile {
                    entry: shown,
                    why: "it is of a kind that is no file",
                });
            }
        }

        rustix::fs::chownat(&parent, last, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("chown"))?;
        // After chown, which takes set-uid bits and file capabilities away.
        if kind != EntryType::Symlink {
            rustix::fs::chmodat(&parent, last, Mode::from_raw_mode(mode), AtFlags::empty())
                .map_err(failed("chmod"))?;
        }
        set_attributes(&parent, last, &attributes).map_err(failed("set an extended attribute"))?;
        rustix::fs::utimensat(&parent, last, &times(modified), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("set the modification time"))
    }

    /// Opens the parent directory of an entry, making what is missing on the way.
    fn parent(&mut self, path: &Path, shown: &str) -> Result<OwnedFd, UnpackError> {
        let failed = |error: Errno| match error {
            Errno::XDEV | Errno::LOOP => UnpackError::Hostile {
                entry: shown.into(),
                why: "a symbolic link on its path leads outside of the image",
            },
            error => UnpackError::Entry {
                entry: shown.into(),
                attempted: "open the directory",
                source: error.into(),
            },
        };
        if let Some((last, descriptor)) = &self.last_parent
            && last == path
        {
            return descriptor.try_clone().map_err(|source| UnpackError::Entry {
                entry: shown.into(),
                attempted: "open the directory",
                source,
            });
        }
        let descriptor = match self.beneath(path) {
            Err(Errno::NOENT) => {
                let mut so_far = PathBuf::new();
                for component in path.components() {
                    let above = self.beneath(&so_far).map_err(failed)?;
                    so_far.push(component);
                    match rustix::fs::mkdirat(&above, component.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) => self.directory_times.push((so_far.clone(), 0)),
                        Err(Errno::EXIST) => {}
                        Err(error) => return Err(failed(error)),
                    }
                }
                self.beneath(path).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        let copy = descriptor.try_clone().map_err(|source| UnpackError::Entry {
            entry: shown.into(),
            attempted: "open the directory",
            source,
        })?;
        self.last_parent = Some((path.into(), copy));
        Ok(descriptor)
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
        let failed = |error: Errno| match error {
            Errno::XDEV | Errno::LOOP => hostile("it is a hard link to outside of the image"),
            error => UnpackError::Entry {
                entry: shown.into(),
                attempted: "make a hard link",
                source: error.into(),
            },
        };
        let target_parent = self.beneath(target_parent).map_err(failed)?;
        rustix::fs::linkat(&target_parent, target_last, parent, last, AtFlags::empty()).map_err(failed)
    }

    /// Sets the modification times of directories, the last word on each.
    fn finish(&mut self) -> Result<(), UnpackError> {
        self.last_parent = None;
        for (path, modified) in std::mem::take(&mut self.directory_times) {
            // A directory may have been replaced by a later entry; then there is nothing to set.
            let Ok(directory) = self.beneath(&path) else {
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

/// The path of an entry inside the image. `./` and a leading `/` mean the image's root; `..` is refused.
fn inner_path(name: &[u8]) -> Result<PathBuf, &'static str> {
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

fn place(path: &Path) -> Place<'_> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(last)) => Place::Below(parent, last),
        _ => Place::Root,
    }
}

fn is_directory(parent: &OwnedFd, last: &OsStr) -> bool {
    rustix::fs::statat(parent, last, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Of two entries of one name the later one counts, as `tar -x` has it.
fn remove_older(parent: &OwnedFd, last: &OsStr) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, last, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => rustix::fs::unlinkat(parent, last, AtFlags::REMOVEDIR),
        Err(error) => Err(error),
    }
}

fn make_node(parent: &OwnedFd, last: &OsStr, kind: FileType, device: u64) -> rustix::io::Result<()> {
    rustix::fs::mknodat(parent, last, kind, Mode::from_raw_mode(0o600), device)
}

fn write_content<R: Read>(
    entry: &mut Entry<'_, R>,
    mut file: File,
    entries: u64,
    shown: &str,
) -> Result<(), UnpackError> {
    let expected = entry.size();
    let mut buffer = vec![0; 1 << 16];
    let mut written = 0u64;
    loop {
        let count = entry
            .read(&mut buffer)
            .map_err(|source| UnpackError::Damaged { entries, source })?;
        if count == 0 {
            break;
        }
        io::Write::write_all(&mut file, buffer.get(..count).unwrap_or_default()).map_err(|source| {
            UnpackError::Entry {
                entry: shown.into(),
                attempted: "write the file",
                source,
            }
        })?;
        written = written.saturating_add(count as u64);
    }
    if written < expected {
        return Err(UnpackError::Truncated);
    }
    Ok(())
}

/// Extended attributes of an entry, as GNU tar and others put them into PAX headers.
fn extended_attributes<R: Read>(entry: &mut Entry<'_, R>) -> io::Result<Vec<(CString, Vec<u8>)>> {
    let mut attributes = Vec::new();
    let Some(extensions) = entry.pax_extensions()? else {
        return Ok(attributes);
    };
    for extension in extensions {
        let extension = extension?;
        if let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.")
            // Labels of the building machine's security policy mean nothing in the guest.
            && name != b"security.selinux"
        {
            let name = CString::new(name).map_err(io::Error::other)?;
            attributes.push((name, extension.value_bytes().to_vec()));
        }
    }
    Ok(attributes)
}

fn set_attributes(
    parent: &OwnedFd,
    last: &OsStr,
    attributes: &[(CString, Vec<u8>)],
) -> rustix::io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    // There is no setxattrat(2) in the kernels that we run on; the descriptor's own link stands for its directory.
    let path = Path::new("/proc/self/fd")
        .join(parent.as_fd().as_raw_fd().to_string())
        .join(last);
    for (name, value) in attributes {
        rustix::fs::lsetxattr(&path, name.as_c_str(), value, XattrFlags::empty())?;
    }
    Ok(())
}

fn id<T: From32>(value: u64) -> io::Result<T> {
    u32::try_from(value)
        .ok()
        // -1 means "do not change" to chown(2).
        .filter(|&id| id != u32::MAX)
        .map(T::from_32)
        .ok_or_else(|| io::Error::other(format!("the owner {value} is no user or group id")))
}

trait From32 {
    fn from_32(id: u32) -> Self;
}

impl From32 for Uid {
    fn from_32(id: u32) -> Self {
        Self::from_raw(id)
    }
}

impl From32 for Gid {
    fn from_32(id: u32) -> Self {
        Self::from_raw(id)
    }
}

fn times(modified: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: modified,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}
