//! Ids of a range that no other jail on the host has, in whatever process.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::JailError;
use crate::policy::Ids;
use crate::sys;

/// Where the ids in use are marked: each is a locked byte, at the id's own offset, so that policies with ranges that overlap
/// do not meet. The file is empty, and a lock ends with its process.
const LOCKS: &str = "/run/picovm-jail.ids";

/// The file, and which of its locks are ours: a second lock of our own would be granted.
pub(crate) struct Locks {
    file: File,
    ours: Mutex<BTreeSet<u32>>,
}

impl Locks {
    /// Does something while nobody else can take an id, if nobody has it.
    pub(crate) fn with_free(&self, id: u32, act: impl FnOnce()) {
        let ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        if !ours.contains(&id) && sys::lock_byte(self.file.as_fd(), id, true).unwrap_or(false) {
            act();
            let _ = sys::lock_byte(self.file.as_fd(), id, false);
        }
    }
}

/// The ids of a range.
pub(crate) struct IdRange {
    locks: Arc<Locks>,
    ids: Ids,
    /// Where to look first.
    next: u32,
}

/// An id, given back when this is dropped.
pub(crate) struct Id {
    locks: Arc<Locks>,
    id: u32,
}

impl IdRange {
    pub(crate) fn open(ids: &Ids) -> Result<Self, JailError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(LOCKS)
            .map_err(JailError::host(format!(
                "open {LOCKS}, which marks the ids of jails"
            )))?;
        Ok(Self {
            locks: Arc::new(Locks {
                file,
                ours: Mutex::default(),
            }),
            // Others begin elsewhere: they would wait for nothing, but look in vain.
            next: std::process::id() % ids.count,
            ids: ids.clone(),
        })
    }

    pub(crate) fn locks(&self) -> Arc<Locks> {
        self.locks.clone()
    }

    /// Takes a free id.
    pub(crate) fn take(&mut self) -> Result<Id, JailError> {
        for _ in 0..self.ids.count {
            let id = self.ids.first.saturating_add(self.next);
            self.next = self.next.saturating_add(1) % self.ids.count;
            let mut ours = self.locks.ours.lock().unwrap_or_else(PoisonError::into_inner);
            if !ours.contains(&id)
                && sys::lock_byte(self.locks.file.as_fd(), id, true)
                    .map_err(JailError::host(format!("lock an id in {LOCKS}")))?
            {
                ours.insert(id);
                return Ok(Id {
                    locks: self.locks.clone(),
                    id,
                });
            }
        }
        Err(JailError::NoIds {
            count: self.ids.count,
        })
    }
}

impl Id {
    pub(crate) fn number(&self) -> u32 {
        self.id
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        let mut ours = self.locks.ours.lock().unwrap_or_else(PoisonError::into_inner);
        ours.remove(&self.id);
        let _ = sys::lock_byte(self.locks.file.as_fd(), self.id, false);
    }
}
