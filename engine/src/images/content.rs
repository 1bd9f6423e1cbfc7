//! Manifests, indices and configurations: what of them is needed, checked. They come from elsewhere.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;
use serde_json::{Value, json};

use super::blobs::Digest;
use super::{ImageConfig, ImagesError};
use crate::error::EngineError;

/// Layers of an image; Docker makes at most 127.
const LAYERS_MAX: usize = 512;

/// Content that a manifest names.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub(super) digest: Digest,
    pub(super) size: u64,
}

/// A manifest.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) config: Named,
    pub(super) layers: Vec<Named>,
}

/// A system that an image is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, ...
    pub architecture: String,
    /// `v8`, ...; any if there is none.
    pub variant: Option<String>,
}

impl Default for Platform {
    /// What picovm's guests are.
    fn default() -> Self {
        Self {
            os: "linux".into(),
            architecture: "amd64".into(),
            variant: None,
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl std::str::FromStr for Platform {
    type Err = String;

    /// `OS/ARCHITECTURE[/VARIANT]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant)),
            _ => return Err("a platform is OS/ARCHITECTURE[/VARIANT], as linux/amd64".into()),
        };
        if [Some(os), Some(architecture), variant]
            .into_iter()
            .flatten()
            .any(|part| part.is_empty())
        {
            return Err("a part of the platform is empty".into());
        }
        Ok(Self {
            os: (*os).into(),
            architecture: match *architecture {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            }
            .into(),
            variant: variant.map(|variant| (*variant).into()),
        })
    }
}

/// What a manifest says of content.
pub(super) fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest.as_str(), "size": size })
}

/// What a document is.
pub(super) enum Kind {
    Manifest(Manifest),
    Index(Box<ImageIndex>),
}

fn wrong(digest: &Digest, reason: impl Into<String>) -> EngineError {
    ImagesError::Document {
        what: digest.to_string(),
        reason: reason.into(),
    }
    .into()
}

/// What of a document says what it is. Old tools leave the media type out.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    schema_version: Option<u32>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
}

/// Reads a manifest or an index.
pub(super) fn parse(digest: &Digest, bytes: &[u8]) -> Result<Kind, EngineError> {
    let outline: Outline = serde_json::from_slice(bytes).map_err(|error| {
        wrong(
            digest,
            format!("it is neither a manifest nor an index of images: {error}"),
        )
    })?;
    if outline.schema_version == Some(1) {
        return Err(wrong(
            digest,
            "it is a manifest of version 1, which no tool makes any more; push the image again",
        ));
    }
    match (outline.manifests.is_some(), outline.layers.is_some()) {
        (true, false) => serde_json::from_slice(bytes)
            .map(|index| Kind::Index(Box::new(index)))
            .map_err(|error| wrong(digest, format!("it is not an index of images: {error}"))),
        (false, true) => parse_manifest(digest, bytes).map(Kind::Manifest),
        _ => Err(wrong(
            digest,
            format!(
                "it is no manifest of an image but {}",
                outline
                    .media_type
                    .as_deref()
                    .unwrap_or("of a kind that is not known")
            ),
        )),
    }
}

/// Reads a manifest.
pub(super) fn parse_manifest(digest: &Digest, bytes: &[u8]) -> Result<Manifest, EngineError> {
    let manifest: ImageManifest = serde_json::from_slice(bytes)
        .map_err(|error| wrong(digest, format!("it is not a manifest of an image: {error}")))?;
    if manifest.layers().len() > LAYERS_MAX {
        return Err(wrong(digest, format!("it has more than {LAYERS_MAX} layers")));
    }
    let named = |descriptor: &Descriptor| {
        let named = Digest::parse(descriptor.digest().as_ref())
            .ok_or_else(|| wrong(digest, format!("it names {} by no SHA-256", descriptor.digest())))?;
        Ok(Named {
            digest: named,
            size: descriptor.size(),
        })
    };
    Ok(Manifest {
        config: named(manifest.config())?,
        layers: manifest
            .layers()
            .iter()
            .map(named)
            .collect::<Result<_, EngineError>>()?,
    })
}

/// Reads a configuration.
pub(super) fn parse_config(digest: &Digest, bytes: &[u8]) -> Result<ImageConfig, EngineError> {
    serde_json::from_slice(bytes)
        .map_err(|error| wrong(digest, format!("it is not a configuration of an image: {error}")))
}

/// The manifest of an index that is for this platform.
pub(super) fn select(
    digest: &Digest,
    index: &ImageIndex,
    platform: &Platform,
) -> Result<Digest, EngineError> {
    let fits = |descriptor: &&Descriptor| match descriptor.platform() {
        Some(of) => {
            of.os().to_string() == platform.os
                && of.architecture().to_string() == platform.architecture
                && (platform.variant.is_none() || *of.variant() == platform.variant)
        }
        None => false,
    };
    let manifests = index.manifests();
    let found = match manifests.as_slice() {
        // Where there is nothing to choose from, many tools say nothing of platforms.
        [only] if only.platform().is_none() => Some(only),
        all => all.iter().find(fits),
    };
    let Some(found) = found else {
        let there: Vec<String> = manifests
            .iter()
            .filter_map(|descriptor| descriptor.platform().as_ref())
            .map(|of| format!("{}/{}", of.os(), of.architecture()))
            .filter(|of| of != "unknown/unknown")
            .collect();
        return Err(wrong(
            digest,
            format!("it has no image for {platform}, but for: {}", there.join(", ")),
        ));
    };
    Digest::parse(found.digest().as_ref())
        .ok_or_else(|| wrong(digest, format!("it names {} by no SHA-256", found.digest())))
}

/// The chain id of layers by the digests of what they are uncompressed (OCI image specification, "Layer ChainID").
pub(super) fn chain_id(diff_ids: &[String]) -> Option<Digest> {
    let mut layers = diff_ids.iter();
    let mut chain = Digest::parse(layers.next()?)?;
    for layer in layers {
        let layer = Digest::parse(layer)?;
        chain = Digest::of(format!("{chain} {layer}").as_bytes());
    }
    Some(chain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: u8) -> String {
        format!("sha256:{}", format!("{byte:02x}").repeat(32))
    }

    #[test]
    fn the_image_of_the_platform_is_chosen_and_none_is_made_up() {
        let entry = |byte: u8, platform: &str| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":1,"digest":"{}"{platform}}}"#,
                digest(byte)
            )
        };
        let of = |os: &str, architecture: &str| {
            format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#)
        };
        let index = |entries: &[String]| {
            let text = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
            match parse(&Digest::of(b""), text.as_bytes()).unwrap() {
                Kind::Index(index) => *index,
                Kind::Manifest(_) => panic!("a manifest"),
            }
        };
        let many = index(&[
            entry(1, &of("linux", "arm64")),
            entry(2, &of("linux", "amd64")),
            entry(3, &of("unknown", "unknown")),
        ]);
        let chosen = |index: &ImageIndex, platform: &str| {
            select(&Digest::of(b""), index, &platform.parse().unwrap())
                .map(|digest| digest.to_string())
                .map_err(|error| error.to_string())
        };
        assert_eq!(chosen(&many, "linux/amd64"), Ok(digest(2)));
        assert_eq!(chosen(&many, "linux/aarch64"), Ok(digest(1)));
        let error = chosen(&many, "linux/riscv64").unwrap_err();
        assert!(error.ends_with("but for: linux/arm64, linux/amd64"), "{error}");
        let single = index(&[entry(4, "")]);
        assert_eq!(chosen(&single, "linux/amd64"), Ok(digest(4)));
        assert!("linux".parse::<Platform>().is_err());
        assert!("linux/".parse::<Platform>().is_err());
    }

    #[test]
    fn what_is_no_manifest_is_refused_with_a_reason() {
        for (text, reason) in [
            ("x", "neither"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "version 1"),
            (r#"{"schemaVersion":2,"mediaType":"x/y"}"#, "x/y"),
            (r#"{"schemaVersion":2,"layers":[]}"#, "config"),
        ] {
            let Err(error) = parse(&Digest::of(b""), text.as_bytes()) else {
                panic!("{text}")
            };
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn a_chain_id_is_that_of_the_specification() {
        assert_eq!(chain_id(&[digest(1)]).unwrap().as_str(), digest(1));
        let two = chain_id(&[digest(1), digest(2)]).unwrap();
        assert_eq!(two, Digest::of(format!("{} {}", digest(1), digest(2)).as_bytes()));
        assert_eq!(chain_id(&[]), None);
        assert_eq!(chain_id(&["sha512:00".into()]), None);
    }
}
