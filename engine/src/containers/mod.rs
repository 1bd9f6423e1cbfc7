//! Containers of the store: created, started, looked at, removed, by any number of processes at once.
//!
//! ```text
//! containers/ID/config.json   what it is; never changes
//! containers/ID/name          its name
//! containers/ID/state.json    what it does
//! containers/ID/running.lock  held by its monitor while it runs, and by who changes it else
//! containers/ID/monitor.sock  where its monitor listens
//! containers/ID/log.json      its output; log.json.1 and so on, older
//! containers/ID/layer.tar     what its last run has written to its root file system
//! containers/ID/storage       or, with storage, the disk that it writes to
//! ```
//!
//! A container that runs has a **monitor**, a process that outlives who started it: the parent of its VMM process, which keeps the
//! log, connects clients, and writes down how it ends. There is no daemon. Whoever finds a state that says *running* and a
//! lock that nobody holds knows that the monitor was killed, and the container with it.

mod client;
mod events;
mod idle;
mod log;
mod monitor;
mod names;
mod origin;
mod protocol;
mod record;
mod storage;

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

pub use client::{Attachment, Client, ClientNews};
pub use events::EngineEvent;
pub use idle::Idle;
pub use log::{LogEntry, LogQuery};
pub use origin::Origin;
pub use protocol::Ending;
pub use record::{
    ContainerConfig, Health, HealthResult, LogOptions, MountKind, MountPoint, Record, RestartPolicy, State,
    Status, Text, WarmStart, machine_memory,
};
pub use storage::check as check_storage;

use picovm_vmm::Template;

use crate::container::random_id;
use crate::error::EngineError;
use crate::share::Shared;
use crate::store::{self, Lock, Store};
use crate::volumes::Volumes;
use names::Names;

/// Begins the name of the directory of a container that is being created or removed.
const UNFINISHED: &str = ".unfinished-";
const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const NAME: &str = "name";
/// Of all containers: [`Containers::lock_all`].
const LOCK: &str = ".lock";
const RUNNING_LOCK: &str = "running.lock";
const STORAGE: &str = "storage";

/// Exit status of a container whose monitor was killed: the kernel has killed it with that.
const KILLED: u8 = 137;
/// How long a monitor may take for what takes a moment.
const MONITOR_MAX: Duration = Duration::from_secs(30);

/// The containers of a store.
#[derive(Clone, Debug)]
pub struct Containers {
    store: Store,
    /// How long a pool stays unused that is begun after a cold start.
    pools: Option<Duration>,
}

impl Store {
    /// Its containers.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn containers(&self) -> Result<Containers, EngineError> {
        // Logs and sockets of containers are nobody else's.
        store::make_private(&self.containers_directory())?;
        let containers = Containers {
            store: self.clone(),
            pools: None,
        };
        if !containers.names().are_indexed() {
            let _lock = containers.lock_all()?;
            containers.names().index()?;
        }
        Ok(containers)
    }
}

impl Containers {
    /// The same, whose containers leave a pool of one clone behind when they were started cold, for the starts that may follow: where
    /// there is no pool of their template, and until no container has taken a clone for so long. None is begun while eight pools stand.
    #[must_use]
    pub fn with_pools(self, idle: Duration) -> Self {
        Self {
            pools: Some(idle).filter(|idle| !idle.is_zero()),
            ..self
        }
    }

    /// A new id.
    ///
    /// # Errors
    /// [`EngineError::Host`].
    pub fn new_id() -> Result<String, EngineError> {
        random_id::<32>()
    }

    /// Makes a container, with this name or one of its own. It is not started.
    ///
    /// # Errors
    /// [`EngineError::ContainerName`], [`EngineError::NameTaken`], [`EngineError::Store`].
    pub fn create(&self, config: ContainerConfig, name: Option<&str>) -> Result<Record, EngineError> {
        if let Some(name) = name {
            names::check(name)?;
        }
        let _volumes = match config.mounts.is_empty() {
            true => None,
            false => Some(self.volumes()?.reserve(&config.mounts)?),
        };
        let root = self.store.containers_directory();
        let unfinished = root.join(format!("{UNFINISHED}{}", config.id));
        let directory = root.join(&config.id);
        let _lock = self.lock_all()?;
        let names = self.names();
        let name = Self::free_name(&names, name)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&unfinished)
            .map_err(EngineError::store("create", &unfinished))?;
        let state = State::default();
        let stored = match config.storage {
            Some(bytes) => storage::make(&unfinished.join(STORAGE), bytes),
            None => Ok(()),
        };
        let written = stored
            .and_then(|()| write_json(&unfinished.join(CONFIG), &config))
            .and_then(|()| write_json(&unfinished.join(STATE), &state))
            .and_then(|()| store::replace(&unfinished.join(NAME), name.as_bytes()))
            .and_then(|()| names.add(&name, &config.id))
            .and_then(|()| {
                fs::rename(&unfinished, &directory).map_err(EngineError::store("create", &directory))
            });
        if let Err(error) = written {
            let _ = store::remove(&unfinished);
            let _ = names.remove(&name, &config.id);
            return Err(error);
        }
        let record = Record {
            name,
            config,
            state,
            directory,
        };
        self.tell(&record, "create", &[]);
        Ok(record)
    }

    fn names(&self) -> Names {
        Names::of(self.store.containers_directory())
    }

    fn lock_path(&self) -> PathBuf {
        self.store.containers_directory().join(LOCK)
    }

    /// The lock of what changes names, and makes containers.
    fn lock_all(&self) -> Result<Lock, EngineError> {
        Lock::take(&self.lock_path())
    }

    fn free_name(names: &Names, wanted: Option<&str>) -> Result<String, EngineError> {
        if let Some(name) = wanted {
            return match names.id(name) {
                Some(id) => Err(EngineError::NameTaken {
                    name: name.to_owned(),
                    id,
                }),
                None => Ok(name.to_owned()),
            };
        }
        let mut attempts = 0u32;
        loop {
            let id = random_id::<4>()?;
            let bits = u32::from_str_radix(&id, 16).unwrap_or_default();
            let mut name = names::random(bits);
            // With many containers, two words are not enough.
            if attempts > 8 {
                name.push_str(&format!("_{id}"));
            }
            if names.id(&name).is_none() {
                return Ok(name);
            }
            attempts = attempts.saturating_add(1);
        }
    }

    /// The volumes of the same store.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn volumes(&self) -> Result<Volumes, EngineError> {
        self.store.volumes()
    }

    /// What a container shares with this machine.
    fn shared(&self, record: &Record) -> Result<Vec<Shared>, EngineError> {
        let mut shared = Vec::new();
        for mount in &record.config.mounts {
            let source = match &mount.kind {
                MountKind::Bind { source } => PathBuf::from(&source.0),
                MountKind::Volume { name, .. } => self.volumes()?.data(name),
            };
            shared.push(Shared {
                source,
                target: mount.target.0.clone(),
                read_only: mount.read_only,
                fill: matches!(mount.kind, MountKind::Volume { .. }) && !mount.no_copy,
            });
        }
        Ok(shared)
    }

    /// Ids of all containers.
    fn ids(&self) -> Result<Vec<String>, EngineError> {
        let directory = self.store.containers_directory();
        let entries = fs::read_dir(&directory).map_err(EngineError::store("read", &directory))?;
        Ok(entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| is_id(name))
            .collect())
    }

    /// All containers, the newest first.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Record`].
    pub fn list(&self) -> Result<Vec<Record>, EngineError> {
        let mut records = Vec::new();
        for id in self.ids()? {
            match self.read(&id, false) {
                Ok(record) => records.push(record),
                // Removed meanwhile.
                Err(EngineError::Store { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        records.sort_by(|one, other| {
            (other.config.created, &other.config.id).cmp(&(one.config.created, &one.config.id))
        });
        Ok(records)
    }

    /// The container of this name, id, or beginning of an id.
    ///
    /// # Errors
    /// [`EngineError::NoContainer`], [`EngineError::AmbiguousContainer`], [`EngineError::Store`].
    pub fn find(&self, name: &str) -> Result<Record, EngineError> {
        let none = || EngineError::NoContainer {
            name: name.to_owned(),
        };
        let root = self.store.containers_directory();
        let whole = Some(name).filter(|name| is_id(name) && root.join(name).is_dir());
        let named = || self.names().id(name.trim_start_matches('/'));
        let id = match whole.map(str::to_owned).or_else(named) {
            Some(id) => id,
            None => {
                let ids = self.ids()?;
                let mut matching = ids.iter().filter(|id| !name.is_empty() && id.starts_with(name));
                let id = matching.next().ok_or_else(none)?;
                if matching.next().is_some() {
                    return Err(EngineError::AmbiguousContainer {
                        name: name.to_owned(),
                    });
                }
                id.clone()
            }
        };
        match self.read(&id, false) {
            Err(EngineError::Store { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(none())
            }
            found => found,
        }
    }

    /// Reads a container again.
    ///
    /// # Errors
    /// [`EngineError::NoContainer`] if it was removed meanwhile, [`EngineError::Store`].
    pub fn reread(&self, record: &Record) -> Result<Record, EngineError> {
        Self::unless_removed(record, self.read(record.id(), false))
    }

    /// What came of reading a container, whose files are gone if it was removed meanwhile.
    fn unless_removed<T>(record: &Record, read: Result<T, EngineError>) -> Result<T, EngineError> {
        read.map_err(|error| match error {
            EngineError::Store { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                EngineError::NoContainer {
                    name: record.name.clone(),
                }
            }
            error => error,
        })
    }

    /// A container by its id. `locked` says that its lock is held here.
    fn read(&self, id: &str, locked: bool) -> Result<Record, EngineError> {
        let directory = self.store.containers_directory().join(id);
        let config: ContainerConfig = read_json(&directory.join(CONFIG))?;
        let name_path = directory.join(NAME);
        let name = fs::read_to_string(&name_path).map_err(EngineError::store("read", &name_path))?;
        let mut record = Record {
            name,
            config,
            state: State::default(),
            directory,
        };
        record.state = Self::read_state(&record, locked)?;
        Ok(record)
    }

    /// The state of a container as it is: of one that is said to run, and has no monitor, that it was killed.
    fn read_state(record: &Record, locked: bool) -> Result<State, EngineError> {
        let path = record.file(STATE);
        let mut state: State = read_json(&path)?;
        if !state.status.is_live() {
            return Ok(state);
        }
        let _shared;
        if !locked {
            let Some(lock) = Lock::try_share(&record.file(RUNNING_LOCK))? else {
                return Ok(state);
            };
            _shared = lock;
            // Its monitor may have ended between the two looks, as it should.
            state = read_json(&path)?;
        }
        if state.status.is_live() {
            let changed = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
            state.status = Status::Exited;
            state.exit_code = KILLED;
            state.finished = Some(changed.map_or_else(Utc::now, DateTime::<Utc>::from));
            state.pid = 0;
            state.error = "its monitor was killed, or the machine was restarted".into();
        }
        Ok(state)
    }

    #[cfg(test)]
    fn write_state(record: &Record) -> Result<(), EngineError> {
        write_json(&record.file(STATE), &record.state)
    }

    /// Gives a container another name.
    ///
    /// # Errors
    /// [`EngineError::ContainerName`], [`EngineError::NameTaken`], [`EngineError::Store`].
    pub fn rename(&self, record: &mut Record, name: &str) -> Result<(), EngineError> {
        names::check(name)?;
        let _lock = self.lock_all()?;
        if record.name == name {
            return Ok(());
        }
        let names = self.names();
        let name = Self::free_name(&names, Some(name))?;
        names.add(&name, record.id())?;
        store::replace(&record.file(NAME), name.as_bytes())?;
        let old = std::mem::replace(&mut record.name, name);
        names.remove(&old, record.id())?;
        self.tell(record, "rename", &[("oldName", old)]);
        Ok(())
    }

    /// Starts a container that does not run, in what [`Containers::origin`] or [`Containers::warm_origin`] has found for it. Its monitor is
    /// a `fork(2)` of this process, which has to have one thread. Returns a connection with it, on which the container's streams are
    /// attached as `attachment` says, and that tells of its start and end; none if it runs already.
    ///
    /// # Errors
    /// [`EngineError::Store`], [`EngineError::Threads`], [`EngineError::Host`]. What happens to the container is told by the client.
    pub fn start(
        &self,
        record: &Record,
        origin: Origin,
        attachment: &Attachment<'_>,
    ) -> Result<Option<Client>, EngineError> {
        let Some((record, lock)) = self.lock(record)? else {
            return Ok(None);
        };
        monitor::start(self, record, origin, attachment, lock).map(Some)
    }

    /// A connection with the monitor of a container that runs.
    ///
    /// # Errors
    /// [`EngineError::NotRunning`], [`EngineError::Host`].
    pub fn connect(&self, record: &Record) -> Result<Client, EngineError> {
        Client::connect(record)
    }

    /// The files of a container that does not run, in a clone for nothing else. Nobody can start or remove it meanwhile.
    ///
    /// # Errors
    /// [`EngineError::StillRunning`], and what starting a container may say.
    pub fn open_idle(&self, record: &Record, template: &Template) -> Result<Idle, EngineError> {
        let (record, lock) = self.lock(record)?.ok_or_else(|| EngineError::StillRunning {
            name: record.name.clone(),
            instead: "wait until it has ended",
        })?;
        Idle::open(record, template, lock)
    }

    /// Removes a container that does not run, and all that it has left.
    ///
    /// # Errors
    /// [`EngineError::StillRunning`], [`EngineError::Store`].
    pub fn remove(&self, record: &Record) -> Result<(), EngineError> {
        let (record, _lock) = self.lock(record)?.ok_or_else(|| EngineError::StillRunning {
            name: record.name.clone(),
            instead: "use --force",
        })?;
        self.remove_locked(&record)
    }

    /// The lock of a container that does not run, and the container as it is; none if it runs. A monitor that is about to end, and
    /// who only looks, are waited for.
    fn lock(&self, record: &Record) -> Result<Option<(Record, Lock)>, EngineError> {
        let path = record.file(RUNNING_LOCK);
        let give_up = Instant::now() + MONITOR_MAX;
        loop {
            let lock = Self::unless_removed(record, Lock::try_take(&path))?;
            // With the lock held here it has no monitor, whatever its state says. It may have been started and have ended meanwhile.
            let now = Self::unless_removed(record, self.read(record.id(), lock.is_some()))?;
            match lock {
                Some(lock) => return Ok(Some((now, lock))),
                None if now.state.status.is_live() => return Ok(None),
                None => {}
            }
            if Instant::now() > give_up {
                return Err(EngineError::Refused(format!(
                    "container {} is in use by another command for longer than {} s",
                    record.name,
                    MONITOR_MAX.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes a container whose lock is held.
    fn remove_locked(&self, record: &Record) -> Result<(), EngineError> {
        let gone = self
            .store
            .containers_directory()
            .join(format!("{UNFINISHED}{}", record.id()));
        fs::rename(&record.directory, &gone).map_err(EngineError::store("remove", &record.directory))?;
        self.tell(record, "destroy", &[]);
        self.forget_name(&gone, record.id());
        store::remove(&gone)
    }

    /// Removes the link of a removed container's name, which may be another than when its command began. A link that stays counts for
    /// nothing, so nobody waits for this.
    fn forget_name(&self, gone: &Path, id: &str) {
        // Between a look at the link and its removal it must not become another's.
        let lock = Lock::try_take(&self.lock_path());
        if let (Ok(Some(_lock)), Ok(name)) = (lock, fs::read_to_string(gone.join(NAME)))
            && let Err(error) = self.names().remove(&name, id)
        {
            tracing::debug!(%error, "the link of a name stays");
        }
    }

    /// Waits until a container that is ending has no monitor any more, for a moment at most.
    ///
    /// # Errors
    /// [`EngineError::StillRunning`] if it goes on.
    pub fn wait_until_gone(&self, record: &Record) -> Result<(), EngineError> {
        let give_up = Instant::now() + MONITOR_MAX;
        while record.directory.is_dir() {
            if Lock::try_share(&record.file(RUNNING_LOCK))?.is_some() {
                break;
            }
            if Instant::now() > give_up {
                return Err(EngineError::StillRunning {
                    name: record.name.clone(),
                    instead: "kill it",
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Removes what creating and removing containers has left when it was interrupted.
    pub fn sweep(&self) {
        // Whoever creates one holds the lock.
        if let Ok(Some(_lock)) = Lock::try_take(&self.lock_path()) {
            store::remove_leftovers(&self.store.containers_directory(), UNFINISHED);
        }
    }

    /// Reads a container's log: `entry` gets each entry, the oldest first, and says whether to go on.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn logs(
        &self,
        record: &Record,
        query: &LogQuery,
        entry: &mut dyn FnMut(LogEntry) -> bool,
    ) -> Result<(), EngineError> {
        let mut is_live = || match self.reread(record) {
            Ok(record) => Ok(record.state.status.is_live()),
            Err(EngineError::NoContainer { .. }) => Ok(false),
            Err(error) => Err(error),
        };
        log::read(&record.log(), query, &mut is_live, entry)
    }

    /// Reads what has happened to containers: `event` gets each event, the oldest first, and says whether to go on. Those from
    /// `since` on, or else only new ones; until `until`, or else without end.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub fn events(
        &self,
        since: Option<DateTime<Utc>>,
        until: Option<DateTime<Utc>>,
        event: &mut dyn FnMut(EngineEvent) -> bool,
    ) -> Result<(), EngineError> {
        events::read(&self.store, since, until, event)
    }

    /// Writes down that something has happened to a container, with what belongs to it.
    pub fn tell(&self, record: &Record, action: &str, more: &[(&str, String)]) {
        events::tell(&self.store, &EngineEvent::of(record, action, more));
    }
}

/// Whether this is an id: 64 hexadecimal digits.
fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), EngineError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| EngineError::store("write", path)(std::io::Error::other(error)))?;
    store::replace(path, &bytes)
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &PathBuf) -> Result<T, EngineError> {
    let bytes = fs::read(path).map_err(EngineError::store("read", path))?;
    serde_json::from_slice(&bytes).map_err(|error| EngineError::ContainerRecord {
        path: path.clone(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests;
