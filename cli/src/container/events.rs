//! `picovm events`.

use std::process::ExitCode;

use chrono::SecondsFormat;
use picovm_engine::Store;
use picovm_engine::containers::EngineEvent;
use serde_json::{Value, json};

use super::arguments::EventsOptions;
use super::filter::Filters;
use crate::format::Format;

const FILTERS: [&str; 5] = ["container", "image", "label", "event", "type"];

pub fn events(options: &EventsOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    let filters = Filters::parse(&options.filter, &FILTERS)?;
    let format = match options.format.as_deref() {
        None | Some("json") => None,
        Some(format) => Some(Format::parse(format)?),
    };
    let json = options.json || options.format.as_deref() == Some("json");
    let mut failed = None;
    containers.events(options.since, options.until, &mut |event| {
        if !takes(&filters, &event) {
            return true;
        }
        let line = match &format {
            Some(format) => format.render(&fields(&event)),
            None if json => Ok(fields(&event).to_string()),
            None => Ok(line(&event)),
        };
        match line {
            Ok(line) => {
                println!("{line}");
                true
            }
            Err(error) => {
                failed = Some(error);
                false
            }
        }
    })?;
    match failed {
        Some(error) => Err(error),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn takes(filters: &Filters, event: &EngineEvent) -> bool {
    let attribute = |name: &str| event.attributes.get(name).map(String::as_str);
    filters.any("container", |wanted| {
        attribute("name") == Some(wanted) || (!wanted.is_empty() && event.id.starts_with(wanted))
    }) && filters.any("image", |wanted| attribute("image") == Some(wanted))
        && filters.any("type", |wanted| event.kind == wanted)
        && filters.any("event", |wanted| {
            event.action == wanted
                || event
                    .action
                    .split_once(':')
                    .is_some_and(|(action, _)| action == wanted)
        })
        && filters.labels(&event.attributes)
}

/// An event as Docker prints it.
fn line(event: &EngineEvent) -> String {
    let attributes: Vec<String> = event
        .attributes
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let line = format!(
        "{} {} {} {} ({})",
        event.time.to_rfc3339_opts(SecondsFormat::Nanos, true),
        event.kind,
        event.action,
        event.id,
        attributes.join(", ")
    );
    // What was executed in a container is somebody else's text.
    picovm_engine::printable(&line).to_string()
}

/// An event as Docker's API has it.
fn fields(event: &EngineEvent) -> Value {
    let attributes: serde_json::Map<String, Value> = event
        .attributes
        .iter()
        .map(|(name, value)| (name.clone(), value.as_str().into()))
        .collect();
    json!({
        "status": event.action,
        "id": event.id,
        "from": event.attributes.get("image"),
        "Type": event.kind,
        "Action": event.action,
        "Actor": { "ID": event.id, "Attributes": attributes },
        "ID": event.id,
        "scope": "local",
        "time": event.time.timestamp(),
        "timeNano": event.time.timestamp_nanos_opt(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn event() -> EngineEvent {
        EngineEvent {
            time: chrono::DateTime::from_timestamp(1_800_000_000, 5).unwrap(),
            kind: "container".into(),
            action: "health_status: healthy".into(),
            id: "abc".into(),
            attributes: BTreeMap::from([("name".into(), "web".into()), ("image".into(), "debian".into())]),
        }
    }

    #[test]
    fn events_are_told_as_docker_tells_them() {
        assert_eq!(
            line(&event()),
            "2027-01-15T08:00:00.000000005Z container health_status: healthy abc (image=debian, name=web)"
        );
        assert_eq!(fields(&event())["Actor"]["Attributes"]["name"], "web");
    }

    #[test]
    fn events_are_chosen_by_what_they_are_and_of_whom() {
        for (filter, takes_it) in [
            ("container=web", true),
            ("container=ab", true),
            ("container=db", false),
            ("event=health_status", true),
            ("event=die", false),
            ("image=debian", true),
            ("label=name=web", true),
        ] {
            let filters = Filters::parse(&[filter.to_owned()], &FILTERS).unwrap();
            assert_eq!(takes(&filters, &event()), takes_it, "{filter}");
        }
    }
}
