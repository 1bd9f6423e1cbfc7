//! Containers that go on with the application of a warm template.

use anyhow::bail;
use chrono::Utc;
use picovm_engine::containers::{ContainerConfig, Containers, RestartPolicy, WarmStart};
use picovm_engine::{Image, StoredTemplate};

use super::arguments::{
    AbsentOptions, BehaviourOptions, CreateOptions, FileOptions, HealthOptions, MachineOptions,
};
use super::create;
use crate::arguments::WarmOptions;

/// The configuration of a container that is started from this template.
pub fn config(template: &StoredTemplate, options: &CreateOptions) -> anyhow::Result<ContainerConfig> {
    let frozen = template.container()?;
    refuse(options)?;
    let behaviour = &options.behaviour;
    let restart = behaviour.restart.unwrap_or_default();
    if options.rm && restart != RestartPolicy::No {
        bail!("--rm and --restart contradict each other: a container that is removed is not started again");
    }
    let process = &options.process;
    Ok(ContainerConfig {
        id: Containers::new_id()?,
        created: Utc::now(),
        hostname: options.files.hostname.clone(),
        stdin: create::wants_stdin(options),
        hosts: create::hosts(&options.files)?,
        labels: create::labels(&frozen.labels, behaviour)?,
        stop_signal: behaviour.stop_signal.unwrap_or(frozen.stop_signal),
        stop_timeout: behaviour.stop_timeout.unwrap_or(frozen.stop_timeout),
        restart,
        log: create::log_options(behaviour)?,
        auto_remove: options.rm,
        healthcheck: create::healthcheck(frozen.healthcheck.clone(), &options.health)?,
        isolate_memory: options.machine.isolate_memory,
        confinement: create::confinement(&options.machine),
        console_log: match &options.machine.console_log {
            Some(path) => Some(create::absolute(path)?),
            None => None,
        },
        warm: Some(WarmStart {
            template: template.key.clone(),
            name: template.name().unwrap_or(&template.key).to_owned(),
            env: create::texts(create::given_environment(&process.env_file, &process.env)?),
        }),
        ..frozen
    })
}

/// The application of a warm template that is to be made of this image: a container that is never created.
pub fn application(image: &Image, options: &WarmOptions) -> anyhow::Result<ContainerConfig> {
    let create = CreateOptions {
        name: None,
        interactive: false,
        tty: false,
        attach: Vec::new(),
        rm: false,
        help: None,
        process: options.process.clone(),
        limits: options.limits.clone(),
        files: FileOptions {
            hostname: options.hostname.clone(),
            ..FileOptions::default()
        },
        behaviour: BehaviourOptions::default(),
        health: HealthOptions::default(),
        machine: MachineOptions::default(),
        absent: AbsentOptions::default(),
        from_template: None,
        image: options.image.clone(),
        command: options.command.clone(),
    };
    create::config(image, image.config()?, &create)
}

/// What cannot be changed of an application that runs already.
fn refuse(options: &CreateOptions) -> anyhow::Result<()> {
    if !options.image.is_empty() || !options.command.is_empty() {
        bail!(
            "--from-template goes on with the application of the template: give neither an image nor a command. `picovm template \
             warm` starts another one"
        );
    }
    if options.tty {
        bail!(
            "--tty: the application of a warm template was started without a terminal, and cannot be given one"
        );
    }
    let (process, limits, files) = (&options.process, &options.limits, &options.files);
    let running =
        "it was decided when the application was started. Make another template with `picovm template warm`";
    let machine =
        "it is part of the machine that was frozen. Make another template with `picovm template warm`";
    for (given, option, reason) in [
        (process.workdir.is_some(), "--workdir", running),
        (process.user.is_some(), "--user", running),
        (!process.group_add.is_empty(), "--group-add", running),
        (process.entrypoint.is_some(), "--entrypoint", running),
        (!process.ulimit.is_empty(), "--ulimit", running),
        (!process.cap_add.is_empty(), "--cap-add", running),
        (!process.cap_drop.is_empty(), "--cap-drop", running),
        (!process.security_opt.is_empty(), "--security-opt", running),
        (!files.tmpfs.is_empty(), "--tmpfs", running),
        (!files.volume.is_empty(), "--volume", running),
        (!files.mount.is_empty(), "--mount", running),
        (files.read_only, "--read-only", running),
        (files.storage.is_some(), "--storage", running),
        (files.storage_opt.is_some(), "--storage-opt", running),
        (options.absent.shm_size.is_some(), "--shm-size", running),
        (limits.memory.is_some(), "--memory", machine),
        (limits.cpus.is_some(), "--cpus", machine),
        (limits.pids_limit.is_some(), "--pids-limit", machine),
    ] {
        if given {
            bail!("{option} cannot be given with --from-template: {reason}");
        }
    }
    Ok(())
}
