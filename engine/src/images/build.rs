//! Images built from directories and archives: they have one layer, which is that archive, or one of the directory.

use std::collections::BTreeSet;
use std::path::Path;

use picovm_rootfs::image::{ImageError, Limits, Progress};
use picovm_rootfs::layer::{self, Made};

use super::blobs::Digest;
use super::config::{History, ImageConfig, RootFs};
use super::content::{Platform, descriptor};
use super::install::ImageActivity;
use super::load::layer_type;
use super::{Image, ImageName};
use crate::error::EngineError;
use crate::store::Store;

impl Store {
    /// Builds an image from a directory or tar archive and gives it a name. An image of that name is replaced, once
    /// the new one is whole, and removed if it has no other name and no container. The same layer gives the same image.
    ///
    /// # Errors
    /// [`super::ImagesError::Name`], [`EngineError::Image`], [`EngineError::Store`]; the store is then unchanged, but for content that
    /// was added while others add some: [`Store::prune`] removes that.
    pub fn build_image(
        &self,
        name: &str,
        source: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, EngineError> {
        let name = ImageName::parse(name)?;
        let failed = |source| EngineError::Image {
            name: name.to_string(),
            source,
        };
        // What is a directory is on this machine already, whatever its size.
        let limits = if source.is_dir() {
            Limits::NONE
        } else {
            Limits::default()
        };
        let adding = self.adding()?;
        let blobs = self.blobs();
        blobs.prepare()?;
        let mut writer = blobs.writer()?;
        let made = layer::make(source, &mut writer, &limits, progress).map_err(failed)?;
        let (layer, size) = writer.finish()?;
        let mut content = BTreeSet::from([layer.clone()]);
        let before = self.read_name(&name.to_string())?;
        let named = self
            .install_layer((&layer, size), &made, source, &limits, &mut content, progress)
            .and_then(|image| self.name_image(&image, &name));
        drop(adding);
        let (image, replaced) = match named {
            Ok(named) => named,
            Err(error) => {
                let file = Digest::parse(&made.diff_id);
                // If that fails, it is left to `prune`, too.
                let _ = self.collect(content, file.as_ref().map_or("", Digest::hex));
                return Err(of_source(error, source, failed));
            }
        };
        if let Some(replaced) = replaced
            && !self.has_container(&replaced)?
        {
            self.remove_untagged(&replaced)?;
        } else if let Some(before) = before
            && before.id() == image.id()
            && before.manifest != image.manifest
        {
            // The same layer, compressed in another way.
            self.collect_image(&before)?;
        }
        Ok(image)
    }

    /// Makes an image of a layer that is in the store. What it puts there is added to `content`.
    fn install_layer(
        &self,
        (layer, size): (&Digest, u64),
        made: &Made,
        source: &Path,
        limits: &Limits,
        content: &mut BTreeSet<Digest>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, EngineError> {
        let platform = Platform::default();
        // Nothing of when and of where from, so that the same layer gives the same image.
        let config = ImageConfig {
            architecture: platform.architecture,
            os: platform.os,
            rootfs: RootFs {
                kind: "layers".into(),
                diff_ids: vec![made.diff_id.clone()],
            },
            history: vec![History {
                created_by: Some("picovm image build".into()),
                ..History::default()
            }],
            ..ImageConfig::default()
        };
        let blobs = self.blobs();
        let layers = vec![descriptor(layer_type(&blobs, layer)?, layer, size)];
        let manifest = self.put_image(&config, layers, content)?;
        if source.is_dir() && !rustix::process::geteuid().is_root() {
            // Only root could unpack files of others.
            self.pack_directory(&made.diff_id, source, &made.left_out, progress)?;
        }
        self.install(&manifest, source, limits, &mut |activity| {
            if let ImageActivity::Building(now) = activity {
                progress(now);
            }
        })
    }

    /// Whether a container is made of an image.
    fn has_container(&self, image: &Image) -> Result<bool, EngineError> {
        let containers = self.containers()?.list()?;
        Ok(containers
            .iter()
            .any(|record| record.config.image_digest == image.digest))
    }
}

/// An error of the layer, told of what it was made of.
fn of_source(error: EngineError, path: &Path, failed: impl FnOnce(ImageError) -> EngineError) -> EngineError {
    match error {
        EngineError::Image {
            source: ImageError::Layer { source, .. },
            ..
        } => failed(ImageError::Unpack {
            path: path.to_owned(),
            source,
        }),
        EngineError::Image { source, .. } => failed(source),
        other => other,
    }
}

#[cfg(test)]
mod tests;
