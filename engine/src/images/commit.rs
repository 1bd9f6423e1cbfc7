//! Images made of what a container has changed: its image's layers and one more.

use std::collections::BTreeSet;
use std::io::{self, Read};

use picovm_rootfs::image::Limits;
use serde_json::Value;

use super::content::descriptor;
use super::install::ImageActivity;
use super::{History, Image, ImageName, ImagesError, RunConfig};
use crate::error::EngineError;
use crate::store::Store;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What an image is to say of itself.
#[derive(Clone, Debug, Default)]
pub struct Commit<'a> {
    /// Its name, if it is to have one.
    pub name: Option<&'a str>,
    /// What a container of it runs.
    pub config: RunConfig,
    /// Who has made it.
    pub author: Option<String>,
    /// What is said of it.
    pub comment: Option<String>,
    /// What its last layer was made by.
    pub created_by: Option<String>,
}

impl Store {
    /// Makes an image of another one and a layer above it, a tar archive with whiteouts as the OCI image specification has them; none
    /// if nothing was changed.
    ///
    /// # Errors
    /// [`ImagesError::Name`], [`ImagesError::Built`], [`ImagesError::Document`], [`EngineError::Image`], [`EngineError::Store`].
    pub fn commit_image(
        &self,
        parent: &Image,
        layer: Option<&mut dyn Read>,
        commit: Commit<'_>,
        activity: &mut dyn FnMut(ImageActivity),
    ) -> Result<Image, EngineError> {
        let name = commit.name.map(ImageName::parse).transpose()?;
        if let Some(name) = name.as_ref().filter(|name| name.digest().is_some()) {
            return Err(ImagesError::Name {
                name: name.to_string(),
                reason: "a name with a digest is given by a registry".into(),
            }
            .into());
        }
        let _adding = self.adding()?;
        let blobs = self.blobs();
        blobs.prepare()?;
        let created = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Nanos, true);
        let mut config = parent.config()?;
        let manifest = parent.manifest_bytes()?.ok_or_else(|| parent.without_layers())?;
        let mut layers = layers_of(parent, &manifest)?;
        let is_changed = layer.is_some();
        if let Some(layer) = layer {
            let mut writer = blobs.writer()?;
            io::copy(layer, &mut writer).map_err(EngineError::store("write to", blobs.directory()))?;
            let (digest, size) = writer.finish()?;
            layers.push(descriptor(LAYER, &digest, size));
            config.rootfs.diff_ids.push(digest.to_string());
        }
        config.rootfs.kind = "layers".into();
        config.created = Some(created.clone());
        config.author = commit.author.clone();
        config.config = commit.config;
        config.history.push(History {
            created: Some(created),
            created_by: commit.created_by,
            author: commit.author,
            comment: commit.comment,
            empty_layer: !is_changed,
        });
        let digest = self.put_image(&config, layers, &mut BTreeSet::new())?;
        let image = self.install(&digest, &parent.source, &Limits::default(), activity)?;
        match name {
            Some(name) => Ok(self.name_image(&image, &name)?.0),
            None => {
                self.keep_image(&image)?;
                Ok(image)
            }
        }
    }
}

/// The layers of a manifest, as one of OCI names them.
fn layers_of(image: &Image, manifest: &[u8]) -> Result<Vec<Value>, EngineError> {
    let wrong = |reason: String| ImagesError::Document {
        what: format!("the manifest of image {}", image.shown()),
        reason,
    };
    let manifest: Value = serde_json::from_slice(manifest).map_err(|error| wrong(error.to_string()))?;
    let Some(Value::Array(layers)) = manifest.get("layers") else {
        return Err(wrong("it names no layers".into()).into());
    };
    let mut layers = layers.clone();
    for layer in &mut layers {
        let of_docker = "application/vnd.docker.image.rootfs.diff.tar";
        let kind = layer.get("mediaType").and_then(Value::as_str).unwrap_or_default();
        let kind = match kind.strip_prefix(of_docker) {
            Some(".gzip") => format!("{LAYER}+gzip"),
            Some(".zstd") => format!("{LAYER}+zstd"),
            Some(_) => LAYER.to_owned(),
            None => continue,
        };
        if let Some(layer) = layer.as_object_mut() {
            layer.insert("mediaType".into(), kind.into());
        }
    }
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::process::Command;

    use super::super::LoadSource;
    use super::*;
    use crate::LoadOptions;

    fn layer(path: &str, content: &[u8]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, content).unwrap();
        archive.into_inner().unwrap()
    }

    #[test]
    fn an_image_gets_a_layer_and_can_be_saved_and_committed_again() {
        if !rustix::process::geteuid().is_root() || Command::new("mkfs.erofs").arg("-V").output().is_err() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::write(root.join("bin/a"), "a").unwrap();
        std::os::unix::fs::symlink("/bin/a", root.join("bin/b")).unwrap();
        let pipe = root.join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from(0o600),
            0,
        )
        .unwrap();
        let parent = store.build_image("parent", &root, &mut |_| {}).unwrap();
        let commit = |name| Commit {
            name: Some(name),
            config: RunConfig {
                cmd: vec!["a".into()],
                ..RunConfig::default()
            },
            comment: Some("first".into()),
            ..Commit::default()
        };
        let changed = layer("etc/new", b"new");
        let one = store
            .commit_image(&parent, Some(&mut changed.as_slice()), commit("one"), &mut |_| {})
            .unwrap();
        assert_eq!(one.name, "one");
        assert!(one.file.is_file() && one.digest != parent.digest);
        let config = one.config().unwrap();
        assert_eq!(
            (
                config.config.cmd.len(),
                config.rootfs.diff_ids.len(),
                config.history.len()
            ),
            (1, 2, 2)
        );
        let changed = layer(".wh.etc", b"");
        let two = store
            .commit_image(&one, Some(&mut changed.as_slice()), commit("two"), &mut |_| {})
            .unwrap();
        assert_eq!(two.config().unwrap().rootfs.diff_ids.len(), 3);
        let same = store
            .commit_image(&two, None, commit("same"), &mut |_| {})
            .unwrap();
        assert_eq!(same.digest, two.digest);
        let path = directory.path().join("saved.tar");
        store
            .save_images(&["one", "two"], &mut File::create(&path).unwrap())
            .unwrap();
        let other = Store::open(&directory.path().join("other")).unwrap();
        let loaded = other
            .load_images(LoadSource::Path(&path), &LoadOptions::default(), &mut |_| {})
            .unwrap();
        assert_eq!(loaded.len(), 2);
        assert_eq!(loaded[0].digest, one.digest);
    }
}
