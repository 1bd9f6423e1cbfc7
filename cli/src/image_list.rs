//! Images as tables and JSON, as Docker shows them.

use std::process::ExitCode;

use anyhow::bail;
use chrono::{DateTime, Utc};
use picovm_engine::{Image, ImageConfig, ImageName, Store};
use serde_json::{Value, json};

use crate::format::Format;
use crate::image_arguments::{InspectOptions, ListOptions};
use crate::output;

/// What stands for a part of a name that is not there.
const NONE: &str = "<none>";
/// Digits of an id that are shown.
const ID_DIGITS: usize = 12;

/// An image, its configuration, and its name.
struct Row {
    image: Image,
    config: ImageConfig,
    name: Option<ImageName>,
}

impl Row {
    fn new(image: Image) -> anyhow::Result<Self> {
        Ok(Self {
            config: image.config()?,
            name: ImageName::parse(&image.name).ok(),
            image,
        })
    }

    fn repository(&self) -> String {
        match &self.name {
            Some(name) => name.repository(),
            // One from before names had a grammar.
            None if !self.image.name.is_empty() => self.image.name.clone(),
            None => NONE.into(),
        }
    }

    fn tag(&self) -> &str {
        self.name.as_ref().and_then(ImageName::tag).unwrap_or(NONE)
    }

    fn created(&self) -> DateTime<Utc> {
        self.config
            .created
            .as_deref()
            .and_then(|text| DateTime::parse_from_rfc3339(text).ok())
            .map(DateTime::<Utc>::from)
            .or_else(|| DateTime::from_timestamp(i64::try_from(self.image.created).ok()?, 0))
            .unwrap_or_default()
    }

    fn fields(&self, whole_id: bool) -> Value {
        let id = if whole_id {
            self.image.id()
        } else {
            self.image.id_digits().chars().take(ID_DIGITS).collect()
        };
        json!({
            "Repository": self.repository(),
            "Tag": self.tag(),
            "Digest": self.image.registry_digest.as_deref().unwrap_or(NONE),
            "ID": id,
            "CreatedSince": output::since(self.created()),
            "CreatedAt": self.created().format("%Y-%m-%d %H:%M:%S %z UTC").to_string(),
            "Size": output::docker_size(self.image.bytes),
            "Bytes": self.image.bytes,
        })
    }
}

pub fn list(store: &Store, options: &ListOptions) -> anyhow::Result<ExitCode> {
    let filters = options
        .filter
        .iter()
        .map(|text| Filter::parse(text))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for image in store.images()? {
        let row = Row::new(image)?;
        if options
            .name
            .as_deref()
            .is_none_or(|wanted| is_named(&row, wanted))
            && filters.iter().all(|filter| filter.takes(&row))
        {
            rows.push(row);
        }
    }
    // The newest first, as Docker has it.
    rows.sort_by_key(|row| std::cmp::Reverse(row.created()));
    let whole_id = options.no_trunc;
    let fields: Vec<Value> = rows
        .iter()
        .map(|row| row.fields(whole_id || options.json))
        .collect();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    if options.quiet {
        let mut before = Vec::new();
        for row in &fields {
            let id = text(row, "ID");
            if !before.contains(&id) {
                println!("{id}");
                before.push(id);
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&fields)?);
        return Ok(ExitCode::SUCCESS);
    }
    match options.format.as_deref() {
        None | Some("table") => {
            let mut columns = vec![("REPOSITORY", "Repository"), ("TAG", "Tag")];
            if options.digests {
                columns.push(("DIGEST", "Digest"));
            }
            columns.extend([("IMAGE ID", "ID"), ("CREATED", "CreatedSince"), ("SIZE", "Size")]);
            let (headings, keys): (Vec<&str>, Vec<&str>) = columns.into_iter().unzip();
            let table: Vec<Vec<String>> = fields
                .iter()
                .map(|row| keys.iter().map(|key| text(row, key)).collect())
                .collect();
            output::table(&headings, &table);
        }
        Some("json") => {
            for row in &fields {
                println!("{row}");
            }
        }
        Some(format) => Format::parse(format)?.print(
            &json!({
                "Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "ID": "IMAGE ID",
                "CreatedSince": "CREATED", "CreatedAt": "CREATED AT", "Size": "SIZE", "Bytes": "BYTES",
            }),
            &fields,
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether an image is of a repository, or has a name.
fn is_named(row: &Row, wanted: &str) -> bool {
    let Some(name) = &row.name else {
        return row.image.name == wanted;
    };
    // A tag is behind the last part: before it, a colon is that of a port.
    let last = wanted.rsplit('/').next().unwrap_or_default();
    if last.contains([':', '@']) {
        ImageName::parse(wanted).is_ok_and(|wanted| wanted == *name)
    } else {
        ImageName::parse(wanted).is_ok_and(|wanted| wanted.is_of_repository_of(name))
    }
}

enum Filter {
    Dangling(bool),
    Reference(String),
    Label(String, Option<String>),
}

impl Filter {
    fn parse(text: &str) -> anyhow::Result<Self> {
        Ok(match text.split_once('=') {
            Some(("dangling", "true" | "1")) => Self::Dangling(true),
            Some(("dangling", "false" | "0")) => Self::Dangling(false),
            Some(("reference", pattern)) => Self::Reference(pattern.to_owned()),
            Some(("label", label)) => match label.split_once('=') {
                Some((key, value)) => Self::Label(key.to_owned(), Some(value.to_owned())),
                None => Self::Label(label.to_owned(), None),
            },
            _ => bail!(
                "{text:?} is no filter: there are dangling=true|false, reference=PATTERN, label=KEY[=VALUE]"
            ),
        })
    }

    fn takes(&self, row: &Row) -> bool {
        match self {
            Self::Dangling(is) => row.image.name.is_empty() == *is,
            Self::Reference(pattern) => {
                let repository = row.repository();
                matches(pattern, &repository) || matches(pattern, &format!("{repository}:{}", row.tag()))
            }
            Self::Label(key, value) => row
                .config
                .config
                .labels
                .get(key)
                .is_some_and(|found| value.as_ref().is_none_or(|value| value == found)),
        }
    }
}

/// Shell patterns of `*` and `?`, neither of which stands for a `/`.
fn matches(pattern: &str, text: &str) -> bool {
    let mut pattern = pattern.chars();
    let Some(first) = pattern.next() else {
        return text.is_empty();
    };
    let rest = pattern.as_str();
    let mut characters = text.chars();
    match first {
        '*' => {
            matches(rest, text)
                || characters
                    .next()
                    .is_some_and(|next| next != '/' && matches(&format!("*{rest}"), characters.as_str()))
        }
        '?' => characters
            .next()
            .is_some_and(|next| next != '/' && matches(rest, characters.as_str())),
        plain => characters.next() == Some(plain) && matches(rest, characters.as_str()),
    }
}

/// The image of this name as `docker image inspect` describes it.
pub fn describe(store: &Store, name: &str) -> anyhow::Result<Value> {
    description(&store.image(name)?, &store.images()?)
}

pub fn inspect(store: &Store, options: &InspectOptions) -> anyhow::Result<ExitCode> {
    let all = store.images()?;
    let mut found = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for name in &options.images {
        match store.image(name) {
            Ok(image) => found.push(description(&image, &all)?),
            Err(error) => {
                eprintln!("picovm: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    match options.format.as_deref() {
        None => println!("{}", serde_json::to_string_pretty(&found)?),
        Some("json") => println!("{}", Value::from(found)),
        Some(format) => Format::parse(format)?.print(&Value::Null, &found)?,
    }
    Ok(code)
}

/// An image as `docker image inspect` describes it.
fn description(image: &Image, all: &[Image]) -> anyhow::Result<Value> {
    let row = Row::new(image.clone())?;
    let (mut tags, mut digests) = (Vec::new(), Vec::new());
    for other in all.iter().filter(|other| other.id() == image.id()) {
        let Ok(name) = ImageName::parse(&other.name) else {
            continue;
        };
        if let Some(tag) = name.tag() {
            tags.push(format!("{}:{tag}", name.repository()));
        }
        if let Some(digest) = &other.registry_digest {
            digests.push(format!("{}@{digest}", name.repository()));
        }
    }
    digests.sort();
    digests.dedup();
    let config = &row.config;
    let mut description = json!({
        "Id": image.id(),
        "RepoTags": tags,
        "RepoDigests": digests,
        "Created": row.created().to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true),
        "Author": config.author.as_deref().unwrap_or_default(),
        "Architecture": config.architecture,
        "Os": config.os,
        "Size": image.bytes,
        "Config": config.config,
        "RootFS": { "Type": "layers", "Layers": config.rootfs.diff_ids },
        "File": image.file,
        "Entries": image.entries,
        "Source": image.source,
    });
    if let (Some(variant), Some(map)) = (&config.variant, description.as_object_mut()) {
        map.insert("Variant".into(), variant.as_str().into());
    }
    Ok(description)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_the_shell_s() {
        for (pattern, text) in [
            ("debian", "debian"),
            ("deb*", "debian"),
            ("*", "debian"),
            ("d?bian:1*", "debian:12"),
            ("*/team/*", "localhost:5000/team/app"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("deb", "debian"), ("*", "a/b"), ("?", ""), ("a*", "b")] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }
}
