//! Pools: clones of one template, each forked, made ready and parked in a VMM process of its own ahead of the request, so that
//! starting a container is no more than giving a clone its identity and letting it run.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use picovm_vmm::Template;
use rustix::event::{PollFd, PollFlags, poll};

use crate::confinement::Confinement;
use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::messages::{self, FromVmm, Parking, ToServer, ToVmm};
use crate::running::RunningContainer;
use crate::timeout;

/// Environment variable that names another `picovm-vmm`.
pub const VMM_VARIABLE: &str = "PICOVM_VMM";
const PROGRAM: &str = "picovm-vmm";
/// Most clones that a pool keeps.
pub const POOL_MAX: usize = 1024;

/// A pool of parked clones. Dropping it ends them; containers that were started go on.
pub struct Pool {
    server: Arc<Server>,
    size: usize,
    parking: Parking,
    /// VMM processes that were asked for, in the order of the requests; those at the front are parked first.
    waiting: VecDeque<Waiting>,
}

/// The fork server of a pool. Dropping it closes its control socket, and waits until it has seen its last child end.
pub(crate) struct Server {
    control: UnixStream,
    process: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.control.shutdown(std::net::Shutdown::Both);
        let _ = self.process.wait();
    }
}

struct Waiting {
    socket: UnixStream,
    /// Once its clone is parked.
    parked: Option<Share>,
}

/// The end at which a share server is connected with a parked clone.
type Share = OwnedFd;

fn failed(attempted: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::host(attempted)
}

impl Pool {
    /// A pool of `size` clones, 1 to [`POOL_MAX`], of a template, each as ready as `parking` says. They are parked in the
    /// background.
    ///
    /// # Errors
    /// [`EngineError::PoolSize`], [`EngineError::NoVmm`] if there is no `picovm-vmm`, [`EngineError::Host`].
    pub fn new(
        template: &Template,
        size: usize,
        parking: Parking,
        confinement: Confinement,
    ) -> Result<Self, EngineError> {
        Self::of(template.path(), size, parking, confinement)
    }

    /// As [`Pool::new`], for the template in this directory, which its fork server opens.
    pub(crate) fn of(
        template: &Path,
        size: usize,
        parking: Parking,
        confinement: Confinement,
    ) -> Result<Self, EngineError> {
        if !(1..=POOL_MAX).contains(&size) {
            return Err(EngineError::PoolSize(size));
        }
        let (control, theirs) = UnixStream::pair().map_err(failed("create a socket pair"))?;
        let process = program(None, confinement, theirs)?
            .arg(template)
            // One heap for all threads: each further one is memory of every clone, and takes time when a start first needs it.
            .env("MALLOC_ARENA_MAX", "1")
            .spawn()
            .map_err(failed("start picovm-vmm, the fork server of a pool"))?;
        let mut pool = Self {
            server: Arc::new(Server { control, process }),
            size,
            parking,
            waiting: VecDeque::with_capacity(size),
        };
        pool.refill()?;
        Ok(pool)
    }

    /// Asks for the clones that are missing, for those that were started. They are parked in the background, so this is best
    /// called when nobody waits for anything.
    ///
    /// # Errors
    /// [`EngineError::Host`] if the fork server has ended.
    pub fn refill(&mut self) -> Result<(), EngineError> {
        while self.waiting.len() < self.size {
            let (ours, theirs) = UnixStream::pair().map_err(failed("create a socket pair"))?;
            messages::send(
                &self.server.control,
                &ToServer::Fork(self.parking),
                &[theirs.as_fd()],
            )
            .map_err(failed("ask the fork server of a pool for a clone"))?;
            self.waiting.push_back(Waiting {
                socket: ours,
                parked: None,
            });
        }
        Ok(())
    }

    /// Changes how many clones are kept, 1 to [`POOL_MAX`]: those that are missing are parked in the background, those that
    /// are too many end.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn resize(&mut self, size: usize) -> Result<(), EngineError> {
        if !(1..=POOL_MAX).contains(&size) {
            return Err(EngineError::PoolSize(size));
        }
        self.size = size;
        self.waiting.truncate(size);
        self.refill()
    }

    /// How many clones are known to be parked: those for which this pool has waited.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.waiting
            .iter()
            .filter(|waiting| waiting.parked.is_some())
            .count()
    }

    /// Process id of the fork server. Its children are the VMM processes, of parked and of live clones.
    #[must_use]
    pub fn server_id(&self) -> u32 {
        self.server.process.id()
    }

    /// Waits until every clone of the pool is parked.
    ///
    /// # Errors
    /// [`EngineError::Vmm`] if one cannot be, [`EngineError::Host`] if `timeout` passes before.
    pub fn wait_until_full(&mut self, timeout: Duration) -> Result<(), EngineError> {
        for index in 0..self.waiting.len() {
            self.wait_until_parked(index, timeout)?;
        }
        Ok(())
    }

    fn wait_until_parked(&mut self, index: usize, timeout: Duration) -> Result<(), EngineError> {
        let Some(waiting) = self
            .waiting
            .get_mut(index)
            .filter(|waiting| waiting.parked.is_none())
        else {
            return Ok(());
        };
        let told = wait_readable(&waiting.socket, timeout).and_then(|()| messages::receive(&waiting.socket));
        let told = match told {
            Ok(Some((FromVmm::Parked, descriptors))) => match descriptors.into_iter().next() {
                Some(share) => {
                    waiting.parked = Some(share);
                    return Ok(());
                }
                None => Err(io::ErrorKind::InvalidData.into()),
            },
            told => told,
        };
        match told {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(failed("wait for a clone to be parked")(error));
            }
            _ => {}
        }
        // It is of no use any more; the next request for a clone may have better luck.
        self.waiting.remove(index);
        Err(EngineError::Vmm(match told {
            Ok(Some((FromVmm::Failed(reason), _))) => reason,
            Err(error) => error.to_string(),
            Ok(_) => self.last_words(),
        }))
    }

    /// Hands over a clone that is parked already, if there is one, for another process to start a container in: its end of the
    /// connection with the clone's VMM process, and where a share server is connected with it.
    pub(crate) fn take(&mut self) -> Option<(UnixStream, OwnedFd)> {
        self.look();
        let parked = self.waiting.iter().position(|vmm| vmm.parked.is_some())?;
        let vmm = self.waiting.remove(parked)?;
        Some((vmm.socket, vmm.parked?))
    }

    /// Looks which clones are parked by now; those that cannot be, or are no longer, are given up.
    pub(crate) fn look(&mut self) {
        // What a parked clone has to say is that it is none any more.
        let gone = |vmm: &Waiting| vmm.parked.is_some() && wait_readable(&vmm.socket, Duration::ZERO).is_ok();
        self.waiting.retain(|vmm| !gone(vmm));
        let mut index = 0;
        while index < self.waiting.len() {
            let before = self.waiting.len();
            let _ = self.wait_until_parked(index, Duration::ZERO);
            if self.waiting.len() == before {
                index = index.saturating_add(1);
            }
        }
    }

    /// Whether clones are missing.
    pub(crate) fn is_short(&self) -> bool {
        self.waiting.len() < self.size
    }

    /// How many clones are kept.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// What the fork server said before it ended, if it has.
    fn last_words(&self) -> String {
        let told = wait_readable(&self.server.control, Duration::from_millis(200))
            .and_then(|()| messages::receive::<FromVmm>(&self.server.control));
        match told {
            Ok(Some((FromVmm::Failed(reason), _))) => reason,
            _ => "its VMM process has ended".into(),
        }
    }

    /// Starts a container in a parked clone, or in the next one that is parked if there is none. Call [`Pool::refill`] when it
    /// is under way. Its standard streams are
    /// these descriptors; [`ContainerOptions::stdin`] says whether the first one is read.
    ///
    /// # Errors
    /// [`EngineError::Vmm`] if no clone can be parked, [`EngineError::Host`]; the pool can be used further.
    pub fn start(
        &mut self,
        options: &ContainerOptions,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<RunningContainer, EngineError> {
        if options.isolate_memory {
            return Err(EngineError::NotIsolated);
        }
        loop {
            if self.waiting.is_empty() {
                self.refill()?;
            }
            self.wait_until_parked(0, PARKING_MAX)?;
            let Some(vmm) = self.waiting.pop_front() else {
                continue;
            };
            // A parked clone whose process was killed: the next one will do.
            if send_start(&vmm.socket, options, streams)? {
                let Waiting { socket, parked } = vmm;
                return Ok(RunningContainer::of_pool(socket, parked, self.server.clone()));
            }
        }
    }
}

/// Has a container started in the parked clone at the other end; false if its process has ended.
pub(crate) fn send_start(
    vmm: &UnixStream,
    options: &ContainerOptions,
    streams: [BorrowedFd<'_>; 3],
) -> Result<bool, EngineError> {
    let start = options.request();
    let message = ToVmm::Start {
        id: start.id,
        spec: start.spec,
        hostname: start.hostname,
    };
    let mut descriptors = streams.to_vec();
    descriptors.extend(options.layer.as_ref().map(AsFd::as_fd));
    match messages::send(vmm, &message, &descriptors) {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(failed("start a container in a parked clone")(error)),
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.waiting.clear();
        // The server parks no more; it ends when the last container that was started has.
        let _ = self.server.control.shutdown(std::net::Shutdown::Both);
    }
}

/// How long a request waits for a clone to be parked.
const PARKING_MAX: Duration = Duration::from_secs(30);

/// Waits until a descriptor is readable; [`io::ErrorKind::TimedOut`] if it is not by then.
pub(crate) fn wait_readable(source: &impl AsFd, timeout: Duration) -> io::Result<()> {
    let timeout = timeout::timespec(timeout);
    loop {
        match poll(&mut [PollFd::new(source, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// `picovm-vmm` for this work, controlled by this connection.
pub(crate) fn program(
    work: Option<&str>,
    confinement: Confinement,
    control: UnixStream,
) -> Result<Command, EngineError> {
    let confined = match confinement {
        Confinement::Jailed => None,
        Confinement::CallsLogged => Some("--seccomp=log"),
        Confinement::Unconfined => Some("--no-jail"),
    };
    let path = find_program()?;
    let mut command = Command::new(&path);
    command
        .args(work)
        .args(confined)
        // What the caller has in its environment is no business of a process that a guest may take over.
        .env_clear()
        // For what it starts itself.
        .env(VMM_VARIABLE, std::path::absolute(&path).unwrap_or(path))
        .stdin(OwnedFd::from(control))
        .stdout(Stdio::null());
    Ok(command)
}

/// Looks in `PICOVM_VMM` if it is set, else beside the running program and where an installation puts it.
fn find_program() -> Result<PathBuf, EngineError> {
    let places = match std::env::var_os(VMM_VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => vec![PathBuf::from(path)],
        None => std::env::current_exe()
            .ok()
            .and_then(|program| program.parent().map(Path::to_owned))
            .map(|beside| {
                // Tests lie one directory deeper than the programs.
                ["", "..", "../lib/picovm"]
                    .map(|place| beside.join(place).join(PROGRAM))
                    .to_vec()
            })
            .unwrap_or_default(),
    };
    places
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .ok_or(EngineError::NoVmm { looked: places })
}
