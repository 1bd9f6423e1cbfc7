//! Large pages under a template's memory: what its clones only read is put into pages of 2 MiB in the host's page cache, so
//! that a clone maps such a block by one fault, in the host's page tables and in KVM's, and not by one for each 4 KiB.
//!
//! It is advice. A host without it (`MADV_COLLAPSE` is of Linux 6.1; a file that is not on a tmpfs needs
//! `CONFIG_READ_ONLY_THP_FOR_FS`) serves the same content in small pages.

// Sizes of regions and chunks of this process, none of them from a guest or a file.
#![allow(clippy::arithmetic_side_effects)]

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::memory::LARGE_PAGE;
use crate::working_set::WorkingSet;

/// `MADV_COLLAPSE` (madvise(2)).
const MADV_COLLAPSE: libc::c_int = 25;

/// Puts the blocks of a memory file that a start reads and does not write into large pages, for as long as the file stays
/// in the page cache. Gives the blocks that are so now.
pub(super) fn collapse(memory: &File, set: &WorkingSet) -> Vec<u64> {
    let mut blocks = set.read_only_blocks();
    blocks.retain(|&block| collapse_block(memory, block).is_some());
    blocks
}

fn collapse_block(memory: &File, block: u64) -> Option<()> {
    let offset = libc::off_t::try_from(block.checked_mul(LARGE_PAGE)?).ok()?;
    let size = usize::try_from(LARGE_PAGE).ok()?;
    // Twice the size, to have an aligned block in it.
    // SAFETY: a new mapping at an address of the kernel's choice, unmapped below.
    let area = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            2 * size,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if area == libc::MAP_FAILED {
        return None;
    }
    let at = area.map_addr(|address| address.next_multiple_of(size));
    // SAFETY: replaces a part of the mapping just made, which nothing else knows of; the advice changes no content.
    let collapsed = unsafe {
        let block = libc::mmap(
            at,
            size,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            memory.as_raw_fd(),
            offset,
        );
        block != libc::MAP_FAILED && libc::madvise(block, size, MADV_COLLAPSE) == 0
    };
    // SAFETY: the area mapped above.
    unsafe { libc::munmap(area, 2 * size) };
    collapsed.then_some(())
}
