//! The life of a VMM process: of one that waits for an order, parks a clone and waits for its container, and of one whose container
//! is known from the start. It ends with its container, or when nobody is left who could start it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use picovm_guest_protocol::frame::MAIN;
use picovm_vmm::{ForkOptions, Machine, Template, Threads};

use crate::attach::Wake;
use crate::confinement::ThreadFilters;
use crate::container::{Container, ContainerOptions, Start};
use crate::error::EngineError;
use crate::messages::{self, FromVmm, Parking, ToServer, ToVmm};
use crate::scheduling::{self, Batch};
use crate::serve::{Command, Director, News, Service};
use crate::share;
use crate::streams::{Channel, Descriptor};

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

/// The life of a VMM process that was forked before anybody asked for it: it waits for its order at this socket, parks a clone,
/// and runs the container that comes, if one does.
///
/// When the order comes, nothing of the jail is left to be done: the threads of the machine are there, each under the filter of
/// its kind, and so is this one. The machine is made by one more, which has what setting up a VMM needs, and has ended before
/// the guest runs.
pub(crate) fn wait_and_run(template: &Template, orders: &UnixStream, filters: &ThreadFilters) {
    match make_ahead(template, orders, filters) {
        Ok(Some(Made {
            socket,
            parking,
            parked,
        })) => {
            let ended = parked.and_then(|parked| park_and_run(template, parking, parked, &socket));
            tell_failure(&socket, ended);
        }
        // Nobody is left who could order one.
        Ok(None) => {}
        // There is nobody to hear it but who reads the fork server's messages; the pool sees that its clone's socket is closed.
        Err(error) => eprintln!("picovm: a VMM process that was to wait for a container: {error}"),
    }
}

/// What came of an order: who gave it, and the clone.
struct Made {
    socket: UnixStream,
    parking: Parking,
    parked: Result<Parked, EngineError>,
}

/// A clone that stands at its freeze point.
struct Parked {
    machine: Machine,
    /// Where the share server is connected of a container that has one.
    share: OwnedFd,
}

fn make_ahead(
    template: &Template,
    orders: &UnixStream,
    filters: &ThreadFilters,
) -> Result<Option<Made>, EngineError> {
    let threads = Threads::ahead(template.metadata().vcpus, filters.on_thread())
        .map_err(EngineError::host("start the threads of a machine"))?;
    std::thread::scope(|scope| {
        let maker = std::thread::Builder::new()
            .name(MAKER.into())
            .stack_size(MAKER_STACK)
            .spawn_scoped(scope, || obey(template, orders, threads))
            .map_err(EngineError::host("start the thread that makes a machine"))?;
        if let Err(error) = filters.seal() {
            // The other thread would go on, and no guest may run in this process.
            eprintln!("picovm: {error}");
            std::process::abort();
        }
        match maker.join() {
            Ok(made) => made,
            Err(_) => Err(EngineError::host("make a machine")(io::ErrorKind::Other.into())),
        }
    })
}

/// Name of the thread that makes a machine.
const MAKER: &str = "maker";
/// Its stack in bytes.
const MAKER_STACK: usize = 256 << 10;

/// Whether the VMM process of this id waits for an order: it has the thread that makes its machine, which is the last one that is
/// made, and ends with that.
#[must_use]
pub fn waits_for_order(process: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task"));
    let names = threads.into_iter().flatten().flatten();
    names
        .filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok())
        .any(|name| name.trim_end() == MAKER)
}

/// Waits for the order, and makes the machine.
fn obey(template: &Template, orders: &UnixStream, threads: Threads) -> Result<Option<Made>, EngineError> {
    let order = messages::receive(orders).map_err(EngineError::host("receive what to park"))?;
    let Some((ToServer::Fork(parking), descriptors)) = order else {
        return Ok(None);
    };
    let Some(socket) = descriptors.into_iter().next().map(UnixStream::from) else {
        return Ok(None);
    };
    let parked = park(template, parking, threads);
    Ok(Some(Made {
        socket,
        parking,
        parked,
    }))
}

/// Forks a clone, as ready as it is to be.
fn park(template: &Template, parking: Parking, threads: Threads) -> Result<Parked, EngineError> {
    let _batch = Batch::begin();
    let (own, share) = share::connection()?;
    let mut machine = template.fork(ForkOptions {
        threads,
        share: Some(own),
        ..ForkOptions::default()
    })?;
    if let (Parking::Prefaulted, Some(set)) = (parking, template.working_set()) {
        machine.prefault(set)?;
    }
    Ok(Parked { machine, share })
}

/// Waits for a container for a parked clone, and runs it.
fn park_and_run(
    template: &Template,
    parking: Parking,
    Parked { machine, share }: Parked,
    socket: &UnixStream,
) -> Result<(), EngineError> {
    let failed = EngineError::host;
    messages::send(socket, &FromVmm::Parked, &[share.as_fd()])
        .map_err(failed("tell the pool of a parked clone"))?;
    drop(share);

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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_process_waits_for_an_order_while_it_has_the_thread_that_makes_its_machine() {
        // A thread names itself, and is there for a moment when it has been joined.
        let comes_to_be = |wanted: bool| {
            let give_up = Instant::now() + Duration::from_secs(10);
            while waits_for_order(std::process::id()) != wanted {
                assert!(Instant::now() < give_up, "it is still not {wanted}");
                std::thread::yield_now();
            }
        };
        let (go_on, waits) = std::sync::mpsc::channel::<()>();
        let maker = std::thread::Builder::new().name(MAKER.into());
        let maker = maker.spawn(move || waits.recv()).unwrap();
        comes_to_be(true);
        drop(go_on);
        let _ = maker.join();
        comes_to_be(false);
    }
}
