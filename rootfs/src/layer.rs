//! Makes the layer of an image that has only one: an archive is that as it is, and a directory becomes one.

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

mod directory;
mod entry;

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use sha2::{Digest, Sha256};

use crate::image::{ImageError, Progress};
use crate::tree::{inner_path, is_whiteout};
use crate::unpack::{
    Budget, Counter, Hashed, Limits, PROGRESS_EVERY, UnpackError, decompress, each_entry, is_xz, sha256,
    start,
};

const WHITEOUT: &str = "names that begin with .wh. say what a layer takes away from those below it, and an image \
                        that is built has no other layer";

/// What a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// SHA-256 of it, uncompressed, as `sha256:` and hexadecimal digits.
    pub diff_id: String,
    /// Sockets of the directory, as paths in it: an archive cannot hold them, and they are nothing without who has made them.
    pub left_out: Vec<PathBuf>,
}

/// Writes the layer of `source`, a directory or a tar archive (plain, or compressed by gzip, zstd or xz, as its content says), to
/// `to`, and looks at each entry on the way. The source is not changed. `progress` is called often.
///
/// An archive stays as it is, but for one of xz, which is not among the media types of layers (OCI image specification, "Layer") and
/// is written uncompressed. Its size is bounded by `limits`, but what of it would reach outside of an image is found only when it
/// is unpacked. The same content of a directory gives the same bytes.
///
/// # Errors
/// [`ImageError`]. What was written then is of no use.
pub fn make(
    source: &Path,
    to: &mut dyn Write,
    limits: &Limits,
    progress: &mut dyn FnMut(Progress),
) -> Result<Made, ImageError> {
    let at_source = |error| ImageError::Source {
        path: source.into(),
        source: error,
    };
    let kind = fs::metadata(source).map_err(at_source)?;
    let mut output = Output {
        to,
        hasher: Sha256::new(),
        failed: None,
    };
    let made = if kind.is_dir() {
        directory::write(source, &mut output, progress).map(|left_out| {
            left_out.map(|left_out| Made {
                diff_id: sha256(output.hasher.clone()),
                left_out,
            })
        })
    } else if kind.file_type().is_block_device() || !(kind.is_file() || kind.file_type().is_fifo()) {
        Err(ImageError::NotAnArchive(source.into()))
    } else {
        let file = File::open(source).map_err(at_source)?;
        let read = archive(file, &mut output, limits, &mut |entries, read| {
            progress(Progress::Reading {
                entries,
                read,
                size: kind.len(),
            });
        });
        match read {
            Ok(diff_id) => Ok(diff_id.map(|diff_id| Made {
                diff_id,
                left_out: Vec::new(),
            })),
            Err(UnpackError::NotAnArchive) => Err(ImageError::NotAnArchive(source.into())),
            Err(error) => Err(ImageError::Unpack {
                path: source.into(),
                source: error,
            }),
        }
    };
    match output.failed {
        // Whatever it led to.
        Some(error) => Err(ImageError::Write {
            path: source.into(),
            source: error,
        }),
        None => made?.ok_or_else(|| ImageError::Empty(source.into())),
    }
}

/// Writes an archive, looks at each of its entries, and returns the digest of it, uncompressed; none if nothing is in it.
fn archive(
    file: File,
    output: &mut Output<'_>,
    limits: &Limits,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Option<String>, UnpackError> {
    let stored = Counter::new(file);
    let read = stored.count.clone();
    let mut stored = BufReader::with_capacity(1 << 17, stored);
    let plain: Box<dyn Read + '_> = if is_xz(start(&mut stored)?) {
        Box::new(Tee {
            from: decompress(stored)?,
            output,
        })
    } else {
        let tee = Tee { from: stored, output };
        decompress(BufReader::with_capacity(1 << 17, tee))?
    };
    let mut is_empty = true;
    let mut budget = Budget::new(limits);
    // No digest is known that would tell truncation.
    let plain = each_entry(Hashed::new(plain), false, &mut budget, &mut |entry, archive| {
        let hostile = |why| UnpackError::Hostile {
            entry: String::from_utf8_lossy(&entry.name).into_owned(),
            why,
        };
        let path = inner_path(&entry.name).map_err(hostile)?;
        if is_whiteout(&path) {
            return Err(hostile(WHITEOUT));
        }
        is_empty &= path.as_os_str().is_empty();
        if archive.entries().saturating_sub(1).is_multiple_of(PROGRESS_EVERY) {
            progress(archive.entries(), read.load(Ordering::Relaxed));
        }
        Ok(())
    })?;
    Ok((!is_empty).then(|| plain.digest()))
}

/// Where a layer is written.
struct Output<'a> {
    to: &'a mut dyn Write,
    hasher: Sha256,
    /// Why it could not be, which tells it from what cannot be read.
    failed: Option<io::Error>,
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.to.write(bytes) {
            Ok(count) => {
                self.hasher.update(bytes.get(..count).unwrap_or_default());
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.failed = Some(error);
                Err(io::Error::other("it cannot be written"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Writes what is read through it.
struct Tee<'a, 'b, R> {
    from: R,
    output: &'a mut Output<'b>,
}

impl<R: Read> Read for Tee<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        self.output.write_all(buffer.get(..count).unwrap_or_default())?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
