//! Content by its digest: manifests, configurations and layers, as they came.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::ImagesError;
use crate::error::EngineError;

/// Bytes of a manifest or configuration; registries refuse larger ones.
pub(super) const DOCUMENT_MAX: u64 = 8 << 20;
/// Begins the name of a file that is not whole yet and nobody continues.
pub(super) const UNFINISHED: &str = ".unfinished-";
const ALGORITHM: &str = "sha256:";

/// SHA-256 of some content, as `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(String);

impl Digest {
    /// Reads one; nothing if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix(ALGORITHM)?;
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (hex.len() == 64 && hex.bytes().all(digit)).then(|| Self(text.to_owned()))
    }

    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hasher(Sha256::new_with_prefix(bytes))
    }

    pub(super) fn from_hasher(hasher: Sha256) -> Self {
        Self(picovm_rootfs::unpack::sha256(hasher))
    }

    /// Its 64 hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        self.0.strip_prefix(ALGORITHM).unwrap_or_default()
    }

    /// As OCI writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The store's content.
#[derive(Clone, Debug)]
pub(super) struct Blobs {
    directory: PathBuf,
}

impl Blobs {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.hex())
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory, which is not there before the first content is.
    pub(super) fn prepare(&self) -> Result<(), EngineError> {
        fs::create_dir_all(&self.directory).map_err(EngineError::store("create", &self.directory))
    }

    /// The size of some content, if it is there.
    pub(super) fn size(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.path(digest))
            .ok()
            .filter(fs::Metadata::is_file)
            .map(|metadata| metadata.len())
    }

    pub(super) fn open(&self, digest: &Digest) -> Result<File, EngineError> {
        let path = self.path(digest);
        File::open(&path).map_err(EngineError::store("open", &path))
    }

    /// A manifest or configuration, checked.
    pub(super) fn document(&self, digest: &Digest) -> Result<Vec<u8>, EngineError> {
        let path = self.path(digest);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(DOCUMENT_MAX).read_to_end(&mut bytes))
            .map_err(EngineError::store("read", &path))?;
        if Digest::of(&bytes) == *digest {
            Ok(bytes)
        } else {
            Err(EngineError::Record {
                path,
                reason: "its content is not what its name says".into(),
            })
        }
    }

    /// Puts down a manifest or configuration.
    pub(super) fn put(&self, bytes: &[u8]) -> Result<Digest, EngineError> {
        let mut writer = self.writer()?;
        writer
            .write_all(bytes)
            .map_err(EngineError::store("write to", &self.directory))?;
        Ok(writer.finish()?.0)
    }

    /// Takes content of which nothing is known yet.
    pub(super) fn writer(&self) -> Result<Writer, EngineError> {
        let file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(&self.directory)
            .map_err(EngineError::store("create a file in", &self.directory))?;
        Ok(Writer {
            file,
            hasher: Sha256::new(),
            size: 0,
            blobs: self.clone(),
        })
    }

    /// Gives a whole and checked file its name.
    pub(super) fn keep(&self, partial: &Path, digest: &Digest) -> Result<(), EngineError> {
        let path = self.path(digest);
        fs::rename(partial, &path)
            .and_then(|()| File::open(&self.directory)?.sync_all())
            .map_err(EngineError::store("create", &path))
    }
}

/// Content that is being written.
pub(super) struct Writer {
    file: NamedTempFile,
    hasher: Sha256,
    size: u64,
    blobs: Blobs,
}

impl Writer {
    /// Names it by its digest. What is already there stays.
    pub(super) fn finish(self) -> Result<(Digest, u64), EngineError> {
        let digest = Digest::from_hasher(self.hasher);
        let failed = || EngineError::store("write to", self.blobs.directory());
        if self.blobs.size(&digest) != Some(self.size) {
            self.file.as_file().sync_all().map_err(failed())?;
            let partial = self.file.into_temp_path();
            self.blobs.keep(&partial, &digest)?;
            // It has another name now.
            let _ = partial.keep();
        }
        Ok((digest, self.size))
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        self.size = self.size.saturating_add(count as u64);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Checks content against what a manifest says.
pub(super) fn check(
    found: &Digest,
    size: u64,
    expected: &Digest,
    expected_size: u64,
) -> Result<(), ImagesError> {
    if size != expected_size {
        return Err(ImagesError::Content {
            digest: expected.to_string(),
            reason: format!("its size is {size} and should be {expected_size}"),
        });
    }
    if found != expected {
        return Err(ImagesError::Content {
            digest: expected.to_string(),
            reason: format!("its digest is {found}"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_found_by_its_digest_and_damage_is() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(directory.path().join("sha256"));
        blobs.prepare().unwrap();
        let digest = blobs.put(b"hello").unwrap();
        assert_eq!(
            digest.as_str(),
            "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        );
        assert_eq!(blobs.put(b"hello").unwrap(), digest);
        assert_eq!(blobs.document(&digest).unwrap(), b"hello");
        assert_eq!(fs::read_dir(blobs.directory()).unwrap().count(), 1);
        fs::write(blobs.path(&digest), "hellO").unwrap();
        assert!(matches!(blobs.document(&digest), Err(EngineError::Record { .. })));
    }

    #[test]
    fn a_digest_is_a_file_name_and_nothing_else() {
        for wrong in [
            "",
            "sha256:",
            "sha256:../../../../etc/passwd",
            &format!("sha256:{}", "A".repeat(64)),
            &format!("sha512:{}", "a".repeat(128)),
            &format!("sha256:{}", "a".repeat(65)),
        ] {
            assert_eq!(Digest::parse(wrong), None);
        }
        assert!(Digest::parse(&format!("sha256:{}", "0f".repeat(32))).is_some());
    }

    #[test]
    fn what_differs_from_what_is_promised_is_named() {
        let digest = Digest::of(b"a");
        check(&digest, 1, &digest, 1).unwrap();
        assert!(
            check(&digest, 1, &digest, 2)
                .unwrap_err()
                .to_string()
                .contains("size")
        );
        let error = check(&Digest::of(b"b"), 1, &digest, 1).unwrap_err().to_string();
        assert!(error.contains(digest.as_str()), "{error}");
    }
}
