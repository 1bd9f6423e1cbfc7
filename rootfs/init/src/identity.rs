//! Taking on an identity: the area in which the host writes it, and what of the machine changes with it.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, compiler_fence};

use picovm_guest_protocol::identity::AREA_HEADER;
use picovm_guest_protocol::{Identity, IdentityError, StartFailure, trap};
use rustix::fs::{Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::time::{ClockId, Timespec};

use crate::error::{Attempt, InitError};
use crate::mounts::PLACEHOLDER_HOSTNAME;
use crate::start::failure;
use crate::trap::Trap;

const AREA_SIZE: usize = trap::IDENTITY_PAGES_MAX * trap::PAGE_SIZE;

/// Pages of memory, shared by init and the container stub, in which the host writes a clone's identity.
pub struct IdentityArea {
    start: NonNull<u8>,
}

impl IdentityArea {
    /// Allocates the area, present in memory and locked there.
    pub fn allocate() -> Result<Self, InitError> {
        let attempted = || "allocate the identity area".into();
        // SAFETY: a new anonymous mapping at an address of the kernel's choice; it is never unmapped.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                AREA_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
            )
        }
        .attempt(attempted)?;
        // SAFETY: exactly the mapping made above.
        unsafe { rustix::mm::mlock(start, AREA_SIZE) }.attempt(attempted)?;
        let start = NonNull::new(start.cast())
            .ok_or_else(|| InitError::Machine("the identity area is at address zero".into()))?;
        Ok(Self { start })
    }

    /// Freezes the machine, again and again in the parent, until this is a clone with an identity.
    pub fn freeze_until_cloned(&self, trap: &Trap) -> Result<Identity, StartFailure> {
        loop {
            // Right before every freeze, so that a page that the kernel has moved meanwhile does no harm.
            let pages = self.physical_pages()?;
            trap.announce(&pages);
            trap.freeze();
            match self.take() {
                Err(IdentityError::Absent) => {}
                Err(error) => {
                    return Err(failure("take on the identity", libc::EINVAL, error.to_string()));
                }
                Ok(identity) => return Ok(identity),
            }
        }
    }

    /// Decodes the identity and wipes it from the area.
    fn take(&self) -> Result<Identity, IdentityError> {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the mapping is AREA_SIZE bytes long and lives as long as the process. The host writes to it only
        // while the machine is stopped inside `Trap::freeze`, and no other reference to it exists.
        let area = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), AREA_SIZE) };
        let identity = Identity::decode(area)?;
        let length = area.get(4..AREA_HEADER).and_then(|bytes| bytes.try_into().ok());
        let used = AREA_HEADER.saturating_add(length.map_or(0, u32::from_le_bytes) as usize);
        for byte in area.iter_mut().take(used) {
            // SAFETY: a byte of the area, by reference. Volatile, because nothing reads it afterwards.
            unsafe { std::ptr::write_volatile(byte, 0) };
        }
        compiler_fence(Ordering::SeqCst);
        Ok(identity)
    }

    /// Guest-physical addresses of the area's pages. Touches each, so that this process has them mapped for writing.
    // Page numbers of this process, below 2^55.
    #[allow(clippy::arithmetic_side_effects)]
    fn physical_pages(&self) -> Result<[u64; trap::IDENTITY_PAGES_MAX], StartFailure> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let attempted = "translate the identity area to physical addresses";
        let because = |error: std::io::Error| failure(attempted, error.raw_os_error().unwrap_or(0), error);
        for page in 0..trap::IDENTITY_PAGES_MAX {
            // SAFETY: within the mapping; the first byte of a page of a zeroed area.
            unsafe {
                self.start.as_ptr().add(page * trap::PAGE_SIZE).write_volatile(0);
            }
        }
        let mut entries = [0u8; 8 * trap::IDENTITY_PAGES_MAX];
        let first = (self.start.as_ptr() as usize / trap::PAGE_SIZE * 8) as u64;
        std::fs::File::open("/proc/self/pagemap")
            .and_then(|pagemap| pagemap.read_exact_at(&mut entries, first))
            .map_err(because)?;
        let mut pages = [0; trap::IDENTITY_PAGES_MAX];
        for (page, entry) in pages.iter_mut().zip(entries.chunks_exact(8)) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            if entry & PRESENT == 0 || entry & FRAME == 0 {
                return Err(failure(
                    attempted,
                    0,
                    "a page is not present or its address is hidden",
                ));
            }
            *page = (entry & FRAME) * trap::PAGE_SIZE as u64;
        }
        Ok(pages)
    }
}

/// `RNDADDENTROPY` of `random(4)`: mix in bytes and credit them.
const RND_ADD_ENTROPY: libc::Ioctl = 0x4008_5203;
/// `RNDRESEEDCRNG` of `random(4)`: derive a new key from the pool at once, on every CPU.
const RND_RESEED_CRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info` of `random(4)` with room for one seed.
#[repr(C)]
struct PoolInput {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; 32],
}

/// What of the running kernel becomes the clone's own.
pub struct Machine {
    random: OwnedFd,
}

impl Machine {
    /// Opens what will be needed after the freeze.
    pub fn open() -> Result<Self, InitError> {
        let random = rustix::fs::open("/dev/urandom", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .attempt(|| "open /dev/urandom".into())?;
        Ok(Self { random })
    }

    /// Goes through [`Self::become_clone`] once before the freeze, so that its code, the kernel's and their pages are
    /// warm. The credit given to a worthless seed makes the generator ready (a kernel that patches itself) in the
    /// template and not in each clone; nothing draws secrets from it before a clone has its own seed.
    pub fn rehearse(&self) -> Result<(), StartFailure> {
        let now = rustix::time::clock_gettime(ClockId::Realtime);
        let nanoseconds = u64::try_from(now.tv_sec)
            .unwrap_or_default()
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::try_from(now.tv_nsec).unwrap_or_default());
        let identity = Identity {
            id: "rehearsal".into(),
            hostname: PLACEHOLDER_HOSTNAME.into(),
            entropy: [0; 32],
            realtime_ns: nanoseconds,
            container: Some(crate::rehearsal::spec()),
        };
        let decoded = identity
            .encode(AREA_SIZE)
            .and_then(|bytes| Identity::decode(&bytes))
            .map_err(|error| failure("rehearse the identity", libc::EINVAL, error))?;
        self.become_clone(&decoded)
    }

    /// Seeds the random number generator before anything else, then sets clock and host name.
    pub fn become_clone(&self, identity: &Identity) -> Result<(), StartFailure> {
        self.reseed(&identity.entropy)?;
        let now = Timespec {
            tv_sec: i64::try_from(identity.realtime_ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(identity.realtime_ns % 1_000_000_000).unwrap_or(0),
        };
        rustix::time::clock_settime(ClockId::Realtime, now)
            .map_err(|error| failure("set the clock", error.raw_os_error(), error))?;
        rustix::system::sethostname(identity.hostname.as_bytes())
            .map_err(|error| failure("set the host name", error.raw_os_error(), error))
    }

    fn reseed(&self, entropy: &[u8; 32]) -> Result<(), StartFailure> {
        let mut input = PoolInput {
            entropy_bits: 256,
            size: 32,
            bytes: *entropy,
        };
        let random = self.random.as_raw_fd();
        // SAFETY: the structure is laid out as the ioctl reads it and outlives the call.
        let added = unsafe { libc::ioctl(random, RND_ADD_ENTROPY, &raw const input) };
        let result = if added == 0 {
            // SAFETY: this ioctl takes no argument.
            unsafe { libc::ioctl(random, RND_RESEED_CRNG) }
        } else {
            added
        };
        let error = std::io::Error::last_os_error();
        for byte in &mut input.bytes {
            // SAFETY: a byte of a local array, by reference.
            unsafe { std::ptr::write_volatile(byte, 0) };
        }
        if result == 0 {
            return Ok(());
        }
        Err(failure(
            "seed the random number generator",
            error.raw_os_error().unwrap_or(0),
            error,
        ))
    }
}

/// Lets the process be chosen by the out-of-memory killer as any other (0), or never (-1000).
pub fn set_oom_score(adjustment: i32) -> std::io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/oom_score_adj")
        .and_then(|mut file| file.write_all(adjustment.to_string().as_bytes()))
}
