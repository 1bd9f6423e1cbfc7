//! The VMM process of one container, and the fork server of which it is a child.
//!
//! The server opens a template once and then only forks: a VMM process is a `fork(2)` of a process that has everything
//! open, and no `execve(2)`. Each parks a clone, tells so, and waits. It ends with its container, or when nobody is left
//! who could start it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use picovm_guest_protocol::frame::MAIN;
use picovm_vmm::{ForkOptions, Template};

use crate::attach::Wake;
use crate::children::{self, Children};
use crate::confinement::{Confinement, Forker, ThreadFilters};
use crate::container::{Container, ContainerOptions, Start};
use crate::error::EngineError;
use crate::messages::{self, FromVmm, Parking, ToServer, ToVmm};
use crate::scheduling::{self, Batch};
use crate::serve::{Command, Director, News, Service};
use crate::streams::{Channel, Descriptor};

/// Serves a pool of one template: forks a VMM process whenever the pool asks for one, until the pool closes `control`; then it
/// waits for the last of them.
///
/// To be called by a process that has one thread and nothing else to do: `picovm-vmm`.
///
/// # Errors
/// [`EngineError::Template`] if the template cannot be opened; [`EngineError::Jail`]; [`EngineError::Host`].
pub fn serve(template: &Path, control: OwnedFd, confinement: Confinement) -> Result<(), EngineError> {
    let failed = EngineError::host;
    // Out of the terminal's process group: Ctrl-C is for who uses the pool.
    let _ = rustix::process::setsid();
    let control = UnixStream::from(control);
    children::raise_open_files();
    let prepared = Template::open(template)
        .map_err(EngineError::from)
        .and_then(|template| {
            let mut forker = Forker::new(&template, None, confinement)?;
            forker.become_server()?;
            Ok((template, forker))
        });
    let (template, mut forker) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            let _ = messages::send(&control, &FromVmm::Failed(error.to_string()), &[]);
            return Err(error);
        }
    };
    let mut control = Some(control);
    let mut children = Children::default();
    loop {
        let asked = children
            .wait(control.as_ref())
            .map_err(failed("wait for the pool"))?;
        if !asked {
            if control.is_none() && children.is_empty() {
                return Ok(());
            }
            continue;
        }
        let told = match &control {
            Some(open) => messages::receive(open).map_err(failed("receive from the pool"))?,
            None => None,
        };
        let Some((ToServer::Fork(parking), descriptors)) = told else {
            control = None;
            continue;
        };
        let Some(socket) = descriptors.into_iter().next() else {
            continue;
        };
        let socket = UnixStream::from(socket);
        let forked = forker.fork(&template, &[socket.as_fd(), rustix::stdio::stderr()], |filters| {
            // Its other end is how the pool notices that its server has ended.
            control = None;
            tell_failure(&socket, park_and_run(&template, parking, &socket, filters));
        });
        match forked {
            Ok(child) => children.push(child, socket),
            Err(error) => {
                // Without the answer the pool sees that the socket is closed.
                let _ = messages::send(&socket, &FromVmm::Failed(error.to_string()), &[]);
            }
        }
    }
}

fn tell_failure(socket: &UnixStream, ended: Result<(), EngineError>) {
    if let Err(error) = ended {
        // Who does not listen any more does not need to know.
        let _ = messages::send(socket, &FromVmm::Failed(error.to_string()), &[]);
    }
}

/// The life of a VMM process whose container is known when it is forked.
pub(crate) fn run_at_once(
    template: &Template,
    options: &ContainerOptions,
    share: Option<&OwnedFd>,
    streams: [BorrowedFd<'_>; 3],
    socket: &UnixStream,
    filters: &ThreadFilters,
) {
    let ended = Container::start_confined(template, options, share, filters)
        .and_then(|container| serve_streams(container, streams.map(Descriptor::Borrowed), socket));
    tell_failure(socket, ended);
}

/// Forks a clone, parks it, and runs the container that comes, if one does.
fn park_and_run(
    template: &Template,
    parking: Parking,
    socket: &UnixStream,
    filters: &ThreadFilters,
) -> Result<(), EngineError> {
    let failed = EngineError::host;
    let machine = {
        let _batch = Batch::begin();
        let confine = filters.on_thread();
        let mut machine = template.fork(ForkOptions {
            on_thread: Some(Arc::new(move |kind| {
                scheduling::end_batch();
                if let Some(confine) = &confine {
                    confine(kind);
                }
            })),
            ..ForkOptions::default()
        })?;
        if let (Parking::Prefaulted, Some(set)) = (parking, template.working_set()) {
            machine.prefault(set)?;
        }
        machine
    };
    filters.seal()?;
    messages::send(socket, &FromVmm::Parked, &[]).map_err(failed("tell the pool of a parked clone"))?;

    let start = messages::receive(socket).map_err(failed("receive what to run"))?;
    let Some((ToVmm::Start { id, spec, hostname }, mut descriptors)) = start else {
        return Ok(());
    };
    let layer = descriptors.get(3).is_some().then(|| descriptors.pop()).flatten();
    let Ok(streams) = <[OwnedFd; 3]>::try_from(descriptors) else {
        let error = io::ErrorKind::InvalidData.into();
        return Err(failed("take the container's standard streams")(error));
    };
    if let (Parking::Bare, Some(set)) = (parking, template.working_set()) {
        set.populate_written(machine.memory());
    }
    let container = Container::start_parked(template, machine, Start { id, spec, hostname }, layer)?;
    serve_streams(container, streams.map(Descriptor::Owned), socket)
}

/// Serves a container for who is at the other end of the socket, and tells when it has ended. The streams end with it, if they are
/// owned: they must not stay open while the clone is torn down, which takes longer than all the rest.
fn serve_streams(
    mut container: Container,
    [stdin, stdout, stderr]: [Descriptor<'_>; 3],
    socket: &UnixStream,
) -> Result<(), EngineError> {
    let service = Service {
        main: Channel::new(MAIN, Some(stdin).filter(|_| container.stdin), stdout, stderr),
        layer: container.layer.take(),
        wake: Some(Descriptor::Borrowed(socket.as_fd())),
        deadline: None,
    };
    let exit = container.serve(service, &mut Owner(socket))?;
    let _ = messages::send(socket, &FromVmm::Exit(exit), &[]);
    scheduling::give_way();
    Ok(())
}

/// Who has the container is at the other end of a socket.
struct Owner<'socket>(&'socket UnixStream);

impl Director for Owner<'_> {
    fn wake(&mut self, _: Wake) -> Option<Command> {
        // Nobody is left who could want the container, or who can be understood.
        let over = Command::Kill(9);
        let (message, descriptors) = match messages::receive::<ToVmm>(self.0) {
            Ok(Some(received)) => received,
            Ok(None) | Err(_) => return Some(over),
        };
        let streams = <[OwnedFd; 3]>::try_from(descriptors);
        Some(match (message, streams) {
            (ToVmm::Signal(signal), _) => Command::Signal {
                process: MAIN,
                signal,
            },
            (ToVmm::SignalProcess(process, signal), _) => Command::Signal { process, signal },
            (ToVmm::Kill(signal), _) => Command::Kill(signal),
            (ToVmm::Exec(process, spec), Ok(streams)) => Command::Exec {
                process,
                spec,
                streams,
            },
            (ToVmm::Help(process, helper), Ok(streams)) => Command::Help {
                process,
                helper,
                streams,
            },
            (ToVmm::Resize(process, size), _) => Command::Resize { process, size },
            (ToVmm::Pause, _) => Command::Pause,
            (ToVmm::Resume, _) => Command::Resume,
            (ToVmm::Start { .. } | ToVmm::Exec(..) | ToVmm::Help(..), _) => over,
        })
    }

    fn news(&mut self, news: News) {
        let message = match news {
            News::Exit(MAIN, exit) => FromVmm::Exit(exit),
            News::Exit(process, exit) => FromVmm::ProcessExit(process, exit),
            News::OutOfMemory => FromVmm::OutOfMemory,
            News::Started => FromVmm::Started,
            News::Paused(paused) => FromVmm::Paused(paused),
        };
        // Who does not listen any more does not need to know.
        let _ = messages::send(self.0, &message, &[]);
    }
}
