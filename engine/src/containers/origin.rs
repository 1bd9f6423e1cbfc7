//! What a container is started in.

use std::path::{Path, PathBuf};

use picovm_vmm::Template;

use super::Containers;
use super::record::{Record, RestartPolicy};
use crate::error::EngineError;
use crate::guest::GuestFiles;
use crate::pools::ParkedClone;
use crate::templates::{StoredTemplate, TemplateProgress, TemplateSpec};

/// What a container is started in: a clone that a pool has given, or one that is forked from a template. The template is opened when
/// it is first needed, and with a clone of a pool that is mostly never.
#[derive(Debug)]
pub struct Origin {
    /// Directory of the template.
    path: PathBuf,
    opened: Option<Template>,
    parked: Option<ParkedClone>,
}

impl Origin {
    /// This template.
    fn of(template: Template) -> Self {
        Self {
            path: template.path().to_owned(),
            opened: Some(template),
            parked: None,
        }
    }

    /// Directory of the template.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The clone, if a pool has given one; once.
    pub(super) fn take_parked(&mut self) -> Option<ParkedClone> {
        self.parked.take()
    }

    /// The template.
    pub(super) fn template(&mut self) -> Result<&Template, EngineError> {
        let opened = match self.opened.take() {
            Some(opened) => opened,
            None => Template::open(&self.path)?,
        };
        Ok(self.opened.insert(opened))
    }
}

impl Containers {
    /// What to start a container of an image in. A template that is not there is built.
    ///
    /// # Errors
    /// What [`Store::template`](crate::Store::template) says.
    pub fn origin(
        &self,
        record: &Record,
        spec: &TemplateSpec,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<Origin, EngineError> {
        let guest = GuestFiles::find()?;
        let key = spec.key(&guest, Some(&spec.image))?;
        if let Some(parked) = self.parked(record, &self.store.templates_directory().join(&key)) {
            return Ok(parked);
        }
        let confinement = record.config.confinement;
        self.store
            .template_named(&key, spec, &guest, confinement, progress)
            .map(Origin::of)
    }

    /// What to start a container in that goes on with the application of a warm template.
    ///
    /// # Errors
    /// [`EngineError::Template`].
    pub fn warm_origin(&self, record: &Record, template: &StoredTemplate) -> Result<Origin, EngineError> {
        match self.parked(record, &template.path) {
            Some(parked) => Ok(parked),
            None => Ok(Origin::of(Template::open(&template.path)?)),
        }
    }

    /// A clone of this template's pool, if the container can do with one.
    fn parked(&self, record: &Record, template: &Path) -> Option<Origin> {
        // One that is started again and again has its template open, or could not be when that is removed.
        if record.config.restart != RestartPolicy::No || !record.config.takes_parked() {
            return None;
        }
        Some(Origin {
            path: template.to_owned(),
            opened: None,
            parked: Some(ParkedClone::take(&self.store, template.file_name()?)?),
        })
    }
}
