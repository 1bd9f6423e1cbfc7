//! `picovm stop`, `kill`, `restart`, `pause`, `unpause`, `wait`, `rm`, `rename` and `container prune`.

use std::process::ExitCode;

use anyhow::bail;
use picovm_engine::containers::{Containers, Record, Status};
use picovm_engine::{EngineError, Store};

use super::arguments::{KillOptions, Names, PruneOptions, RemoveOptions, RenameOptions, StopOptions};
use super::filter::Filters;
use super::{create, each, run, values};
use crate::output;

const SIGKILL: u8 = 9;

/// Does it, unless the container has ended meanwhile.
fn unless_ended<T>(result: Result<T, EngineError>) -> Result<Option<T>, EngineError> {
    match result {
        Ok(done) => Ok(Some(done)),
        Err(EngineError::NotRunning { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Ends a container that runs, and waits until nothing of it does.
fn stop_one(containers: &Containers, record: &Record, options: &StopOptions) -> anyhow::Result<()> {
    if !record.state.status.is_live() {
        return Ok(());
    }
    // Docker: what is below zero waits without end.
    let timeout = options
        .timeout
        .map(|seconds| u32::try_from(seconds).unwrap_or(u32::MAX));
    if let Some(client) = unless_ended(containers.connect(record))? {
        unless_ended(client.stop(options.signal, timeout))?;
    }
    Ok(containers.wait_until_gone(record)?)
}

/// Kills a container that runs, and waits until nothing of it does.
fn kill_one(containers: &Containers, record: &Record) -> anyhow::Result<()> {
    if let Some(client) = unless_ended(containers.connect(record))? {
        unless_ended(client.stop(Some(SIGKILL), Some(0)))?;
    }
    Ok(containers.wait_until_gone(record)?)
}

pub fn stop(options: &StopOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    Ok(each(&containers, &options.containers, |record| {
        stop_one(&containers, record, options)
    }))
}

pub fn restart(options: &StopOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = run::containers(&store)?;
    Ok(each(&containers, &options.containers, |record| {
        stop_one(&containers, record, options)?;
        run::start_detached(&store, &containers, &containers.reread(record)?)?;
        containers.tell(record, "restart", &[]);
        Ok(())
    }))
}

pub fn kill(options: &KillOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    Ok(each(&containers, &options.containers, |record| {
        if options.signal == SIGKILL {
            let client = containers.connect(record)?;
            client.signal(SIGKILL)?;
            unless_ended(client.wait())?;
            return Ok(containers.wait_until_gone(record)?);
        }
        Ok(containers.connect(record)?.kill(options.signal)?)
    }))
}

pub fn pause(names: &Names) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    Ok(each(&containers, &names.containers, |record| {
        Ok(containers.connect(record)?.pause()?)
    }))
}

pub fn unpause(names: &Names) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    Ok(each(&containers, &names.containers, |record| {
        Ok(containers.connect(record)?.unpause()?)
    }))
}

pub fn wait(names: &Names) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    let mut code = ExitCode::SUCCESS;
    for name in &names.containers {
        match wait_one(&containers, name) {
            Ok(status) => println!("{status}"),
            Err(error) => {
                eprintln!("picovm: {}", output::sentence(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

fn wait_one(containers: &Containers, name: &str) -> anyhow::Result<u8> {
    let record = containers.find(name)?;
    if record.state.status.is_live()
        && let Some(client) = unless_ended(containers.connect(&record))?
        && let Some(ending) = unless_ended(client.wait())?
    {
        return Ok(ending.code);
    }
    Ok(containers.reread(&record)?.state.exit_code)
}

pub fn remove(options: &RemoveOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    containers.sweep();
    let mut code = ExitCode::SUCCESS;
    for name in &options.containers {
        match remove_one(&containers, name, options.force, options.volumes) {
            Ok(()) => println!("{name}"),
            Err(error) => {
                // Docker tells of one that is not there, and does not mind it.
                let forgiven =
                    options.force && matches!(error.downcast_ref(), Some(EngineError::NoContainer { .. }));
                eprintln!("picovm: {}", output::sentence(&error));
                if !forgiven {
                    code = ExitCode::FAILURE;
                }
            }
        }
    }
    Ok(code)
}

fn remove_one(containers: &Containers, name: &str, force: bool, volumes: bool) -> anyhow::Result<()> {
    let record = containers.find(name)?;
    if force && record.state.status.is_live() {
        kill_one(containers, &record)?;
    }
    let remove = || match volumes {
        true => containers.remove_with_volumes(&record),
        false => containers.remove(&record),
    };
    match remove() {
        // It was to be removed when it has ended.
        Err(EngineError::NoContainer { .. }) if force => Ok(()),
        // Its monitor is just ending.
        Err(EngineError::StillRunning { .. }) if force || !record.state.status.is_live() => {
            containers.wait_until_gone(&record)?;
            match remove() {
                Err(EngineError::NoContainer { .. }) => Ok(()),
                removed => Ok(removed?),
            }
        }
        removed => Ok(removed?),
    }
}

pub fn rename(options: &RenameOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    let mut record = containers.find(&options.container)?;
    containers.rename(&mut record, &options.name)?;
    Ok(ExitCode::SUCCESS)
}

pub fn prune(options: &PruneOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    let filters = Filters::parse(&options.filter, &["until", "label"])?;
    let mut before = None;
    for until in filters.values("until") {
        match values::moment(until) {
            Ok(time) => before = Some(time),
            Err(reason) => bail!("--filter until={until}: {reason}"),
        }
    }
    if !create::confirmed(options.force, "This removes all containers that do not run.")? {
        return Ok(ExitCode::SUCCESS);
    }
    containers.sweep();
    let (mut removed, mut bytes) = (Vec::new(), 0u64);
    for record in containers.list()? {
        let ended = matches!(record.state.status, Status::Created | Status::Exited);
        if !ended
            || before.is_some_and(|before| record.config.created > before)
            || !filters.labels(&record.config.labels)
        {
            continue;
        }
        let size = record.layer_size();
        match containers.remove(&record) {
            Ok(()) => {
                bytes = bytes.saturating_add(size);
                removed.push(record.config.id);
            }
            // Started or removed meanwhile.
            Err(EngineError::StillRunning { .. } | EngineError::NoContainer { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !removed.is_empty() {
        println!("Deleted Containers:");
        for id in &removed {
            println!("{id}");
        }
        println!();
    }
    println!("Total reclaimed space: {}", output::docker_size(bytes));
    Ok(ExitCode::SUCCESS)
}
