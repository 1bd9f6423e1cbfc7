//! What can go wrong between a request and its container. The message says what was tried, on what, what happened,
//! and what to do.

use std::io;
use std::path::{Path, PathBuf};

use picovm_guest_protocol::{ContainerExit, FrameError};
use picovm_jailer::JailError;
use picovm_rootfs::image::ImageError;
use picovm_vmm::{MachineError, TemplateError};

use crate::images::ImagesError;
use crate::printable::{printable, printable_lines, printable_text};

/// Why the engine could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file of the store.
    #[error("cannot {attempted} {}: {source}", path.display())]
    Store {
        /// `read`, `create`, ...
        attempted: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// A record of the store is not what was written.
    #[error("the store's record {} cannot be read: {reason}. Remove it, and pull, load or build the image again", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No such image.
    #[error(
        "there is no image named {name}. `picovm images` lists those that there are; `picovm pull` and \
         `picovm load` bring one, `picovm image build` makes one of a directory or tar archive"
    )]
    NoImage {
        /// The name.
        name: String,
    },
    /// The image's file is gone.
    #[error("the file of image {name} is missing ({}): remove the image with `picovm rmi` and pull, load or build it again", path.display())]
    ImageFile {
        /// The name.
        name: String,
        /// Where it should be.
        path: PathBuf,
    },
    /// Something about images in particular.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// No such template.
    #[error("there is no template {id}. `picovm template ls` lists those that there are")]
    NoTemplate {
        /// What was given.
        id: String,
    },
    /// More than one template.
    #[error("{id} begins the id of more than one template: give more of it")]
    AmbiguousTemplate {
        /// What was given.
        id: String,
    },
    /// Kernel or initramfs are not where they should be.
    #[error("{what} is not there: looked for {}. `make build` puts it beside the picovm binary; PICOVM_GUEST names another directory", looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))]
    NoGuest {
        /// `the pico kernel (vmlinux)` or the initramfs.
        what: &'static str,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// Building an image.
    #[error("cannot build the image {name}: {source}")]
    Image {
        /// Its name.
        name: String,
        /// Why.
        source: ImageError,
    },
    /// The parent did not reach its freeze point.
    #[error(
        "cannot build the template: the guest did not reach its freeze point: {reason}{}",
        console(tail)
    )]
    NotFrozen {
        /// What it did instead.
        reason: String,
        /// Its last console output.
        tail: String,
    },
    /// An application did not get warm.
    #[error("the application did not get warm: {reason}{}", output(tail))]
    NotWarm {
        /// Why.
        reason: String,
        /// What it wrote last.
        tail: String,
    },
    /// Making a machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The clone ended, its container did not.
    #[error("the clone ended before its container: {reason}{}", console(tail))]
    CloneEnded {
        /// What it did.
        reason: String,
        /// Its last console output.
        tail: String,
    },
    /// A record of a container is not what was written.
    #[error("the container's record {} cannot be read: {reason}. Remove its directory", path.display())]
    ContainerRecord {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Not a name for a container.
    #[error(
        "{name:?} is not a name for a container: names are 2 to 128 of a-z, A-Z, 0-9, `_`, `.`, `-`, and begin with a letter or \
         digit"
    )]
    ContainerName {
        /// What was given.
        name: String,
    },
    /// A volume cannot be called so.
    #[error(
        "{name:?} is no name of a volume: two or more of letters, digits, _, . and -, and a letter or digit first. A directory of \
             this machine is named by its absolute path"
    )]
    VolumeName {
        /// What was given.
        name: String,
    },
    /// No such volume.
    #[error("there is no volume {name}. `picovm volume ls` lists those that there are")]
    NoVolume {
        /// What was given.
        name: String,
    },
    /// A container uses it.
    #[error("volume {name} is in use by {containers}: remove what uses it first")]
    VolumeInUse {
        /// Its name.
        name: String,
        /// Names of the containers.
        containers: String,
    },
    /// No such container.
    #[error("there is no container {name}. `picovm ps -a` lists those that there are")]
    NoContainer {
        /// What was given.
        name: String,
    },
    /// More than one container.
    #[error("{name} begins the id of more than one container: give more of it")]
    AmbiguousContainer {
        /// What was given.
        name: String,
    },
    /// Another container has the name.
    #[error("the name {name} is that of container {id}: remove or rename that one, or take another name")]
    NameTaken {
        /// The name.
        name: String,
        /// The other container's id.
        id: String,
    },
    /// It takes a container that runs.
    #[error("container {name} is not running: `picovm start {name}` starts it")]
    NotRunning {
        /// The container.
        name: String,
    },
    /// It takes one that does not.
    #[error("container {name} is running: stop it first, or {instead}")]
    StillRunning {
        /// The container.
        name: String,
        /// What else helps.
        instead: &'static str,
    },
    /// A container's monitor does not do what it was asked for.
    #[error("{0}")]
    Refused(String),
    /// The agent could not do what it was asked for.
    #[error("cannot {attempted} of container {name}: {reason}")]
    Agent {
        /// What was asked for.
        attempted: &'static str,
        /// The container.
        name: String,
        /// What the agent said.
        reason: String,
    },
    /// A size that no pool can have.
    #[error("a pool of {0} clones cannot be made: 1 to {max} are possible", max = crate::pool::POOL_MAX)]
    PoolSize(usize),
    /// No such pool.
    #[error("there is no pool {id}. `picovm pool ls` lists those that there are")]
    NoPool {
        /// What was given: an id or an image's name.
        id: String,
    },
    /// There is no program for VMM processes.
    #[error(
        "there is no picovm-vmm, which makes templates and runs the clones of a pool (looked at {}): `make build` puts it beside picovm, \
         or PICOVM_VMM names it",
        looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NoVmm {
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// A VMM process failed, for the reason that it told.
    #[error("{}", printable_text(.0))]
    Vmm(String),
    /// A process with more than one thread cannot be forked into a VMM process.
    #[error(
        "a VMM process cannot be forked by a process with {threads} threads: start the container from a pool, \
         which has a process for that"
    )]
    Threads {
        /// How many it has.
        threads: usize,
    },
    /// One of the clones whose density is measured failed.
    #[error("cannot {attempted} clone {number} of {clones}: {reason}")]
    Numbered {
        /// `park`, `start a container in`, ...
        attempted: &'static str,
        /// Which one, from 1 on.
        number: usize,
        /// How many there were to be.
        clones: usize,
        /// What happened.
        reason: Box<EngineError>,
    },
    /// A container did something else than it was started for.
    #[error("its container wrote {output:?} and {}", how(exit))]
    Unexpected {
        /// What it wrote.
        output: String,
        /// How it ended.
        exit: ContainerExit,
    },
    /// This process may not have as many files open as it needs.
    #[error(
        "this needs {needed} open files, and the limit is {limit}: start it with a higher one (`ulimit -Hn`), \
         or with fewer clones"
    )]
    OpenFiles {
        /// How many it needs.
        needed: u64,
        /// To how many the limit can be raised.
        limit: u64,
    },
    /// A pool's clones share the memory of their template.
    #[error(
        "a parked clone shares memory with others of its template: start a container with isolated memory cold"
    )]
    NotIsolated,
    /// A VMM process cannot be confined.
    #[error("the VMM process cannot be confined: {0}")]
    Jail(#[from] JailError),
    /// What the agent sends makes no sense.
    #[error("the clone's agent broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// The agent sends more than it has credit for.
    #[error("the clone's agent sent more than it may")]
    Credit,
    /// Something of the host failed.
    #[error("cannot {attempted}: {source}")]
    Host {
        /// What was attempted.
        attempted: &'static str,
        /// What happened.
        source: io::Error,
    },
}

fn how(exit: &ContainerExit) -> String {
    match exit {
        ContainerExit::Code(code) => format!("ended with status {code}"),
        ContainerExit::Signal(signal) => format!("was ended by signal {signal}"),
        ContainerExit::NotStarted(failure) => {
            format!(
                "could not be started: cannot {}: {}",
                printable(&failure.attempted),
                printable(&failure.message)
            )
        }
    }
}

fn output(tail: &str) -> String {
    if tail.trim_end().is_empty() {
        ". It has written nothing".into()
    } else {
        format!("\nits last output:\n{}", printable_lines(tail))
    }
}

fn console(tail: &str) -> String {
    if tail.trim_end().is_empty() {
        String::new()
    } else {
        format!("\nits last console output:\n{}", printable_lines(tail))
    }
}

impl EngineError {
    pub(crate) fn store<'a>(
        attempted: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Store {
            attempted,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn host(attempted: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { attempted, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use picovm_guest_protocol::StartFailure;

    #[test]
    fn nothing_that_a_guest_says_is_a_command_to_a_terminal() {
        let hostile = "\x1b[2Jgone\r\u{9b}1m\x07".to_owned();
        let failure = StartFailure {
            attempted: hostile.clone(),
            errno: 2,
            message: hostile.clone(),
        };
        let errors = [
            EngineError::CloneEnded {
                reason: "it reset itself".into(),
                tail: hostile.clone(),
            },
            EngineError::NotFrozen {
                reason: "it reset itself".into(),
                tail: hostile.clone(),
            },
            EngineError::Unexpected {
                output: hostile.clone(),
                exit: ContainerExit::NotStarted(failure),
            },
            EngineError::Vmm(hostile),
        ];
        for error in errors {
            let text = error.to_string();
            assert!(text.contains("\\u{1b}[2Jgone\\r\\u{9b}1m\\u{7}"), "{text:?}");
            assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
        }
    }
}
