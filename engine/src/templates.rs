//! Templates of the store: built when first needed, found again by what they were built from.
//!
//! They have three depths. A *base* is a kernel and its init, before any image: booted once for each memory size and number
//! of vCPUs. An *image* template is a clone of the base that has mounted the image, warmed up, and was frozen again. A *warm* one
//! (`warm.rs`) is a clone of that in which an application was started.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use picovm_vmm::template::{FORMAT_VERSION, Metadata, unfinished};
use picovm_vmm::{BootFiles, Disk, Draft, Expected, MachineConfig, Template, TemplateError};

use crate::confinement::Confinement;
use crate::error::EngineError;
use crate::guest::GuestFiles;
use crate::images::Image;
use crate::maker::{Maker, Order};
use crate::store::{self, Lock, Store};
use crate::working_set::try_starts;

/// Sectors of 512 bytes of the disk that an image is, as every guest sees it: 1 TiB, so that one base serves images of all
/// sizes. What is behind an image's end reads as zeros, and its file system knows where it ends.
const IMAGE_SECTORS: u64 = 1 << 31;

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

    /// What tells this template from others, as a name in the store; without `image`, its base.
    pub(crate) fn key(&self, guest: &GuestFiles, image: Option<&Image>) -> Result<String, EngineError> {
        let text = format!(
            "{FORMAT_VERSION}/{}/{}/{}/{}/{}",
            picovm_guest_protocol::PROTOCOL_VERSION,
            guest.fingerprint()?,
            image.map_or("base", |image| &image.digest),
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
    /// There is none yet.
    Missing {
        /// The image's name.
        image: String,
        /// Memory in MiB.
        memory_mib: u64,
        /// vCPUs.
        vcpus: u8,
    },
    /// Booting the base.
    Booting,
    /// The base is booted and frozen.
    Booted {
        /// What booting took.
        booted: Duration,
        /// What freezing took.
        frozen: Duration,
    },
    /// A clone of the base has mounted the image and warmed up; writing memory and state.
    Freezing {
        /// What that took.
        prepared: Duration,
    },
    /// Starting an application in a clone of the image's template.
    Warming,
    /// It is warm; writing memory and state.
    Warm {
        /// What that took.
        took: Duration,
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
            Self::Missing {
                image,
                memory_mib,
                vcpus,
            } => write!(
                f,
                "no template of {image} with {memory_mib} MiB and {vcpus} vCPU{} yet: making one",
                if *vcpus == 1 { "" } else { "s" }
            ),
            Self::Booting => write!(f, "booting the kernel, once for all images"),
            Self::Booted { booted, frozen } => write!(
                f,
                "booted in {} ms, frozen in {} ms",
                booted.as_millis(),
                frozen.as_millis()
            ),
            Self::Freezing { prepared } => {
                write!(
                    f,
                    "image mounted and warmed up in {} ms, freezing",
                    prepared.as_millis()
                )
            }
            Self::Warming => write!(f, "starting the application"),
            Self::Warm { took } => write!(f, "warm after {} ms, freezing", took.as_millis()),
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

pub(crate) type Report<'a> = dyn FnMut(TemplateProgress) + 'a;
/// Makes a template at a path where there is none.
pub(crate) type Make<'a> = dyn Fn(&Path, &mut Report<'_>) -> Result<Template, EngineError> + 'a;

/// Boots a machine to its base freeze point and freezes it.
fn boot_base(
    spec: &TemplateSpec,
    guest: &GuestFiles,
    confinement: Confinement,
    path: &Path,
    progress: &mut Report<'_>,
) -> Result<Template, EngineError> {
    progress(TemplateProgress::Booting);
    let start = Instant::now();
    let mut config = MachineConfig::new(&guest.kernel);
    config.initramfs = Some(guest.initramfs.clone());
    config.memory_mib = spec.memory_mib;
    config.vcpus = spec.vcpus;
    config.stop_at_base = true;
    // Any image: nothing of it is read before the base freeze point.
    config.disks = vec![image_disk(&spec.image)];
    // What is wrong with these is told best from here.
    drop(BootFiles::open(&config)?);
    let draft = Draft::new(path)?;
    let files = draft.create_files()?;
    let order = Order::Boot {
        config: config.clone(),
        directory: draft.path().to_owned(),
    };
    let mut booted = Duration::ZERO;
    Maker::start(confinement)?.carry_out(
        &order,
        &[files.memory().as_fd(), files.state().as_fd()],
        &mut || booted = start.elapsed(),
    )?;
    let expected = Expected {
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
        disks: &config.disks,
        base: None,
    };
    let template = draft.seal(BTreeMap::new(), Some(&expected))?;
    progress(TemplateProgress::Booted {
        booted,
        frozen: start.elapsed().saturating_sub(booted),
    });
    Ok(template)
}

/// An image as every guest sees it.
fn image_disk(image: &Image) -> Disk {
    Disk {
        sectors: Some(IMAGE_SECTORS),
        ..Disk::read_only(&image.file)
    }
}

/// Has a clone of the base mount the image and warm up, and freezes it.
fn take_image(
    base: &Template,
    spec: &TemplateSpec,
    confinement: Confinement,
    path: &Path,
    progress: &mut Report<'_>,
) -> Result<Template, EngineError> {
    let start = Instant::now();
    let image = &spec.image;
    let draft = Draft::new(path)?;
    let files = draft.create_files()?;
    let order = Order::Image {
        base: base.path().to_owned(),
        image: image.file.clone(),
        directory: draft.path().to_owned(),
    };
    let mut maker = Maker::start(confinement)?;
    maker.carry_out(
        &order,
        &[files.memory().as_fd(), files.state().as_fd()],
        &mut || {
            progress(TemplateProgress::Freezing {
                prepared: start.elapsed(),
            });
        },
    )?;
    complete(draft, BTreeMap::new(), spec, base, &mut maker)
}

/// Makes a template of what a maker has written: a clone of `base` that has the image in it, with what there is to note beside that.
/// Containers are run in it, to learn which pages a start touches.
pub(crate) fn complete(
    draft: Draft,
    mut notes: BTreeMap<String, String>,
    spec: &TemplateSpec,
    base: &Template,
    maker: &mut Maker,
) -> Result<Template, EngineError> {
    let image = &spec.image;
    notes.insert(NOTE_IMAGE.to_owned(), image.shown());
    notes.insert(NOTE_DIGEST.to_owned(), image.digest.clone());
    let expected = Expected {
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
        disks: &[image_disk(image)],
        base: Some(base),
    };
    let mut template = draft.seal(notes, Some(&expected))?;
    match try_starts(&template, maker) {
        Ok(set) => template.record_working_set(set),
        // An image without a shell, or a host without /proc: a template is as good without, only its pools are slower.
        Err(error) => tracing::warn!(%error, "cannot record which pages a start touches"),
    }
    Ok(template)
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
    pub(crate) fn note(&self, name: &str) -> Option<&str> {
        self.metadata.as_ref().ok()?.notes.get(name).map(String::as_str)
    }

    /// Name of the image that it was built from; a base has none.
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
    /// It is built in a jailed process, which `picovm-vmm` starts.
    ///
    /// # Errors
    /// [`EngineError::Machine`], [`EngineError::Template`], [`EngineError::NoGuest`], [`EngineError::NoVmm`];
    /// [`EngineError::Vmm`] for what goes wrong in the jailed process.
    pub fn template(
        &self,
        spec: &TemplateSpec,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<Template, EngineError> {
        self.template_confined(spec, Confinement::Jailed, progress)
    }

    /// As [`Store::template`], with the process that builds it confined as it is said.
    ///
    /// # Errors
    /// As [`Store::template`].
    pub fn template_confined(
        &self,
        spec: &TemplateSpec,
        confinement: Confinement,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<Template, EngineError> {
        let guest = GuestFiles::find()?;
        let key = spec.key(&guest, Some(&spec.image))?;
        self.template_named(&key, spec, &guest, confinement, progress)
    }

    /// As [`Store::template_confined`], by the key that these guest's files give it.
    pub(crate) fn template_named(
        &self,
        key: &str,
        spec: &TemplateSpec,
        guest: &GuestFiles,
        confinement: Confinement,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<Template, EngineError> {
        self.open_or_make(key, progress, &|path, progress| {
            progress(TemplateProgress::Missing {
                image: spec.image.shown(),
                memory_mib: spec.memory_mib,
                vcpus: spec.vcpus,
            });
            let start = Instant::now();
            let key = spec.key(guest, None)?;
            let base = self.open_or_make(&key, progress, &|path, progress| {
                boot_base(spec, guest, confinement, path, progress)
            })?;
            let template = take_image(&base, spec, confinement, path, progress)?;
            progress(TemplateProgress::Built {
                took: start.elapsed(),
                data_bytes: template.metadata().memory_data_bytes,
            });
            Ok(template)
        })
    }

    /// Opens the template of this name, or has it made.
    pub(crate) fn open_or_make(
        &self,
        key: &str,
        progress: &mut Report<'_>,
        make: &Make<'_>,
    ) -> Result<Template, EngineError> {
        let path = self.templates_directory().join(key);
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
        self.remove_unfinished(key);
        make(&path, progress)
    }

    /// Removes what killed makers of templates have left half-written, of whatever template. One that is alive holds its template's
    /// lock, as the caller does that of `own`. What cannot be removed only takes room.
    fn remove_unfinished(&self, own: &str) {
        let directory = self.templates_directory();
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(key) = name.to_str().and_then(unfinished) else {
                continue;
            };
            let lock = (key != own).then(|| Lock::try_take(&directory.join(format!("{key}.lock"))));
            if matches!(lock, None | Some(Ok(Some(_)))) {
                let _ = store::remove(&entry.path());
            }
        }
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

    /// The template of this name, or whose key begins with `id`.
    ///
    /// # Errors
    /// [`EngineError::NoTemplate`], [`EngineError::AmbiguousTemplate`], [`EngineError::Store`].
    pub fn find_template(&self, id: &str) -> Result<StoredTemplate, EngineError> {
        let mut found = self.templates()?;
        if let Some(named) = found.iter().position(|template| template.name() == Some(id)) {
            return Ok(found.swap_remove(named));
        }
        found.retain(|template| !id.is_empty() && template.key.starts_with(id));
        if found.len() > 1 {
            return Err(EngineError::AmbiguousTemplate { id: id.to_owned() });
        }
        found
            .pop()
            .ok_or_else(|| EngineError::NoTemplate { id: id.to_owned() })
    }

    /// Removes the template whose key begins with `id`, and its pools. Clones of it that run go on: they have its files open.
    ///
    /// # Errors
    /// As [`Store::find_template`].
    pub fn remove_template(&self, id: &str) -> Result<StoredTemplate, EngineError> {
        let template = self.find_template(id)?;
        let lock = Lock::take(&self.templates_directory().join(format!("{}.lock", template.key)))?;
        store::remove(&template.path)?;
        drop(lock);
        // Last: none is begun for a template that is not there.
        self.pools().stop_all_of(&template.key)?;
        Ok(template)
    }
}
