//! Volumes: directories of the store that outlive containers, each with a name.
//!
//! ```text
//! volumes/NAME/_data          what is in it
//! volumes/NAME/volume.json    what is known of it
//! volumes/.lock               held while one is made or removed, and while a container is created that uses one
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::container::random_id;
use crate::containers::{Containers, MountKind, MountPoint, Record, read_json, write_json};
use crate::error::EngineError;
use crate::store::{self, Lock, Store};

/// Begins the name of the directory of a volume that is being made or removed.
const UNFINISHED: &str = ".unfinished-";
const DATA: &str = "_data";
const RECORD: &str = "volume.json";

/// The volumes of a store.
#[derive(Clone, Debug)]
pub struct Volumes {
    store: Store,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created: DateTime<Utc>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it was made for a container that named none: it goes with that, if asked to.
    pub anonymous: bool,
}

impl Store {
    /// Its volumes.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn volumes(&self) -> Result<Volumes, EngineError> {
        // What is in them belongs to users of containers, whose numbers mean others here.
        store::make_private(&self.volumes_directory())?;
        Ok(Volumes { store: self.clone() })
    }
}

/// Docker's grammar.
fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() >= 2
        && name.len() <= 255
        && bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

impl Volumes {
    fn directory(&self, name: &str) -> PathBuf {
        self.store.volumes_directory().join(name)
    }

    fn lock(&self) -> Result<Lock, EngineError> {
        Lock::take(&self.store.volumes_directory().join(".lock"))
    }

    /// Where what is in a volume lies.
    #[must_use]
    pub fn data(&self, name: &str) -> PathBuf {
        self.directory(name).join(DATA)
    }

    /// Makes a volume; one of this name that is there already is given as it is. Without a name it gets a random one.
    ///
    /// # Errors
    /// [`EngineError::VolumeName`], [`EngineError::Store`].
    pub fn create(
        &self,
        name: Option<&str>,
        labels: BTreeMap<String, String>,
    ) -> Result<Volume, EngineError> {
        let _lock = self.lock()?;
        let (name, anonymous) = match name {
            Some(name) => (name.to_owned(), false),
            None => (random_id::<32>()?, true),
        };
        self.ensure(&name, labels, anonymous)
    }

    /// The volume of this name, made if it is not there. The lock is held.
    fn ensure(
        &self,
        name: &str,
        labels: BTreeMap<String, String>,
        anonymous: bool,
    ) -> Result<Volume, EngineError> {
        if !is_name(name) {
            return Err(EngineError::VolumeName {
                name: name.to_owned(),
            });
        }
        let directory = self.directory(name);
        if directory.is_dir() {
            return read_json(&directory.join(RECORD));
        }
        let root = self.store.volumes_directory();
        store::remove_leftovers(&root, UNFINISHED);
        let unfinished = root.join(format!("{UNFINISHED}{name}"));
        let volume = Volume {
            name: name.to_owned(),
            created: Utc::now(),
            labels,
            anonymous,
        };
        let data = unfinished.join(DATA);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&data)
            .map_err(EngineError::store("create", &data))?;
        write_json(&unfinished.join(RECORD), &volume)?;
        fs::rename(&unfinished, &directory).map_err(EngineError::store("create", &directory))?;
        Ok(volume)
    }

    /// Makes the volumes that a container names and that are not there yet. They are not removed while the lock is held, and then
    /// because the container is there.
    pub(crate) fn reserve(&self, mounts: &[MountPoint]) -> Result<Lock, EngineError> {
        let lock = self.lock()?;
        for mount in mounts {
            if let MountKind::Volume { name, anonymous } = &mount.kind {
                self.ensure(name, BTreeMap::new(), *anonymous)?;
            }
        }
        Ok(lock)
    }

    /// The volume of this name.
    ///
    /// # Errors
    /// [`EngineError::NoVolume`], [`EngineError::Store`].
    pub fn find(&self, name: &str) -> Result<Volume, EngineError> {
        let path = self.directory(name).join(RECORD);
        if !is_name(name) || !path.is_file() {
            return Err(EngineError::NoVolume {
                name: name.to_owned(),
            });
        }
        read_json(&path)
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn list(&self) -> Result<Vec<Volume>, EngineError> {
        let root = self.store.volumes_directory();
        let entries = fs::read_dir(&root).map_err(EngineError::store("read", &root))?;
        let mut volumes = Vec::new();
        for name in entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
        {
            match self.find(&name) {
                Ok(volume) => volumes.push(volume),
                // Removed meanwhile, or no volume.
                Err(EngineError::NoVolume { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(volumes)
    }

    /// Names of the volumes that containers use, whether these run or not, with the container's.
    ///
    /// # Errors
    /// As [`Containers::list`].
    pub fn used(&self) -> Result<BTreeMap<String, BTreeSet<String>>, EngineError> {
        let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for record in self.store.containers()?.list()? {
            for name in names(&record) {
                used.entry(name.to_owned())
                    .or_default()
                    .insert(record.name.clone());
            }
        }
        Ok(used)
    }

    /// Removes a volume that no container uses, and all that is in it.
    ///
    /// # Errors
    /// [`EngineError::NoVolume`], [`EngineError::VolumeInUse`], [`EngineError::Store`].
    pub fn remove(&self, name: &str) -> Result<(), EngineError> {
        let _lock = self.lock()?;
        self.find(name)?;
        if let Some(containers) = self.used()?.get(name) {
            return Err(EngineError::VolumeInUse {
                name: name.to_owned(),
                containers: containers.iter().cloned().collect::<Vec<_>>().join(", "),
            });
        }
        let directory = self.directory(name);
        let gone = self.store.volumes_directory().join(format!("{UNFINISHED}{name}"));
        fs::rename(&directory, &gone).map_err(EngineError::store("remove", &directory))?;
        store::remove(&gone)
    }

    /// Removes the volumes that were made for this container and that no other uses: what it leaves when it is gone.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn remove_anonymous_of(&self, record: &Record) -> Result<(), EngineError> {
        for mount in &record.config.mounts {
            let MountKind::Volume {
                name,
                anonymous: true,
            } = &mount.kind
            else {
                continue;
            };
            match self.remove(name) {
                Ok(()) | Err(EngineError::NoVolume { .. } | EngineError::VolumeInUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Bytes that a volume takes on disk.
    #[must_use]
    pub fn size(&self, name: &str) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let mut directories = vec![self.data(name)];
        let mut bytes = 0u64;
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let Ok(metadata) = entry.metadata() else { continue };
                bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512));
                if metadata.is_dir() {
                    directories.push(entry.path());
                }
            }
        }
        bytes
    }
}

/// Names of the volumes of a container.
fn names(record: &Record) -> impl Iterator<Item = &str> {
    record.config.mounts.iter().filter_map(|mount| match &mount.kind {
        MountKind::Volume { name, .. } => Some(name.as_str()),
        MountKind::Bind { .. } => None,
    })
}

impl Containers {
    /// As [`Containers::remove`], with the volumes that were made for it alone.
    ///
    /// # Errors
    /// As [`Containers::remove`].
    pub fn remove_with_volumes(&self, record: &Record) -> Result<(), EngineError> {
        self.remove(record)?;
        self.volumes()?.remove_anonymous_of(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes() -> (tempfile::TempDir, Volumes) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        (directory, store.volumes().unwrap())
    }

    #[test]
    fn a_volume_is_made_once_and_found_until_it_is_removed() {
        let (_directory, volumes) = volumes();
        let made = volumes.create(Some("data"), BTreeMap::new()).unwrap();
        assert_eq!(volumes.create(Some("data"), BTreeMap::new()).unwrap(), made);
        assert!(volumes.data("data").is_dir());
        fs::write(volumes.data("data").join("file"), "text").unwrap();
        let other = volumes.create(None, BTreeMap::new()).unwrap();
        assert!(other.anonymous && other.name.len() == 64);
        assert_eq!(volumes.list().unwrap().len(), 2);
        volumes.remove("data").unwrap();
        assert!(matches!(volumes.find("data"), Err(EngineError::NoVolume { .. })));
        assert!(matches!(
            volumes.remove("data"),
            Err(EngineError::NoVolume { .. })
        ));
    }

    #[test]
    fn names_are_dockers() {
        let (_directory, volumes) = volumes();
        for name in ["", "a", "../x", "a/b", ".hidden", "-x", "ü1", "a b"] {
            let refused = volumes.create(Some(name), BTreeMap::new());
            assert!(matches!(refused, Err(EngineError::VolumeName { .. })), "{name}");
            assert!(
                matches!(volumes.find(name), Err(EngineError::NoVolume { .. })),
                "{name}"
            );
        }
    }
}
