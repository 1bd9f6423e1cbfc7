//! Giving names and taking them away, and collecting what no name stands for any more.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;

use super::{Digest, Image, ImageName, ImagesError, UNTAGGED, content_of, name};
use crate::error::EngineError;
use crate::store::{self, Lock, Store};

/// What the removal of an image did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<String>,
    /// Id of the image, if it is gone too.
    pub deleted: Option<String>,
    /// Whether its content is still there, because content was being added meanwhile; [`Store::prune`] removes it.
    pub left: bool,
}

/// What was collected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Ids of images that had no name.
    pub images: Vec<String>,
    /// Other content.
    pub content: Vec<String>,
    /// Bytes that it took.
    pub bytes: u64,
}

impl Store {
    fn untagged_record(&self, image: &Image) -> PathBuf {
        self.names().join(format!("{UNTAGGED}{}.json", image.id_digits()))
    }

    fn write_image(&self, path: &std::path::Path, image: &Image) -> Result<(), EngineError> {
        let bytes = serde_json::to_vec_pretty(image)
            .map_err(|error| EngineError::store("encode", path)(error.into()))?;
        store::write_atomically(path, &bytes)
    }

    /// Gives an image a name, and returns it with that, and the image that had the name before and has no other.
    pub(super) fn name_image(
        &self,
        image: &Image,
        name: &ImageName,
    ) -> Result<(Image, Option<Image>), EngineError> {
        let short = name.to_string();
        let path = name::record(&short)
            .map(|record| self.names().join(record))
            .ok_or_else(|| ImagesError::Name {
                name: short.clone(),
                reason: "it cannot be kept".into(),
            })?;
        let _lock = Lock::take(&self.names_lock())?;
        let before = self
            .read_record(&path)?
            .filter(|before| before.id() != image.id());
        let named = Image {
            name: short.clone(),
            ..image.clone()
        };
        let mut replaced = None;
        if let Some(before) = before {
            let elsewhere = |other: &Image| other.id() == before.id() && other.name != short;
            if !self.images()?.iter().any(elsewhere) {
                let before = Image {
                    name: String::new(),
                    ..before
                };
                // First, so that it is never without a record.
                self.write_image(&self.untagged_record(&before), &before)?;
                replaced = Some(before);
            }
        }
        self.write_image(&path, &named)?;
        store::remove(&self.untagged_record(image))?;
        Ok((named, replaced))
    }

    /// Keeps an image that has no name, unless it has one already.
    pub(super) fn keep_image(&self, image: &Image) -> Result<(), EngineError> {
        let _lock = Lock::take(&self.names_lock())?;
        if self.images()?.iter().any(|other| other.id() == image.id()) {
            return Ok(());
        }
        self.write_image(&self.untagged_record(image), image)
    }

    /// Gives an image another name. An image that had it before stays, without a name if it has no other.
    ///
    /// # Errors
    /// As [`Store::image`]; [`ImagesError::Name`].
    pub fn tag_image(&self, image: &str, name: &str) -> Result<Image, EngineError> {
        let name = ImageName::parse(name)?;
        if name.digest().is_some() {
            return Err(ImagesError::Name {
                name: name.to_string(),
                reason: "a name with a digest is given by a registry".into(),
            }
            .into());
        }
        let _adding = self.adding()?;
        let mut image = self.image(image)?;
        image.registry_digest = None;
        Ok(self.name_image(&image, &name)?.0)
    }

    /// Removes a name, and the image, its templates and its content if no other name stands for it. By its id, an image with
    /// one name is removed, or with more if `force`.
    ///
    /// # Errors
    /// As [`Store::image`]; [`ImagesError::Names`].
    pub fn remove_image(&self, text: &str, force: bool) -> Result<Removed, EngineError> {
        let names = Lock::take(&self.names_lock())?;
        let image = self.find_image(text)?;
        let by_id =
            self.read_name(name::without_defaults(text))?.is_none() && self.find_by_id(text)?.is_some();
        let all: Vec<Image> = self
            .images()?
            .into_iter()
            .filter(|other| other.id() == image.id())
            .collect();
        let told = |images: &[Image]| images.iter().map(|image| image.name.clone()).collect::<Vec<_>>();
        if by_id && all.len() > 1 && !force {
            return Err(ImagesError::Names {
                id: text.to_owned(),
                names: told(&all).join(", "),
            }
            .into());
        }
        let (going, staying): (Vec<Image>, Vec<Image>) = all
            .into_iter()
            .partition(|other| by_id || other.name == image.name);
        for image in &going {
            let record = match name::record(&image.name) {
                Some(record) => self.names().join(record),
                None => self.untagged_record(image),
            };
            store::remove(&record)?;
        }
        drop(names);
        let mut removed = Removed {
            untagged: told(&going).into_iter().filter(|name| !name.is_empty()).collect(),
            ..Removed::default()
        };
        if staying.is_empty() {
            removed.deleted = Some(image.id());
            removed.left = !self.collect_image(&image)?;
        }
        Ok(removed)
    }

    /// Takes a name away, and keeps the image, without a name if it has no other. Nothing happens to one that has none.
    ///
    /// # Errors
    /// As [`Store::image`].
    pub fn untag_image(&self, text: &str) -> Result<Removed, EngineError> {
        let _names = Lock::take(&self.names_lock())?;
        let image = self.find_image(text)?;
        let Some(record) = name::record(&image.name) else {
            return Ok(Removed::default());
        };
        let elsewhere = |other: &Image| other.id() == image.id() && other.name != image.name;
        if !self.images()?.iter().any(elsewhere) {
            let kept = Image {
                name: String::new(),
                ..image.clone()
            };
            // First, so that it is never without a record.
            self.write_image(&self.untagged_record(&kept), &kept)?;
        }
        store::remove(&self.names().join(record))?;
        Ok(Removed {
            untagged: vec![image.name],
            ..Removed::default()
        })
    }

    /// Removes an image that has lost its name.
    pub(super) fn remove_untagged(&self, image: &Image) -> Result<(), EngineError> {
        store::remove(&self.untagged_record(image))?;
        self.collect_image(image).map(|_| ())
    }

    /// Removes what only this image needed, which has no record any more; `false` if content is being added, for which it may
    /// be needed.
    pub(super) fn collect_image(&self, image: &Image) -> Result<bool, EngineError> {
        // One whose manifest is damaged has nothing that could be told from other content; prune finds it.
        let content = content_of(&self.blobs(), image).unwrap_or_default();
        self.collect(content, &image.digest)
    }

    /// Removes content and an image's file but for what an image needs that has a record; `false` if content is being added.
    pub(super) fn collect(&self, mut content: BTreeSet<Digest>, file: &str) -> Result<bool, EngineError> {
        let Some(_alone) = Lock::try_take(&self.images_lock())? else {
            return Ok(false);
        };
        let images = self.images()?;
        let blobs = self.blobs();
        for other in &images {
            for digest in content_of(&blobs, other)? {
                content.remove(&digest);
            }
        }
        for digest in content {
            store::remove(&blobs.path(&digest))?;
        }
        if !images.iter().any(|other| other.digest == file) {
            self.remove_file(file)?;
        }
        Ok(true)
    }

    /// Removes the file of an image, and the templates made of it with their pools.
    fn remove_file(&self, digest: &str) -> Result<(), EngineError> {
        for template in self.templates()? {
            if template.image_digest().is_some_and(|of| of == digest) {
                store::remove(&template.path)?;
                // Last: none is begun for a template that is not there.
                self.pools().stop_all_of(&template.key)?;
            }
        }
        store::remove(&self.image_file(digest))?;
        store::remove(&self.files().join(format!("{digest}.json")))
    }

    /// Removes what no name stands for: images without one, content that was fetched for nothing, and what was left by who
    /// was killed. With `all`, images that have names too, but those in `used`, which holds digests of root file systems
    /// ([`Image::digest`]). Waits until nobody adds anything.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Record`].
    pub fn prune(&self, all: bool, used: &BTreeSet<String>) -> Result<Collected, EngineError> {
        let _alone = Lock::take(&self.images_lock())?;
        let names = Lock::take(&self.names_lock())?;
        self.remove_leftovers();
        store::remove_leftovers(&self.names(), ".tmp");
        let mut collected = Collected::default();
        let blobs = self.blobs();
        let (mut files, mut content) = (BTreeSet::new(), BTreeSet::new());
        for image in self.images()? {
            if used.contains(&image.digest) || (!all && !image.name.is_empty()) {
                files.insert(image.digest.clone());
                content.extend(content_of(&blobs, &image)?);
                continue;
            }
            let record = match name::record(&image.name) {
                Some(record) => self.names().join(record),
                None => self.untagged_record(&image),
            };
            store::remove(&record)?;
            if !collected.images.contains(&image.id()) {
                collected.images.push(image.id());
            }
        }
        drop(names);
        for (path, size) in entries(&self.files())? {
            let stem = path
                .file_stem()
                .and_then(OsStr::to_str)
                .unwrap_or_default()
                .to_owned();
            let is_file = path.extension().is_some_and(|extension| extension == "erofs");
            if is_file && !files.contains(&stem) {
                self.remove_file(&stem)?;
                collected.bytes = collected.bytes.saturating_add(size);
            }
        }
        for (path, size) in entries(&self.blobs_directory())? {
            let file = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            let kept =
                Digest::parse(&format!("sha256:{file}")).is_some_and(|digest| content.contains(&digest));
            if !kept {
                store::remove(&path)?;
                collected.bytes = collected.bytes.saturating_add(size);
                collected.content.push(file.to_owned());
            }
        }
        Ok(collected)
    }
}

/// Files of a directory, which need not be there, and their sizes.
fn entries(directory: &std::path::Path) -> Result<Vec<(PathBuf, u64)>, EngineError> {
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        listing => listing.map_err(EngineError::store("list", directory))?,
    };
    let mut files = Vec::new();
    for entry in listing {
        let entry = entry.map_err(EngineError::store("list", directory))?;
        let metadata = entry
            .metadata()
            .map_err(EngineError::store("look at", &entry.path()))?;
        // Blocks, not bytes: an image that another store has lent is a link.
        if metadata.is_file() || metadata.is_symlink() {
            files.push((entry.path(), metadata.len()));
        }
    }
    files.sort();
    Ok(files)
}
