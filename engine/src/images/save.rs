//! Saving images: an archive that is an OCI image layout, and has the `manifest.json` of `docker save` beside, so that tools
//! of both kinds read it.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::blobs::{Blobs, Digest};
use super::content::parse_manifest;
use super::load::{NAME_ANNOTATION, REF_ANNOTATION};
use super::{Image, ImageName, name};
use crate::error::EngineError;
use crate::store::{Lock, Store};

impl Store {
    /// Writes images, with the names that are given, as a tar archive. The same images give the same bytes.
    ///
    /// # Errors
    /// As [`Store::image`]; [`super::ImagesError::Built`] for an image that has no layers.
    pub fn save_images(&self, names: &[&str], to: &mut dyn Write) -> Result<(), EngineError> {
        // Nothing is collected meanwhile.
        let _lock = Lock::share(&self.images_lock())?;
        let blobs = self.blobs();
        let mut index = Vec::new();
        let mut saved: Vec<Value> = Vec::new();
        let mut content: BTreeSet<Digest> = BTreeSet::new();
        for text in names {
            let image = self.image(text)?;
            let digest = image.manifest.as_deref().and_then(Digest::parse);
            let digest = digest.ok_or_else(|| image.without_layers())?;
            let bytes = blobs.document(&digest)?;
            let manifest = parse_manifest(&digest, &bytes)?;
            let name = self.name_to_save(text, &image)?;
            let media_type = serde_json::from_slice::<Value>(&bytes)
                .ok()
                .and_then(|value| value.get("mediaType")?.as_str().map(str::to_owned))
                .unwrap_or_else(|| "application/vnd.oci.image.manifest.v1+json".into());
            let mut descriptor = json!({
                "mediaType": media_type,
                "digest": digest.as_str(),
                "size": bytes.len(),
            });
            if let Some(name) = &name {
                descriptor["annotations"] = json!({
                    NAME_ANNOTATION: name.whole(),
                    REF_ANNOTATION: name.tag(),
                });
            }
            index.push(descriptor);
            let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
            let tag = name.map(|name| format!("{}:{}", name.repository(), name.tag().unwrap_or("latest")));
            let config = path(&manifest.config.digest);
            match saved.iter_mut().find(|image| image["Config"] == config.as_str()) {
                Some(image) => {
                    if let (Some(tag), Some(tags)) = (tag, image["RepoTags"].as_array_mut()) {
                        tags.push(tag.into());
                    }
                }
                None => saved.push(json!({
                    "Config": config,
                    "RepoTags": tag.into_iter().collect::<Vec<_>>(),
                    "Layers": manifest.layers.iter().map(|layer| path(&layer.digest)).collect::<Vec<_>>(),
                })),
            }
            content.extend(manifest.layers.into_iter().map(|layer| layer.digest));
            content.extend([manifest.config.digest, digest]);
        }
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": index,
        });
        write(to, &blobs, &content, &index, &saved).map_err(EngineError::host("write the archive"))
    }

    /// The name that an image has in an archive: the one by which it was asked for, unless that is its id.
    fn name_to_save(&self, text: &str, image: &Image) -> Result<Option<ImageName>, EngineError> {
        if self.read_name(name::without_defaults(text))?.is_none() && self.find_by_id(text)?.is_some() {
            return Ok(None);
        }
        Ok(Some(ImageName::parse(&image.name)?).filter(|name| name.tag().is_some()))
    }
}

fn write(
    to: &mut dyn Write,
    blobs: &Blobs,
    content: &BTreeSet<Digest>,
    index: &Value,
    saved: &[Value],
) -> io::Result<()> {
    let mut archive = tar::Builder::new(to);
    let mut add = |path: &str, size: u64, from: &mut dyn Read| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        archive.append_data(&mut header, Path::new(path), from)
    };
    let documents = [
        ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string()),
        ("index.json", index.to_string()),
        ("manifest.json", Value::from(saved).to_string()),
    ];
    for (path, text) in &documents {
        add(path, text.len() as u64, &mut text.as_bytes())?;
    }
    for digest in content {
        let mut file = blobs.open(digest).map_err(io::Error::other)?;
        let size = file.metadata()?.len();
        add(&format!("blobs/sha256/{}", digest.hex()), size, &mut file)?;
    }
    archive.finish()
}
