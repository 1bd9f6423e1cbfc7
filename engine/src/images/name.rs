//! Names of images, by Docker's grammar: `debian` is `docker.io/library/debian:latest`.
//!
//! (The grammar is that of the crate oci-spec and of Docker's `distribution/reference`. Theirs is a regular expression, whose
//! tables and compilation every start of a container would pay for.)

use std::fmt;

use super::{Digest, ImagesError};

const DEFAULT_REGISTRY: &str = "docker.io";
/// An older name of it.
const LEGACY_REGISTRY: &str = "index.docker.io";
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Bytes of a repository, registry included, and of a tag.
const REPOSITORY_MAX: usize = 255;
const TAG_MAX: usize = 128;
/// Bytes of a record's file name; file systems take 255.
const RECORD_NAME_MAX: usize = 200;

/// The name of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    registry: String,
    repository: String,
    version: Version,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Version {
    Tag(String),
    Digest(Digest),
}

impl ImageName {
    /// Reads a name as people type it: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`. What is before the first `/` is a host if it has a
    /// `.` or `:` in it or is `localhost`. As Docker has it, beside a digest a tag says nothing.
    ///
    /// # Errors
    /// [`ImagesError::Name`].
    pub fn parse(text: &str) -> Result<Self, ImagesError> {
        Self::read(text).map_err(|reason| ImagesError::Name {
            name: text.to_owned(),
            reason: reason.to_owned(),
        })
    }

    fn read(text: &str) -> Result<Self, &'static str> {
        let (named, digest) = match text.split_once('@') {
            Some((named, digest)) => {
                let digest = Digest::parse(digest).ok_or("behind the @ is no digest by SHA-256")?;
                (named, Some(digest))
            }
            None => (text, None),
        };
        // A colon behind the last slash begins the tag; one before it is a port's.
        let last = named.rfind('/').map_or(0, |slash| slash.saturating_add(1));
        let (path, tag) = match named.get(last..).and_then(|part| part.split_once(':')) {
            Some((part, tag)) => {
                let end = last.saturating_add(part.len());
                (named.get(..end).unwrap_or_default(), Some(tag))
            }
            None => (named, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(
                "its tag is not 1 to 128 of a-z, A-Z, 0-9, `_`, `.`, `-`, or begins with one of the last two",
            );
        }
        let (registry, repository) = match path.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
            _ => (DEFAULT_REGISTRY, path),
        };
        if !is_registry(registry) {
            return Err("its registry is no host");
        }
        let registry = match registry {
            LEGACY_REGISTRY => DEFAULT_REGISTRY,
            registry => registry,
        };
        if !repository.split('/').all(is_part) {
            return Err(
                "a part of its path is not of a-z, 0-9 and single `.`, one or two `_` or any `-` between these",
            );
        }
        let repository = match repository {
            official if registry == DEFAULT_REGISTRY && !official.contains('/') => {
                format!("{DEFAULT_NAMESPACE}{official}")
            }
            repository => repository.to_owned(),
        };
        if repository.len() > REPOSITORY_MAX {
            return Err("it is too long");
        }
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            version: match digest {
                Some(digest) => Version::Digest(digest),
                None => Version::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
            },
        })
    }

    /// Its registry, a host and perhaps a port.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Its path in the registry: `library/debian`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.repository
    }

    /// All of it: `docker.io/library/debian:latest`.
    #[must_use]
    pub fn whole(&self) -> String {
        let (mark, version) = match &self.version {
            Version::Tag(tag) => (':', tag.as_str()),
            Version::Digest(digest) => ('@', digest.as_str()),
        };
        format!("{}/{}{mark}{version}", self.registry, self.repository)
    }

    /// Without what goes without saying, the tag aside: `debian`, `localhost:5000/team/app`.
    #[must_use]
    pub fn repository(&self) -> String {
        let whole = format!("{}/{}", self.registry, self.repository);
        without_defaults(&whole).to_owned()
    }

    /// Its tag, if it has one rather than a digest.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(tag) => Some(tag),
            Version::Digest(_) => None,
        }
    }

    /// Its digest, if it has one.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(_) => None,
            Version::Digest(digest) => Some(digest.as_str()),
        }
    }

    /// Whether another name has the same registry and repository.
    #[must_use]
    pub fn is_of_repository_of(&self, other: &Self) -> bool {
        (&self.registry, &self.repository) == (&other.registry, &other.repository)
    }
}

/// A host name or address, and perhaps a port.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !text.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(inner)
    };
    let is_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(is_label),
    };
    is_host && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A part of a repository's path: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_part(part: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| is_plain(*byte));
    let bytes = part.as_bytes();
    ends(bytes.first())
        && ends(bytes.last())
        && part
            .split(|character: char| character.is_ascii_lowercase() || character.is_ascii_digit())
            .all(|between| {
                matches!(between, "" | "." | "_" | "__") || between.bytes().all(|byte| byte == b'-')
            })
}

/// `[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}`.
fn is_tag(tag: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= TAG_MAX
        && tag.bytes().next().is_some_and(is_word)
        && tag
            .bytes()
            .all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

/// Without what goes without saying: `debian`, `debian:12`, `localhost:5000/app`.
impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(without_defaults(&self.whole()))
    }
}

/// Takes away what goes without saying, without looking whether the rest is a name.
pub(super) fn without_defaults(text: &str) -> &str {
    let text = match text.strip_prefix(DEFAULT_REGISTRY) {
        Some(rest) => rest.strip_prefix('/').unwrap_or(text),
        None => text,
    };
    let text = match text.strip_prefix(DEFAULT_NAMESPACE) {
        Some(rest) if !rest.contains('/') => rest,
        _ => text,
    };
    match text
        .strip_suffix(DEFAULT_TAG)
        .and_then(|rest| rest.strip_suffix(':'))
    {
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
            assert_eq!(name.whole(), whole);
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
