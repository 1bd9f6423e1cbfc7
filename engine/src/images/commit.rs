//! Images made of what a container has changed: its image's layers and one more.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use picovm_rootfs::image::Limits;
use serde_json::{Value, json};

use super::blobs::{Blobs, Digest};
use super::install::ImageActivity;
use super::{BUILDING, History, Image, ImageName, ImagesError, RunConfig};
use crate::error::EngineError;
use crate::store::Store;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
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
    /// if nothing was changed. An image that was built from a root file system gets that as its first layer.
    ///
    /// # Errors
    /// [`ImagesError::Name`], [`ImagesError::Document`], [`EngineError::Image`], [`EngineError::Store`], [`EngineError::Host`].
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
        let mut layers = match parent.manifest_bytes()? {
            Some(bytes) => layers_of(parent, &bytes)?,
            None => {
                let (digest, size) = self.root_layer(parent, &blobs)?;
                config.rootfs.diff_ids = vec![digest.to_string()];
                config.history = vec![History {
                    created_by: Some(format!("picovm image build {}", parent.source.display())),
                    ..History::default()
                }];
                vec![descriptor(LAYER, &digest, size)]
            }
        };
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
        let bytes = serde_json::to_vec(&config)
            .map_err(|error| EngineError::store("encode", blobs.directory())(error.into()))?;
        let digest = blobs.put(&bytes)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &digest, bytes.len() as u64),
            "layers": layers,
        });
        let digest = blobs.put(manifest.to_string().as_bytes())?;
        let image = self.install(&digest, &parent.source, &Limits::default(), activity)?;
        match name {
            Some(name) => Ok(self.name_image(&image, &name)?.0),
            None => {
                self.keep_image(&image)?;
                Ok(image)
            }
        }
    }

    /// The root file system of an image without layers, as a layer.
    fn root_layer(&self, image: &Image, blobs: &Blobs) -> Result<(Digest, u64), EngineError> {
        let failed = |reason: String| ImagesError::Document {
            what: format!("the root file system of image {}", image.shown()),
            reason,
        };
        if !rustix::process::geteuid().is_root() {
            return Err(failed(
                "it was built from a directory or an archive, and only root can make a layer of it that keeps its owners".into(),
            )
            .into());
        }
        let scratch = tempfile::Builder::new()
            .prefix(BUILDING)
            .tempdir_in(self.files())
            .map_err(EngineError::store("create a directory in", &self.files()))?;
        let root = scratch.path().join("root");
        let output = Command::new("fsck.erofs")
            .arg(format!("--extract={}", root.display()))
            .arg("--preserve")
            .arg(&image.file)
            .output()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    failed("fsck.erofs is not installed: `apt-get install erofs-utils`".into())
                }
                _ => failed(format!("fsck.erofs: {error}")),
            })?;
        if !output.status.success() {
            let told = String::from_utf8_lossy(&output.stderr);
            return Err(failed(format!("fsck.erofs cannot unpack it: {}", told.trim())).into());
        }
        let mut writer = blobs.writer()?;
        archive(&root, &mut writer).map_err(EngineError::store("make a layer of", &root))?;
        writer.finish()
    }
}

fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.as_str(), "size": size })
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

/// Writes a directory's content as an archive, the same for the same content.
fn archive(root: &Path, to: impl Write) -> io::Result<()> {
    let mut archive = tar::Builder::new(to);
    archive.follow_symlinks(false);
    add(&mut archive, root, Path::new(""))?;
    archive.into_inner()?.flush()
}

fn add(archive: &mut tar::Builder<impl Write>, root: &Path, inside: &Path) -> io::Result<()> {
    let mut names: Vec<_> = fs::read_dir(root.join(inside))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    for name in names {
        let inside = inside.join(name);
        let path = root.join(&inside);
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_dir() {
            archive.append_dir(&inside, &path)?;
            add(archive, root, &inside)?;
        } else if metadata.is_file() {
            archive.append_file(&inside, &mut File::open(&path)?)?;
        } else if metadata.is_symlink() {
            archive.append_path_with_name(&path, &inside)?;
        } else {
            add_special(archive, &metadata, &inside)?;
        }
    }
    Ok(())
}

/// Adds a device or a pipe. Others are nothing without who has made them.
fn add_special(
    archive: &mut tar::Builder<impl Write>,
    metadata: &fs::Metadata,
    inside: &Path,
) -> io::Result<()> {
    let kind = metadata.file_type();
    let entry = if kind.is_char_device() {
        tar::EntryType::Char
    } else if kind.is_block_device() {
        tar::EntryType::Block
    } else if kind.is_fifo() {
        tar::EntryType::Fifo
    } else {
        return Ok(());
    };
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    header.set_entry_type(entry);
    header.set_size(0);
    header.set_device_major(rustix::fs::major(metadata.rdev()))?;
    header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
    archive.append_data(&mut header, inside, io::empty())
}

#[cfg(test)]
mod tests {
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
