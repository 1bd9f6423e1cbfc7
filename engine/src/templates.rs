//! Templates of the store: built from an image when first needed, found again by what they were built from.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use picovm_vmm::template::{FORMAT_VERSION, Metadata, partial_prefix};
use picovm_vmm::{Disk, FreezeOptions, Machine, MachineConfig, Outcome, Template, TemplateError};

use crate::error::EngineError;
use crate::guest::GuestFiles;
use crate::images::Image;
use crate::store::{self, Lock, Store};

/// How long a guest may take to its freeze point. It takes under a second on a real host.
const BOOT_MAX: Duration = Duration::from_secs(120);

const NOTE_IMAGE: &str = "image";
const NOTE_DIGEST: &str = "image-digest";

/// What a template is built from.
#[derive(Clone, Debug)]
pub struct TemplateSpec {
    /// The root file system.
    pub image: Image,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// vCPUs, 1 to 8.
    pub vcpus: u8,
}

impl TemplateSpec {
    /// Memory of a machine that nobody asked more or less of, in MiB. It is not taken from the host until used.
    pub const DEFAULT_MEMORY_MIB: u64 = 256;

    /// One vCPU and the default memory for an image.
    #[must_use]
    pub fn new(image: Image) -> Self {
        Self {
            image,
            memory_mib: Self::DEFAULT_MEMORY_MIB,
            vcpus: 1,
        }
    }

    /// What tells this template from others, as a name in the store.
    fn key(&self, guest: &GuestFiles) -> Result<String, EngineError> {
        let text = format!(
            "{FORMAT_VERSION}/{}/{}/{}/{}/{}",
            picovm_guest_protocol::PROTOCOL_VERSION,
            guest.fingerprint()?,
            self.image.digest,
            self.memory_mib,
            self.vcpus
        );
        Ok(blake3::hash(text.as_bytes())
            .to_hex()
            .get(..16)
            .unwrap_or_default()
            .to_owned())
    }
}

/// What building a template is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateProgress {
    /// Booting the parent.
    Booting {
        /// The image's name.
        image: String,
        /// Memory in MiB.
        memory_mib: u64,
        /// vCPUs.
        vcpus: u8,
    },
    /// Writing memory and state.
    Freezing {
        /// What booting took.
        booted: Duration,
    },
    /// Done.
    Built {
        /// What all of it took.
        took: Duration,
        /// Bytes of memory in the template that are not zero.
        data_bytes: u64,
    },
    /// The template that was there cannot be used and is built again.
    Replacing {
        /// Why.
        reason: String,
    },
}

impl std::fmt::Display for TemplateProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Booting {
                image,
                memory_mib,
                vcpus,
            } => write!(
                f,
                "no template of {image} with {memory_mib} MiB and {vcpus} vCPU{} yet: booting one",
                if *vcpus == 1 { "" } else { "s" }
            ),
            Self::Freezing { booted } => write!(f, "booted in {} ms, freezing", booted.as_millis()),
            Self::Built { took, data_bytes } => {
                write!(
                    f,
                    "template built in {} ms ({} MiB)",
                    took.as_millis(),
                    data_bytes >> 20
                )
            }
            Self::Replacing { reason } => write!(f, "building the template again: {reason}"),
        }
    }
}

/// Whether a template is whole, but of no use to this picovm on this host, so that building it again is the cure.
fn is_outdated(error: &TemplateError) -> bool {
    matches!(
        error,
        TemplateError::Version { .. } | TemplateError::Protocol { .. } | TemplateError::Foreign { .. }
    )
}

/// A template of the store, by its metadata alone.
#[derive(Debug)]
pub struct StoredTemplate {
    /// Its name in the store.
    pub key: String,
    /// Its directory.
    pub path: PathBuf,
    /// What it says of itself, or why that cannot be read.
    pub metadata: Result<Metadata, TemplateError>,
}

impl StoredTemplate {
    fn note(&self, name: &str) -> Option<&str> {
        self.metadata.as_ref().ok()?.notes.get(name).map(String::as_str)
    }

    /// Name of the image that it was built from.
    #[must_use]
    pub fn image(&self) -> Option<&str> {
        self.note(NOTE_IMAGE)
    }

    /// Digest of that image.
    #[must_use]
    pub fn image_digest(&self) -> Option<&str> {
        self.note(NOTE_DIGEST)
    }
}

impl Store {
    /// The template for `spec`, built if it is not there. Two that need the same one at once build it once.
    ///
    /// A template that is damaged is an error: nothing says what else is. One that was made by another version or on
    /// another processor is built again.
    ///
    /// # Errors
    /// [`EngineError::NotFrozen`], [`EngineError::Machine`], [`EngineError::Template`], [`EngineError::NoGuest`].
    pub fn template(
        &self,
        spec: &TemplateSpec,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<Template, EngineError> {
        let guest = GuestFiles::find()?;
        let key = spec.key(&guest)?;
        let path = self.templates_directory().join(&key);
        if path.exists() {
            match Template::open(&path) {
                Err(error) if is_outdated(&error) => {
                    progress(TemplateProgress::Replacing {
                        reason: error.to_string(),
                    });
                }
                opened => return Ok(opened?),
            }
        }
        let _lock = Lock::take(&self.templates_directory().join(format!("{key}.lock")))?;
        // Somebody else may have built it while this waited.
        match Template::open(&path) {
            Err(TemplateError::Io { .. }) if !path.exists() => {}
            Err(error) if is_outdated(&error) => store::remove(&path)?,
            opened => return Ok(opened?),
        }
        self.build_template(spec, &guest, path, progress)
    }

    fn build_template(
        &self,
        spec: &TemplateSpec,
        guest: &GuestFiles,
        path: PathBuf,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<Template, EngineError> {
        // A builder that was killed may have left something half-written; one that is alive would hold the lock.
        store::remove_leftovers(&self.templates_directory(), &partial_prefix(&path));
        progress(TemplateProgress::Booting {
            image: spec.image.name.clone(),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
        });
        let start = Instant::now();
        let mut config = MachineConfig::new(&guest.kernel);
        config.initramfs = Some(guest.initramfs.clone());
        config.memory_mib = spec.memory_mib;
        config.vcpus = spec.vcpus;
        config.disks = vec![Disk {
            path: spec.image.file.clone(),
            read_only: true,
        }];
        let mut parent = Machine::boot(&config)?;
        let reason = match parent.run(Some(BOOT_MAX))? {
            Some(Outcome::FreezePoint) => None,
            Some(outcome) => Some(outcome.to_string()),
            None => Some(format!("it took longer than {} s", BOOT_MAX.as_secs())),
        };
        if let Some(reason) = reason {
            return Err(EngineError::NotFrozen {
                reason,
                tail: parent.console_tail(),
            });
        }
        progress(TemplateProgress::Freezing {
            booted: start.elapsed(),
        });
        let notes = BTreeMap::from([
            (NOTE_IMAGE.to_owned(), spec.image.name.clone()),
            (NOTE_DIGEST.to_owned(), spec.image.digest.clone()),
        ]);
        let template = parent.freeze(&path, &FreezeOptions { notes })?;
        progress(TemplateProgress::Built {
            took: start.elapsed(),
            data_bytes: template.metadata().memory_data_bytes,
        });
        Ok(template)
    }

    /// All templates, newest first; those that cannot be read last.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn templates(&self) -> Result<Vec<StoredTemplate>, EngineError> {
        let directory = self.templates_directory();
        let mut templates = Vec::new();
        for entry in fs::read_dir(&directory).map_err(EngineError::store("list", &directory))? {
            let path = entry.map_err(EngineError::store("list", &directory))?.path();
            let Some(key) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else {
                continue;
            };
            if key.starts_with('.') || !path.is_dir() {
                continue;
            }
            let metadata = Template::read_metadata(&path).map(|(metadata, _)| metadata);
            templates.push(StoredTemplate { key, path, metadata });
        }
        templates.sort_by_key(|template| {
            std::cmp::Reverse(template.metadata.as_ref().map_or(0, |metadata| metadata.created))
        });
        Ok(templates)
    }

    /// The template whose key begins with `id`.
    ///
    /// # Errors
    /// [`EngineError::NoTemplate`], [`EngineError::AmbiguousTemplate`], [`EngineError::Store`].
    pub fn find_template(&self, id: &str) -> Result<StoredTemplate, EngineError> {
        let mut found = self.templates()?;
        found.retain(|template| !id.is_empty() && template.key.starts_with(id));
        if found.len() > 1 {
            return Err(EngineError::AmbiguousTemplate { id: id.to_owned() });
        }
        found
            .pop()
            .ok_or_else(|| EngineError::NoTemplate { id: id.to_owned() })
    }

    /// Removes the template whose key begins with `id`. Clones of it that run go on: they have its files open.
    ///
    /// # Errors
    /// As [`Store::find_template`].
    pub fn remove_template(&self, id: &str) -> Result<StoredTemplate, EngineError> {
        let template = self.find_template(id)?;
        let _lock = Lock::take(&self.templates_directory().join(format!("{}.lock", template.key)))?;
        store::remove(&template.path)?;
        Ok(template)
    }
}
