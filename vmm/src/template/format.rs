//! The files of a template and what can be wrong with them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::checksum;
use crate::arch::cpuid::Processor;
use crate::machine::MachineError;

/// Version of the format. It grows with every change of the files, the device slots or the saved state.
pub const FORMAT_VERSION: u32 = 5;

/// Metadata.
pub const METADATA: &str = "template.json";
/// Machine state.
pub const STATE: &str = "state";
/// Guest memory.
pub const MEMORY: &str = "memory";
/// Record of a verified memory checksum.
pub const VERIFIED: &str = "verified";
/// Record of the pages that a start touches: a [`crate::WorkingSet`], encoded by postcard.
pub const WORKING_SET: &str = "working-set";

/// Largest metadata and state files that are read, in bytes: both are some ten KiB.
pub const SMALL_FILE_MAX: u64 = 16 << 20;

/// A file of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 in hexadecimal; of the memory, see `docs/architecture.md`.
    pub checksum: String,
}

/// What a template says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// [`FORMAT_VERSION`] of who wrote it.
    pub format: u32,
    /// Version of the guest protocol that its `init` speaks.
    pub protocol: u32,
    /// Seconds since 1970.
    pub created: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// The processor that the guest has seen.
    pub processor: Processor,
    /// Guest memory.
    pub memory: FileRecord,
    /// Bytes of memory that are not holes.
    pub memory_data_bytes: u64,
    /// Machine state.
    pub state: FileRecord,
    /// Notes of whoever froze it, for example what image it holds.
    pub notes: BTreeMap<String, String>,
}

/// Why a template cannot be written, opened or forked.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file cannot be read or written.
    #[error("cannot {attempted} {}: {source}", path.display())]
    Io {
        /// `read`, `write`, ...
        attempted: &'static str,
        /// Which file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// A file is not what was written.
    #[error("the template {} is damaged: {reason}. Remove it and build it again", path.display())]
    Damaged {
        /// The template's directory.
        path: PathBuf,
        /// Which file, and what is wrong with it.
        reason: String,
    },
    /// Another version wrote it.
    #[error(
        "the template {} has format {found}, and this picovm reads format {FORMAT_VERSION}: build it again",
        path.display()
    )]
    Version {
        /// The template's directory.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Its guest speaks another version of the guest protocol.
    #[error(
        "the init of the template {} speaks version {found} of the guest protocol, and this picovm version {}: \
         build it again",
        path.display(),
        picovm_guest_protocol::PROTOCOL_VERSION
    )]
    Protocol {
        /// The template's directory.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It was made on another processor.
    #[error(
        "the template {} was made on another processor ({made_on}; this is {here}), and its guest has adapted to \
         that one: build it again on this host",
        path.display()
    )]
    Foreign {
        /// The template's directory.
        path: PathBuf,
        /// Processor that it was made on.
        made_on: Box<Processor>,
        /// Processor of this host.
        here: Box<Processor>,
    },
    /// What was written is not what was to be.
    #[error(
        "what was written for the new template is not the machine that was asked for: {reason}. It was not kept"
    )]
    Refused {
        /// What differs.
        reason: String,
    },
    /// There is a template at the place already.
    #[error("cannot freeze into {}: it exists already", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// The identity does not fit.
    #[error("the identity takes {needed} bytes, but the guest has set aside {available}")]
    Identity {
        /// Bytes of the identity.
        needed: usize,
        /// Bytes of the identity area.
        available: usize,
    },
    /// The identity area lies outside guest memory.
    #[error("the template's identity area at {address:#x} is outside guest memory")]
    IdentityArea {
        /// The page.
        address: u64,
    },
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl TemplateError {
    pub(super) fn io<'a>(
        attempted: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io {
            attempted,
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// Version alone, read before anything else so that a newer format is told as such.
#[derive(Deserialize)]
struct JustFormat {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    checksum: String,
    metadata: Box<RawValue>,
}

/// Encodes metadata with its own checksum.
pub fn encode(metadata: &Metadata) -> io::Result<Vec<u8>> {
    let text = serde_json::to_string(metadata)?;
    let envelope = Envelope {
        checksum: checksum::of(text.as_bytes()),
        metadata: RawValue::from_string(text)?,
    };
    Ok(serde_json::to_vec(&envelope)?)
}

/// Decodes metadata; returns it with its checksum, which is the template's id.
pub fn decode(bytes: &[u8], path: &Path) -> Result<(Metadata, String), TemplateError> {
    let damaged = |reason: String| TemplateError::damaged(path, format!("{METADATA} {reason}"));
    let envelope: Envelope =
        serde_json::from_slice(bytes).map_err(|error| damaged(format!("cannot be read ({error})")))?;
    if checksum::of(envelope.metadata.get().as_bytes()) != envelope.checksum {
        return Err(damaged("does not match its checksum".into()));
    }
    let format: JustFormat = serde_json::from_str(envelope.metadata.get())
        .map_err(|error| damaged(format!("has no format version ({error})")))?;
    if format.format != FORMAT_VERSION {
        return Err(TemplateError::Version {
            path: path.to_owned(),
            found: format.format,
        });
    }
    let metadata = serde_json::from_str(envelope.metadata.get())
        .map_err(|error| damaged(format!("cannot be read ({error})")))?;
    Ok((metadata, envelope.checksum))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample() -> Metadata {
        let record = FileRecord {
            bytes: 1,
            checksum: "00".into(),
        };
        Metadata {
            format: FORMAT_VERSION,
            protocol: 1,
            created: 1_790_000_000,
            memory_mib: 128,
            vcpus: 1,
            processor: Processor {
                vendor: "AuthenticAMD".into(),
                signature: 1,
                features: [0; 8],
            },
            memory: record.clone(),
            memory_data_bytes: 1,
            state: record,
            notes: BTreeMap::from([("image".into(), "debian".into())]),
        }
    }

    #[test]
    fn metadata_survives_and_has_a_stable_id() {
        let bytes = encode(&sample()).unwrap();
        let (metadata, id) = decode(&bytes, Path::new("t")).unwrap();
        assert_eq!(metadata, sample());
        assert_eq!(decode(&encode(&metadata).unwrap(), Path::new("t")).unwrap().1, id);
    }

    #[test]
    fn a_newer_format_is_told_as_such() {
        let newer = Metadata {
            format: FORMAT_VERSION + 1,
            ..sample()
        };
        let error = decode(&encode(&newer).unwrap(), Path::new("t")).unwrap_err();
        assert!(matches!(error, TemplateError::Version { found, .. } if found == FORMAT_VERSION + 1));
    }

    proptest! {
        #[test]
        fn a_flipped_byte_is_an_error(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = encode(&sample()).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            // White space between tokens of the envelope means nothing; everything else is noticed.
            if let Ok((metadata, _)) = decode(&bytes, Path::new("t")) {
                prop_assert_eq!(metadata, sample());
            }
        }

        #[test]
        fn a_truncated_file_is_an_error(length in any::<prop::sample::Index>()) {
            let bytes = encode(&sample()).unwrap();
            let length = length.index(bytes.len());
            prop_assert!(decode(&bytes[..length], Path::new("t")).is_err());
        }
    }
}
