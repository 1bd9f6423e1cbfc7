//! Images of the store: a name stands for a content-addressed EROFS file.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use picovm_rootfs::image::{self, Progress};
use serde::{Deserialize, Serialize};

use crate::error::EngineError;
use crate::store::{self, Lock, Store};

/// Begins the name of a directory in which an image is being built.
const BUILDING: &str = ".building-";

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// BLAKE3 of its file, in hexadecimal.
    pub digest: String,
    /// Size of its file in bytes.
    pub bytes: u64,
    /// Files, directories and links in it.
    pub entries: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// What it was built from.
    pub source: PathBuf,
    /// The file. Not part of the record: the store may be moved.
    #[serde(skip_deserializing, default)]
    pub file: PathBuf,
}

fn check_name(name: &str) -> Result<(), EngineError> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "._-:".contains(character);
    let starts = name
        .chars()
        .next()
        .is_some_and(|first| first.is_ascii_alphanumeric());
    if starts && name.len() <= 128 && name.chars().all(allowed) {
        Ok(())
    } else {
        Err(EngineError::ImageName {
            name: name.to_owned(),
        })
    }
}

impl Store {
    fn name_record(&self, name: &str) -> Result<PathBuf, EngineError> {
        check_name(name)?;
        Ok(self.names().join(format!("{name}.json")))
    }

    fn image_file(&self, digest: &str) -> PathBuf {
        self.files().join(format!("{digest}.erofs"))
    }

    /// Builds an image from a directory or tar archive and gives it a name. An image of that name is replaced, once
    /// the new one is whole.
    ///
    /// # Errors
    /// [`EngineError::ImageName`], [`EngineError::Image`], [`EngineError::Store`]; the store is then unchanged.
    pub fn build_image(
        &self,
        name: &str,
        source: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, EngineError> {
        let record = self.name_record(name)?;
        let old = self.image(name).ok();
        // One build at a time, so that what a build that was killed has left can be told from one that goes on.
        let _lock = Lock::take(&self.files().join(".lock"))?;
        store::remove_leftovers(&self.files(), BUILDING);
        // A name of its own while it is built: the digest is known at the end.
        let partial = tempfile::Builder::new()
            .prefix(BUILDING)
            .tempdir_in(self.files())
            .map_err(EngineError::store("create a directory in", &self.files()))?;
        let built = partial.path().join("image.erofs");
        let info = image::build(source, &built, progress).map_err(|source| EngineError::Image {
            name: name.to_owned(),
            source,
        })?;
        let file = self.image_file(&info.digest);
        if !file.is_file() {
            fs::rename(&built, &file).map_err(EngineError::store("create", &file))?;
        }
        let image = Image {
            name: name.to_owned(),
            digest: info.digest,
            bytes: info.size,
            entries: info.entries,
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            source: source.to_owned(),
            file,
        };
        let bytes = serde_json::to_vec_pretty(&image)
            .map_err(|error| EngineError::store("encode", &record)(error.into()))?;
        store::write_atomically(&record, &bytes)?;
        if let Some(old) = old.filter(|old| old.digest != image.digest) {
            self.collect_image(&old.digest)?;
        }
        Ok(image)
    }

    /// The image of a name.
    ///
    /// # Errors
    /// [`EngineError::NoImage`], [`EngineError::ImageName`], [`EngineError::Record`], [`EngineError::ImageFile`].
    pub fn image(&self, name: &str) -> Result<Image, EngineError> {
        let image = self.read_record(&self.name_record(name)?, name)?;
        if image.file.is_file() {
            Ok(image)
        } else {
            Err(EngineError::ImageFile {
                name: name.to_owned(),
                path: image.file,
            })
        }
    }

    fn read_record(&self, path: &Path, name: &str) -> Result<Image, EngineError> {
        let bytes = fs::read(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => EngineError::NoImage {
                name: name.to_owned(),
            },
            _ => EngineError::store("read", path)(error),
        })?;
        let bad = |reason: String| EngineError::Record {
            path: path.to_owned(),
            reason,
        };
        let mut image: Image = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if image.digest.len() != 64 || !image.digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad("its digest is none".into()));
        }
        image.file = self.image_file(&image.digest);
        Ok(image)
    }

    /// All images, by name.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Record`].
    pub fn images(&self) -> Result<Vec<Image>, EngineError> {
        let directory = self.names();
        let mut images = Vec::new();
        for entry in fs::read_dir(&directory).map_err(EngineError::store("list", &directory))? {
            let path = entry.map_err(EngineError::store("list", &directory))?.path();
            let Some(name) = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_suffix(".json"))
            else {
                continue;
            };
            if check_name(name).is_ok() {
                images.push(self.read_record(&path, name)?);
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// Removes a name, and the image's file and templates if no other name stands for it.
    ///
    /// # Errors
    /// [`EngineError::NoImage`], [`EngineError::Store`].
    pub fn remove_image(&self, name: &str) -> Result<Image, EngineError> {
        let record = self.name_record(name)?;
        let image = self.read_record(&record, name)?;
        store::remove(&record)?;
        self.collect_image(&image.digest)?;
        Ok(image)
    }

    fn collect_image(&self, digest: &str) -> Result<(), EngineError> {
        if self.images()?.iter().any(|image| image.digest == digest) {
            return Ok(());
        }
        for template in self.templates()? {
            if template.image_digest().is_some_and(|of| of == digest) {
                store::remove(&template.path)?;
            }
        }
        store::remove(&self.image_file(digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        (directory, store)
    }

    fn tree(directory: &Path, content: &str) -> PathBuf {
        let tree = directory.join("tree");
        fs::create_dir_all(tree.join("bin")).unwrap();
        fs::write(tree.join("bin/file"), content).unwrap();
        tree
    }

    #[test]
    fn names_cannot_leave_the_store() {
        let (_directory, store) = store();
        for name in ["", "..", "../x", "a/b", ".hidden", "a b", &"x".repeat(129)] {
            assert!(
                matches!(store.image(name), Err(EngineError::ImageName { .. })),
                "{name:?}"
            );
        }
        assert!(matches!(
            store.image("debian:12"),
            Err(EngineError::NoImage { .. })
        ));
    }

    #[test]
    fn an_image_is_shared_by_its_names_and_goes_with_the_last() {
        let (directory, store) = store();
        let source = tree(directory.path(), "one");
        let first = store.build_image("first", &source, &mut |_| {}).unwrap();
        let second = store.build_image("second", &source, &mut |_| {}).unwrap();
        assert_eq!(first.digest, second.digest);
        assert_eq!(store.images().unwrap().len(), 2);
        store.remove_image("first").unwrap();
        assert!(second.file.is_file());
        store.remove_image("second").unwrap();
        assert!(!second.file.exists());
        assert!(matches!(
            store.remove_image("second"),
            Err(EngineError::NoImage { .. })
        ));
    }

    #[test]
    fn building_again_replaces_and_an_error_keeps_the_old_one() {
        let (directory, store) = store();
        let old = store
            .build_image("name", &tree(directory.path(), "old"), &mut |_| {})
            .unwrap();
        assert!(
            store
                .build_image("name", Path::new("/nowhere"), &mut |_| {})
                .is_err()
        );
        assert_eq!(store.image("name").unwrap(), old);
        let new = store
            .build_image("name", &tree(directory.path(), "new"), &mut |_| {})
            .unwrap();
        assert_ne!(new.digest, old.digest);
        assert!(!old.file.exists());
        let files = fs::read_dir(store.files())
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        assert_eq!(files.filter(|name| name != ".lock").count(), 1);
    }
}
