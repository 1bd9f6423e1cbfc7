//! Loading images: archives as `docker save` and `podman save` write them, and OCI image layouts; as tar archives, compressed
//! or not, from a file or a stream, or as directories.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use picovm_rootfs::image::Limits;
use picovm_rootfs::unpack::{Item, UnpackError, each_file};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use super::blobs::{Blobs, DOCUMENT_MAX, Digest, check};
use super::content::{self, Kind, Named, Platform};
use super::install::ImageActivity;
use super::{Image, ImageName, ImagesError};
use crate::error::EngineError;
use crate::store::Store;

/// Bytes of a file of an archive that is kept in memory until it is known what it is.
const SMALL: usize = 1 << 20;
/// Bytes of all such files.
const SMALL_ALL: usize = 64 << 20;
/// Links from one name to the next.
const LINKS_MAX: usize = 8;
/// Indices in each other.
const DEPTH_MAX: usize = 4;
/// The name of an image in an OCI layout, as containerd and Docker give it.
pub(super) const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// Its tag, or with some tools its name.
pub(super) const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// Where images are loaded from.
pub enum LoadSource<'a> {
    /// An archive, or a directory with an OCI layout or what is in an archive.
    Path(&'a Path),
    /// An archive.
    Stream(Box<dyn Read>),
}

/// How images are loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Of an image that is for several platforms, which one.
    pub platform: Platform,
    /// How large an image may be.
    pub limits: Limits,
}

/// An image of `docker save`'s `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Store {
    /// Loads every image of an archive or a directory, with the names that are in it. Images with none of these get none.
    ///
    /// # Errors
    /// [`ImagesError`], [`EngineError::Image`], [`EngineError::Store`]. Images that were loaded before are in the store.
    pub fn load_images(
        &self,
        source: LoadSource<'_>,
        options: &LoadOptions,
        activity: &mut dyn FnMut(ImageActivity),
    ) -> Result<Vec<Image>, EngineError> {
        let _adding = self.adding()?;
        let blobs = self.blobs();
        blobs.prepare()?;
        let (shown, mut files) = open(source, &blobs, options)?;
        let mut loading = Loading {
            store: self,
            blobs,
            files: files.as_mut(),
            shown,
            options,
            activity,
            loaded: Vec::new(),
        };
        loading.all()?;
        Ok(loading.loaded)
    }
}

fn open(
    source: LoadSource<'_>,
    blobs: &Blobs,
    options: &LoadOptions,
) -> Result<(PathBuf, Box<dyn Files>), EngineError> {
    let (shown, stream) = match source {
        LoadSource::Stream(stream) => (PathBuf::from("standard input"), stream),
        LoadSource::Path(path) => {
            let file = File::open(path).map_err(EngineError::store("open", path))?;
            let kind = file.metadata().map_err(EngineError::store("look at", path))?;
            if kind.is_dir() {
                return Ok((path.to_owned(), Box::new(Directory(file.into()))));
            }
            (path.to_owned(), Box::new(file) as Box<dyn Read>)
        }
    };
    let spooled = Spooled::read(stream, blobs, &options.limits).map_err(|source| ImagesError::Archive {
        path: shown.clone(),
        source,
    })?;
    Ok((shown, Box::new(spooled)))
}

/// The files of an archive or a directory.
trait Files {
    /// A small one, whole.
    fn document(&mut self, path: &str, blobs: &Blobs) -> io::Result<Option<Vec<u8>>>;
    /// Puts one among the store's content.
    fn keep(&mut self, path: &str, blobs: &Blobs) -> Result<Option<(Digest, u64)>, EngineError>;
}

/// Images that are being loaded.
struct Loading<'a> {
    store: &'a Store,
    blobs: Blobs,
    files: &'a mut dyn Files,
    shown: PathBuf,
    options: &'a LoadOptions,
    activity: &'a mut dyn FnMut(ImageActivity),
    loaded: Vec<Image>,
}

impl Loading<'_> {
    fn all(&mut self) -> Result<(), EngineError> {
        let saved: Vec<Saved> = match self.document("manifest.json")? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| self.wrong(format!("its manifest.json cannot be read: {error}")))?,
            None => Vec::new(),
        };
        // What has both is read as a layout, in which each image keeps its manifest.
        if let Some(bytes) = self.document("index.json")?
            && self.document("oci-layout")?.is_some()
        {
            let digest = Digest::of(&bytes);
            let Kind::Index(index) = content::parse(&digest, &bytes)? else {
                return Err(self.wrong("its index.json is no index of images".into()));
            };
            for descriptor in index.manifests() {
                let digest = Digest::parse(descriptor.digest().as_ref())
                    .ok_or_else(|| self.wrong("its index.json names an image by no SHA-256".into()))?;
                let annotation = |key: &str| descriptor.annotations().as_ref()?.get(key).cloned();
                let name = annotation(NAME_ANNOTATION)
                    .or_else(|| annotation(REF_ANNOTATION).filter(|name| name.contains(['/', ':'])));
                self.of_layout(&digest, name.as_deref(), &saved)?;
            }
        } else if saved.is_empty() {
            return Err(self.wrong(
                "it is neither an archive of images (`docker save`) nor an OCI image layout: it has no manifest.json \
                 and no index.json. `picovm image build NAME` makes an image of a root file system"
                    .into(),
            ));
        } else {
            for image in saved {
                self.of_archive(&image)?;
            }
        }
        Ok(())
    }

    fn wrong(&self, reason: String) -> EngineError {
        ImagesError::Load {
            path: self.shown.clone(),
            reason,
        }
        .into()
    }

    fn document(&mut self, path: &str) -> Result<Option<Vec<u8>>, EngineError> {
        self.files
            .document(path, &self.blobs)
            .map_err(|error| self.wrong(format!("its {path} cannot be read: {error}")))
    }

    /// An image of an OCI layout.
    fn of_layout(&mut self, digest: &Digest, name: Option<&str>, saved: &[Saved]) -> Result<(), EngineError> {
        let mut digest = digest.clone();
        for _ in 0..DEPTH_MAX {
            let bytes = self
                .document(&blob_path(&digest))?
                .ok_or_else(|| self.wrong(format!("it has no {digest}, which it names")))?;
            let found = Digest::of(&bytes);
            check(&found, bytes.len() as u64, &digest, bytes.len() as u64)?;
            match content::parse(&digest, &bytes)? {
                Kind::Index(index) => digest = content::select(&digest, &index, &self.options.platform)?,
                Kind::Manifest(manifest) => {
                    for named in std::iter::once(&manifest.config).chain(&manifest.layers) {
                        self.blob(named)?;
                    }
                    self.blobs.put(&bytes)?;
                    let config = blob_path(&manifest.config.digest);
                    let tags = saved
                        .iter()
                        .filter(|image| image.config == config)
                        .flat_map(|image| image.repo_tags.iter().flatten());
                    let mut names: Vec<&str> = name.into_iter().collect();
                    if names.is_empty() {
                        names.extend(tags.map(String::as_str));
                    }
                    return self.finish(&digest, &names);
                }
            }
        }
        Err(self.wrong(format!("it has indices in indices at {digest}")))
    }

    /// Content of an OCI layout.
    fn blob(&mut self, named: &Named) -> Result<(), EngineError> {
        if self.blobs.size(&named.digest) == Some(named.size) {
            (self.activity)(ImageActivity::Exists(named.digest.clone()));
            return Ok(());
        }
        let (found, size) = self
            .files
            .keep(&blob_path(&named.digest), &self.blobs)?
            .ok_or_else(|| self.wrong(format!("it has no {}, which its manifest names", named.digest)))?;
        check(&found, size, &named.digest, named.size)?;
        (self.activity)(ImageActivity::Fetched(found));
        Ok(())
    }

    /// An image of `docker save`, which has no manifest of its own: it gets one.
    fn of_archive(&mut self, image: &Saved) -> Result<(), EngineError> {
        let config = self.document(&image.config)?.ok_or_else(|| {
            self.wrong(format!(
                "it has no {}, which its manifest.json names",
                image.config
            ))
        })?;
        let mut layers = Vec::new();
        for path in &image.layers {
            let (digest, size) = self
                .files
                .keep(path, &self.blobs)?
                .ok_or_else(|| self.wrong(format!("it has no {path}, which its manifest.json names")))?;
            (self.activity)(ImageActivity::Fetched(digest.clone()));
            layers.push(serde_json::json!({
                "mediaType": layer_type(&self.blobs, &digest)?,
                "digest": digest.as_str(),
                "size": size,
            }));
        }
        let config_digest = self.blobs.put(&config)?;
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config_digest.as_str(),
                "size": config.len(),
            },
            "layers": layers,
        });
        let digest = self.blobs.put(manifest.to_string().as_bytes())?;
        let names: Vec<&str> = image.repo_tags.iter().flatten().map(String::as_str).collect();
        self.finish(&digest, &names)
    }

    fn finish(&mut self, digest: &Digest, names: &[&str]) -> Result<(), EngineError> {
        let names: Vec<ImageName> = names
            .iter()
            .map(|name| ImageName::parse(name))
            .collect::<Result<_, _>>()?;
        let image = self
            .store
            .install(digest, &self.shown, &self.options.limits, self.activity)?;
        if names.is_empty() {
            self.store.keep_image(&image)?;
            self.loaded.push(image.clone());
        }
        for name in &names {
            self.loaded.push(self.store.name_image(&image, name)?.0);
        }
        Ok(())
    }
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The media type of a layer by its first bytes.
pub(super) fn layer_type(blobs: &Blobs, digest: &Digest) -> Result<&'static str, EngineError> {
    let mut start = [0; 4];
    let mut file = blobs.open(digest)?;
    let count = file
        .read(&mut start)
        .map_err(EngineError::store("read", &blobs.path(digest)))?;
    Ok(match start.get(..count).unwrap_or_default() {
        [0x1f, 0x8b, ..] => "application/vnd.oci.image.layer.v1.tar+gzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "application/vnd.oci.image.layer.v1.tar+zstd",
        _ => "application/vnd.oci.image.layer.v1.tar",
    })
}

/// A directory. Links that lead out of it are not followed.
struct Directory(OwnedFd);

impl Directory {
    fn open(&self, path: &str) -> io::Result<Option<File>> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        // A FIFO would not be opened before somebody writes to it.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::openat2(&self.0, path, flags, Mode::empty(), resolve) {
            Ok(file) => {
                let file = File::from(file);
                if file.metadata()?.is_file() {
                    Ok(Some(file))
                } else {
                    Err(io::Error::other("it is no file"))
                }
            }
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Files for Directory {
    fn document(&mut self, path: &str, _: &Blobs) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = self.open(path)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(DOCUMENT_MAX).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn keep(&mut self, path: &str, blobs: &Blobs) -> Result<Option<(Digest, u64)>, EngineError> {
        let failed = || EngineError::store("read", Path::new(path));
        let Some(mut file) = self.open(path).map_err(failed())? else {
            return Ok(None);
        };
        let mut writer = blobs.writer()?;
        io::copy(&mut file, &mut writer).map_err(EngineError::store("copy", Path::new(path)))?;
        writer.finish().map(Some)
    }
}

/// The files of an archive, which can be read only once and in its own order: large ones are among the store's content
/// already, under the digests that they have.
struct Spooled(BTreeMap<String, Spool>);

enum Spool {
    Memory(Vec<u8>),
    Content(Digest, u64),
    Link(String),
}

impl Spooled {
    fn read(stream: Box<dyn Read>, blobs: &Blobs, limits: &Limits) -> Result<Self, UnpackError> {
        let mut files = BTreeMap::new();
        let mut in_memory = 0usize;
        each_file(stream, limits, &mut |path, item| {
            let spool = match item {
                Item::Link(target) => Spool::Link(beside(path, &target)),
                Item::File(content) => {
                    let mut start = Vec::new();
                    let most = SMALL.min(SMALL_ALL.saturating_sub(in_memory));
                    (&mut *content).take(most as u64).read_to_end(&mut start)?;
                    if start.len() < most {
                        in_memory = in_memory.saturating_add(start.len());
                        Spool::Memory(start)
                    } else {
                        let mut writer = blobs.writer().map_err(io::Error::other)?;
                        writer.write_all(&start)?;
                        io::copy(content, &mut writer)?;
                        let (digest, size) = writer.finish().map_err(io::Error::other)?;
                        Spool::Content(digest, size)
                    }
                }
            };
            files.insert(path.to_owned(), spool);
            Ok(())
        })?;
        Ok(Self(files))
    }

    fn find(&self, path: &str) -> Option<&Spool> {
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            match self.0.get(&path)? {
                Spool::Link(target) => path.clone_from(target),
                found => return Some(found),
            }
        }
        None
    }
}

impl Files for Spooled {
    fn document(&mut self, path: &str, blobs: &Blobs) -> io::Result<Option<Vec<u8>>> {
        match self.find(path) {
            Some(Spool::Memory(bytes)) => Ok(Some(bytes.clone())),
            Some(Spool::Content(digest, _)) => blobs.document(digest).map(Some).map_err(io::Error::other),
            _ => Ok(None),
        }
    }

    fn keep(&mut self, path: &str, blobs: &Blobs) -> Result<Option<(Digest, u64)>, EngineError> {
        match self.find(path) {
            Some(Spool::Memory(bytes)) => Ok(Some((blobs.put(bytes)?, bytes.len() as u64))),
            Some(Spool::Content(digest, size)) => Ok(Some((digest.clone(), *size))),
            _ => Ok(None),
        }
    }
}

/// The target of a link, as a path in the archive. Old archives of Docker share layers by `../ID/layer.tar`.
fn beside(path: &str, target: &str) -> String {
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
