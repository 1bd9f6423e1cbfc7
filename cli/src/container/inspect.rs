//! `picovm inspect`: containers as Docker describes them, and images.

use std::process::ExitCode;

use chrono::{DateTime, SecondsFormat, Utc};
use picovm_engine::containers::{
    ContainerConfig, Containers, MountKind, MountPoint, Record, RestartPolicy, Status, Text,
};
use picovm_engine::{EngineError, Limits, Store};
use serde_json::{Map, Value, json};

use super::arguments::{InspectOptions, ObjectType};
use super::values;
use crate::format::Format;
use crate::{image_list, output};

pub fn inspect(options: &InspectOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = store.containers()?;
    let mut found = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for name in &options.names {
        match one(&store, &containers, name, options) {
            Ok(value) => found.push(value),
            Err(error) => {
                eprintln!("picovm: {}", output::sentence(&error));
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

/// A container of this name, or else an image.
fn one(
    store: &Store,
    containers: &Containers,
    name: &str,
    options: &InspectOptions,
) -> anyhow::Result<Value> {
    let container = || -> Result<Value, EngineError> {
        let record = containers.find(name)?;
        let mut value = description(&record);
        if options.size {
            value["SizeRw"] = record.layer_size().into();
        }
        Ok(value)
    };
    match options.r#type {
        Some(ObjectType::Container) => Ok(container()?),
        Some(ObjectType::Image) => image_list::describe(store, name),
        None => match container() {
            Err(EngineError::NoContainer { .. }) => match image_list::describe(store, name) {
                Err(error) if matches!(error.downcast_ref(), Some(EngineError::NoImage { .. })) => {
                    anyhow::bail!("there is no container and no image named {name}")
                }
                image => image,
            },
            found => Ok(found?),
        },
    }
}

/// When nothing has happened yet, as Go writes it.
const NEVER: &str = "0001-01-01T00:00:00Z";

fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

fn text(texts: &[Text]) -> Vec<String> {
    texts.iter().map(Text::to_string).collect()
}

/// A list, or null where Docker has that for none.
fn or_null(list: Vec<String>) -> Value {
    match list.is_empty() {
        true => Value::Null,
        false => list.into(),
    }
}

/// A container as `docker inspect` describes it.
pub fn description(record: &Record) -> Value {
    let config = &record.config;
    let (path, args) = match config.args.split_first() {
        Some((path, args)) => (path.to_string(), text(args)),
        None => (String::new(), Vec::new()),
    };
    json!({
        "Id": config.id,
        "Created": time(config.created),
        "Path": path,
        "Args": args,
        "State": state(record),
        "Image": config.image_id,
        "HostnamePath": "",
        "HostsPath": "",
        "LogPath": if config.log.keep { record.log().display().to_string() } else { String::new() },
        "Name": format!("/{}", record.name),
        "RestartCount": record.state.restarts,
        "Driver": "erofs",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": null,
        "HostConfig": host_config(config),
        "Mounts": mounts(config),
        "Config": run_config(config),
        "NetworkSettings": { "Ports": {}, "IPAddress": "", "MacAddress": "", "Networks": {} },
    })
}

fn state(record: &Record) -> Value {
    let state = &record.state;
    let mut value = json!({
        "Status": state.status.name(),
        "Running": state.status.is_live(),
        "Paused": state.status == Status::Paused,
        "Restarting": state.status == Status::Restarting,
        "OOMKilled": state.oom_killed,
        "Dead": false,
        "Pid": state.pid,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": state.started.map_or_else(|| NEVER.into(), time),
        "FinishedAt": state.finished.map_or_else(|| NEVER.into(), time),
    });
    if let Some(health) = &state.health {
        value["Health"] = json!({
            "Status": health.status,
            "FailingStreak": health.failing_streak,
            "Log": health.log.iter().map(|result| json!({
                "Start": time(result.start),
                "End": time(result.end),
                "ExitCode": result.exit_code,
                "Output": result.output,
            })).collect::<Vec<_>>(),
        });
    }
    value
}

fn host_config(config: &ContainerConfig) -> Value {
    /// Nanoseconds of a second of a processor.
    const SECOND: u64 = 1_000_000_000;
    let (policy, retries) = match config.restart {
        RestartPolicy::No => ("no", 0),
        RestartPolicy::OnFailure(most) => ("on-failure", most),
        RestartPolicy::Always => ("always", 0),
        RestartPolicy::UnlessStopped => ("unless-stopped", 0),
    };
    let mut log = Map::new();
    if let Some(size) = config.log.max_size {
        log.insert("max-size".into(), size.to_string().into());
        log.insert("max-file".into(), config.log.max_files.to_string().into());
    }
    let tmpfs: Map<String, Value> = config
        .tmpfs
        .iter()
        .map(|(place, options)| (place.to_string(), options.to_string().into()))
        .collect();
    json!({
        "Binds": or_null(config.mounts.iter().map(bind).collect()),
        "LogConfig": { "Type": if config.log.keep { "json-file" } else { "none" }, "Config": log },
        "NetworkMode": "none",
        "PortBindings": {},
        "RestartPolicy": { "Name": policy, "MaximumRetryCount": retries },
        "AutoRemove": config.auto_remove,
        "CapAdd": null,
        "CapDrop": or_null(values::capability_names(config.drop_capabilities)),
        "ExtraHosts": or_null(config.hosts.iter().map(|(address, name)| format!("{name}:{address}")).collect()),
        "GroupAdd": or_null(text(&config.groups)),
        "Init": true,
        "Isolation": "",
        "Memory": config.memory_limit.unwrap_or(0),
        "MemorySwap": config.memory_limit.unwrap_or(0),
        "NanoCpus": match config.cpu_limit {
            Some(limit) => limit.saturating_mul(SECOND / Limits::CPU_PERIOD),
            None => u64::from(config.vcpus) * SECOND,
        },
        "PidsLimit": config.pids_limit,
        "Privileged": false,
        "PublishAllPorts": false,
        "ReadonlyRootfs": config.read_only,
        "SecurityOpt": if config.no_new_privileges { json!(["no-new-privileges"]) } else { Value::Null },
        "StorageOpt": config.storage.map_or(Value::Null, |bytes| json!({ "size": bytes.to_string() })),
        "Tmpfs": tmpfs,
        "Ulimits": config.rlimits.iter().map(|(number, soft, hard)| json!({
            "Name": values::resource_name(*number),
            "Soft": limit(*soft),
            "Hard": limit(*hard),
        })).collect::<Vec<_>>(),
        "Runtime": "picovm",
        "Machine": {
            "MemoryMiB": config.memory_mib,
            "Vcpus": config.vcpus,
            "IsolateMemory": config.isolate_memory,
            "Confinement": config.confinement,
            "ConsoleLog": config.console_log,
        },
    })
}

/// What is mounted, as Docker describes it.
fn mounts(config: &ContainerConfig) -> Vec<Value> {
    let shared = config.mounts.iter().map(|mount| {
        let mut value = json!({
            "Destination": mount.target.to_string(), "Mode": "", "RW": !mount.read_only, "Propagation": "",
        });
        match &mount.kind {
            MountKind::Bind { source } => {
                value["Type"] = "bind".into();
                value["Source"] = source.to_string().into();
            }
            MountKind::Volume { name, .. } => {
                value["Type"] = "volume".into();
                value["Name"] = name.as_str().into();
                value["Driver"] = "local".into();
                let data = Store::open_default().and_then(|store| store.volumes());
                value["Source"] = data.map_or_else(
                    |_| "".into(),
                    |volumes| volumes.data(name).display().to_string().into(),
                );
            }
        }
        value
    });
    let memory = config.tmpfs.iter().map(|(place, _)| {
        json!({
            "Type": "tmpfs", "Source": "", "Destination": place.to_string(), "Mode": "", "RW": true, "Propagation": "",
        })
    });
    shared.chain(memory).collect()
}

/// A mount as `-v` has it.
fn bind(mount: &MountPoint) -> String {
    let source = match &mount.kind {
        MountKind::Bind { source } => source.to_string(),
        MountKind::Volume { name, .. } => name.clone(),
    };
    let mode = if mount.read_only { "ro" } else { "rw" };
    format!("{source}:{}:{mode}", mount.target)
}

/// A resource limit; none is -1, as in Docker.
fn limit(limit: u64) -> i64 {
    i64::try_from(limit).unwrap_or(-1)
}

fn run_config(config: &ContainerConfig) -> Value {
    let words = text(&config.args);
    let (entrypoint, cmd) = words.split_at(config.entrypoint.min(words.len()));
    let mut value = json!({
        "Hostname": config.hostname(),
        "Domainname": "",
        "User": config.user.to_string(),
        "AttachStdin": config.stdin,
        "AttachStdout": true,
        "AttachStderr": true,
        "Tty": config.terminal,
        "OpenStdin": config.stdin,
        "StdinOnce": config.stdin,
        "Env": text(&config.env),
        "Cmd": or_null(cmd.to_vec()),
        "Image": config.image,
        "Volumes": null,
        "WorkingDir": config.workdir.to_string(),
        "Entrypoint": or_null(entrypoint.to_vec()),
        "Labels": config.labels,
        "StopSignal": values::signal_name(config.stop_signal),
        "StopTimeout": config.stop_timeout,
    });
    if let Some(check) = &config.healthcheck {
        value["Healthcheck"] = serde_json::to_value(check).unwrap_or_default();
    }
    value
}
