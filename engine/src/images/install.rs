//! Making an image of content that is in the store: its layers become one EROFS file.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use picovm_rootfs::image::{self, ImageInfo, Layer, Limits, Progress};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::blobs::{Digest, check};
use super::content::{Manifest, chain_id, descriptor, parse_config, parse_manifest};
use super::{Image, ImageConfig, ImagesError, now};
use crate::error::EngineError;
use crate::store::{self, Lock, Store};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Begins the name of a directory for what is being loaded.
pub(super) const LOADING: &str = ".loading-";

/// What is known of an image's file.
#[derive(Debug, Serialize, Deserialize)]
struct FileRecord {
    /// BLAKE3 of the file.
    blake3: String,
    bytes: u64,
    entries: u64,
}

/// What happens while an image is loaded or pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageActivity {
    /// The name has been looked up: this is its manifest's digest.
    Resolved(Digest),
    /// Some content is there already.
    Exists(Digest),
    /// Some content is being fetched.
    Fetching {
        /// Its digest.
        digest: Digest,
        /// Bytes that are there.
        done: u64,
        /// All its bytes.
        size: u64,
    },
    /// Some content is there and checked.
    Fetched(Digest),
    /// The layers are unpacked and become a file.
    Building(Progress),
}

impl Store {
    /// Puts down the configuration and the manifest of an image whose layers, as descriptors, are in the store; the manifest's digest.
    /// What is put down is added to `content`.
    pub(super) fn put_image(
        &self,
        config: &ImageConfig,
        layers: Vec<Value>,
        content: &mut BTreeSet<Digest>,
    ) -> Result<Digest, EngineError> {
        let blobs = self.blobs();
        let bytes = serde_json::to_vec(config)
            .map_err(|error| EngineError::store("encode", blobs.directory())(error.into()))?;
        let digest = blobs.put(&bytes)?;
        content.insert(digest.clone());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &digest, bytes.len() as u64),
            "layers": layers,
        });
        let digest = blobs.put(manifest.to_string().as_bytes())?;
        content.insert(digest.clone());
        Ok(digest)
    }

    /// Makes the image of a manifest whose configuration and layers are in the store. It has no name yet, so the caller must
    /// hold the lock of [`Store::adding`].
    pub(super) fn install(
        &self,
        digest: &Digest,
        source: &Path,
        limits: &Limits,
        activity: &mut dyn FnMut(ImageActivity),
    ) -> Result<Image, EngineError> {
        let blobs = self.blobs();
        let manifest = parse_manifest(digest, &blobs.document(digest)?)?;
        let config_digest = &manifest.config.digest;
        let config = parse_config(config_digest, &blobs.document(config_digest)?)?;
        let wrong = |reason: String| ImagesError::Document {
            what: config_digest.to_string(),
            reason,
        };
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(wrong(format!(
                "it describes {} layers and the manifest {}",
                diff_ids.len(),
                manifest.layers.len()
            ))
            .into());
        }
        let chain =
            chain_id(diff_ids).ok_or_else(|| wrong("it has no layers, or names one by no SHA-256".into()))?;
        let record = self.unpacked(&chain, &manifest, diff_ids, limits, activity)?;
        Ok(Image {
            name: String::new(),
            digest: chain.hex().to_owned(),
            bytes: record.bytes,
            entries: record.entries,
            created: now(),
            source: source.to_owned(),
            manifest: Some(digest.to_string()),
            config_digest: Some(config_digest.to_string()),
            registry_digest: None,
            file: self.image_file(chain.hex()),
        })
    }

    /// The file of a chain of layers, which is made if it is not there.
    fn unpacked(
        &self,
        chain: &Digest,
        manifest: &Manifest,
        diff_ids: &[String],
        limits: &Limits,
        activity: &mut dyn FnMut(ImageActivity),
    ) -> Result<FileRecord, EngineError> {
        if let Some(known) = self.known_file(chain) {
            return Ok(known);
        }
        // One at a time: that is as fast, and two that need the same image make it once.
        let _lock = Lock::take(&self.unpack_lock())?;
        if let Some(known) = self.known_file(chain) {
            return Ok(known);
        }
        let blobs = self.blobs();
        let mut layers = Vec::new();
        for (named, diff_id) in manifest.layers.iter().zip(diff_ids) {
            let archive = blobs.open(&named.digest)?;
            let size = archive
                .metadata()
                .map_err(EngineError::store("look at", &blobs.path(&named.digest)))?
                .len();
            check(&named.digest, size, &named.digest, named.size)?;
            layers.push(Layer {
                name: named.digest.to_string(),
                file: archive,
                diff_id: diff_id.clone(),
            });
        }
        self.make_file(chain, |built| {
            image::build_layers(layers, built, limits, &mut |progress| {
                activity(ImageActivity::Building(progress));
            })
            .map_err(|source| EngineError::Image {
                name: manifest.config.digest.to_string(),
                source,
            })
        })
    }

    /// Makes the file of an image with one layer, of the directory that the layer was made of.
    pub(super) fn pack_directory(
        &self,
        diff_id: &str,
        directory: &Path,
        left_out: &[PathBuf],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), EngineError> {
        let _lock = Lock::take(&self.unpack_lock())?;
        let Some(chain) = Digest::parse(diff_id).filter(|chain| self.known_file(chain).is_none()) else {
            return Ok(());
        };
        self.make_file(&chain, |built| {
            image::build_directory(directory, left_out, built, progress).map_err(|source| {
                EngineError::Image {
                    name: diff_id.to_owned(),
                    source,
                }
            })
        })?;
        Ok(())
    }

    /// What is known of the file of a chain of layers, if it is there.
    fn known_file(&self, chain: &Digest) -> Option<FileRecord> {
        let known: FileRecord = serde_json::from_slice(&fs::read(self.file_record(chain)).ok()?).ok()?;
        let size = fs::metadata(self.image_file(chain.hex())).ok()?.len();
        (size == known.bytes).then_some(known)
    }

    fn file_record(&self, chain: &Digest) -> PathBuf {
        self.files().join(format!("{}.json", chain.hex()))
    }

    /// Makes the file of a chain of layers, by `make` where it is told to, and keeps what is known of it.
    fn make_file(
        &self,
        chain: &Digest,
        make: impl FnOnce(&Path) -> Result<ImageInfo, EngineError>,
    ) -> Result<FileRecord, EngineError> {
        let (file, record) = (self.image_file(chain.hex()), self.file_record(chain));
        let partial = tempfile::Builder::new()
            .prefix(super::BUILDING)
            .tempdir_in(self.files())
            .map_err(EngineError::store("create a directory in", &self.files()))?;
        let built = partial.path().join("image.erofs");
        let info = make(&built)?;
        fs::rename(&built, &file).map_err(EngineError::store("create", &file))?;
        let known = FileRecord {
            blake3: info.digest,
            bytes: info.size,
            entries: info.entries,
        };
        let bytes = serde_json::to_vec(&known)
            .map_err(|error| EngineError::store("encode", &record)(error.into()))?;
        store::write_atomically(&record, &bytes)?;
        Ok(known)
    }
}
