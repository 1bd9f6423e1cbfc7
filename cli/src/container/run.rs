//! `picovm run` and `picovm start`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use picovm_engine::containers::{Attachment, Client, ClientNews, Containers, Ending, Origin, Record, Status};
use picovm_engine::{Store, TemplateProgress, TemplateSpec};
use picovm_vmm::Template;

use super::arguments::{CreateOptions, RunOptions, StartOptions, StreamName};
use super::attach::{self, Ends, Wanted};
use super::{create, values};
use crate::output;

/// Statuses of a container that could not be started.
const NOT_STARTED: std::ops::RangeInclusive<u8> = 125..=127;

/// Environment variable: how long a pool stays unused that picovm has begun by itself; none is begun if it is 0.
const POOL_IDLE_VARIABLE: &str = "PICOVM_POOL_IDLE";
const POOL_IDLE: Duration = Duration::from_secs(300);

/// The containers of a store, whose starts leave a pool behind for those that follow.
pub fn containers(store: &Store) -> anyhow::Result<Containers> {
    let idle = match std::env::var_os(POOL_IDLE_VARIABLE).filter(|text| !text.is_empty()) {
        Some(text) => values::duration(&text.to_string_lossy())
            .map_err(|reason| anyhow!("the environment variable {POOL_IDLE_VARIABLE}: {reason}"))?,
        None => POOL_IDLE,
    };
    Ok(store.containers()?.with_pools(idle))
}

/// What a container is started in: a clone of its image's template, which is built if it is not there, or of the warm one that it was
/// created from.
fn origin(store: &Store, containers: &Containers, record: &Record) -> anyhow::Result<Origin> {
    let Some(warm) = &record.config.warm else {
        return image_origin(containers, record, &create::template_spec(store, record)?);
    };
    let found = store.find_template(&warm.template).with_context(|| {
        format!(
            "cannot start container {}: the warm template {} that it was created from is gone, and the application with it",
            record.name, warm.name
        )
    })?;
    Ok(containers.warm_origin(record, &found)?)
}

fn image_origin(containers: &Containers, record: &Record, spec: &TemplateSpec) -> anyhow::Result<Origin> {
    Ok(containers.origin(record, spec, &mut tell)?)
}

/// The template of a container's image, which is built if it is not there.
pub fn template(store: &Store, record: &Record) -> anyhow::Result<Template> {
    let spec = create::template_spec(store, record)?;
    Ok(store.template_confined(&spec, record.config.confinement, &mut tell)?)
}

fn tell(progress: TemplateProgress) {
    eprintln!("picovm: {progress}");
}

/// `picovm run`.
pub fn run(options: &RunOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = containers(&store)?;
    let wanted = wanted(&options.create, options.detach);
    // What cannot be is said before anything is made; with the status that Docker has for it.
    let ends = match Ends::open(wanted, &options.session.detach_keys) {
        Ok(ends) => ends,
        Err(error) => return Ok(output::ended_with(Err(error), 1)),
    };
    let (record, image) = create::new_container(&store, &containers, &options.create)?;
    let origin = match image {
        Some(image) => {
            let spec = TemplateSpec {
                image,
                memory_mib: record.config.memory_mib,
                vcpus: record.config.vcpus,
            };
            image_origin(&containers, &record, &spec)
        }
        None => origin(&store, &containers, &record),
    };
    let started = origin.and_then(|origin| {
        let attachment = match options.detach {
            true => announced(),
            false => ends.attachment(false),
        };
        started(&containers, &record, origin, &attachment)
    });
    let client = match started {
        Ok(client) => client,
        Err(error) => {
            // It was never started, and who asked for it does not even know its name.
            let _ = containers.remove_with_volumes(&record);
            if let Some(path) = &options.create.behaviour.cidfile {
                let _ = std::fs::remove_file(path);
            }
            return Err(error);
        }
    };
    if options.detach {
        drop(ends);
        return match until_started(&client)? {
            Some(ending) => {
                eprintln!("picovm: {}", ending.error);
                Ok(ExitCode::from(ending.code))
            }
            None => {
                output::say(record.id());
                Ok(ExitCode::SUCCESS)
            }
        };
    }
    let deadline = options
        .timeout
        .and_then(|timeout| Instant::now().checked_add(timeout));
    let end = attach::follow(&client, ends, &attach::following(&options.session, deadline))?;
    drop(client);
    attach::status(&record.name, end)
}

/// Which streams are connected: all that there are, or those that are named.
fn wanted(options: &CreateOptions, detach: bool) -> Wanted {
    if detach {
        return Wanted::default();
    }
    let named = |stream| options.attach.is_empty() || options.attach.contains(&stream);
    Wanted {
        terminal: options.tty,
        stdin: create::wants_stdin(options) && named(StreamName::Stdin),
        stdout: named(StreamName::Stdout),
        stderr: named(StreamName::Stderr) && !options.tty,
    }
}

/// Nothing is connected, and the start is told.
fn announced() -> Attachment<'static> {
    Attachment {
        announce: true,
        ..Attachment::default()
    }
}

fn started(
    containers: &Containers,
    record: &Record,
    origin: Origin,
    attachment: &Attachment<'_>,
) -> anyhow::Result<Client> {
    match containers.start(record, origin, attachment)? {
        Some(client) => Ok(client),
        None => bail!("container {} was started by somebody else meanwhile", record.name),
    }
}

/// Waits until the container's program runs, or has run; how it has ended, if it could not be started.
fn until_started(client: &Client) -> anyhow::Result<Option<Ending>> {
    loop {
        match client.news()? {
            ClientNews::Started => return Ok(None),
            ClientNews::Ended(ending) => {
                let failed = NOT_STARTED.contains(&ending.code) && !ending.error.is_empty();
                return Ok(Some(ending).filter(|_| failed));
            }
            ClientNews::Gone => bail!("the container's monitor was killed, and the container with it"),
            ClientNews::Exited(_) => {}
        }
    }
}

/// Starts a container that does not run, and leaves it alone.
pub fn start_detached(store: &Store, containers: &Containers, record: &Record) -> anyhow::Result<()> {
    let origin = origin(store, containers, record)?;
    let Some(client) = containers.start(record, origin, &announced())? else {
        return Ok(());
    };
    match until_started(&client)? {
        Some(ending) => bail!("cannot start container {}: {}", record.name, ending.error),
        None => Ok(()),
    }
}

/// `picovm start`.
pub fn start(options: &StartOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = containers(&store)?;
    if options.attach || options.interactive {
        let [name] = options.containers.as_slice() else {
            bail!("only one container can be started with -a or -i");
        };
        return start_attached(&store, &containers, &containers.find(name)?, options);
    }
    Ok(super::each(
        &containers,
        &options.containers,
        |record| match record.state.status {
            Status::Paused => bail!(
                "container {name} is paused: `picovm unpause {name}` lets it go on",
                name = record.name
            ),
            Status::Running | Status::Restarting => Ok(()),
            Status::Created | Status::Exited => start_detached(&store, &containers, record),
        },
    ))
}

fn start_attached(
    store: &Store,
    containers: &Containers,
    record: &Record,
    options: &StartOptions,
) -> anyhow::Result<ExitCode> {
    let config = &record.config;
    let wanted = Wanted {
        terminal: config.terminal,
        stdin: options.interactive && config.stdin,
        stdout: true,
        stderr: !config.terminal,
    };
    let ends = Ends::open(wanted, &options.session.detach_keys)?;
    let attachment = ends.attachment(false);
    let client = if record.state.status.is_live() {
        let client = containers.connect(record)?;
        client.attach(&attachment)?;
        client
    } else {
        started(
            containers,
            record,
            origin(store, containers, record)?,
            &attachment,
        )?
    };
    let end = attach::follow(&client, ends, &attach::following(&options.session, None))?;
    drop(client);
    attach::status(&record.name, end)
}
