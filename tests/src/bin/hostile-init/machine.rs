//! The machine as an attacker holds it: device registers, physical memory, and pages of its own whose physical
//! addresses it knows.

use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::FileExt;

use picovm_guest_protocol::trap;
use rustix::mm::{MapFlags, ProtFlags};

/// Guest-physical address of the freeze trap; behind it the windows of the devices (docs/architecture.md).
const REGISTERS: u64 = 0xd000_0000;
/// Bytes that are mapped from there: the trap, all 19 windows that there can be, and four pages behind.
pub const REGISTERS_SIZE: u64 = 24 * PAGE;
/// Where the first window begins.
pub const WINDOWS: u64 = 0x1000;
pub const PAGE: u64 = 0x1000;
/// Pages of the attacker's own.
const PAGES: usize = 108;
/// The first of those in which the identity is written.
const IDENTITY: usize = PAGES - trap::IDENTITY_PAGES_MAX;

/// Copies share everything, so that threads can attack at once.
#[derive(Clone)]
pub struct Machine {
    registers: usize,
    pages: usize,
    physical: Vec<u64>,
    ram_end: u64,
}

fn map(file: Option<&File>, length: usize, at: u64, protection: ProtFlags) -> Result<usize> {
    // SAFETY: new mappings at an address of the kernel's choice, which are never unmapped.
    let mapped = unsafe {
        match file {
            Some(file) => rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                file,
                at,
            )?,
            None => rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED | MapFlags::POPULATE,
            )?,
        }
    };
    Ok(mapped as usize)
}

/// `/dev/mem`, for reading and writing.
pub fn physical_memory() -> Result<File> {
    File::options().read(true).write(true).open("/dev/mem")
}

/// Maps a page of physical memory.
pub fn map_physical(address: u64, protection: ProtFlags) -> Result<usize> {
    map(Some(&physical_memory()?), PAGE as usize, address, protection)
}

impl Machine {
    pub fn open() -> Result<Self> {
        let both = ProtFlags::READ | ProtFlags::WRITE;
        let registers = map(
            Some(&physical_memory()?),
            REGISTERS_SIZE as usize,
            REGISTERS,
            both,
        )?;
        let length = PAGES * PAGE as usize;
        let pages = map(None, length, 0, both)?;
        // SAFETY: exactly the mapping made above.
        unsafe { rustix::mm::mlock(pages as *mut _, length)? };
        let mut machine = Self {
            registers,
            pages,
            physical: Vec::new(),
            ram_end: ram_end()?,
        };
        let pagemap = File::open("/proc/self/pagemap")?;
        for page in 0..PAGES {
            machine.put(page, 0, &[0]);
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (pages as u64 / PAGE + page as u64) * 8)?;
            machine
                .physical
                .push((u64::from_le_bytes(entry) & ((1 << 55) - 1)) * PAGE);
        }
        Ok(machine)
    }

    /// Where RAM ends.
    pub fn ram_end(&self) -> u64 {
        self.ram_end
    }

    /// Guest-physical address of one of the attacker's pages.
    pub fn address(&self, page: usize) -> u64 {
        self.physical[page]
    }

    /// Guest-physical addresses of the identity area.
    pub fn identity_pages(&self) -> &[u64] {
        &self.physical[IDENTITY..]
    }

    /// The identity area, as the host has written it.
    pub fn identity(&self) -> Vec<u8> {
        (IDENTITY..PAGES)
            .flat_map(|page| self.get(page, 0, PAGE as usize))
            .collect()
    }

    /// Where a page of the attacker's own is mapped, from an offset on for `length` bytes.
    fn own(&self, page: usize, offset: usize, length: usize) -> *mut u8 {
        assert!(page < PAGES && offset + length <= PAGE as usize);
        (self.pages + page * PAGE as usize + offset) as *mut u8
    }

    pub fn put(&self, page: usize, offset: usize, bytes: &[u8]) {
        let start = self.own(page, offset, bytes.len());
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: within a mapping that is never unmapped, as `own` has checked. Volatile, for devices and other
            // threads see it.
            unsafe { start.add(index).write_volatile(*byte) };
        }
    }

    pub fn get(&self, page: usize, offset: usize, length: usize) -> Vec<u8> {
        let start = self.own(page, offset, length);
        // SAFETY: as for `put`.
        (0..length)
            .map(|index| unsafe { start.add(index).read_volatile() })
            .collect()
    }

    /// Where registers are mapped, from an offset on for `width` bytes.
    pub fn register(&self, offset: u64, width: u64) -> *mut u8 {
        assert!(offset + width <= REGISTERS_SIZE);
        (self.registers as u64 + offset) as *mut u8
    }

    /// Writes the low bytes of `value` at an offset from the trap on: 1, 2, 4 or 8 of them, aligned or not.
    pub fn poke(&self, offset: u64, width: u64, value: u64) {
        let at = self.register(offset, width);
        // SAFETY: within the mapped registers, as `register` has checked; x86 takes unaligned accesses, and `asm` makes no
        // assumption of alignment.
        unsafe {
            match width {
                1 => std::arch::asm!("mov [{}], {}", in(reg) at, in(reg_byte) value as u8),
                2 => std::arch::asm!("mov [{}], {:x}", in(reg) at, in(reg) value as u16),
                4 => std::arch::asm!("mov [{}], {:e}", in(reg) at, in(reg) value as u32),
                _ => std::arch::asm!("mov [{}], {}", in(reg) at, in(reg) value),
            }
        }
    }

    /// Reads, likewise.
    pub fn peek(&self, offset: u64, width: u64) -> u64 {
        let at = self.register(offset, width);
        let value: u64;
        // SAFETY: as for `poke`.
        unsafe {
            match width {
                1 => std::arch::asm!("movzx {:e}, byte ptr [{}]", out(reg) value, in(reg) at),
                2 => std::arch::asm!("movzx {:e}, word ptr [{}]", out(reg) value, in(reg) at),
                4 => std::arch::asm!("mov {:e}, [{}]", out(reg) value, in(reg) at),
                _ => std::arch::asm!("mov {}, [{}]", out(reg) value, in(reg) at),
            }
        }
        value
    }
}

/// Where the last range of RAM ends, from `/proc/iomem`.
fn ram_end() -> Result<u64> {
    let iomem = std::fs::read_to_string("/proc/iomem")?;
    iomem
        .lines()
        .filter(|line| line.ends_with("System RAM"))
        .filter_map(|line| line.split([' ', '-']).nth(1))
        .filter_map(|end| u64::from_str_radix(end, 16).ok())
        .max()
        .map(|last| last + 1)
        .ok_or_else(|| Error::other("/proc/iomem names no RAM"))
}
