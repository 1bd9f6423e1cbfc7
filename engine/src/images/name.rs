//! Names of images, by Docker's grammar: `debian` is `docker.io/library/debian:latest`.

use std::fmt;

use oci_spec::distribution::Reference;

use super::ImagesError;

const DEFAULT_REGISTRY: &str = "docker.io/";
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = ":latest";
/// Bytes of a record's file name; file systems take 255.
const RECORD_NAME_MAX: usize = 200;

/// The name of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName(Reference);

impl ImageName {
    /// Reads a name as people type it.
    ///
    /// # Errors
    /// [`ImagesError::Name`].
    pub fn parse(text: &str) -> Result<Self, ImagesError> {
        let wrong = |reason: String| ImagesError::Name {
            name: text.to_owned(),
            reason,
        };
        let reference: Reference = text
            .parse()
            .map_err(|error: oci_spec::distribution::ParseError| wrong(error.to_string()))?;
        match reference.digest() {
            Some(digest) if super::Digest::parse(digest).is_none() => {
                Err(wrong("only digests by SHA-256 are known".into()))
            }
            // As Docker has it: beside a digest, a tag says nothing.
            Some(digest) => Ok(Self(reference.clone_with_digest(digest.to_owned()))),
            None => Ok(Self(reference)),
        }
    }

    /// Its parts.
    #[must_use]
    pub fn reference(&self) -> &Reference {
        &self.0
    }

    /// Without what goes without saying, the tag aside: `debian`, `localhost:5000/team/app`.
    #[must_use]
    pub fn repository(&self) -> String {
        let whole = format!("{}/{}", self.0.registry(), self.0.repository());
        without_defaults(&whole).to_owned()
    }

    /// Its tag, if it has one rather than a digest.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    /// Its digest, if it has one.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        self.0.digest()
    }

    /// Whether another name has the same registry and repository.
    #[must_use]
    pub fn is_of_repository_of(&self, other: &Self) -> bool {
        (self.0.registry(), self.0.repository()) == (other.0.registry(), other.0.repository())
    }
}

/// Without what goes without saying: `debian`, `debian:12`, `localhost:5000/app`.
impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository())?;
        match (self.0.tag(), self.0.digest()) {
            (_, Some(digest)) => write!(f, "@{digest}"),
            (Some(tag), None) if tag != &DEFAULT_TAG[1..] => write!(f, ":{tag}"),
            _ => Ok(()),
        }
    }
}

/// Takes away what goes without saying, without looking whether the rest is a name.
pub(super) fn without_defaults(text: &str) -> &str {
    let text = text.strip_prefix(DEFAULT_REGISTRY).unwrap_or(text);
    let text = match text.strip_prefix(DEFAULT_NAMESPACE) {
        Some(rest) if !rest.contains('/') => rest,
        _ => text,
    };
    match text.strip_suffix(DEFAULT_TAG) {
        Some(rest) if !rest.is_empty() && !rest.contains('@') => rest,
        _ => text,
    }
}

/// The file name of the record of a name without what goes without saying; nothing if it cannot be one. Names have neither
/// `%` nor begin with a dot, so that no two have the same record and none leaves its directory.
pub(super) fn record(short: &str) -> Option<String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:@/".contains(&byte);
    if !short.starts_with(|first: char| first.is_ascii_alphanumeric()) || !short.bytes().all(allowed) {
        return None;
    }
    let encoded = short.replace('/', "%2F");
    Some(if encoded.len() > RECORD_NAME_MAX {
        format!("%{}.json", blake3::hash(short.as_bytes()).to_hex())
    } else {
        format!("{encoded}.json")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_docker_reads_it_and_told_without_what_goes_without_saying() {
        for (typed, told, whole) in [
            ("debian", "debian", "docker.io/library/debian:latest"),
            ("debian:latest", "debian", "docker.io/library/debian:latest"),
            (
                "docker.io/library/debian:12",
                "debian:12",
                "docker.io/library/debian:12",
            ),
            (
                "index.docker.io/team/app",
                "team/app",
                "docker.io/team/app:latest",
            ),
            (
                "localhost:5000/app:1",
                "localhost:5000/app:1",
                "localhost:5000/app:1",
            ),
            ("localhost/app", "localhost/app", "localhost/app:latest"),
            ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
        ] {
            let name = ImageName::parse(typed).unwrap();
            assert_eq!(name.to_string(), told);
            assert_eq!(name.reference().whole(), whole);
            assert_eq!(without_defaults(told), told);
            assert_eq!(ImageName::parse(told).unwrap(), name);
        }
        let digest = format!("sha256:{}", "0a".repeat(32));
        let name = ImageName::parse(&format!("debian:12@{digest}")).unwrap();
        assert_eq!(name.to_string(), format!("debian@{digest}"));
        assert_eq!(name.tag(), None);
        for wrong in [
            "",
            "Debian",
            "a//b",
            "/a",
            "a:",
            "..",
            "../x",
            "a b",
            "a@sha256:12",
        ] {
            assert!(ImageName::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_name_has_a_record_of_its_own_in_one_directory() {
        assert_eq!(record("debian").unwrap(), "debian.json");
        assert_eq!(
            record("localhost:5000/a/b:1").unwrap(),
            "localhost:5000%2Fa%2Fb:1.json"
        );
        let long = record(&format!("a/{}", "b".repeat(250))).unwrap();
        assert!(long.len() < 100 && long.starts_with('%'));
        for wrong in ["", ".", "..", "../x", "/x", "a b", "a\0", "%2F"] {
            assert_eq!(record(wrong), None, "{wrong}");
        }
    }
}
