//! Unpacks tar archives from an untrusted source into a directory, and nowhere else: the layers of an image one over the other.

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

use crate::archive::{Entry, Reader};
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

impl Limits {
    /// Any size: for what is there already.
    pub const NONE: Self = Self {
        bytes: u64::MAX,
        entries: u64::MAX,
    };
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
pub(crate) const PROGRESS_EVERY: u64 = 256;

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
        let stored = Counter::new(archive);
        let read = stored.count.clone();
        let plain = Hashed::new(decompress(BufReader::with_capacity(1 << 17, stored))?);
        let tree = &mut self.tree;
        // Truncation is found by the digest, and there are layers that have no end mark.
        let plain = each_entry(plain, true, &mut self.budget, &mut |entry, archive| {
            tree.add(entry, archive)?;
            if archive.entries().saturating_sub(1).is_multiple_of(PROGRESS_EVERY) {
                progress(archive.entries(), read.load(Ordering::Relaxed));
            }
            Ok(())
        })?;
        let actual = plain.digest();
        if actual == diff_id {
            Ok(())
        } else {
            Err(UnpackError::Digest {
                actual,
                expected: diff_id.to_owned(),
            })
        }
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
pub(crate) struct Budget {
    limits: Limits,
    bytes: u64,
    entries: u64,
}

impl Budget {
    pub(crate) fn new(limits: &Limits) -> Self {
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

    fn take(&mut self, entry: &Entry) -> Result<(), UnpackError> {
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

/// Shows the entries of an archive, uncompressed, one after the other to `each`, reads it to its end, and gives it back.
pub(crate) fn each_entry<R: Read>(
    plain: R,
    lenient: bool,
    budget: &mut Budget,
    each: &mut Each<'_, R>,
) -> Result<R, UnpackError> {
    let bounded = Bounded {
        inner: BufReader::with_capacity(1 << 17, plain),
        left: budget.stream(),
    };
    let mut archive = Reader::new(bounded, lenient);
    while let Some(entry) = archive.next()? {
        if entry.kind.is_pax_global_extensions() {
            continue;
        }
        budget.take(&entry)?;
        each(&entry, &mut archive)?;
    }
    let entries = archive.entries();
    // What follows is padding, but with it comes the compression's own checksum, it counts for the digest, and who writes into a pipe
    // wants it to be read.
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(|source| UnpackError::Damaged { entries, source })?;
    Ok(rest.inner.into_inner())
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

/// An archive whose entries are shown.
pub(crate) type Archive<R> = Reader<Bounded<BufReader<R>>>;

/// Looks at an entry, and reads its content if it likes.
type Each<'a, R> = dyn FnMut(&Entry, &mut Archive<R>) -> Result<(), UnpackError> + 'a;

/// Counts the bytes that are read through it.
pub(crate) struct Counter<R> {
    inner: R,
    pub(crate) count: Arc<AtomicU64>,
}

impl<R> Counter<R> {
    pub(crate) fn new(inner: R) -> Self {
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

/// Computes the digest of the bytes that are read through it.
pub(crate) struct Hashed<R> {
    inner: R,
    hasher: Sha256,
}

impl<R> Hashed<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
        }
    }

    pub(crate) fn digest(self) -> String {
        sha256(self.hasher)
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Ends a stream that does not end itself.
pub(crate) struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other("uncompressed, it is larger than an image may be"))?;
        Ok(count)
    }
}

/// The content of a file that may be compressed by gzip, zstd or xz, as its first bytes say.
pub(crate) fn decompress<'a, R: Read + 'a>(
    mut stored: BufReader<R>,
) -> Result<Box<dyn Read + 'a>, UnpackError> {
    Ok(match start(&mut stored)? {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(stored)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(Zstd::new(stored)),
        start if is_xz(start) => Box::new(lzma_rust2::XzReader::new(stored, true)),
        _ => Box::new(stored),
    })
}

/// The first bytes of a file.
pub(crate) fn start<R: Read>(stored: &mut BufReader<R>) -> Result<&[u8], UnpackError> {
    stored
        .fill_buf()
        .map_err(|source| UnpackError::Damaged { entries: 0, source })
}

/// Whether a file that begins so is compressed by xz.
pub(crate) fn is_xz(start: &[u8]) -> bool {
    start.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0])
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
