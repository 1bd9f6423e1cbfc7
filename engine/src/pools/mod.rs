//! Standing pools: a process for each that keeps clones of one template parked, and hands one to every container of that template
//! that is started meanwhile, whoever starts it.
//!
//! ```text
//! pools/KEY/pool.json    what the pool is of; KEY is the template's
//! pools/KEY/pool.sock    where it listens
//! pools/KEY/lock         held by its process
//! ```
//!
//! A container that got its clone from a pool does not depend on the pool's process: its VMM process is a child of the pool's fork
//! server, which goes on until the last of them has ended.

mod process;

use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use picovm_vmm::Template;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::confinement::Confinement;
use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::forked;
use crate::messages::{self, Parking};
use crate::pool::{self, POOL_MAX};
use crate::running::RunningContainer;
use crate::store::{self, Lock, Store};
use crate::templates::{TemplateProgress, TemplateSpec};

const SOCKET: &str = "pool.sock";
const RECORD: &str = "pool.json";
const LOCK: &str = "lock";

/// Of what is said between processes below: a pool that speaks another gives no clone.
const VERSION: u32 = 1;
/// How long one that is asked may take to answer; it is asked for nothing that takes long.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How long one may take to end.
const END_MAX: Duration = Duration::from_secs(10);

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
    /// With the descriptor of the clone.
    Clone,
    /// None is parked.
    None,
    Status {
        pid: u32,
        size: u32,
        parked: u32,
        taken: u64,
    },
    Done,
    Failed(String),
}

/// What a pool is of.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PoolRecord {
    image: String,
    memory_mib: u64,
    vcpus: u8,
    parking: Parking,
    created: DateTime<Utc>,
}

/// A standing pool.
#[derive(Clone, Debug, Serialize)]
pub struct StandingPool {
    /// Its id: that of the template.
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
    /// Its process.
    pub pid: u32,
    /// How many clones it keeps.
    pub size: u32,
    /// How many of them are parked.
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

/// Whether there is nobody to talk to.
fn is_nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn connect(directory: &Path) -> io::Result<UnixStream> {
    let directory = File::open(directory)?;
    let socket = UnixStream::connect(store::socket_path(&directory, SOCKET))?;
    socket.set_read_timeout(Some(ANSWER_MAX))?;
    socket.set_write_timeout(Some(ANSWER_MAX))?;
    Ok(socket)
}

fn ask(directory: &Path, message: &ToPool) -> io::Result<(FromPool, Option<UnixStream>)> {
    let socket = connect(directory)?;
    messages::send(&socket, message, &[])?;
    let (answer, descriptors) = messages::receive(&socket)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((answer, descriptors.into_iter().next().map(UnixStream::from)))
}

/// Starts a container in a clone of the template's pool; nothing if there is no pool, none of its clones is parked, or the container
/// needs what only one that is started cold can have.
pub(crate) fn start(
    store: &Store,
    template: &Template,
    options: &ContainerOptions,
    streams: [BorrowedFd<'_>; 3],
    confinement: Confinement,
) -> Option<RunningContainer> {
    let cold = confinement != Confinement::Jailed
        || options.isolate_memory
        || options.console_log.is_some()
        || !options.shared.is_empty()
        || options.storage.is_some();
    let directory = store.pools_directory().join(template.path().file_name()?);
    if cold {
        return None;
    }
    loop {
        let clone = match ask(&directory, &ToPool::Take(VERSION)) {
            Ok((FromPool::Clone, Some(clone))) => clone,
            Ok(_) => return None,
            Err(error) => {
                if !is_nobody(&error) {
                    tracing::warn!("no clone from the pool {}: {error}", directory.display());
                }
                return None;
            }
        };
        match pool::send_start(&clone, options, streams) {
            Ok(true) => return Some(RunningContainer::of_standing_pool(clone)),
            // It has just ended; the next one will do.
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("{error}");
                return None;
            }
        }
    }
}

impl Pools {
    fn directory(&self, id: &str) -> PathBuf {
        self.store.pools_directory().join(id)
    }

    /// Makes a pool of `size` clones, 1 to [`POOL_MAX`], with its template if that is not there, and waits until they are parked. It
    /// has a process of its own, which goes on after this one. If there is a pool of this template, it is given this size.
    ///
    /// To be called by a process with one thread: the pool's is a `fork(2)` of it.
    ///
    /// # Errors
    /// [`EngineError::PoolSize`], [`EngineError::Threads`], [`EngineError::Vmm`] if a clone cannot be parked; what
    /// [`Store::template`] says.
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
        let directory = self.directory(&id);
        // Who takes a clone runs what he likes in it.
        store::make_private(&directory)?;
        let Some(lock) = Lock::try_take(&directory.join(LOCK))? else {
            self.request(&id, &ToPool::Resize(wanted))?;
            return self.status(&id)?.ok_or(EngineError::NoPool { id });
        };
        let record = PoolRecord {
            image: spec.image.shown(),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            parking,
            created: Utc::now(),
        };
        let json = serde_json::to_vec_pretty(&record)
            .map_err(|error| EngineError::store("write", &directory)(error.into()))?;
        store::replace(&directory.join(RECORD), &json)?;

        let (ours, theirs) = UnixStream::pair().map_err(failed("create a socket pair"))?;
        let Some(_child) = forked::fork("fork a pool's process")? else {
            drop(ours);
            process::live(&directory, &template, size, parking, theirs, lock);
            forked::exit()
        };
        // It has the lock now: closing this copy does not let it go.
        drop((theirs, lock));
        let answer = messages::receive::<FromPool>(&ours).map_err(failed("hear from a pool's process"))?;
        match answer {
            Some((FromPool::Done, _)) => self.status(&id)?.ok_or(EngineError::NoPool { id }),
            Some((FromPool::Failed(reason), _)) => Err(EngineError::Vmm(reason)),
            _ => Err(EngineError::Vmm("the pool's process has ended".into())),
        }
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
            pools.extend(self.status(&entry.file_name().to_string_lossy())?);
        }
        pools.sort_by(|a, b| (&a.image, a.memory_mib, a.vcpus).cmp(&(&b.image, b.memory_mib, b.vcpus)));
        Ok(pools)
    }

    /// Those that are meant: by the beginning of the id, or by the image's name.
    ///
    /// # Errors
    /// [`EngineError::NoPool`], and as [`Pools::list`].
    pub fn find(&self, name: &str) -> Result<Vec<StandingPool>, EngineError> {
        let mut pools = self.list()?;
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
        if !directory.is_dir() {
            return Ok(());
        }
        let until = Instant::now() + END_MAX;
        let _ = self.request(id, &ToPool::Stop);
        let lock = loop {
            if let Some(lock) = Lock::try_take(&directory.join(LOCK))? {
                break lock;
            }
            if Instant::now() >= until {
                return Err(failed("wait for a pool's process to end")(
                    io::ErrorKind::TimedOut.into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let removed = store::remove(&directory);
        drop(lock);
        removed
    }

    fn request(&self, id: &str, message: &ToPool) -> Result<(), EngineError> {
        match ask(&self.directory(id), message) {
            Ok((FromPool::Failed(reason), _)) => Err(EngineError::Vmm(reason)),
            Ok(_) => Ok(()),
            Err(error) => Err(failed("ask a pool's process")(error)),
        }
    }

    /// One pool, if its process runs.
    fn status(&self, id: &str) -> Result<Option<StandingPool>, EngineError> {
        let directory = self.directory(id);
        let (pid, size, parked, taken) = match ask(&directory, &ToPool::Status) {
            Ok((
                FromPool::Status {
                    pid,
                    size,
                    parked,
                    taken,
                },
                _,
            )) => (pid, size, parked, taken),
            Ok(_) => return Ok(None),
            Err(error) if is_nobody(&error) => return Ok(None),
            Err(error) => return Err(failed("ask a pool's process")(error)),
        };
        let path = directory.join(RECORD);
        let bytes = fs::read(&path).map_err(EngineError::store("read", &path))?;
        let record: PoolRecord = parse(&path, &bytes)?;
        Ok(Some(StandingPool {
            id: id.to_owned(),
            image: record.image,
            memory_mib: record.memory_mib,
            vcpus: record.vcpus,
            parking: record.parking,
            created: record.created,
            pid,
            size,
            parked,
            taken,
        }))
    }
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, EngineError> {
    serde_json::from_slice(bytes).map_err(|error| EngineError::Record {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}
