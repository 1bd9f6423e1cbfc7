//! The VMM process of one container, and the fork server of which it is a child.
//!
//! The server opens a template once and then only forks: a VMM process is a `fork(2)` of a process that has everything
//! open, and no `execve(2)`. Each parks a clone, tells so, and waits. It ends with its container, or when nobody is left
//! who could start it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use picovm_vmm::{ForkOptions, Template};
use rustix::process::Pid;

use crate::attach::{Interruption, Stdio};
use crate::container::{Container, ContainerOptions, Start};
use crate::error::EngineError;
use crate::messages::{self, FromVmm, Parking, ToServer, ToVmm};
use crate::scheduling::{self, Batch};

/// Serves a pool of one template: forks a VMM process whenever the pool asks for one, until the pool closes `control`.
///
/// To be called by a process that has one thread and nothing else to do: `picovm-vmm`.
///
/// # Errors
/// [`EngineError::Template`] if the template cannot be opened; [`EngineError::Host`].
pub fn serve(template: &Path, control: OwnedFd) -> Result<(), EngineError> {
    let failed = EngineError::host;
    // Out of the terminal's process group: Ctrl-C is for who uses the pool.
    let _ = rustix::process::setsid();
    // Children are reaped by the kernel.
    // SAFETY: SIG_IGN is a valid disposition, and this process has one thread.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let control = UnixStream::from(control);
    let template = match Template::open(template) {
        Ok(template) => template,
        Err(error) => {
            let _ = messages::send(&control, &FromVmm::Failed(error.to_string()), &[]);
            return Err(error.into());
        }
    };
    let mut control = Some(control);
    while let Some(open) = &control {
        let Some((ToServer::Fork(parking), descriptors)) =
            messages::receive(open).map_err(failed("receive from the pool"))?
        else {
            break;
        };
        let Some(socket) = descriptors.into_iter().next() else {
            continue;
        };
        let socket = UnixStream::from(socket);
        let forked = fork(|| {
            // Its other end is how the pool notices that its server has ended.
            control = None;
            tell_failure(&socket, park_and_run(&template, parking, &socket));
        });
        if let Err(error) = forked {
            // Without the answer the pool sees that the socket is closed.
            let _ = messages::send(&socket, &FromVmm::Failed(error.to_string()), &[]);
        }
    }
    Ok(())
}

/// Forks a VMM process: one that does this and ends.
///
/// # Errors
/// [`EngineError::Threads`] if this process has more than one thread, whose locks would stay locked in the child;
/// [`EngineError::Host`].
pub(crate) fn fork(life: impl FnOnce()) -> Result<Pid, EngineError> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        return Err(EngineError::Threads { threads });
    }
    // SAFETY: this process has one thread, so its child may do whatever it may.
    match unsafe { libc::fork() } {
        -1 => Err(EngineError::host("fork a VMM process")(io::Error::last_os_error())),
        0 => {
            life();
            // SAFETY: ends this process at once; what it shares with its parent needs none of its destructors.
            unsafe { libc::_exit(0) }
        }
        child => Pid::from_raw(child)
            .ok_or_else(|| EngineError::host("fork a VMM process")(io::ErrorKind::InvalidData.into())),
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
    streams: [BorrowedFd<'_>; 3],
    socket: &UnixStream,
) {
    // Out of the terminal's process group: Ctrl-C is for who started it.
    let _ = rustix::process::setsid();
    let ended =
        Container::start(template, options).and_then(|container| serve_streams(container, streams, socket));
    tell_failure(socket, ended);
}

/// Forks a clone, parks it, and runs the container that comes, if one does.
fn park_and_run(template: &Template, parking: Parking, socket: &UnixStream) -> Result<(), EngineError> {
    let failed = EngineError::host;
    let machine = {
        let _batch = Batch::begin();
        let mut machine = template.fork(ForkOptions::default())?;
        if let (Parking::Prefaulted, Some(set)) = (parking, template.working_set()) {
            machine.prefault(set)?;
        }
        machine
    };
    messages::send(socket, &FromVmm::Parked, &[]).map_err(failed("tell the pool of a parked clone"))?;

    let start = messages::receive(socket).map_err(failed("receive what to run"))?;
    let Some((ToVmm::Start { spec, hostname }, descriptors)) = start else {
        return Ok(());
    };
    let Ok([stdin, stdout, stderr]) = <[OwnedFd; 3]>::try_from(descriptors) else {
        let error = io::ErrorKind::InvalidData.into();
        return Err(failed("take the container's standard streams")(error));
    };
    if let (Parking::Bare, Some(set)) = (parking, template.working_set()) {
        set.populate_written(machine.memory());
    }
    let container = Container::start_parked(template, machine, Start { spec, hostname })?;
    serve_streams(container, [stdin, stdout, stderr], socket)
}

/// Connects a container's streams, and tells when it has ended. The streams end with it, if they are owned: they must not stay
/// open while the clone is torn down, which takes longer than all the rest.
fn serve_streams<S: AsFd>(
    mut container: Container,
    streams: [S; 3],
    socket: &UnixStream,
) -> Result<(), EngineError> {
    let [stdin, stdout, stderr] = &streams;
    let stdio = Stdio {
        stdin: stdin.as_fd(),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        wake: Some(socket.as_fd()),
        deadline: None,
    };
    let exit = container.serve(stdio, &mut |_| {
        Some(match messages::receive::<ToVmm>(socket) {
            Ok(Some((ToVmm::Signal(signal), _))) => Interruption::Signal(signal),
            Ok(Some((ToVmm::Kill(signal), _))) => Interruption::Kill(signal),
            // Nobody is left who could want the container, or who can be understood.
            Ok(Some((ToVmm::Start { .. }, _)) | None) | Err(_) => Interruption::Kill(9),
        })
    })?;
    drop(streams);
    let _ = messages::send(socket, &FromVmm::Exit(exit), &[]);
    scheduling::give_way();
    Ok(())
}
