//! The process of a standing pool: it keeps its clones, and answers who asks for one.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use picovm_vmm::Template;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{ANSWER_MAX, FromPool, SOCKET, ToPool, VERSION, failed};
use crate::confinement::Confinement;
use crate::error::EngineError;
use crate::messages::{self, Parking};
use crate::pool::Pool;
use crate::store::{self, Lock};
use crate::{children, forked};

/// How long to wait after a clone was taken before the next one is forked: its start comes first.
const REFILL_AFTER: Duration = Duration::from_millis(20);
/// How long a pool may take to be full at first, for each clone and as a whole: where every instruction is emulated.
const PARKED_WITHIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// The life of a pool's process. It tells whether the pool is full, and then serves it.
pub(super) fn live(
    directory: &Path,
    template: &Template,
    size: usize,
    parking: Parking,
    caller: UnixStream,
    lock: Lock,
) {
    let _lock = lock;
    let (told, server) = match Server::prepare(directory, template, size, parking) {
        Ok(server) => (FromPool::Done, Some(server)),
        Err(error) => (FromPool::Failed(error.to_string()), None),
    };
    let _ = messages::send(&caller, &told, &[]);
    drop(caller);
    if let Some(server) = server {
        // Not dropped: that would wait for the containers that go on. What this process has open ends with it.
        std::mem::ManuallyDrop::new(server).serve();
    }
    if let Ok(directory) = File::open(directory) {
        let _ = fs::remove_file(store::socket_path(&directory, SOCKET));
    }
}

struct Server<'t> {
    template: &'t Template,
    parking: Parking,
    pool: Pool,
    listener: UnixListener,
    taken: u64,
    refill_at: Option<Instant>,
}

/// Whether a pool goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Serve,
    End,
}

impl<'t> Server<'t> {
    fn prepare(
        directory: &Path,
        template: &'t Template,
        size: usize,
        parking: Parking,
    ) -> Result<Self, EngineError> {
        forked::leave_caller(false).map_err(failed("prepare a pool's process"))?;
        children::raise_open_files();
        let mut pool = Pool::new(template, size, parking, Confinement::Jailed)?;
        let (each, least) = PARKED_WITHIN;
        let within = each
            .saturating_mul(u32::try_from(size).unwrap_or(u32::MAX))
            .max(least);
        pool.wait_until_full(within)?;
        let opened = File::open(directory).map_err(EngineError::store("open", directory))?;
        let path = store::socket_path(&opened, SOCKET);
        // Of one that was killed.
        store::remove(&path)?;
        let listener =
            UnixListener::bind(&path).map_err(EngineError::store("listen at", &directory.join(SOCKET)))?;
        Ok(Self {
            template,
            parking,
            pool,
            listener,
            taken: 0,
            refill_at: None,
        })
    }

    /// Serves it until it is told to end, or cannot go on.
    fn serve(&mut self) {
        loop {
            let timeout = self
                .refill_at
                .map(|at| at.saturating_duration_since(Instant::now()))
                .and_then(|rest| Timespec::try_from(rest).ok());
            let asked = match poll(
                &mut [PollFd::new(&self.listener, PollFlags::IN)],
                timeout.as_ref(),
            ) {
                Ok(count) => count > 0,
                Err(rustix::io::Errno::INTR) => false,
                Err(_) => return,
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
                    return;
                }
            }
            if self.refill_at.is_some_and(|at| at <= Instant::now()) {
                self.refill_at = None;
                if self.refill().is_err() {
                    return;
                }
            }
        }
    }

    /// Forks what is missing; if the fork server has ended, by a new one.
    fn refill(&mut self) -> Result<(), EngineError> {
        if self.pool.refill().is_ok() {
            return Ok(());
        }
        self.pool = Pool::new(self.template, self.pool.size(), self.parking, Confinement::Jailed)?;
        Ok(())
    }

    fn answer(&mut self, client: &UnixStream) -> Next {
        let Ok(Some((message, _))) = messages::receive::<ToPool>(client) else {
            return Next::Serve;
        };
        let mut clone = None;
        let answer = match &message {
            ToPool::Take(VERSION) => {
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
                    pid: std::process::id(),
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
        let with: Vec<BorrowedFd<'_>> = clone.iter().map(AsFd::as_fd).collect();
        // Without the answer the clone ends, as nobody has its other end.
        let _ = messages::send(client, &answer, &with);
        match message {
            ToPool::Stop => Next::End,
            _ => Next::Serve,
        }
    }
}
