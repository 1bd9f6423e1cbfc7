//! Images of the store: a name stands for a root file system, which is a read-only EROFS file, and for what a container of it
//! runs. They are built from directories and archives, or come from registries and archives of images.

mod blobs;
mod build;
mod commit;
mod config;
mod content;
mod install;
mod load;
mod name;
mod names;
#[cfg(feature = "registry")]
mod pull;
mod save;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

pub use blobs::Digest;
pub use commit::Commit;
pub use config::{Healthcheck, History, ImageConfig, Overrides, RootFs, RunConfig};
pub use content::Platform;
pub use install::ImageActivity;
pub use load::{LoadOptions, LoadSource};
pub use name::ImageName;
pub use names::{Collected, Removed};
#[cfg(feature = "registry")]
pub use pull::{PullError, PullOptions, Pulled};

use crate::error::EngineError;
use crate::store::{self, Lock, Store};
use blobs::Blobs;

/// Begins the name of a directory in which an image is being built.
const BUILDING: &str = ".building-";
/// Begins the record of an image that has no name.
const UNTAGGED: &str = "%untagged-";
/// Digits that tell an image from others, at least.
const ID_DIGITS_MIN: usize = 4;

/// What can go wrong with images in particular.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// Not a name.
    #[error(
        "{name:?} is not a name for an image: {reason}. Names are as in Docker: debian, debian:12, \
         localhost:5000/team/app:v1"
    )]
    Name {
        /// What was given.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// More than one image.
    #[error("{id} begins the id of more than one image: give more of it")]
    Ambiguous {
        /// What was given.
        id: String,
    },
    /// An image that has several names cannot be removed by its id.
    #[error("image {id} has more than one name ({names}): remove these, or use --force")]
    Names {
        /// What was given.
        id: String,
        /// Its names.
        names: String,
    },
    /// An image cannot be pulled.
    #[cfg(feature = "registry")]
    #[error(transparent)]
    Pull(#[from] PullError),
    /// Content differs from what was promised.
    #[error("{digest} is not what it should be: {reason}")]
    Content {
        /// What it should be.
        digest: String,
        /// What it is.
        reason: String,
    },
    /// An archive of images cannot be read.
    #[error("cannot load {}: {source}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it, and with which entry.
        source: picovm_rootfs::image::UnpackError,
    },
    /// An archive of images is none, or lacks something.
    #[error("cannot load {}: {reason}", path.display())]
    Load {
        /// The archive or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An image has no layers that could be saved or put another one above.
    #[error(
        "image {name} has no layers that could be saved or committed with others: an older picovm built it from {} and kept none. \
         `picovm image build` builds it again, with one, and containers can then be made of the new image",
        from.display()
    )]
    Built {
        /// The image.
        name: String,
        /// What it was built from.
        from: PathBuf,
    },
    /// A manifest or configuration makes no sense, or is of a kind that is not known.
    #[error("{what} cannot be used: {reason}")]
    Document {
        /// Which one.
        what: String,
        /// Why.
        reason: String,
    },
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its name, without what goes without saying; empty if it has none.
    pub name: String,
    /// What tells its root file system from others, 64 hexadecimal digits: the chain id of its layers (OCI image
    /// specification, "Layer ChainID"), or BLAKE3 of its file if it has none.
    pub digest: String,
    /// Size of its file in bytes.
    pub bytes: u64,
    /// Files, directories and links in it.
    pub entries: u64,
    /// When it came into the store, in seconds since 1970.
    pub created: u64,
    /// What it was made from.
    pub source: PathBuf,
    /// Digest of its manifest; none if it has no layers, as one that an older version has built from a directory or an archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// Digest of its configuration, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_digest: Option<String>,
    /// Digest by which its registry knows it: that of its manifest, or of the index that names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry_digest: Option<String>,
    /// The file. Not part of the record: the store may be moved.
    #[serde(skip_deserializing, default)]
    pub file: PathBuf,
}

impl Image {
    /// Its id: the digest of its configuration, as in Docker; `blake3:` and digits for one without.
    #[must_use]
    pub fn id(&self) -> String {
        match &self.config_digest {
            Some(digest) => digest.clone(),
            None => format!("blake3:{}", self.digest),
        }
    }

    /// What people call it: its name, or the first digits of its id if it has none.
    #[must_use]
    pub fn shown(&self) -> String {
        if self.name.is_empty() {
            self.id_digits().chars().take(12).collect()
        } else {
            self.name.clone()
        }
    }

    /// The digits of its id.
    #[must_use]
    pub fn id_digits(&self) -> String {
        let id = self.id();
        id.split_once(':').map_or("", |(_, digits)| digits).to_owned()
    }

    /// Its configuration: what a container of it runs. That of an image without layers is empty.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Record`], [`ImagesError::Document`].
    pub fn config(&self) -> Result<ImageConfig, EngineError> {
        match self.document(self.config_digest.as_deref())? {
            Some((digest, bytes)) => content::parse_config(&digest, &bytes),
            None => Ok(ImageConfig {
                architecture: "amd64".into(),
                os: "linux".into(),
                ..ImageConfig::default()
            }),
        }
    }

    /// Its manifest, byte by byte, if it has one.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Record`].
    pub fn manifest_bytes(&self) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.document(self.manifest.as_deref())?.map(|(_, bytes)| bytes))
    }

    /// The files in the store of its manifest, its configuration and its layers.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Record`], [`ImagesError::Document`].
    pub fn content(&self) -> Result<Vec<PathBuf>, EngineError> {
        let blobs = self.blobs();
        let content = content_of(&blobs, self)?;
        Ok(content.iter().map(|digest| blobs.path(digest)).collect())
    }

    fn without_layers(&self) -> EngineError {
        ImagesError::Built {
            name: self.shown(),
            from: self.source.clone(),
        }
        .into()
    }

    /// The content of the store that it is in.
    fn blobs(&self) -> Blobs {
        // images/files/KEY.erofs and images/blobs/sha256 lie in the same store.
        let images = self.file.parent().and_then(Path::parent).unwrap_or(Path::new(""));
        Blobs::new(images.join("blobs/sha256"))
    }

    /// Its manifest and configuration among the store's content.
    fn document(&self, digest: Option<&str>) -> Result<Option<(Digest, Vec<u8>)>, EngineError> {
        let Some(digest) = digest.and_then(Digest::parse) else {
            return Ok(None);
        };
        let bytes = self.blobs().document(&digest)?;
        Ok(Some((digest, bytes)))
    }
}

impl Store {
    fn image_file(&self, digest: &str) -> PathBuf {
        self.files().join(format!("{digest}.erofs"))
    }

    fn blobs(&self) -> Blobs {
        Blobs::new(self.blobs_directory())
    }

    /// The image that a name or an id, or the first digits of one, stands for.
    ///
    /// # Errors
    /// [`EngineError::NoImage`], [`ImagesError::Name`], [`ImagesError::Ambiguous`], [`EngineError::Record`],
    /// [`EngineError::ImageFile`].
    pub fn image(&self, name: &str) -> Result<Image, EngineError> {
        let image = self.find_image(name)?;
        if image.file.is_file() {
            Ok(image)
        } else {
            Err(EngineError::ImageFile {
                name: name.to_owned(),
                path: image.file,
            })
        }
    }

    /// As [`Store::image`], with or without its file.
    fn find_image(&self, text: &str) -> Result<Image, EngineError> {
        // Most names are told as they are kept, and some are from before they had a grammar.
        if let Some(image) = self.read_name(name::without_defaults(text))? {
            return Ok(image);
        }
        if let Some(image) = self.find_by_id(text)? {
            return Ok(image);
        }
        let name = ImageName::parse(text)?;
        if let Some(image) = self.read_name(&name.to_string())? {
            return Ok(image);
        }
        // By the registry's digest, whatever the tag.
        let of_digest = |image: &Image| {
            image.registry_digest.as_deref() == name.digest()
                && ImageName::parse(&image.name).is_ok_and(|other| other.is_of_repository_of(&name))
        };
        let found = match name.digest() {
            Some(_) => self.images()?.into_iter().find(of_digest),
            None => None,
        };
        found.ok_or_else(|| EngineError::NoImage {
            name: text.to_owned(),
        })
    }

    fn find_by_id(&self, text: &str) -> Result<Option<Image>, EngineError> {
        let digits = ["sha256:", "blake3:"]
            .iter()
            .find_map(|prefix| text.strip_prefix(prefix))
            .unwrap_or(text);
        let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hex || !(ID_DIGITS_MIN..=64).contains(&digits.len()) {
            return Ok(None);
        }
        let mut found: Option<Image> = None;
        for image in self.images()? {
            if !image.id_digits().starts_with(digits) {
                continue;
            }
            match &found {
                Some(other) if other.id() != image.id() => {
                    return Err(ImagesError::Ambiguous { id: text.to_owned() }.into());
                }
                Some(_) => {}
                None => found = Some(image),
            }
        }
        Ok(found)
    }

    /// The record of a name without what goes without saying, if there is one.
    fn read_name(&self, short: &str) -> Result<Option<Image>, EngineError> {
        match name::record(short) {
            Some(record) => self.read_record(&self.names().join(record)),
            None => Ok(None),
        }
    }

    fn read_record(&self, path: &Path) -> Result<Option<Image>, EngineError> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(EngineError::store("read", path))?,
        };
        let bad = |reason: String| EngineError::Record {
            path: path.to_owned(),
            reason,
        };
        let mut image: Image = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        if image.digest.len() != 64 || !image.digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad("its digest is none".into()));
        }
        image.file = self.image_file(&image.digest);
        Ok(Some(image))
    }

    /// All images, by name, each as often as it has names; those without come first.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Record`].
    pub fn images(&self) -> Result<Vec<Image>, EngineError> {
        let directory = self.names();
        let mut images = Vec::new();
        for entry in fs::read_dir(&directory).map_err(EngineError::store("list", &directory))? {
            let path = entry.map_err(EngineError::store("list", &directory))?.path();
            let is_record = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.ends_with(".json") && !name.starts_with('.'));
            // One that is removed meanwhile is no image any more.
            if is_record && let Some(image) = self.read_record(&path)? {
                images.push(image);
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// Holds off who collects, while content is added that no name stands for yet. First removes what others have left that
    /// were killed, if nobody adds anything now.
    fn adding(&self) -> Result<Lock, EngineError> {
        let path = self.images_lock();
        if let Some(_alone) = Lock::try_take(&path)? {
            self.remove_leftovers();
        }
        Lock::share(&path)
    }

    /// Removes what was being written by who was killed. Nobody else may add anything.
    fn remove_leftovers(&self) {
        for prefix in [BUILDING, ".picovm-", ".tmp"] {
            store::remove_leftovers(&self.files(), prefix);
        }
        store::remove_leftovers(&self.blobs_directory(), blobs::UNFINISHED);
        store::remove_leftovers(&self.root().join("images"), install::LOADING);
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The content that an image needs: its manifest, and what that names.
fn content_of(blobs: &Blobs, image: &Image) -> Result<BTreeSet<Digest>, EngineError> {
    let mut content = BTreeSet::new();
    let Some(digest) = image.manifest.as_deref().and_then(Digest::parse) else {
        return Ok(content);
    };
    let manifest = content::parse_manifest(&digest, &blobs.document(&digest)?)?;
    content.insert(manifest.config.digest.clone());
    content.extend(manifest.layers.into_iter().map(|layer| layer.digest));
    content.insert(digest);
    Ok(content)
}

#[cfg(test)]
mod tests;
