//! What a block device lies on: a file, or nothing until a clone is given one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryMmap};

use super::state::BlockState;
use crate::devices::virtio::queue::Buffer;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Why a file cannot back a block device.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// It cannot be opened.
    #[error("cannot open the disk {} {}: {source}", path.display(), if *read_only { "for reading" } else { "for reading and writing" })]
    Open {
        /// The file.
        path: PathBuf,
        /// How it was to be opened.
        read_only: bool,
        /// What happened.
        source: io::Error,
    },
    /// Its size is no whole number of sectors, or zero.
    #[error("the disk {} has {bytes} bytes: a disk is one or more whole sectors of {SECTOR} bytes", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The guest cannot see less of it than there is, nor write to what there is not.
    #[error(
        "the disk {} has {sectors} sectors and cannot be shown as one of {capacity}: a disk can only be shown larger, \
         and only to be read",
        path.display()
    )]
    Capacity {
        /// The file.
        path: PathBuf,
        /// Its sectors.
        sectors: u64,
        /// Sectors that the guest was to see.
        capacity: u64,
    },
    /// It is not the disk that the template was made with.
    #[error(
        "the disk {} has {sectors} sectors, but the template was made with one of {expected}: rebuild the template",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Its sectors.
        sectors: u64,
        /// Sectors that the guest knows of.
        expected: u64,
    },
    /// A file cannot be a clone's storage.
    #[error("cannot use a file as the storage of a clone: {0}")]
    Storage(io::Error),
}

/// A file as a disk. Clones of it are the same open file.
#[derive(Clone)]
pub struct FileBackend {
    /// None: a disk of zeros, which takes no write.
    file: Option<Arc<File>>,
    /// What the guest sees.
    sectors: u64,
    /// What the file has, `sectors` or fewer. Nothing is written behind its end, so it never grows.
    in_file: u64,
    read_only: bool,
}

/// What is behind the end of a file reads as this.
const ZEROS: [u8; 4096] = [0; 4096];

/// Guest ranges of one request as the kernel's vectored calls take them.
fn iovecs(memory: &GuestMemoryMmap, buffers: &[Buffer]) -> Option<Vec<libc::iovec>> {
    let mut list = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let length = usize::try_from(buffer.length).ok()?;
        let slice = memory.get_slice(buffer.address, length).ok()?;
        list.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
    }
    Some(list)
}

impl FileBackend {
    /// Opens a file of whole sectors.
    ///
    /// # Errors
    /// [`BackendError`] names the file and what is wrong with it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BackendError> {
        let open = |source| BackendError::Open {
            path: path.to_owned(),
            read_only,
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(open)?;
        let sectors = sectors_of(&file)
            .map_err(open)?
            .map_err(|bytes| BackendError::Size {
                path: path.to_owned(),
                bytes,
            })?;
        Ok(Self {
            file: Some(Arc::new(file)),
            sectors,
            in_file: sectors,
            read_only,
        })
    }

    /// A disk of so many sectors for storage: on this file, which is open for reading and writing, or on nothing. What is behind the
    /// file's end reads as zeros and cannot be written.
    ///
    /// # Errors
    /// [`BackendError::Storage`].
    pub fn storage(file: Option<File>, sectors: u64) -> Result<Self, BackendError> {
        let in_file = match &file {
            Some(file) => sectors_of(file)
                .map_err(BackendError::Storage)?
                .ok()
                .filter(|in_file| *in_file <= sectors)
                .ok_or_else(|| {
                    let reason = format!("it is no file of one or more whole sectors, {sectors} at most");
                    BackendError::Storage(io::Error::other(reason))
                })?,
            None => 0,
        };
        Ok(Self {
            file: file.map(Arc::new),
            sectors,
            in_file,
            read_only: false,
        })
    }

    /// Its file.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// The same file, seen by the guest as a disk of so many sectors: see [`crate::Disk::sectors`].
    ///
    /// # Errors
    /// [`BackendError::Capacity`].
    pub fn with_capacity(self, path: &Path, sectors: Option<u64>) -> Result<Self, BackendError> {
        let capacity = sectors.unwrap_or(self.in_file);
        if capacity < self.in_file || capacity > self.in_file && !self.read_only {
            return Err(BackendError::Capacity {
                path: path.to_owned(),
                sectors: self.in_file,
                capacity,
            });
        }
        Ok(Self {
            sectors: capacity,
            ..self
        })
    }

    /// Opens the file for a clone and checks that the guest can go on with it: it is as large as the guest knows it, or
    /// was shown larger than it is and still can be.
    ///
    /// # Errors
    /// As [`FileBackend::open`], and [`BackendError::Changed`].
    pub fn open_for_clone(path: &Path, state: &BlockState) -> Result<Self, BackendError> {
        let backend = Self::open(path, state.read_only)?;
        let fits = if state.padded {
            state.read_only && backend.in_file <= state.sectors
        } else {
            backend.in_file == state.sectors
        };
        if !fits {
            return Err(BackendError::Changed {
                path: path.to_owned(),
                sectors: backend.in_file,
                expected: state.sectors,
            });
        }
        backend.with_capacity(path, Some(state.sectors))
    }

    /// Whether the guest sees a larger disk than the file.
    #[must_use]
    pub fn is_padded(&self) -> bool {
        self.sectors > self.in_file
    }

    /// Capacity in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the request lies within so many sectors.
    fn in_range(sector: u64, bytes: u64, sectors: u64) -> bool {
        bytes.is_multiple_of(SECTOR)
            && sector
                .checked_add(bytes / SECTOR)
                .is_some_and(|end| end <= sectors)
    }

    /// Reads into guest memory; returns the bytes read, or `None` if the request is outside disk or memory or fails.
    pub fn read(&self, sector: u64, memory: &GuestMemoryMmap, buffers: &[Buffer]) -> Option<u64> {
        let total: u64 = buffers.iter().map(|buffer| u64::from(buffer.length)).sum();
        if !Self::in_range(sector, total, self.sectors) {
            return None;
        }
        let in_file = self.in_file.saturating_sub(sector).saturating_mul(SECTOR);
        if total <= in_file && in_file > 0 {
            return self.read_file(sector, memory, buffers);
        }
        let (stored, behind) = split(buffers, in_file);
        if !stored.is_empty() {
            self.read_file(sector, memory, &stored)?;
        }
        behind.iter().try_for_each(|buffer| zero(memory, buffer))?;
        Some(total)
    }

    fn read_file(&self, sector: u64, memory: &GuestMemoryMmap, buffers: &[Buffer]) -> Option<u64> {
        self.transfer(sector, memory, buffers, |fd, list, offset| {
            // SAFETY: every element is a range of live guest memory, which the guest shares and races with as it
            // likes; no Rust reference to it exists.
            unsafe { libc::preadv(fd, list.as_ptr(), list.len() as i32, offset) }
        })
    }

    /// Writes from guest memory; otherwise as [`FileBackend::read`].
    pub fn write(&self, sector: u64, memory: &GuestMemoryMmap, buffers: &[Buffer]) -> Option<u64> {
        if self.read_only {
            return None;
        }
        self.transfer(sector, memory, buffers, |fd, list, offset| {
            // SAFETY: as for reading.
            unsafe { libc::pwritev(fd, list.as_ptr(), list.len() as i32, offset) }
        })
    }

    fn transfer(
        &self,
        sector: u64,
        memory: &GuestMemoryMmap,
        buffers: &[Buffer],
        call: impl Fn(i32, &[libc::iovec], libc::off_t) -> isize,
    ) -> Option<u64> {
        let total: u64 = buffers.iter().map(|buffer| u64::from(buffer.length)).sum();
        if !Self::in_range(sector, total, self.in_file) {
            return None;
        }
        let file = self.file.as_ref()?.as_raw_fd();
        let list = iovecs(memory, buffers)?;
        let mut rest: Vec<libc::iovec> = list;
        let mut offset = sector.checked_mul(SECTOR)?;
        let mut left = total;
        while left > 0 {
            let done = call(
                file,
                rest.get(..rest.len().min(1024))?,
                i64::try_from(offset).ok()?,
            );
            let done = match u64::try_from(done) {
                // The end of the file before the end of the disk: it was truncated under us.
                Ok(0) => return None,
                Ok(done) => done,
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return None,
            };
            offset = offset.checked_add(done)?;
            left = left.checked_sub(done)?;
            advance(&mut rest, done);
        }
        Some(total)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As `fdatasync(2)`.
    pub fn flush(&self) -> io::Result<()> {
        match &self.file {
            Some(file) if !self.read_only => file.sync_data(),
            _ => Ok(()),
        }
    }

    /// Gives the host back what a range takes of its disk; it reads as zeros then. `None` if the range is not within the file, or the
    /// host refuses; on a file system that cannot do it the range stays as it is, which a guest must expect (5.2.6.2).
    pub fn discard(&self, sector: u64, sectors: u64) -> Option<()> {
        let bytes = sectors.checked_mul(SECTOR)?;
        if self.read_only || !Self::in_range(sector, bytes, self.in_file) {
            return None;
        }
        let file = self.file.as_ref()?;
        if bytes == 0 {
            return Some(());
        }
        // This mode alone is what the filter of system calls lets through.
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(file, mode, sector.saturating_mul(SECTOR), bytes)
        }) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Some(()),
            Err(_) => None,
        }
    }
}

/// How many sectors a file has, or how many bytes, if these are no whole sectors or none.
fn sectors_of(file: &File) -> io::Result<Result<u64, u64>> {
    let mut file = file;
    let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    Ok(if bytes == 0 || bytes % SECTOR != 0 {
        Err(bytes)
    } else {
        Ok(bytes / SECTOR)
    })
}

/// The buffers of the first `bytes` bytes, and those of the rest.
fn split(buffers: &[Buffer], bytes: u64) -> (Vec<Buffer>, Vec<Buffer>) {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let mut left = bytes;
    for buffer in buffers {
        // No more than the buffer's own length, which has 32 bits.
        let part = left.min(u64::from(buffer.length)) as u32;
        left = left.saturating_sub(u64::from(part));
        if part > 0 {
            first.push(Buffer {
                address: buffer.address,
                length: part,
            });
        }
        if part < buffer.length {
            rest.push(Buffer {
                // One that leaves the address space is refused where it is written to.
                address: vm_memory::GuestAddress(buffer.address.0.saturating_add(u64::from(part))),
                length: buffer.length.saturating_sub(part),
            });
        }
    }
    (first, rest)
}

/// Writes zeros to a buffer; `None` if it is not in memory.
fn zero(memory: &GuestMemoryMmap, buffer: &Buffer) -> Option<()> {
    let (mut address, mut left) = (buffer.address, buffer.length as usize);
    while left > 0 {
        let part = left.min(ZEROS.len());
        memory.write_slice(ZEROS.get(..part)?, address).ok()?;
        left = left.saturating_sub(part);
        if left > 0 {
            address = address.checked_add(part as u64)?;
        }
    }
    Some(())
}

/// Drops the first `done` bytes from a list of ranges.
fn advance(list: &mut Vec<libc::iovec>, done: u64) {
    let mut done = usize::try_from(done).unwrap_or(usize::MAX);
    let mut whole = 0usize;
    for entry in list.iter_mut() {
        if done >= entry.iov_len {
            done = done.saturating_sub(entry.iov_len);
            whole = whole.saturating_add(1);
        } else {
            entry.iov_base = entry.iov_base.cast::<u8>().wrapping_add(done).cast();
            entry.iov_len = entry.iov_len.saturating_sub(done);
            break;
        }
    }
    list.drain(..whole);
}
