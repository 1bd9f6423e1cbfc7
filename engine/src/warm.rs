//! Warm templates: an application is started once in a clone of an image's template, and the machine is frozen with it as it
//! runs. A clone of that goes on with the application where it was.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use picovm_vmm::{Draft, Template};

use crate::confinement::Confinement;
use crate::containers::ContainerConfig;
use crate::error::EngineError;
use crate::guest::GuestFiles;
use crate::maker::{Maker, Order};
use crate::store::Store;
use crate::templates::{Report, StoredTemplate, TemplateProgress, TemplateSpec, complete};
use crate::warming::{Until, pattern};

/// Name of a warm template.
pub(crate) const NOTE_NAME: &str = "warm-name";
/// The container that was frozen, a [`ContainerConfig`] in JSON.
pub(crate) const NOTE_CONTAINER: &str = "warm-container";
const NOTE_UNTIL: &str = "warm-until";

/// What a warm template is made of.
#[derive(Clone, Debug)]
pub struct WarmSpec {
    /// Image and machine.
    pub template: TemplateSpec,
    /// The application, as a container of that image.
    pub container: ContainerConfig,
    /// What says that it is warm.
    pub until: Until,
    /// How long it may take to that.
    pub timeout: Duration,
    /// Name of the template, if it has one.
    pub name: Option<String>,
}

impl WarmSpec {
    /// What of the container makes the template another one.
    fn frozen(&self) -> ContainerConfig {
        let container = self.container.clone();
        ContainerConfig {
            id: String::new(),
            created: chrono::DateTime::UNIX_EPOCH,
            confinement: Confinement::Jailed,
            ..container
        }
    }

    fn key(&self, guest: &GuestFiles, container: &str) -> Result<String, EngineError> {
        let image = self.template.key(guest, Some(&self.template.image))?;
        let text = format!("warm/{image}/{container}/{}/{:?}", self.until, self.name);
        Ok(blake3::hash(text.as_bytes())
            .to_hex()
            .get(..16)
            .unwrap_or_default()
            .to_owned())
    }
}

impl Store {
    /// The warm template of `spec`, made if it is not there, from the image's template, which is made if that is not. What the
    /// application writes meanwhile goes to standard error.
    ///
    /// # Errors
    /// [`EngineError::Refused`] for a name that another template has, and a pattern that is none; [`EngineError::Vmm`] for an
    /// application that does not get warm; and as [`Store::template`].
    pub fn warm_template(
        &self,
        spec: &WarmSpec,
        confinement: Confinement,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<Template, EngineError> {
        if let Until::Log(text) = &spec.until {
            pattern(text)?;
        }
        let guest = GuestFiles::find()?;
        let container = serde_json::to_string(&spec.frozen())
            .map_err(|error| EngineError::host("describe the container")(std::io::Error::other(error)))?;
        let key = spec.key(&guest, &container)?;
        if let Some(name) = &spec.name {
            self.check_warm_name(name, &key)?;
        }
        let image = self.template_confined(&spec.template, confinement, progress)?;
        self.open_or_make(&key, progress, &|path, progress| {
            warm_up(&image, spec, &container, confinement, path, progress)
        })
    }

    fn check_warm_name(&self, name: &str, key: &str) -> Result<(), EngineError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let begins_well = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if !begins_well || name.len() > 64 || !name.bytes().all(allowed) {
            return Err(EngineError::Refused(format!(
                "{name:?} is no name of a template: it is 1 to 64 of a-z, A-Z, 0-9, `-`, `.`, `_`, and begins with a letter or a digit"
            )));
        }
        match self
            .templates()?
            .iter()
            .find(|other| other.name() == Some(name) && other.key != key)
        {
            Some(other) => Err(EngineError::Refused(format!(
                "the name {name} belongs to template {}, which was made in another way: give another name, or remove that one with \
                 `picovm template rm {name}`",
                other.key
            ))),
            None => Ok(()),
        }
    }
}

impl StoredTemplate {
    /// Its name, if it is warm and has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.note(NOTE_NAME)
    }

    /// How deep it is: `base`, `image` or `warm`.
    #[must_use]
    pub fn depth(&self) -> &'static str {
        match (self.note(NOTE_CONTAINER), self.image()) {
            (Some(_), _) => "warm",
            (None, Some(_)) => "image",
            (None, None) => "base",
        }
    }

    /// The container that was frozen in it.
    ///
    /// # Errors
    /// [`EngineError::Refused`] if it is not warm, or cannot be used any more.
    pub fn container(&self) -> Result<ContainerConfig, EngineError> {
        let refused = |reason: &str| {
            EngineError::Refused(format!(
                "the template {} {reason}. `picovm template warm` makes a warm one",
                self.key
            ))
        };
        if let Err(error) = &self.metadata {
            return Err(refused(&format!("cannot be read: {error}")));
        }
        let text = self
            .note(NOTE_CONTAINER)
            .ok_or_else(|| refused("has no running application in it"))?;
        serde_json::from_str(text)
            .map_err(|error| refused(&format!("is of another version of picovm: {error}")))
    }
}

/// Has a clone of an image's template start the application, and freezes it when that is warm.
fn warm_up(
    image: &Template,
    spec: &WarmSpec,
    container: &str,
    confinement: Confinement,
    path: &Path,
    progress: &mut Report<'_>,
) -> Result<Template, EngineError> {
    let start = Instant::now();
    progress(TemplateProgress::Warming);
    let draft = Draft::new(path)?;
    let files = draft.create_files()?;
    let mut start_of = spec.container.options(None).request();
    // Clones are given it, or its end.
    start_of.spec.process.stdin = true;
    let order = Order::Warm {
        template: image.path().to_owned(),
        container: Box::new(start_of.spec),
        hostname: spec.container.hostname.clone(),
        until: spec.until.clone(),
        timeout: spec.timeout,
        directory: draft.path().to_owned(),
    };
    let mut maker = Maker::start(confinement)?;
    maker.carry_out(
        &order,
        &[files.memory().as_fd(), files.state().as_fd()],
        &mut || {
            progress(TemplateProgress::Warm {
                took: start.elapsed(),
            })
        },
    )?;
    let mut notes = BTreeMap::from([
        (NOTE_CONTAINER.to_owned(), container.to_owned()),
        (NOTE_UNTIL.to_owned(), spec.until.to_string()),
    ]);
    if let Some(name) = &spec.name {
        notes.insert(NOTE_NAME.to_owned(), name.clone());
    }
    let template = complete(draft, notes, &spec.template, image, &mut maker)?;
    progress(TemplateProgress::Built {
        took: start.elapsed(),
        data_bytes: template.metadata().memory_data_bytes,
    });
    Ok(template)
}
