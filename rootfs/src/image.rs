//! Builds an image: layers, or a directory, become a read-only EROFS file.
//!
//! The file is uncompressed with blocks of 4 KiB, so that a guest's page is a page of the file. The same content
//! gives the same bytes, and so the same digest, wherever and whenever it is built.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::Builder;

pub use crate::unpack::{Limits, UnpackError};

/// Part of every image, so that an image says nothing about when and where it was built.
const FILE_SYSTEM_UUID: &str = "7069636f-766d-4e52-8f66-73696d616765";
/// Bytes of a block, the smallest unit of an image.
pub const BLOCK_SIZE: u64 = 4096;

/// What a finished image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// BLAKE3 of the file, 64 hexadecimal digits.
    pub digest: String,
    /// Size of the file in bytes, a multiple of [`BLOCK_SIZE`].
    pub size: u64,
    /// Files, directories and all else in it, the root not counted.
    pub entries: u64,
    /// Sum of the regular files' sizes in bytes, each hard-linked file counted once.
    pub content: u64,
}

/// What a build is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Making a layer of a directory or an archive.
    Reading {
        /// Entries so far.
        entries: u64,
        /// Bytes of the archive (as it is stored, so perhaps compressed), or of the directory's files, read so far.
        read: u64,
        /// Bytes of the archive; 0 if they are not known.
        size: u64,
    },
    /// Unpacking the archive.
    Unpacking {
        /// Entries so far.
        entries: u64,
        /// Bytes of the archive (as it is stored, so perhaps compressed) read so far.
        read: u64,
        /// Bytes of the archive.
        size: u64,
    },
    /// Unpacking the next layer of several.
    Layer {
        /// Which one, from 1 on.
        number: usize,
        /// How many there are.
        of: usize,
    },
    /// Looking through the source directory.
    Scanning,
    /// Writing the EROFS file.
    Packing {
        /// Entries to be written.
        entries: u64,
        /// Bytes of files to be written.
        content: u64,
    },
    /// Computing the digest.
    Digesting {
        /// Bytes to be read.
        size: u64,
    },
}

/// Why there is no image. Nothing is left behind then.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no such source, or it cannot be read.
    #[error("read {path}: {source}")]
    Source {
        /// The source or a file in it.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source is no directory and no archive.
    #[error("{0} is neither a directory nor a tar archive (plain or compressed by gzip, zstd or xz)")]
    NotAnArchive(PathBuf),
    /// Nothing is in the source.
    #[error("{0} is empty: an image needs at least one file")]
    Empty(PathBuf),
    /// The archive is damaged or would reach outside of the image.
    #[error("unpack {path}: {source}")]
    Unpack {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it, and with which entry.
        source: UnpackError,
    },
    /// A layer is damaged, not what it should be, or would reach outside of the image.
    #[error("unpack layer {layer}: {source}")]
    Layer {
        /// Its name: mostly its digest.
        layer: String,
        /// What is wrong with it, and with which entry.
        source: UnpackError,
    },
    /// The layer that is made cannot be written.
    #[error("write the layer made of {path}: {source}")]
    Write {
        /// The source.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no `mkfs.erofs`.
    #[error("mkfs.erofs is not installed; install it with `apt-get install erofs-utils`")]
    NoTool,
    /// `mkfs.erofs` failed.
    #[error("mkfs.erofs could not make an image of {path}: {message}")]
    Tool {
        /// The source.
        path: PathBuf,
        /// Its last words.
        message: String,
    },
    /// The image cannot be written where it should be.
    #[error("write {path}: {source}")]
    Destination {
        /// The image or its directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A layer of an image.
#[derive(Debug)]
pub struct Layer {
    /// What it is called in messages: mostly its digest.
    pub name: String,
    /// The archive, plain or compressed by gzip, zstd or xz.
    pub file: File,
    /// SHA-256 of the uncompressed archive, as `sha256:` and hexadecimal digits.
    pub diff_id: String,
}

/// Builds an image of `layers`, the lowest first, and puts it at `destination`, whose directory must exist. An older file there is
/// replaced, all at once.
///
/// Owners, modes, modification times, extended attributes, hard links and device nodes are kept. The layers are unpacked beside
/// `destination` first, which takes their unpacked size there and, for other owners and device nodes, root. `progress` is
/// called often.
///
/// # Errors
/// [`ImageError`]; `destination` is then as it was, and nothing else is left.
pub fn build_layers(
    layers: Vec<Layer>,
    destination: &Path,
    limits: &Limits,
    progress: &mut dyn FnMut(Progress),
) -> Result<ImageInfo, ImageError> {
    let directory = directory_of(destination);
    let at_destination = |error| ImageError::Destination {
        path: destination.into(),
        source: error,
    };
    let scratch = Builder::new()
        .prefix(".picovm-unpack-")
        .tempdir_in(directory)
        .map_err(at_destination)?;
    let root = scratch.path().join("root");
    fs::create_dir(&root).map_err(at_destination)?;
    let of = layers.len();
    let mut unpacked = crate::unpack::Layers::new(&root, limits).map_err(|source| ImageError::Unpack {
        path: root.clone(),
        source,
    })?;
    for (layer, number) in layers.into_iter().zip(1..) {
        progress(Progress::Layer { number, of });
        let size = layer.file.metadata().map_err(at_destination)?.len();
        unpacked
            .add(layer.file, &layer.diff_id, &mut |entries, read| {
                progress(Progress::Unpacking { entries, read, size });
            })
            .map_err(|source| ImageError::Layer {
                layer: layer.name,
                source,
            })?;
    }
    unpacked.finish().map_err(|source| ImageError::Unpack {
        path: root.clone(),
        source,
    })?;
    let tree = Unpacked {
        source: Path::new("the layers"),
        root: &root,
        left_out: &[],
    };
    pack(&tree, directory, destination, progress)
}

/// The directory that a file lies in.
fn directory_of(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Builds an image of a directory, which is not changed, as [`build_layers`] does of the layer that [`crate::layer::make`] makes of
/// it: what that left out is left out here. Whoever may read the directory can do this, whomever its files belong to.
///
/// # Errors
/// [`ImageError`]; `destination` is then as it was, and nothing else is left.
pub fn build_directory(
    source: &Path,
    left_out: &[PathBuf],
    destination: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<ImageInfo, ImageError> {
    let tree = Unpacked {
        source,
        root: source,
        left_out,
    };
    pack(&tree, directory_of(destination), destination, progress)
}

/// A tree that an image is made of.
struct Unpacked<'a> {
    /// Where it came from.
    source: &'a Path,
    /// Where it is.
    root: &'a Path,
    /// Paths in it that do not count.
    left_out: &'a [PathBuf],
}

/// Makes the EROFS file of a tree.
fn pack(
    tree: &Unpacked<'_>,
    directory: &Path,
    destination: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<ImageInfo, ImageError> {
    let Unpacked {
        source,
        root,
        left_out,
    } = *tree;
    progress(Progress::Scanning);
    let (entries, content) = census(root)?;
    let entries = entries.saturating_sub(left_out.len() as u64);
    if entries == 0 {
        return Err(ImageError::Empty(source.into()));
    }
    let at_destination = |error| ImageError::Destination {
        path: destination.into(),
        source: error,
    };
    if destination.is_dir() {
        return Err(at_destination(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    let unfinished = Builder::new()
        .prefix(".picovm-image-")
        .tempfile_in(directory)
        .map_err(at_destination)?;

    progress(Progress::Packing { entries, content });
    let mut arguments: Vec<OsString> = ["-Enosbcrc", "--preserve-mtime", "--quiet", "-d1"]
        .map(OsString::from)
        .to_vec();
    arguments.push(format!("-U{FILE_SYSTEM_UUID}").into());
    for path in left_out {
        let mut argument = OsString::from("--exclude-path=");
        argument.push(path);
        arguments.push(argument);
    }
    // mkfs.erofs takes a file system without extended attributes for a broken one.
    let attributes = rustix::fs::listxattr(root, &mut [0u8; 0]);
    if attributes == Err(rustix::io::Errno::OPNOTSUPP) {
        arguments.push("-x-1".into());
    }
    // Absolute, so that no name is taken for an option.
    for path in [unfinished.path(), root] {
        arguments.push(std::path::absolute(path).map_err(at_destination)?.into());
    }
    let output = Command::new("mkfs.erofs")
        .args(&arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::NoTool,
            _ => ImageError::Tool {
                path: source.into(),
                message: error.to_string(),
            },
        })?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|line| !line.trim().is_empty());
        return Err(ImageError::Tool {
            path: source.into(),
            message: last.map_or_else(|| output.status.to_string(), |line| line.trim().into()),
        });
    }

    forget_build_time(unfinished.path()).map_err(|error| ImageError::Tool {
        path: source.into(),
        message: format!("its superblock is not as expected: {error}"),
    })?;
    let size = fs::metadata(unfinished.path()).map_err(at_destination)?.len();
    progress(Progress::Digesting { size });
    let digest = digest(unfinished.path()).map_err(at_destination)?;
    fs::set_permissions(
        unfinished.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o644),
    )
    .map_err(at_destination)?;
    // On disk before the name is: after a crash there is the old image or the whole new one.
    File::open(unfinished.path())
        .and_then(|file| file.sync_all())
        .map_err(at_destination)?;
    unfinished
        .persist(destination)
        .map_err(|error| at_destination(error.error))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(at_destination)?;
    Ok(ImageInfo {
        digest,
        size,
        entries,
        content,
    })
}

/// Sets the time of building in the superblock to zero. (`mkfs.erofs -T0` would do so, but for every file as well.)
/// The superblock is that of the kernel's `fs/erofs/erofs_fs.h`; its checksum is off, as the image has a digest.
fn forget_build_time(image: &Path) -> io::Result<()> {
    const SUPERBLOCK: u64 = 1024;
    const MAGIC: u32 = 0xe0f5_e1e2;
    const HAS_CHECKSUM: u32 = 1;
    // By name: mkfs.erofs may have made a new file.
    let image = File::options().read(true).write(true).open(image)?;
    let word = |at| {
        let mut bytes = [0; 4];
        image.read_exact_at(&mut bytes, SUPERBLOCK + at)?;
        io::Result::Ok(u32::from_le_bytes(bytes))
    };
    if word(0)? != MAGIC || word(8)? & HAS_CHECKSUM != 0 {
        return Err(io::Error::other("wrong magic number or checksummed"));
    }
    // 64 bits of seconds and 32 of nanoseconds.
    image.write_all_at(&[0; 12], SUPERBLOCK + 24)
}

/// BLAKE3 of a file, 64 hexadecimal digits.
///
/// # Errors
/// What reading the file says.
pub fn digest(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            count => hasher.update(buffer.get(..count).unwrap_or_default()),
        };
    }
}

/// Entries below a directory, and bytes of the regular files among them.
fn census(root: &Path) -> Result<(u64, u64), ImageError> {
    let mut linked = std::collections::BTreeSet::new();
    let (mut entries, mut content) = (0, 0);
    let mut pending = vec![root.to_path_buf()];
    while let Some(directory) = pending.pop() {
        let failed = |error| ImageError::Source {
            path: directory.clone(),
            source: error,
        };
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let metadata = entry.metadata().map_err(failed)?;
            entries += 1;
            if metadata.is_dir() {
                pending.push(entry.path());
            } else if metadata.is_file()
                && (metadata.nlink() == 1 || linked.insert((metadata.dev(), metadata.ino())))
            {
                content += metadata.len();
            }
        }
    }
    Ok((entries, content))
}

#[cfg(test)]
mod tests;
