//! Images built from directories and archives.

use std::fs;
use std::path::Path;

use picovm_rootfs::image::{self, Progress};

use super::{BUILDING, Image, ImageName, now};
use crate::error::EngineError;
use crate::store::Store;

impl Store {
    /// Builds an image from a directory or tar archive and gives it a name. An image of that name is replaced, once
    /// the new one is whole, and removed if it has no other name.
    ///
    /// # Errors
    /// [`super::ImagesError::Name`], [`EngineError::Image`], [`EngineError::Store`]; the store is then unchanged.
    pub fn build_image(
        &self,
        name: &str,
        source: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, EngineError> {
        let name = ImageName::parse(name)?;
        let adding = self.adding()?;
        // A name of its own while it is built: the digest is known at the end.
        let partial = tempfile::Builder::new()
            .prefix(BUILDING)
            .tempdir_in(self.files())
            .map_err(EngineError::store("create a directory in", &self.files()))?;
        let built = partial.path().join("image.erofs");
        let info = image::build(source, &built, progress).map_err(|source| EngineError::Image {
            name: name.to_string(),
            source,
        })?;
        let file = self.image_file(&info.digest);
        if !file.is_file() {
            fs::rename(&built, &file).map_err(EngineError::store("create", &file))?;
        }
        let image = Image {
            name: String::new(),
            digest: info.digest,
            bytes: info.size,
            entries: info.entries,
            created: now(),
            source: source.to_owned(),
            manifest: None,
            config_digest: None,
            registry_digest: None,
            file,
        };
        let (image, replaced) = self.name_image(&image, &name)?;
        drop((adding, partial));
        if let Some(replaced) = replaced {
            self.remove_untagged(&replaced)?;
        }
        Ok(image)
    }
}
