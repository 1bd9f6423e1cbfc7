//! `picovm ps`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::bail;
use chrono::{DateTime, Utc};
use picovm_engine::Store;
use picovm_engine::containers::{MountKind, MountPoint, Record, State, Status};
use serde_json::{Value, json};

use super::arguments::PsOptions;
use super::filter::Filters;
use crate::format::Format;
use crate::output;

const FILTERS: [&str; 11] = [
    "id", "name", "label", "status", "exited", "ancestor", "health", "before", "since", "network", "volume",
];
/// Characters of a command that are shown.
const COMMAND_WIDTH: usize = 20;

pub fn list(options: &PsOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = store.containers()?;
    let filters = Filters::parse(&options.filter, &FILTERS)?;
    let bounds = Bounds::read(&filters, &containers)?;
    let last = match options.last {
        _ if options.latest => Some(1),
        Some(last) => usize::try_from(last).ok().filter(|last| *last > 0),
        None => None,
    };
    // As in Docker, who asks for a state means all of that state.
    let all = options.all || last.is_some() || filters.has("status") || filters.has("exited");
    let mut records = Vec::new();
    for record in containers.list()? {
        let shown = all || record.state.status.is_live();
        if shown && bounds.take(&record) && takes(&filters, &record, &store)? {
            records.push(record);
        }
    }
    records.truncate(last.unwrap_or(usize::MAX));
    if options.quiet && options.format.is_none() {
        for record in &records {
            println!("{}", shown_id(record, options.no_trunc));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let now = Utc::now();
    let mut rows: Vec<Value> = records
        .iter()
        .map(|record| fields(record, options.no_trunc || options.json, now))
        .collect();
    if options.json || options.format.as_deref() == Some("json") {
        for row in rows.iter_mut().filter_map(Value::as_object_mut) {
            row.remove(crate::format::LABEL);
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(ExitCode::SUCCESS);
    }
    match options.format.as_deref() {
        None | Some("table") => {
            let mut columns = vec![
                ("CONTAINER ID", "ID"),
                ("IMAGE", "Image"),
                ("COMMAND", "Command"),
                ("CREATED", "RunningFor"),
                ("STATUS", "Status"),
                ("PORTS", "Ports"),
                ("NAMES", "Names"),
            ];
            if options.size {
                columns.push(("SIZE", "Size"));
            }
            output::columns(&columns, &rows);
        }
        Some("json") => output::lines(&rows),
        Some(format) => Format::parse(format)?.print(&headings(&rows), &rows)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Containers that are older or younger than others.
struct Bounds {
    before: Option<DateTime<Utc>>,
    since: Option<DateTime<Utc>>,
}

impl Bounds {
    fn read(filters: &Filters, containers: &picovm_engine::containers::Containers) -> anyhow::Result<Self> {
        let created = |key: &str| -> anyhow::Result<Option<DateTime<Utc>>> {
            match filters.values(key).last() {
                Some(name) => Ok(Some(containers.find(name)?.config.created)),
                None => Ok(None),
            }
        };
        for status in filters.values("status") {
            let known = [
                "created",
                "running",
                "paused",
                "restarting",
                "exited",
                "removing",
                "dead",
            ];
            if !known.contains(&status.as_str()) {
                bail!("there is no status {status:?}: there are {}", known.join(", "));
            }
        }
        for code in filters.values("exited") {
            if code.parse::<u8>().is_err() {
                bail!("--filter exited={code}: it is no exit status");
            }
        }
        Ok(Self {
            before: created("before")?,
            since: created("since")?,
        })
    }

    fn take(&self, record: &Record) -> bool {
        self.before.is_none_or(|before| record.config.created < before)
            && self.since.is_none_or(|since| record.config.created > since)
    }
}

/// Whether a container is one of those that are asked for.
fn takes(filters: &Filters, record: &Record, store: &Store) -> anyhow::Result<bool> {
    let (config, state) = (&record.config, &record.state);
    let health = state.health.as_ref().map_or("none", |health| &health.status);
    Ok(filters.any("id", |id| config.id.starts_with(id))
        && filters.any("name", |name| is_named(&record.name, name))
        && filters.labels(&config.labels)
        && filters.any("status", |status| state.status.name() == status)
        && filters.any("exited", |code| {
            state.status == Status::Exited && code.parse() == Ok(state.exit_code)
        })
        && filters.any("health", |wanted| wanted == health)
        && filters.any("ancestor", |image| {
            config.image == image
                || store
                    .image(image)
                    .is_ok_and(|image| image.digest == config.image_digest)
        })
        && filters.any("network", |network| network == "none")
        && filters.any("volume", |_| false))
}

/// Whether a name is meant: a part of it, or with `^` and `$` its beginning and end.
fn is_named(name: &str, wanted: &str) -> bool {
    let (wanted, begins) = match wanted.strip_prefix('^') {
        Some(rest) => (rest, true),
        None => (wanted, false),
    };
    let (wanted, ends) = match wanted.strip_suffix('$') {
        Some(rest) => (rest, true),
        None => (wanted, false),
    };
    let wanted = wanted.trim_start_matches('/');
    match (begins, ends) {
        (true, true) => name == wanted,
        (true, false) => name.starts_with(wanted),
        (false, true) => name.ends_with(wanted),
        (false, false) => name.contains(wanted),
    }
}

fn shown_id(record: &Record, whole: bool) -> &str {
    match whole {
        true => record.id(),
        false => record.config.short_id(),
    }
}

/// The names of the columns, for a table of one's own.
fn headings(rows: &[Value]) -> Value {
    let mut headings = json!({
        "ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "CREATED AT", "RunningFor": "CREATED",
        "State": "STATE", "Status": "STATUS", "Health": "HEALTH", "Ports": "PORTS", "Names": "NAMES", "Labels": "LABELS",
        "LocalVolumes": "LOCAL VOLUMES", "Mounts": "MOUNTS", "Networks": "NETWORKS", "Size": "SIZE", "Platform": "PLATFORM",
    });
    // Of a label, its name is the heading.
    let mut labels = serde_json::Map::new();
    for row in rows {
        if let Some(Value::Object(found)) = row.get(crate::format::LABEL) {
            labels.extend(found.keys().map(|key| (key.clone(), Value::from(key.as_str()))));
        }
    }
    headings[crate::format::LABEL] = labels.into();
    headings
}

/// A container as Docker shows it in a list.
fn fields(record: &Record, whole: bool, now: DateTime<Utc>) -> Value {
    let (config, state) = (&record.config, &record.state);
    let labels: Vec<String> = config
        .labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let mut row = json!({
        "ID": shown_id(record, whole),
        "Image": config.image,
        "Command": command(&config.command_line(), whole),
        "CreatedAt": config.created.format("%Y-%m-%d %H:%M:%S %z UTC").to_string(),
        "RunningFor": output::since(config.created),
        "State": state.status.name(),
        "Status": status(state, now),
        "Health": state.health.as_ref().map_or("", |health| &health.status),
        "Ports": "",
        "Names": record.name,
        "Labels": labels.join(","),
        "LocalVolumes": volumes(&config.mounts).to_string(),
        "Mounts": config.mounts.iter().map(source).collect::<Vec<_>>().join(","),
        "Networks": "none",
        "Platform": "linux/amd64",
        "Size": output::docker_size(record.layer_size()),
    });
    row[crate::format::LABEL] = labels_value(&config.labels);
    row
}

fn labels_value(labels: &BTreeMap<String, String>) -> Value {
    labels
        .iter()
        .map(|(key, value)| (key.clone(), Value::from(value.as_str())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// A command in quotes, shortened.
fn command(line: &str, whole: bool) -> String {
    let mut text: String = line.to_owned();
    if !whole && line.chars().count() > COMMAND_WIDTH {
        text = line.chars().take(COMMAND_WIDTH - 1).collect();
        text.push('…');
    }
    let inside: String = text
        .chars()
        .flat_map(|character| match character {
            '"' => vec!['\\', '"'],
            '\n' => vec!['\\', 'n'],
            '\t' => vec!['\\', 't'],
            control if control.is_control() => control.escape_default().collect(),
            plain => vec![plain],
        })
        .collect();
    format!("\"{inside}\"")
}

/// How many of the mounts are volumes.
fn volumes(mounts: &[MountPoint]) -> usize {
    let is_volume = |mount: &&MountPoint| matches!(mount.kind, MountKind::Volume { .. });
    mounts.iter().filter(is_volume).count()
}

/// What is mounted: a path, or a volume's name.
fn source(mount: &MountPoint) -> String {
    match &mount.kind {
        MountKind::Bind { source } => source.to_string(),
        MountKind::Volume { name, .. } => name.clone(),
    }
}

/// What a container does, as Docker tells it.
pub fn status(state: &State, now: DateTime<Utc>) -> String {
    let since = |time: Option<DateTime<Utc>>| time.map_or(0, |time| (now - time).num_seconds());
    let health = match &state.health {
        Some(health) if health.status == "starting" => " (health: starting)".to_owned(),
        Some(health) if !health.status.is_empty() => format!(" ({})", health.status),
        _ => String::new(),
    };
    match state.status {
        Status::Created => "Created".into(),
        Status::Running => format!("Up {}{health}", output::span(since(state.started))),
        Status::Paused => format!("Up {} (Paused)", output::span(since(state.started))),
        Status::Restarting => format!(
            "Restarting ({}) {} ago",
            state.exit_code,
            output::span(since(state.finished))
        ),
        Status::Exited => format!(
            "Exited ({}) {} ago",
            state.exit_code,
            output::span(since(state.finished))
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use picovm_engine::containers::Health;

    #[test]
    fn what_a_container_does_is_told_as_docker_tells_it() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let before = |seconds| Some(now - chrono::Duration::seconds(seconds));
        let mut state = State::default();
        assert_eq!(status(&state, now), "Created");
        state.status = Status::Running;
        state.started = before(5);
        assert_eq!(status(&state, now), "Up 5 seconds");
        state.health = Some(Health {
            status: "healthy".into(),
            ..Health::default()
        });
        assert_eq!(status(&state, now), "Up 5 seconds (healthy)");
        state.health.as_mut().unwrap().status = "starting".into();
        assert_eq!(status(&state, now), "Up 5 seconds (health: starting)");
        state.status = Status::Paused;
        assert_eq!(status(&state, now), "Up 5 seconds (Paused)");
        state.status = Status::Exited;
        state.exit_code = 3;
        state.finished = before(180);
        assert_eq!(status(&state, now), "Exited (3) 3 minutes ago");
        state.status = Status::Restarting;
        assert_eq!(status(&state, now), "Restarting (3) 3 minutes ago");
    }

    #[test]
    fn commands_are_quoted_and_shortened() {
        assert_eq!(command("sleep 5", false), "\"sleep 5\"");
        assert_eq!(
            command("sh -c 'echo a long command'", false),
            "\"sh -c 'echo a long …\""
        );
        assert_eq!(
            command("sh -c 'echo a long command'", true),
            "\"sh -c 'echo a long command'\""
        );
        assert_eq!(command("a \"b\"\n\x1b", true), "\"a \\\"b\\\"\\n\\u{1b}\"");
    }

    #[test]
    fn names_are_looked_for_as_parts_or_whole() {
        for (wanted, is) in [
            ("eb", true),
            ("^web$", true),
            ("^we", true),
            ("b$", true),
            ("^eb", false),
            ("/web", true),
        ] {
            assert_eq!(is_named("web", wanted), is, "{wanted}");
        }
    }
}
