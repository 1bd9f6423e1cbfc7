//! A layer of a directory: its entries sorted by name, with owners, modes, times, extended attributes, hard links and device nodes as
//! they are.

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
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use tar::{Builder, EntryType};

use super::entry::Entry;
use super::{Output, WHITEOUT};
use crate::image::{ImageError, Progress};
use crate::tree::{attributes, is_whiteout};
use crate::unpack::{PROGRESS_EVERY, UnpackError};

/// Writes it; what is left out, or nothing if nothing else is in it.
pub(super) fn write(
    root: &Path,
    output: &mut Output<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<Vec<PathBuf>>, ImageError> {
    let mut directory = Directory {
        root,
        archive: Builder::new(output),
        linked: HashMap::new(),
        left_out: Vec::new(),
        entries: 0,
        read: 0,
        progress,
    };
    directory.entry(Path::new(""), Path::new("./"))?;
    directory.archive.finish().map_err(at(root))?;
    // Beside the directory itself.
    Ok((directory.entries > 1).then_some(directory.left_out))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    |source| ImageError::Source { path, source }
}

/// A directory that is being written.
struct Directory<'a, 'b> {
    root: &'a Path,
    archive: Builder<&'a mut Output<'b>>,
    /// Where in the archive files stand that have more names, by device and inode.
    linked: HashMap<(u64, u64), PathBuf>,
    left_out: Vec<PathBuf>,
    entries: u64,
    read: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl Directory<'_, '_> {
    /// Writes one entry and what is below it. `inside` is where it lies, and `name` what it is called in the archive.
    fn entry(&mut self, inside: &Path, name: &Path) -> Result<(), ImageError> {
        let path = self.root.join(inside);
        if is_whiteout(inside) {
            return Err(ImageError::Unpack {
                path: self.root.to_owned(),
                source: UnpackError::Hostile {
                    entry: inside.display().to_string(),
                    why: WHITEOUT,
                },
            });
        }
        // The directory itself may be given by a link.
        let metadata = if inside.as_os_str().is_empty() {
            fs::metadata(&path)
        } else {
            fs::symlink_metadata(&path)
        }
        .map_err(at(&path))?;
        if metadata.file_type().is_socket() {
            self.left_out.push(inside.to_owned());
            return Ok(());
        }
        self.write(&path, name, &metadata).map_err(at(&path))?;
        self.entries = self.entries.saturating_add(1);
        if self.entries.saturating_sub(1).is_multiple_of(PROGRESS_EVERY) {
            (self.progress)(Progress::Reading {
                entries: self.entries,
                read: self.read,
                size: 0,
            });
        }
        if !metadata.is_dir() {
            return Ok(());
        }
        let mut names: Vec<_> = fs::read_dir(&path)
            .and_then(|entries| {
                entries
                    .map(|entry| Ok(entry?.file_name()))
                    .collect::<io::Result<_>>()
            })
            .map_err(at(&path))?;
        names.sort();
        for name in names {
            let inside = inside.join(name);
            self.entry(&inside, &inside)?;
        }
        Ok(())
    }

    fn write(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        let name_bytes = name.as_os_str().as_bytes();
        if !kind.is_dir() && metadata.nlink() > 1 {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.linked.get(&inode) {
                return Entry::new(EntryType::Link, name_bytes, metadata)
                    .link(first.as_os_str().as_bytes())
                    .write(&mut self.archive);
            }
            self.linked.insert(inode, name.to_owned());
        }
        let entry = |kind, name| Entry::new(kind, name, metadata).attributes(attributes::of(path)?);
        if kind.is_dir() {
            let mut name = name_bytes.to_vec();
            if !name.ends_with(b"/") {
                name.push(b'/');
            }
            entry(EntryType::Directory, &name)?.write(&mut self.archive)
        } else if kind.is_symlink() {
            let target = fs::read_link(path)?;
            entry(EntryType::Symlink, name_bytes)?
                .link(target.as_os_str().as_bytes())
                .write(&mut self.archive)
        } else if kind.is_file() {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
            self.read = self.read.saturating_add(metadata.len());
            entry(EntryType::Regular, name_bytes)?.write_file(
                &mut self.archive,
                name_bytes,
                &file,
                metadata.len(),
            )
        } else if kind.is_fifo() {
            entry(EntryType::Fifo, name_bytes)?.write(&mut self.archive)
        } else {
            let kind = if kind.is_block_device() {
                EntryType::Block
            } else {
                EntryType::Char
            };
            entry(kind, name_bytes)?
                .device(metadata.rdev())?
                .write(&mut self.archive)
        }
    }
}
