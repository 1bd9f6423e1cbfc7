//! The writable layer of a container: all that it has changed of its image's files.
//!
//! It is the upper directory of an overlay. The switch of the root has put that and the image out of everybody's sight; a
//! descriptor of each, opened before, still leads there.

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

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use picovm_guest_protocol::frame::{INITIAL_CREDIT, LAYER};
use picovm_guest_protocol::{Change, ChangeKind, Frame, StartFailure, Stream};
use rustix::fs::{AtFlags, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::archive::unpack::{Manner, unpack};
use crate::archive::write::Packer;
use crate::archive::{OPAQUE, WHITEOUT};
use crate::error::{Attempt, InitError};
use crate::start::failure;
use crate::stub::{receive_frame, send_frame};

/// What the agent itself writes for each container, and Docker has outside of the layer, too.
const NOT_THE_CONTAINERS: [&str; 3] = ["etc/hosts", "etc/hostname", "etc/resolv.conf"];
/// Bytes of the layer that are taken before credit is given back for them.
const CREDIT_STEP: u32 = INITIAL_CREDIT / 4;
/// Frames for the agent that may come while the layer does.
const EARLY_MAX: usize = 1024;

/// When something of a file was changed last.
type Changed = (i64, i64);

/// A container's image and its writable layer.
#[derive(Debug)]
pub struct Layers {
    image: OwnedFd,
    upper: OwnedFd,
    /// What was in the upper directory before the container: made by init, and the container's only once it changes.
    made_before: BTreeMap<PathBuf, Changed>,
}

/// A file of the upper directory.
struct Item {
    path: PathBuf,
    kind: ChangeKind,
    /// A directory that hides what the image has in its place.
    is_opaque: bool,
}

impl Layers {
    /// Opens both, while they are still in sight.
    pub fn open(image: &str, upper: &str) -> Result<Self, InitError> {
        let open = |path: &str| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).attempt(|| format!("open {path}"))
        };
        Ok(Self {
            image: open(image)?,
            upper: open(upper)?,
            made_before: BTreeMap::new(),
        })
    }

    /// Remembers what is there by now. To be called last before the container.
    pub fn remember(&mut self) -> Result<(), InitError> {
        // Not by way of the working directory, which is init's own.
        let root = PathBuf::from(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&self.upper)
        ));
        let mut found = BTreeMap::new();
        remember(&root, Path::new(""), &mut found).attempt(|| "look at the upper directory".into())?;
        self.made_before = found;
        Ok(())
    }

    /// Makes the upper directory this process's working directory.
    pub fn enter(&self) -> rustix::io::Result<()> {
        rustix::process::fchdir(&self.upper)
    }

    /// What the container has changed, by path. The upper directory is at `upper`.
    pub fn changes(&self, upper: &Path) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        for item in self.items(upper)? {
            if item.is_opaque {
                self.hidden(upper, &item.path, &mut changes)?;
            }
            changes.push(Change {
                kind: item.kind,
                path: absolute(&item.path),
            });
        }
        changes.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(changes)
    }

    /// What of an image's directory is gone because the container has made it anew.
    fn hidden(&self, upper: &Path, directory: &Path, changes: &mut Vec<Change>) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let image = match rustix::fs::openat(&self.image, directory, flags, Mode::empty()) {
            Ok(image) => image,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for entry in rustix::fs::Dir::read_from(&image)? {
            let entry = entry?;
            let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let path = directory.join(name);
            if fs::symlink_metadata(upper.join(&path)).is_err() {
                changes.push(Change {
                    kind: ChangeKind::Deleted,
                    path: absolute(&path),
                });
            }
        }
        Ok(())
    }

    /// Writes the layer as an archive. The upper directory is at `upper`.
    pub fn save(&self, upper: &Path, writer: impl Write) -> io::Result<()> {
        let mut archive = Packer::new(writer);
        for item in self.items(upper)? {
            let path = upper.join(&item.path);
            let saved = if item.kind == ChangeKind::Deleted {
                let name = item.path.file_name().unwrap_or_default().as_bytes();
                let whiteout = OsString::from(std::ffi::OsStr::from_bytes(&[WHITEOUT, name].concat()));
                archive.marker(item.path.with_file_name(whiteout).as_os_str().as_bytes())
            } else {
                archive.append(&path, item.path.as_os_str().as_bytes())
            };
            match saved {
                Ok(()) if item.is_opaque => {
                    let marker = item.path.join(std::ffi::OsStr::from_bytes(OPAQUE));
                    archive.marker(marker.as_os_str().as_bytes())?;
                }
                // Gone meanwhile, while the container runs.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
        archive.finish()
    }

    /// What of the upper directory is the container's, each directory before what is in it.
    fn items(&self, upper: &Path) -> io::Result<Vec<Item>> {
        let mut items = Vec::new();
        self.walk(upper, Path::new(""), &mut items)?;
        Ok(items)
    }

    fn walk(&self, upper: &Path, directory: &Path, items: &mut Vec<Item>) -> io::Result<()> {
        for name in names(&upper.join(directory))? {
            let path = directory.join(name);
            if NOT_THE_CONTAINERS.iter().any(|not| path == Path::new(not)) {
                continue;
            }
            let here = upper.join(&path);
            let metadata = match fs::symlink_metadata(&here) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let is_old = self.made_before.get(&path) == Some(&changed(&metadata));
            let in_image = self.in_image(&path)?;
            if is_whiteout(&here, &metadata) {
                // One without anything to hide is what a file that came and went has left.
                if in_image.is_some() && !is_old {
                    items.push(Item {
                        path,
                        kind: ChangeKind::Deleted,
                        is_opaque: false,
                    });
                }
                continue;
            }
            let kind = match in_image {
                Some(_) => ChangeKind::Modified,
                None => ChangeKind::Added,
            };
            if !metadata.is_dir() {
                if !is_old {
                    items.push(Item {
                        path,
                        kind,
                        is_opaque: false,
                    });
                }
                continue;
            }
            let place = items.len();
            self.walk(upper, &path, items)?;
            let has_changes = items.len() > place;
            let is_opaque = is_opaque(&here);
            let differs = is_opaque || in_image.is_none_or(|image| !same_directory(&metadata, &image));
            if has_changes || (differs && !is_old) {
                let item = Item {
                    path,
                    kind,
                    is_opaque,
                };
                items.insert(place, item);
            }
        }
        Ok(())
    }

    fn in_image(&self, path: &Path) -> io::Result<Option<Stat>> {
        match rustix::fs::statat(&self.image, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn absolute(path: &Path) -> Vec<u8> {
    [b"/", path.as_os_str().as_bytes()].concat()
}

fn changed(metadata: &Metadata) -> Changed {
    (metadata.ctime(), metadata.ctime_nsec())
}

/// Names in a directory, sorted.
fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names: Vec<OsString> = entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn remember(root: &Path, directory: &Path, found: &mut BTreeMap<PathBuf, Changed>) -> io::Result<()> {
    for name in names(&root.join(directory))? {
        let path = directory.join(name);
        let metadata = fs::symlink_metadata(root.join(&path))?;
        if metadata.is_dir() {
            remember(root, &path, found)?;
        }
        found.insert(path, changed(&metadata));
    }
    Ok(())
}

fn is_whiteout(path: &Path, metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
        || metadata.is_file() && has_attribute(path, c"trusted.overlay.whiteout")
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 8];
    let read = rustix::fs::lgetxattr(path, c"trusted.overlay.opaque", value.as_mut_slice());
    read.is_ok_and(|count| value.get(..count) == Some(b"y"))
}

fn has_attribute(path: &Path, name: &std::ffi::CStr) -> bool {
    rustix::fs::lgetxattr(path, name, [0u8; 8].as_mut_slice()).is_ok()
}

/// Whether a directory of the upper directory is what the image has: it is there only for what is in it.
fn same_directory(here: &Metadata, image: &Stat) -> bool {
    here.mode() == image.st_mode
        && here.uid() == image.st_uid
        && here.gid() == image.st_gid
        && here.mtime() == i64::try_from(image.st_mtime).unwrap_or(i64::MIN)
        && u64::try_from(here.mtime_nsec()) == Ok(image.st_mtime_nsec)
}

/// Receives the layer and unpacks it at `root`: frames of process [`LAYER`] until its standard input is closed, and not a
/// byte of what follows. Gives the frames for the agent that came in between.
pub fn receive(control: BorrowedFd<'_>, root: &Path) -> Result<Vec<(u16, Frame)>, StartFailure> {
    let mut layer = Incoming {
        control,
        bytes: VecDeque::new(),
        owed: 0,
        is_over: false,
        early: Vec::new(),
    };
    let failed = |message: String| failure("unpack the writable layer", 0, message);
    unpack(&mut layer, root, Manner::Layer).map_err(failed)?;
    // What fills up the last block of the archive.
    io::copy(&mut layer, &mut io::sink()).map_err(|error| failed(error.to_string()))?;
    Ok(layer.early)
}

/// The layer, as it comes in.
struct Incoming<'a> {
    control: BorrowedFd<'a>,
    bytes: VecDeque<u8>,
    /// Bytes taken for which no credit was given.
    owed: u32,
    is_over: bool,
    early: Vec<(u16, Frame)>,
}

impl Incoming<'_> {
    fn next_frame(&mut self) -> io::Result<()> {
        if self.owed >= CREDIT_STEP {
            let credit = Frame::Credit(Stream::Stdin, std::mem::take(&mut self.owed));
            send_frame(self.control, LAYER, &credit)?;
        }
        match receive_frame(self.control.as_fd())? {
            (LAYER, Frame::Data(Stream::Stdin, bytes)) => {
                let count = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                self.owed = self
                    .owed
                    .checked_add(count)
                    .filter(|&owed| owed <= INITIAL_CREDIT)
                    .ok_or_else(|| io::Error::other("the host sent more of it than it had credit for"))?;
                self.bytes.extend(bytes);
            }
            (LAYER, Frame::Close(Stream::Stdin)) => self.is_over = true,
            (LAYER, _) => return Err(io::Error::other("the host sent another frame")),
            early if self.early.len() < EARLY_MAX => self.early.push(early),
            _ => return Err(io::Error::other("the host sent too much else meanwhile")),
        }
        Ok(())
    }
}

impl Read for Incoming<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.bytes.is_empty() && !self.is_over {
            self.next_frame()?;
        }
        self.bytes.read(to)
    }
}
