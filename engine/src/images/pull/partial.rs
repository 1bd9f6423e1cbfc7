//! Content on its way from a registry: what has come is kept, and the next pull goes on from there.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use super::super::ImagesError;
use super::super::blobs::{Blobs, Digest, check};
use super::super::content::Named;
use crate::error::EngineError;

/// Where content lies that is being fetched, and is continued if that ends early.
fn place(blobs: &Blobs, digest: &Digest) -> PathBuf {
    blobs.path(digest).with_extension("partial")
}

/// Content of which a part is there. Nobody else writes it.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    hasher: Sha256,
    /// Bytes of it that are there.
    pub(super) done: u64,
    /// Whether some of it is from an earlier pull.
    pub(super) taken_up: bool,
}

impl Partial {
    /// Waits until nobody else fetches it. Nothing if somebody has, meanwhile.
    pub(super) fn open(
        blobs: &Blobs,
        named: &Named,
        exists: &dyn Fn() -> bool,
    ) -> Result<Option<Self>, EngineError> {
        let path = place(blobs, &named.digest);
        let failed = || EngineError::store("open", &path);
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .map_err(failed())?;
            file.lock().map_err(EngineError::store("lock", &path))?;
            if exists() {
                return Ok(None);
            }
            // Whoever had the lock may have given the file its name, or taken it away.
            let same = std::fs::metadata(&path)
                .ok()
                .zip(file.metadata().ok())
                .is_some_and(|(there, mine)| (there.dev(), there.ino()) == (mine.dev(), mine.ino()));
            if !same {
                continue;
            }
            let mut partial = Self {
                path: path.clone(),
                file,
                hasher: Sha256::new(),
                done: 0,
                taken_up: false,
            };
            partial.read_on(named.size)?;
            return Ok(Some(partial));
        }
    }

    /// Takes up what is there.
    fn read_on(&mut self, size: u64) -> Result<(), EngineError> {
        let mut buffer = vec![0; 1 << 18];
        loop {
            let count = self
                .file
                .read(&mut buffer)
                .map_err(EngineError::store("read", &self.path))?;
            if count == 0 {
                break;
            }
            self.hasher.update(buffer.get(..count).unwrap_or_default());
            self.done = self.done.saturating_add(count as u64);
        }
        self.taken_up = self.done > 0;
        if self.done > size {
            self.restart()?;
        }
        Ok(())
    }

    pub(super) fn restart(&mut self) -> Result<(), EngineError> {
        self.hasher = Sha256::new();
        self.done = 0;
        self.taken_up = false;
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)).map(|_| ()))
            .map_err(EngineError::store("truncate", &self.path))
    }

    pub(super) fn write(&mut self, bytes: &[u8], named: &Named) -> Result<(), EngineError> {
        let done = self.done.saturating_add(bytes.len() as u64);
        if done > named.size {
            self.restart()?;
            return Err(ImagesError::Content {
                digest: named.digest.to_string(),
                reason: format!(
                    "it is larger than the {} bytes that its manifest says",
                    named.size
                ),
            }
            .into());
        }
        self.file
            .write_all(bytes)
            .map_err(EngineError::store("write to", &self.path))?;
        self.hasher.update(bytes);
        self.done = done;
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<(), EngineError> {
        self.file
            .sync_all()
            .map_err(EngineError::store("write to", &self.path))
    }

    /// Checks it. If it is not what it should be, and nothing of it is from an earlier pull, it is removed: there is nothing in it
    /// to go on from.
    pub(super) fn check(&self, named: &Named) -> Result<(), EngineError> {
        let found = Digest::from_hasher(self.hasher.clone());
        let result = check(&found, self.done, &named.digest, named.size);
        if result.is_err() && !self.taken_up {
            crate::store::remove(&self.path)?;
        }
        Ok(result?)
    }

    /// Gives it its name.
    pub(super) fn finish(self, blobs: &Blobs, named: &Named) -> Result<(), EngineError> {
        self.sync()?;
        blobs.keep(&self.path, &named.digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_is_taken_up_and_what_is_wrong_is_thrown_away() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(directory.path().to_owned());
        let named = Named {
            digest: Digest::of(b"hello"),
            size: 5,
        };
        let open = || Partial::open(&blobs, &named, &|| false).unwrap().unwrap();
        let mut partial = open();
        partial.write(b"hel", &named).unwrap();
        drop(partial);
        let mut partial = open();
        assert_eq!(partial.done, 3);
        partial.write(b"lo", &named).unwrap();
        partial.check(&named).unwrap();
        partial.finish(&blobs, &named).unwrap();
        assert_eq!(blobs.document(&named.digest).unwrap(), b"hello");
        assert!(Partial::open(&blobs, &named, &|| true).unwrap().is_none());

        let mut partial = open();
        let error = partial.write(b"hello!", &named).unwrap_err().to_string();
        assert!(error.contains("larger than"), "{error}");
        partial.write(b"hallo", &named).unwrap();
        let error = partial.check(&named).unwrap_err().to_string();
        assert!(error.contains(named.digest.as_str()), "{error}");
        assert!(!place(&blobs, &named.digest).exists());
        std::fs::write(place(&blobs, &named.digest), "longer than it").unwrap();
        assert_eq!(open().done, 0);
    }
}
