//! `picovm volume`: what outlives containers.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use picovm_engine::volumes::{Volume, Volumes};
use picovm_engine::{EngineError, Store};
use serde_json::{Value, json};

use crate::container::confirmed;
use crate::format::Format;
use crate::output;

#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Make a volume
    #[command(after_help = "Examples:
  picovm volume create data
  picovm run --rm -v data:/data debian touch /data/file")]
    Create(CreateOptions),
    /// List volumes
    #[command(
        visible_alias = "list",
        after_help = "Examples:
  picovm volume ls
  picovm volume ls -q --filter dangling=true"
    )]
    Ls(ListOptions),
    /// Show volumes as JSON
    #[command(after_help = "Examples:
  picovm volume inspect data
  picovm volume inspect --format '{{.Mountpoint}}' data")]
    Inspect(InspectOptions),
    /// Remove volumes that no container uses, and what is in them
    #[command(
        visible_alias = "remove",
        after_help = "Examples:
  picovm volume rm data"
    )]
    Rm(RemoveOptions),
    /// Remove all volumes without a name that no container uses
    #[command(after_help = "Examples:
  picovm volume prune -f
  picovm volume prune -a -f")]
    Prune(PruneOptions),
}

#[derive(Args)]
pub struct CreateOptions {
    /// Its name; a random one if there is none
    pub name: Option<String>,
    /// Set a label
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// Accepted if it is `local`, which is what there is
    #[arg(short, long, value_name = "DRIVER", default_value = "local")]
    pub driver: String,
}

#[derive(Args)]
pub struct ListOptions {
    /// Print names only
    #[arg(short, long)]
    pub quiet: bool,
    /// Only those for which this holds: dangling=BOOL, name=TEXT, label=KEY[=VALUE]
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// `json`, or a template such as '{{.Name}}'
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
}

#[derive(Args)]
pub struct InspectOptions {
    /// Their names
    #[arg(required = true)]
    pub names: Vec<String>,
    /// A template such as '{{.Mountpoint}}'
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
}

#[derive(Args)]
pub struct RemoveOptions {
    /// Their names
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Do not mind those that are not there
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Args)]
pub struct PruneOptions {
    /// Those with a name too
    #[arg(short, long)]
    pub all: bool,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
}

pub fn volume(command: &VolumeCommand) -> anyhow::Result<ExitCode> {
    let volumes = Store::open_default()?.volumes()?;
    match command {
        VolumeCommand::Create(options) => create(&volumes, options),
        VolumeCommand::Ls(options) => list(&volumes, options),
        VolumeCommand::Inspect(options) => inspect(&volumes, options),
        VolumeCommand::Rm(options) => remove(&volumes, options),
        VolumeCommand::Prune(options) => prune(&volumes, options),
    }
}

fn create(volumes: &Volumes, options: &CreateOptions) -> anyhow::Result<ExitCode> {
    if options.driver != "local" {
        anyhow::bail!(
            "there is no volume driver {:?}: volumes here are `local`",
            options.driver
        );
    }
    let labels: BTreeMap<String, String> = options
        .label
        .iter()
        .map(|label| {
            let (key, value) = label.split_once('=').unwrap_or((label, ""));
            (key.to_owned(), value.to_owned())
        })
        .collect();
    println!("{}", volumes.create(options.name.as_deref(), labels)?.name);
    Ok(ExitCode::SUCCESS)
}

fn description(volumes: &Volumes, volume: &Volume) -> Value {
    json!({
        "CreatedAt": volume.created.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
        "Driver": "local",
        "Labels": volume.labels,
        "Mountpoint": volumes.data(&volume.name).display().to_string(),
        "Name": volume.name,
        "Options": null,
        "Scope": "local",
    })
}

fn list(volumes: &Volumes, options: &ListOptions) -> anyhow::Result<ExitCode> {
    let used = volumes.used()?;
    let mut rows = Vec::new();
    for volume in volumes.list()? {
        let mut wanted = true;
        for filter in &options.filter {
            wanted &= match filter.split_once('=') {
                Some(("dangling", value)) => {
                    let dangling = !used.contains_key(&volume.name);
                    dangling == matches!(value, "true" | "1")
                }
                Some(("name", text)) => volume.name.contains(text),
                Some(("label", label)) => {
                    let (key, value) = label
                        .split_once('=')
                        .map_or((label, None), |(key, value)| (key, Some(value)));
                    volume
                        .labels
                        .get(key)
                        .is_some_and(|found| value.is_none_or(|value| value == found))
                }
                _ => anyhow::bail!(
                    "there is no filter {filter:?}: there are dangling=BOOL, name=TEXT and label=KEY[=VALUE]"
                ),
            };
        }
        if wanted {
            rows.push(volume);
        }
    }
    match options.format.as_deref() {
        _ if options.quiet => rows.iter().for_each(|volume| println!("{}", volume.name)),
        None => {
            println!("{:<10}VOLUME NAME", "DRIVER");
            rows.iter()
                .for_each(|volume| println!("{:<10}{}", "local", volume.name));
        }
        Some("json") => rows
            .iter()
            .for_each(|volume| println!("{}", description(volumes, volume))),
        Some(format) => {
            let rows: Vec<Value> = rows.iter().map(|volume| description(volumes, volume)).collect();
            let heads = json!({ "Name": "VOLUME NAME", "Driver": "DRIVER", "Mountpoint": "MOUNTPOINT", "Labels": "LABELS", "Scope": "SCOPE" });
            Format::parse(format)?.print(&heads, &rows)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn inspect(volumes: &Volumes, options: &InspectOptions) -> anyhow::Result<ExitCode> {
    let mut found = Vec::new();
    let code = each(&options.names, |name| {
        found.push(description(volumes, &volumes.find(name)?));
        Ok(())
    });
    match options.format.as_deref() {
        None => println!("{}", serde_json::to_string_pretty(&found)?),
        Some("json") => println!("{}", Value::from(found)),
        Some(format) => Format::parse(format)?.print(&Value::Null, &found)?,
    }
    Ok(code)
}

fn remove(volumes: &Volumes, options: &RemoveOptions) -> anyhow::Result<ExitCode> {
    Ok(each(&options.names, |name| {
        match volumes.remove(name) {
            Err(EngineError::NoVolume { .. }) if options.force => {}
            removed => removed?,
        }
        println!("{name}");
        Ok(())
    }))
}

/// Does something with each, and tells what goes wrong with one.
fn each(names: &[String], mut act: impl FnMut(&str) -> Result<(), EngineError>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        if let Err(error) = act(name) {
            eprintln!("picovm: {}", output::sentence(&error.into()));
            code = ExitCode::FAILURE;
        }
    }
    code
}

fn prune(volumes: &Volumes, options: &PruneOptions) -> anyhow::Result<ExitCode> {
    let which = match options.all {
        true => "This removes all volumes that no container uses.",
        false => "This removes all volumes without a name that no container uses.",
    };
    if !confirmed(options.force, which)? {
        return Ok(ExitCode::SUCCESS);
    }
    let used = volumes.used()?;
    let (mut removed, mut bytes) = (Vec::new(), 0u64);
    for volume in volumes.list()? {
        if used.contains_key(&volume.name) || !options.all && !volume.anonymous {
            continue;
        }
        let size = volumes.size(&volume.name);
        match volumes.remove(&volume.name) {
            Ok(()) => {
                bytes = bytes.saturating_add(size);
                removed.push(volume.name);
            }
            // Used or removed meanwhile.
            Err(EngineError::VolumeInUse { .. } | EngineError::NoVolume { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !removed.is_empty() {
        println!("Deleted Volumes:");
        for name in &removed {
            println!("{name}");
        }
        println!();
    }
    println!("Total reclaimed space: {}", output::docker_size(bytes));
    Ok(ExitCode::SUCCESS)
}
