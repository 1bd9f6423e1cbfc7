//! Unpacks tar archives from an untrusted source into a directory, and nowhere else: one, or the layers of an image one over
//! the other.

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

mod listing;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use sha2::{Digest, Sha256};

use crate::archive::Reader;
use crate::tree::Tree;
pub use listing::{Item, each_file};

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
    /// Unpacked, it would be larger than is allowed.
    #[error("refused at entry {entry}: with it, the image has more than {limit} {what}")]
    Limit {
        /// Its name in the archive.
        entry: String,
        /// `bytes` or `entries`.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
    /// It is not what it should be.
    #[error(
        "its content is not what the image's configuration says: it is {actual}, and should be {expected}"
    )]
    Digest {
        /// Digest of the archive, uncompressed.
        actual: String,
        /// What the configuration says (`diff_ids`).
        expected: String,
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

/// How large an image may be, unpacked. A few bytes of an archive can describe any size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all archives, uncompressed, and of all files.
    pub bytes: u64,
    /// Entries of all archives.
    pub entries: u64,
}

impl Default for Limits {
    /// 64 GiB and 4 million entries.
    fn default() -> Self {
        Self {
            bytes: 64 << 30,
            entries: 4_000_000,
        }
    }
}

/// Calls of `progress` are this many entries apart.
const PROGRESS_EVERY: u64 = 256;

/// Unpacks `archive` into the empty directory `root`. `progress` gets entries so far and bytes of the archive read.
///
/// # Errors
/// [`UnpackError`]. What is in `root` then is of no use.
pub fn unpack(
    archive: File,
    root: &Path,
    limits: &Limits,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), UnpackError> {
    let mut tree = Tree::open(root)?;
    add(archive, &mut tree, None, &mut Budget::new(limits), progress)?;
    tree.finish()
}

/// Layers, to be unpacked one over the other.
pub struct Layers {
    tree: Tree,
    budget: Budget,
}

impl Layers {
    /// None yet, in the empty directory `root`.
    ///
    /// # Errors
    /// [`UnpackError::Entry`] if it cannot be opened.
    pub fn new(root: &Path, limits: &Limits) -> Result<Self, UnpackError> {
        Ok(Self {
            tree: Tree::open(root)?,
            budget: Budget::new(limits),
        })
    }

    /// Unpacks one over those before. `diff_id` is what SHA-256 of the uncompressed archive must be, as `sha256:` and
    /// hexadecimal digits; it is computed on the way.
    ///
    /// # Errors
    /// [`UnpackError`]. What is in the directory then is of no use.
    pub fn add(
        &mut self,
        archive: File,
        diff_id: &str,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), UnpackError> {
        self.tree.begin_layer();
        add(archive, &mut self.tree, Some(diff_id), &mut self.budget, progress)
    }

    /// Has to be called after the last.
    ///
    /// # Errors
    /// [`UnpackError::Entry`].
    pub fn finish(mut self) -> Result<(), UnpackError> {
        self.tree.finish()
    }
}

/// What may still be unpacked.
struct Budget {
    limits: Limits,
    bytes: u64,
    entries: u64,
}

impl Budget {
    fn new(limits: &Limits) -> Self {
        Self {
            limits: *limits,
            bytes: limits.bytes,
            entries: limits.entries,
        }
    }

    /// Bytes of one archive, uncompressed: beside those of its files it has headers and padding.
    fn stream(&self) -> u64 {
        self.limits
            .bytes
            .saturating_add(self.limits.entries.saturating_mul(2048))
    }

    fn take(&mut self, entry: &crate::archive::Entry) -> Result<(), UnpackError> {
        let exceeded = |what, limit| UnpackError::Limit {
            entry: String::from_utf8_lossy(&entry.name).into_owned(),
            what,
            limit,
        };
        self.entries = self
            .entries
            .checked_sub(1)
            .ok_or_else(|| exceeded("entries", self.limits.entries))?;
        self.bytes = self
            .bytes
            .checked_sub(entry.size)
            .ok_or_else(|| exceeded("bytes", self.limits.bytes))?;
        Ok(())
    }
}

/// Unpacks one archive.
fn add(
    archive: File,
    tree: &mut Tree,
    diff_id: Option<&str>,
    budget: &mut Budget,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), UnpackError> {
    let stored = Counter::new(archive);
    let read = stored.count.clone();
    let plain = decompress(BufReader::with_capacity(1 << 17, stored))?;
    let plain = Hashed {
        inner: BufReader::with_capacity(1 << 17, plain),
        hasher: diff_id.map(|_| Sha256::new()),
        left: budget.stream(),
    };
    // Truncation is found by the digest where there is one, and there are layers that have no end mark.
    let mut archive = Reader::new(plain, diff_id.is_some());
    let mut entries = 0u64;
    while let Some(entry) = archive.next()? {
        if entry.kind.is_pax_global_extensions() {
            continue;
        }
        budget.take(&entry)?;
        tree.add(&entry, &mut archive)?;
        if entries.is_multiple_of(PROGRESS_EVERY) {
            progress(entries, read.load(Ordering::Relaxed));
        }
        entries = entries.saturating_add(1);
    }
    let entries = archive.entries();
    // What follows is padding, but with it comes the compression's own checksum, and it counts for the digest.
    let mut rest = archive.into_inner();
    let damaged = |source| UnpackError::Damaged { entries, source };
    io::copy(&mut rest, &mut io::sink()).map_err(damaged)?;
    progress(entries, read.load(Ordering::Relaxed));
    if let (Some(expected), Some(hasher)) = (diff_id, rest.hasher) {
        let actual = sha256(hasher);
        if actual != expected {
            return Err(UnpackError::Digest {
                actual,
                expected: expected.to_owned(),
            });
        }
    }
    Ok(())
}

/// A digest as OCI writes it.
#[must_use]
pub fn sha256(hasher: Sha256) -> String {
    use std::fmt::Write;
    hasher
        .finalize()
        .iter()
        .fold("sha256:".to_owned(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
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

/// Computes the digest of the bytes that are read through it, and ends a stream that does not end itself.
struct Hashed<R> {
    inner: R,
    hasher: Option<Sha256>,
    left: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other("uncompressed, it is larger than an image may be"))?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(buffer.get(..count).unwrap_or_default());
        }
        Ok(count)
    }
}

/// The content of a file that may be compressed by gzip, zstd or xz, as its first bytes say.
fn decompress<R: Read + 'static>(mut stored: BufReader<R>) -> Result<Box<dyn Read>, UnpackError> {
    let start = stored
        .fill_buf()
        .map_err(|source| UnpackError::Damaged { entries: 0, source })?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(stored)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(Zstd::new(stored)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Box::new(lzma_rust2::XzReader::new(stored, true)),
        _ => Box::new(stored),
    })
}

/// A sequence of zstd frames, as parallel compressors write it. Frames that are to be skipped are: tools put a list of an
/// archive's files into them.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    /// Whether the decoder is inside of a frame.
    within: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Self {
        Self {
            source,
            decoder: FrameDecoder::new(),
            within: false,
        }
    }

    /// Goes on to the next frame with content; `false` if there is none.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.within {
                if !self.begin()? {
                    return Ok(0);
                }
                self.within = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(io::Error::other)?;
            }
            match self.decoder.read(buffer)? {
                0 => self.within = false,
                count => return Ok(count),
            }
        }
    }
}

#[cfg(test)]
mod tests;
