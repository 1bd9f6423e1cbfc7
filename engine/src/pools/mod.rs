//! Standing pools: a process for each that keeps clones of one template parked, and hands one to every container of that template
//! that is started meanwhile, whoever starts it.
//!
//! ```text
//! pools/KEY/pool.json    what the pool is of; KEY is the template's
//! pools/KEY/pool.sock    where it listens, once it is full
//! pools/KEY/lock         held by its process
//! pools/KEY-CONTEXT/     the same of one that nobody has asked for
//! ```
//!
//! A container that got its clone from a pool does not depend on the pool's process: its VMM process is a child of the pool's fork
//! server, which goes on until the last of them has ended.
//!
//! A pool is asked for, and then stays until it is stopped; or one is begun for the starts that may follow, when a container was started
//! cold ([`Containers::with_pools`](crate::containers::Containers::with_pools)). That one ends when no container has needed it for some time,
//! and serves only who could have begun it as well (`context`): a container ends with the fork server of its pool, and that with all of
//! its cgroup, so nobody gets a clone of one without having asked for it.

mod context;
mod process;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use process::serve;

use crate::confinement::Confinement;
use crate::container::ContainerOptions;
use crate::containers::ContainerConfig;
use crate::error::EngineError;
use crate::messages::{self, Parking};
use crate::pool::{self, POOL_MAX};
use crate::running::RunningContainer;
use crate::share::ShareServer;
use crate::store::{self, Lock, Store};
use crate::templates::{TemplateProgress, TemplateSpec};

/// The word by which `picovm-vmm` knows that it is to keep a pool.
pub const KEEP_POOL: &str = "keep-pool";

const SOCKET: &str = "pool.sock";
const RECORD: &str = "pool.json";
const LOCK: &str = "lock";
/// Begins the name of a directory that is being removed.
const ENDING: &str = ".ending-";

/// Of what is said between processes below: a pool that speaks another gives no clone.
const VERSION: u32 = 2;
/// How long one that is asked may take to answer; it is asked for nothing that takes long.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How long one may take to end.
const END_MAX: Duration = Duration::from_secs(10);
/// How long one may take until it listens: see `process::PARKED_WITHIN`.
const READY_MAX: Duration = Duration::from_secs(75);

/// To a pool's process.
#[derive(Debug, Serialize, Deserialize)]
enum ToPool {
    /// Hand over a parked clone.
    Take(u32),
    Status,
    /// Keep so many.
    Resize(u32),
    Stop,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
enum FromPool {
    /// With the descriptor of the clone, and that at which a share server is connected with it.
    Clone,
    /// None is parked.
    None,
    Status {
        size: u32,
        parked: u32,
        taken: u64,
    },
    Done,
    Failed(String),
    /// There is a pool of this template already.
    Stands,
}

/// The pool that a process is to keep.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    /// `pools/KEY`.
    directory: PathBuf,
    template: PathBuf,
    record: PoolRecord,
}

/// What a pool is of.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PoolRecord {
    image: String,
    memory_mib: u64,
    vcpus: u8,
    parking: Parking,
    created: DateTime<Utc>,
    #[serde(default)]
    idle_seconds: Option<u64>,
    /// Its process, and how many clones it was begun with.
    #[serde(default)]
    pid: u32,
    #[serde(default)]
    size: u32,
}

/// A standing pool.
#[derive(Clone, Debug, Serialize)]
pub struct StandingPool {
    /// Its id: that of the template, and of one that nobody has asked for some digits more.
    pub id: String,
    /// The image's name, as it was when the pool was made.
    pub image: String,
    /// Memory of its machines in MiB.
    pub memory_mib: u64,
    /// Their vCPUs.
    pub vcpus: u8,
    /// How ready its clones are.
    pub parking: Parking,
    /// When it was made.
    pub created: DateTime<Utc>,
    /// After how many seconds it ends in which no container has taken a clone; not before it is stopped if there is no such time.
    pub idle_seconds: Option<u64>,
    /// Its process.
    pub pid: u32,
    /// How many clones it keeps.
    pub size: u32,
    /// How many of them are parked; none until it is full for the first time.
    pub parked: u32,
    /// How many containers it has given one.
    pub taken: u64,
}

/// The standing pools of a store.
#[derive(Clone, Debug)]
pub struct Pools {
    store: Store,
}

impl Store {
    /// The standing pools.
    #[must_use]
    pub fn pools(&self) -> Pools {
        Pools { store: self.clone() }
    }
}

fn failed(attempted: &'static str) -> impl FnOnce(io::Error) -> EngineError {
    EngineError::host(attempted)
}

/// Whether there is nobody to talk to, or nobody any more.
fn is_nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    )
}

fn connect(directory: &Path) -> io::Result<UnixStream> {
    let directory = File::open(directory)?;
    let socket = UnixStream::connect(store::socket_path(&directory, SOCKET))?;
    socket.set_read_timeout(Some(ANSWER_MAX))?;
    socket.set_write_timeout(Some(ANSWER_MAX))?;
    Ok(socket)
}

fn ask(directory: &Path, message: &ToPool) -> io::Result<(FromPool, Vec<OwnedFd>)> {
    let socket = connect(directory)?;
    messages::send(&socket, message, &[])?;
    messages::receive(&socket)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A parked clone that its pool has given away. It ends if it is dropped.
#[derive(Debug)]
pub(crate) struct ParkedClone {
    socket: UnixStream,
    share: OwnedFd,
}

impl ParkedClone {
    /// One of a pool of the template with this key: of that which was asked for, or of this process's own; none if there is no pool, or
    /// none is parked.
    pub(crate) fn take(store: &Store, key: &OsStr) -> Option<Self> {
        let asked = store.pools_directory().join(key);
        Self::take_of(&asked).or_else(|| Self::take_of(&unasked(store, key)?))
    }

    fn take_of(directory: &Path) -> Option<Self> {
        match ask(directory, &ToPool::Take(VERSION)) {
            Ok((FromPool::Clone, descriptors)) => {
                let [socket, share] = descriptors.try_into().ok()?;
                Some(Self {
                    socket: socket.into(),
                    share,
                })
            }
            Ok(_) => None,
            Err(error) => {
                if !is_nobody(&error) {
                    tracing::warn!("no clone from the pool {}: {error}", directory.display());
                }
                None
            }
        }
    }

    /// Starts a container in it, with a share server if it shares anything; nothing if it has ended.
    ///
    /// To be called by a process with one thread: the share server is a `fork(2)` of it.
    ///
    /// # Errors
    /// As [`ShareServer::start_at`]; [`EngineError::Host`].
    pub(crate) fn start(
        self,
        options: &ContainerOptions,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<Option<RunningContainer>, EngineError> {
        let share = match options.shared.as_slice() {
            [] => Err(self.share),
            shared => Ok(ShareServer::start_at(shared, self.share, Confinement::Jailed)?),
        };
        let started = pool::send_start(&self.socket, options, streams)?;
        Ok(started.then(|| RunningContainer::of_standing_pool(self.socket, share)))
    }
}

/// Where the pool is that nobody has asked for, of the template with this key and for this process.
fn unasked(store: &Store, key: &OsStr) -> Option<PathBuf> {
    let mut name = key.to_owned();
    name.push("-");
    name.push(context::own()?);
    Some(store.pools_directory().join(name))
}

/// Begins a pool of one clone for the starts that may follow a cold one, if there is none: in the background, for nobody waits for it.
/// It ends when it was not needed for `idle`.
pub(crate) fn begin_unasked(
    store: &Store,
    template: &Path,
    config: &ContainerConfig,
    idle: Duration,
) -> Result<(), EngineError> {
    let Some(key) = template.file_name() else {
        return Ok(());
    };
    if connect(&store.pools_directory().join(key)).is_ok() {
        // It was just empty.
        return Ok(());
    }
    let Some(directory) = unasked(store, key) else {
        return Ok(());
    };
    let order = Order {
        directory,
        template: template.to_owned(),
        record: PoolRecord {
            image: config.image.clone(),
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            parking: Parking::default(),
            created: Utc::now(),
            idle_seconds: Some(idle.as_secs().max(1)),
            pid: 0,
            size: 1,
        },
    };
    begin(&order).map(drop)
}

/// Starts the process of a pool, which is no child of this one; returns a connection on which it tells that the pool is full, or why not.
fn begin(order: &Order) -> Result<UnixStream, EngineError> {
    let failed = || EngineError::host("start a pool's process");
    let (ours, theirs) = UnixStream::pair().map_err(failed())?;
    let mut process = pool::program(Some(KEEP_POOL), Confinement::Jailed, theirs)?
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed())?;
    let sent = messages::send(&ours, order, &[]);
    // It forks the one that stays, and ends.
    process.wait().map_err(failed())?;
    sent.map_err(failed())?;
    Ok(ours)
}

impl Pools {
    fn directory(&self, id: &str) -> PathBuf {
        self.store.pools_directory().join(id)
    }

    /// Makes a pool of `size` clones, 1 to [`POOL_MAX`], with its template if that is not there, and waits until they are parked. It
    /// has a process of its own, which goes on after this one. If there is a pool of this template already that was asked for, it is given
    /// this size, and fills in the background.
    ///
    /// # Errors
    /// [`EngineError::PoolSize`], [`EngineError::NoVmm`], [`EngineError::Vmm`] if a clone cannot be parked; what [`Store::template`] says.
    pub fn start(
        &self,
        spec: &TemplateSpec,
        size: usize,
        parking: Parking,
        progress: &mut dyn FnMut(TemplateProgress),
    ) -> Result<StandingPool, EngineError> {
        let wanted = u32::try_from(size).map_err(|_| EngineError::PoolSize(size))?;
        if !(1..=POOL_MAX).contains(&size) {
            return Err(EngineError::PoolSize(size));
        }
        let template = self.store.template(spec, progress)?;
        let id = template
            .path()
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let order = Order {
            directory: self.directory(&id),
            template: template.path().to_owned(),
            record: PoolRecord {
                image: spec.image.shown(),
                memory_mib: spec.memory_mib,
                vcpus: spec.vcpus,
                parking,
                created: Utc::now(),
                idle_seconds: None,
                pid: 0,
                size: wanted,
            },
        };
        let until = Instant::now() + READY_MAX;
        loop {
            let process = begin(&order)?;
            match messages::receive(&process).map_err(failed("hear from a pool's process"))? {
                Some((FromPool::Done, _)) => break,
                Some((FromPool::Stands, _)) => match ask(&order.directory, &ToPool::Resize(wanted)) {
                    Ok((FromPool::Failed(reason), _)) => return Err(EngineError::Vmm(reason)),
                    Ok(_) => break,
                    // It is not full yet, or has just ended.
                    Err(error) if is_nobody(&error) && Instant::now() < until => {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    Err(error) => return Err(failed("ask a pool's process")(error)),
                },
                Some((FromPool::Failed(reason), _)) => return Err(EngineError::Vmm(reason)),
                _ => return Err(EngineError::Vmm("the pool's process has ended".into())),
            }
        }
        self.status(&id)?.ok_or(EngineError::NoPool { id })
    }

    /// All of them, by image.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Host`] for one that does not answer.
    pub fn list(&self) -> Result<Vec<StandingPool>, EngineError> {
        let root = self.store.pools_directory();
        let entries = match fs::read_dir(&root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(EngineError::store("list", &root)(error)),
        };
        let mut pools = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if !name.starts_with('.') {
                pools.extend(self.status(&name)?);
            }
        }
        pools.sort_by(|a, b| (&a.image, a.memory_mib, a.vcpus).cmp(&(&b.image, b.memory_mib, b.vcpus)));
        Ok(pools)
    }

    /// Those that are meant: by the id or its beginning, or by the image's name.
    ///
    /// # Errors
    /// [`EngineError::NoPool`], and as [`Pools::list`].
    pub fn find(&self, name: &str) -> Result<Vec<StandingPool>, EngineError> {
        let mut pools = self.list()?;
        // The id of one that was asked for begins those of the others of its template.
        if let Some(index) = pools.iter().position(|pool| pool.id == name) {
            return Ok(vec![pools.swap_remove(index)]);
        }
        pools.retain(|pool| {
            let image = pool.image.as_str();
            !name.is_empty()
                && (pool.id.starts_with(name) || image == name || image.strip_suffix(":latest") == Some(name))
        });
        if pools.is_empty() {
            return Err(EngineError::NoPool { id: name.to_owned() });
        }
        Ok(pools)
    }

    /// Ends a pool, and its parked clones; containers go on. One that is not there is no error.
    ///
    /// # Errors
    /// [`EngineError::Host`] if it does not end, [`EngineError::Store`].
    pub fn stop(&self, id: &str) -> Result<(), EngineError> {
        let directory = self.directory(id);
        let mut until = Instant::now() + READY_MAX;
        while directory.is_dir() {
            match lock_of(&directory) {
                Ok(Some(lock)) => return clear(&directory, &lock),
                // It has just ended by itself.
                Err(_) if !directory.is_dir() => break,
                Err(error) => return Err(error),
                Ok(None) => {}
            }
            match ask(&directory, &ToPool::Stop) {
                // It is not full yet, or has ended.
                Err(error) if is_nobody(&error) => {}
                _ => until = until.min(Instant::now() + END_MAX),
            }
            if Instant::now() >= until {
                return Err(failed("wait for a pool's process to end")(
                    io::ErrorKind::TimedOut.into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends all pools of the template with this key.
    pub(crate) fn stop_all_of(&self, key: &str) -> Result<(), EngineError> {
        let entries = fs::read_dir(self.store.pools_directory());
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name
                .strip_prefix(key)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
            {
                self.stop(&name)?;
            }
        }
        Ok(())
    }

    /// One pool, if its process runs.
    fn status(&self, id: &str) -> Result<Option<StandingPool>, EngineError> {
        let directory = self.directory(id);
        let told = match ask(&directory, &ToPool::Status) {
            Ok((FromPool::Status { size, parked, taken }, _)) => Some((size, parked, taken)),
            Ok(_) => return Ok(None),
            // Whoever has its lock is about to fill it.
            Err(error) if is_nobody(&error) => match lock_of(&directory) {
                Ok(None) => None,
                _ => return Ok(None),
            },
            Err(error) => return Err(failed("ask a pool's process")(error)),
        };
        let path = directory.join(RECORD);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(EngineError::store("read", &path))?,
        };
        let record: PoolRecord = parse(&path, &bytes)?;
        let (size, parked, taken) = told.unwrap_or((record.size, 0, 0));
        Ok(Some(StandingPool {
            id: id.to_owned(),
            image: record.image,
            memory_mib: record.memory_mib,
            vcpus: record.vcpus,
            parking: record.parking,
            created: record.created,
            idle_seconds: record.idle_seconds,
            pid: record.pid,
            size,
            parked,
            taken,
        }))
    }
}

/// Removes the directory of a pool whose lock this is, as a whole: whoever waits for the lock finds that it is none any more.
fn clear(directory: &Path, lock: &Lock) -> Result<(), EngineError> {
    let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
        return Ok(());
    };
    // Another store may be there by now.
    if !lock.is_of(&directory.join(LOCK)) {
        return Ok(());
    }
    let gone = parent.join(format!("{ENDING}{}", name.display()));
    store::remove(&gone)?;
    match fs::rename(directory, &gone) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(EngineError::store("remove", directory)(error))
        }
        _ => store::remove(&gone),
    }
}

/// The lock of a pool whose process does not run.
fn lock_of(directory: &Path) -> Result<Option<Lock>, EngineError> {
    let path = directory.join(LOCK);
    loop {
        match Lock::try_take(&path)? {
            // A pool that ends by itself removes its directory: whoever had opened the lock before has one of no use.
            Some(lock) if !lock.is_of(&path) => {}
            taken => return Ok(taken),
        }
    }
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, EngineError> {
    serde_json::from_slice(bytes).map_err(|error| EngineError::Record {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}
