//! Guest memory between pages that nobody may touch, and an interrupt line that leads nowhere.

use std::sync::Arc;

use picovm_vmm::devices::interrupt::InterruptLine;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of guest memory.
pub const MEMORY: usize = 128 << 10;
/// Bytes on either side of it in which any access is the end.
const GUARD: usize = 1 << 20;

/// Guest memory from address 0, filled with zeros. It is mapped once for the thread and never freed.
pub fn memory() -> GuestMemoryMmap {
    thread_local! {
        static MAPPED: GuestMemoryMmap = map();
    }
    let memory = MAPPED.with(GuestMemoryMmap::clone);
    memory
        .write_slice(&[0; MEMORY], GuestAddress(0))
        .expect("the range is the whole memory");
    memory
}

fn map() -> GuestMemoryMmap {
    // SAFETY: a fresh mapping where the kernel likes, and rights of a part of it: nothing else is there.
    let start = unsafe {
        let all = rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            MEMORY + 2 * GUARD,
            ProtFlags::empty(),
            MapFlags::PRIVATE,
        )
        .expect("map guest memory");
        let start = all.cast::<u8>().wrapping_add(GUARD);
        rustix::mm::mprotect(start.cast(), MEMORY, MprotectFlags::READ | MprotectFlags::WRITE)
            .expect("open guest memory");
        start
    };
    let protection = (ProtFlags::READ | ProtFlags::WRITE).bits() as i32;
    // SAFETY: the range is mapped with these rights and stays so to the end of the process.
    let region = unsafe {
        MmapRegion::build_raw(start, MEMORY, protection, MapFlags::PRIVATE.bits() as i32)
            .expect("the range is aligned")
    };
    let region = GuestRegionMmap::new(region, GuestAddress(0)).expect("address 0 leaves room");
    GuestMemoryMmap::from_regions(vec![region]).expect("one region overlaps nothing")
}

struct NoLine;

impl InterruptLine for NoLine {
    fn pulse(&self) {}
}

/// A line that leads nowhere.
pub fn line() -> Arc<dyn InterruptLine> {
    Arc::new(NoLine)
}
