//! What a jailed process does that makes a template, and what it says of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use picovm_vmm::{
    BootFiles, ForkOptions, FrozenFiles, Machine, MachineConfig, Outcome, Template, WorkingSet,
};
use rustix::net::SendFlags;
use serde::{Deserialize, Serialize};

use super::failed;
use crate::attach::{Interruption, Stdio};
use crate::confinement::ThreadFilters;
use crate::container::{Container, ContainerOptions, Start};
use crate::error::EngineError;
use crate::warm::NOTE_CONTAINER;
use crate::warming::{Until, Warming};

/// How long a guest may take to its freeze point. It takes under a second on a real host.
const BOOT_MAX: Duration = Duration::from_secs(120);
/// How long the container may take that is run to see which pages a start touches.
const TRY_MAX: Duration = Duration::from_secs(20);
/// How long an application that goes on is looked at.
const WARM_TRY: Duration = Duration::from_millis(300);
/// Largest reason that it gives, in bytes: the rest of it is not of interest.
pub(super) const REASON_MAX: usize = 32 << 10;

/// From the jailed process: a packet each.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Said {
    /// The machine has reached its freeze point.
    FreezePoint,
    /// The files are written, or cannot be for this reason.
    Done(Result<(), String>),
}

/// Boots a machine, and saves it at its freeze point.
pub(super) fn boot(
    config: &MachineConfig,
    sources: BootFiles,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    let machine = Machine::boot_from(config, sources, filters.threads())?;
    freeze(machine, files, filters, pagemap, say)
}

/// Lets a clone of a base mount its image and warm up, and saves it.
pub(super) fn take_image(
    base: &Template,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    let machine = base.fork(ForkOptions {
        threads: filters.threads(),
        ..ForkOptions::default()
    })?;
    freeze(machine, files, filters, pagemap, say)
}

/// Starts an application in a clone of an image's template, and saves that when it is warm.
#[expect(clippy::too_many_arguments, reason = "each is what this process was given")]
pub(super) fn warm_up(
    template: &Template,
    start: Start,
    until: &Until,
    timeout: Duration,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    let mut machine = template.fork(ForkOptions {
        threads: filters.threads(),
        ..ForkOptions::default()
    })?;
    machine.prepare_save()?;
    filters.seal()?;
    let env = start.spec.process.env.clone();
    let container = Container::start_parked(template, machine, start, None)?;
    let mut machine = Warming::new(container, until, env)?.freeze(until, timeout)?;
    send(say, &Said::FreezePoint);
    machine.freeze_into(files, pagemap.as_ref())?;
    Ok(())
}

fn freeze(
    mut machine: Machine,
    files: &FrozenFiles,
    filters: &ThreadFilters,
    pagemap: Option<File>,
    say: &OwnedFd,
) -> Result<(), EngineError> {
    machine.prepare_save()?;
    filters.seal()?;
    to_freeze_point(&mut machine)?;
    send(say, &Said::FreezePoint);
    machine.freeze_into(files, pagemap.as_ref())?;
    Ok(())
}

fn to_freeze_point(machine: &mut Machine) -> Result<(), EngineError> {
    let reason = match machine.run(Some(BOOT_MAX))? {
        Some(Outcome::FreezePoint) => return Ok(()),
        Some(outcome) => outcome.to_string(),
        None => format!("it took longer than {} s", BOOT_MAX.as_secs()),
    };
    Err(EngineError::NotFrozen {
        reason,
        tail: machine.console_tail(),
    })
}

/// Runs a container, and writes which pages that touched.
pub(super) fn try_a_start(
    template: &Template,
    file: &File,
    null: &File,
    filters: &ThreadFilters,
    pagemap: Option<File>,
) -> Result<(), EngineError> {
    let set = watch_a_start(template, filters, pagemap.as_ref(), null)?;
    let bytes = postcard::to_stdvec(&set).map_err(io::Error::other);
    bytes
        .and_then(|bytes| file.write_all_at(&bytes, 0))
        .map_err(failed("write which pages a start touches"))
}

/// Runs a container, and looks which pages that touches.
fn watch_a_start(
    template: &Template,
    filters: &ThreadFilters,
    pagemap: Option<&File>,
    null: &File,
) -> Result<WorkingSet, EngineError> {
    let machine = template.fork(ForkOptions {
        threads: filters.threads(),
        ..ForkOptions::default()
    })?;
    machine
        .watch_working_set()
        .map_err(EngineError::host("watch which pages a start touches"))?;
    filters.seal()?;
    let is_warm = template.metadata().notes.contains_key(NOTE_CONTAINER);
    let mut start = ContainerOptions::command(["sh", "-c", "echo"]).request();
    // An application that was started already goes on, and is ended after a while.
    start.spec.process.stdin = is_warm;
    let time = if is_warm { WARM_TRY } else { TRY_MAX };
    let mut container = Container::start_parked(template, machine, start, None)?;
    container.stdin = false;
    let stdio = Stdio {
        stdin: null.as_fd(),
        stdout: null.as_fd(),
        stderr: null.as_fd(),
        wake: None,
        deadline: Instant::now().checked_add(time),
    };
    container.serve_stdio(stdio, &mut |_| Some(Interruption::Kill(9)))?;
    match pagemap {
        Some(pagemap) => container.machine().working_set_by(pagemap),
        None => container.machine().working_set(),
    }
    .map_err(EngineError::host("record which pages a start touches"))
}

pub(super) fn tell(say: &OwnedFd, done: Result<(), EngineError>) {
    let done = done.map_err(|error| {
        let mut reason = error.to_string();
        let end = (0..=REASON_MAX).rev().find(|&end| reason.is_char_boundary(end));
        reason.truncate(end.unwrap_or(0));
        reason
    });
    send(say, &Said::Done(done));
}

/// Who does not listen any more does not need to know.
pub(super) fn send(say: &OwnedFd, said: &Said) {
    if let Ok(bytes) = postcard::to_stdvec(said) {
        let _ = rustix::net::send(say, &bytes, SendFlags::NOSIGNAL);
    }
}
