//! The process of a standing pool: it keeps its clones, and answers who asks for one.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;

use super::{ANSWER_MAX, ENDING, FromPool, Order, PoolRecord, RECORD, SOCKET, ToPool, VERSION, failed};
use crate::confinement::Confinement;
use crate::error::EngineError;
use crate::messages;
use crate::pool::Pool;
use crate::store::{self, Lock};
use crate::{children, forked, timeout};

/// How long to wait after a clone was taken before the next one is forked: its start comes first.
const REFILL_AFTER: Duration = Duration::from_millis(20);
/// How long a pool may take to be full at first, for each clone and as a whole: where every instruction is emulated.
const PARKED_WITHIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));
/// Most pools of a store when one more is begun that nobody has asked for.
const UNASKED_MAX: usize = 8;

/// Keeps the pool that it is told to keep, and tells when it is full, or why not. The process that does so is a child that this one
/// leaves behind.
///
/// To be called by a process that has one thread and nothing else to do: `picovm-vmm keep-pool`.
///
/// # Errors
/// [`EngineError::Host`]; what goes wrong with the pool is told to the caller.
pub fn serve(control: OwnedFd) -> Result<(), EngineError> {
    if forked::fork("fork a pool's process")?.is_some() {
        return Ok(());
    }
    forked::leave_caller(false).map_err(failed("prepare a pool's process"))?;
    children::raise_open_files();
    let caller = UnixStream::from(control);
    let Some((order, _)) =
        messages::receive::<Order>(&caller).map_err(failed("receive which pool to keep"))?
    else {
        return Ok(());
    };
    let (told, keeper) = match Keeper::prepare(order) {
        Ok(Some(keeper)) => (FromPool::Done, Some(keeper)),
        Ok(None) => (FromPool::Stands, None),
        Err(error) => (FromPool::Failed(error.to_string()), None),
    };
    // Nobody may be there to hear it.
    let _ = messages::send(&caller, &told, &[]);
    drop(caller);
    if let Some(keeper) = keeper {
        // Not dropped: that would wait for the containers that go on. What this process has open ends with it.
        std::mem::ManuallyDrop::new(keeper).serve();
    }
    Ok(())
}

/// How many pools stand in the same store.
fn standing_beside(directory: &Path) -> usize {
    let entries = directory.parent().map(fs::read_dir);
    entries
        .into_iter()
        .flatten()
        .flatten()
        .flatten()
        .filter(|entry| super::connect(&entry.path()).is_ok())
        .count()
}

struct Keeper {
    directory: PathBuf,
    template: PathBuf,
    record: PoolRecord,
    pool: Pool,
    listener: UnixListener,
    /// Readable when something in its directory was removed.
    removals: OwnedFd,
    taken: u64,
    /// When it was last asked for a clone, or begun.
    used: Instant,
    refill_at: Option<Instant>,
    lock: Lock,
}

/// Whether a pool goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Serve,
    End,
}

impl Keeper {
    /// `None` if there is a pool of this template, or there are enough of them for one that nobody has asked for.
    fn prepare(order: Order) -> Result<Option<Self>, EngineError> {
        let Order {
            directory,
            template,
            mut record,
        } = order;
        // Removed meanwhile, perhaps with all of the store, which is not to come back.
        let is_there = || match template.is_dir() {
            true => Ok(()),
            false => Err(EngineError::NoTemplate {
                id: template.display().to_string(),
            }),
        };
        is_there()?;
        if record.idle_seconds.is_some() && standing_beside(&directory) >= UNASKED_MAX {
            return Ok(None);
        }
        let Some(lock) = Self::lock(&directory)? else {
            return Ok(None);
        };
        record.pid = std::process::id();
        // Who removes the template stops its pools then: those that he can see.
        let filled =
            Self::fill(&directory, &template, &record).and_then(|filled| is_there().map(|()| filled));
        match filled {
            Ok((pool, listener, removals)) => Ok(Some(Self {
                directory,
                template,
                record,
                pool,
                listener,
                removals,
                taken: 0,
                used: Instant::now(),
                refill_at: None,
                lock,
            })),
            Err(error) => {
                let _ = super::clear(&directory, &lock);
                Err(error)
            }
        }
    }

    /// Makes its directory, unless there is no store any more, and takes its lock; `None` if somebody else has it.
    fn lock(directory: &Path) -> Result<Option<Lock>, EngineError> {
        // Who takes a clone runs what he likes in it.
        let make = |directory: &Path| match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(EngineError::store("create", directory)(error))
            }
            _ => Ok(()),
        };
        if let Some(all) = directory.parent() {
            make(all)?;
            // What was killed while it removed one has left.
            store::remove_leftovers(all, ENDING);
        }
        loop {
            make(directory)?;
            match super::lock_of(directory) {
                // One that ended at this moment has removed it.
                Err(_) if !directory.is_dir() => {}
                taken => return taken,
            }
        }
    }

    /// Parks its clones, and listens when all are.
    fn fill(
        directory: &Path,
        template: &Path,
        record: &PoolRecord,
    ) -> Result<(Pool, UnixListener, OwnedFd), EngineError> {
        let json = serde_json::to_vec_pretty(record)
            .map_err(|error| EngineError::store("write", directory)(error.into()))?;
        store::replace(&directory.join(RECORD), &json)?;
        let size = record.size as usize;
        let mut pool = Pool::of(template, size, record.parking, Confinement::Jailed)?;
        let (each, least) = PARKED_WITHIN;
        pool.wait_until_full(each.saturating_mul(record.size).max(least))?;
        let opened = File::open(directory).map_err(EngineError::store("open", directory))?;
        let path = store::socket_path(&opened, SOCKET);
        // Of one that was killed.
        store::remove(&path)?;
        let listener =
            UnixListener::bind(&path).map_err(EngineError::store("listen at", &directory.join(SOCKET)))?;
        let watch = || {
            let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            inotify::add_watch(&watch, directory, inotify::WatchFlags::DELETE)?;
            Ok(watch)
        };
        let removals = watch()
            .map_err(|error: rustix::io::Errno| EngineError::store("watch", directory)(error.into()))?;
        Ok((pool, listener, removals))
    }

    /// Serves it until it is told to end, nobody needs it any more, or it cannot go on.
    fn serve(&mut self) {
        let told_to = self.answer_all();
        // Who has told it to end waits for that, and removes the rest.
        let _ = match told_to {
            true => store::remove(&self.directory.join(SOCKET)),
            false => super::clear(&self.directory, &self.lock),
        };
    }

    /// When it ends, as no container has needed it.
    fn unused_at(&self) -> Option<Instant> {
        self.used
            .checked_add(Duration::from_secs(self.record.idle_seconds?))
    }

    /// Whether it was told to end.
    fn answer_all(&mut self) -> bool {
        loop {
            let due = [self.refill_at, self.unused_at()].into_iter().flatten().min();
            let timeout = due.map(timeout::until);
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::new(&self.removals, PollFlags::IN),
            ];
            let (asked, removed) = match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {
                    let [asked, removed] = fds.map(|fd| !fd.revents().is_empty());
                    (asked, removed)
                }
                Err(rustix::io::Errno::INTR) => (false, false),
                Err(_) => return false,
            };
            if asked {
                let Ok((client, _)) = self.listener.accept() else {
                    continue;
                };
                // One that says nothing, or does not listen, is no reason to stand still for long.
                let limits = client
                    .set_read_timeout(Some(ANSWER_MAX))
                    .and_then(|()| client.set_write_timeout(Some(ANSWER_MAX)));
                if limits.is_ok() && self.answer(&client) == Next::End {
                    return true;
                }
            }
            // Of a store that was removed nobody can take a clone.
            if removed && self.was_removed() {
                return false;
            }
            let now = Instant::now();
            if self.unused_at().is_some_and(|at| at <= now) {
                return false;
            }
            if self.refill_at.is_some_and(|at| at <= now) {
                self.refill_at = None;
                if self.refill().is_err() {
                    return false;
                }
            }
        }
    }

    /// Whether its socket is not there any more.
    fn was_removed(&self) -> bool {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 1024];
        let mut events = inotify::Reader::new(&self.removals, &mut buffer);
        while events.next().is_ok() {}
        !self.directory.join(SOCKET).exists()
    }

    /// Forks what is missing; if the fork server has ended, by a new one.
    fn refill(&mut self) -> Result<(), EngineError> {
        if self.pool.refill().is_ok() {
            return Ok(());
        }
        let size = self.pool.size();
        self.pool = Pool::of(&self.template, size, self.record.parking, Confinement::Jailed)?;
        Ok(())
    }

    fn answer(&mut self, client: &UnixStream) -> Next {
        let Ok(Some((message, _))) = messages::receive::<ToPool>(client) else {
            return Next::Serve;
        };
        let mut clone = None;
        let answer = match &message {
            ToPool::Take(VERSION) => {
                self.used = Instant::now();
                clone = self.pool.take();
                match &clone {
                    Some(_) => {
                        self.taken = self.taken.saturating_add(1);
                        FromPool::Clone
                    }
                    None => FromPool::None,
                }
            }
            ToPool::Take(_) => FromPool::None,
            ToPool::Status => {
                self.pool.look();
                FromPool::Status {
                    size: u32::try_from(self.pool.size()).unwrap_or(u32::MAX),
                    parked: u32::try_from(self.pool.parked()).unwrap_or(u32::MAX),
                    taken: self.taken,
                }
            }
            ToPool::Resize(size) => match self.pool.resize(*size as usize) {
                Ok(()) => FromPool::Done,
                Err(error) => FromPool::Failed(error.to_string()),
            },
            ToPool::Stop => FromPool::Done,
        };
        if self.pool.is_short() {
            self.refill_at = Instant::now().checked_add(REFILL_AFTER);
        }
        let with: Vec<BorrowedFd<'_>> = clone
            .iter()
            .flat_map(|(socket, share)| [socket.as_fd(), share.as_fd()])
            .collect();
        // Without the answer the clone ends, as nobody has its other end.
        let _ = messages::send(client, &answer, &with);
        match message {
            ToPool::Stop => Next::End,
            _ => Next::Serve,
        }
    }
}
