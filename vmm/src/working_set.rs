//! The working set: which pages the start of a container touches, recorded once from a clone that has run one, so that
//! every other clone can have them before it needs them.
//!
//! It is advice. A page too many costs memory, a page too few a fault; neither changes what a guest sees.

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

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::memory::LARGE_PAGE;
use crate::template::checksum;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Pages of a large page.
const LARGE_PAGE_PAGES: u64 = LARGE_PAGE / PAGE;
/// A large page pays where at least so many of its pages are read.
const READ_MIN: u64 = 16;
/// Entries of `/proc/self/pagemap` that are read at once.
const ENTRIES: usize = 8192;
/// Entry of `/proc/self/pagemap` (the kernel's `admin-guide/mm/pagemap.rst`): the page is present, is swapped out, is
/// that of a file or shared.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Pages in a row, by their number in the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Number of the first.
    pub first: u64,
    /// How many, at least 1.
    pub count: u64,
}

/// Pages that a start touches, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Written: each clone has its own.
    pub written: Vec<Pages>,
    /// Only read: shared. More than were read where the host maps them in blocks; see [`watch`].
    pub read: Vec<Pages>,
}

fn push(list: &mut Vec<Pages>, page: u64) {
    match list.last_mut() {
        Some(last) if last.first.saturating_add(last.count) == page => {
            last.count = last.count.saturating_add(1);
        }
        _ => list.push(Pages {
            first: page,
            count: 1,
        }),
    }
}

fn total(list: &[Pages]) -> u64 {
    list.iter().fold(0, |sum, pages| sum.saturating_add(pages.count))
}

/// Mappings that [`watch`] leaves to the process.
const LEFT: usize = 1024;

/// Makes [`WorkingSet::of`] tell exactly which pages of a clone's memory are touched from now on: without it, the host maps
/// up to 16 pages around one that is read. It costs a mapping of its own for each page that the template's memory file holds, so it is
/// for a clone that is run to be looked at. Where the host has not so many (`vm.max_map_count`) it is exact as far as they go, and leaves
/// 1,024 of them to the process.
///
/// # Errors
/// As `lseek(2)`, by which the file tells what it holds. `mincore(2)` would tell only its owner.
// Sizes and addresses of regions of this process.
#[allow(clippy::arithmetic_side_effects)]
pub fn watch(memory: &GuestMemoryMmap, file: &File) -> io::Result<()> {
    let bytes = memory.iter().fold(0, |sum, region| sum + region.len());
    let held = checksum::data_ranges(file, bytes)?;
    let advise = |address: *mut u8, advice| {
        // SAFETY: a page of a live mapping of `memory`. The call changes no content.
        unsafe { libc::madvise(address.cast(), PAGE as usize, advice) == 0 }
    };
    let mut apart = Vec::new();
    let mut begin = 0;
    for region in memory.iter() {
        let end = begin + region.len();
        for range in &held {
            let (from, to) = (range.start.max(begin) / PAGE, range.end.min(end).div_ceil(PAGE));
            // The host looks around within a mapping only, and does not join neighbours that differ: so every other one is
            // to be left out of a core dump.
            for page in (from..to).filter(|page| page % 2 == 0) {
                let address = region.as_ptr().wrapping_add((page * PAGE - begin) as usize);
                if advise(address, libc::MADV_DONTDUMP) {
                    apart.push(address);
                    continue;
                }
                // There are none left, not even for the stack of one more thread. Each page that is like its neighbours again
                // frees two.
                for &page in apart.iter().rev().take(LEFT / 2) {
                    advise(page, libc::MADV_DODUMP);
                }
                return Ok(());
            }
        }
        begin = end;
    }
    Ok(())
}

impl WorkingSet {
    /// Looks which pages of a clone's memory are there by now.
    ///
    /// # Errors
    /// As reading `/proc/self/pagemap`.
    pub fn of(memory: &GuestMemoryMmap) -> io::Result<Self> {
        Self::by(&File::open("/proc/self/pagemap")?, memory)
    }

    /// The same from an open `/proc/self/pagemap`.
    ///
    /// # Errors
    /// As reading it.
    // As for `watch`.
    #[allow(clippy::arithmetic_side_effects)]
    pub fn by(pagemap: &File, memory: &GuestMemoryMmap) -> io::Result<Self> {
        let mut set = Self::default();
        let mut buffer = vec![0u8; 8 * ENTRIES];
        let mut page = 0;
        for region in memory.iter() {
            let mut left = region.len() / PAGE;
            let mut at = region.as_ptr() as u64 / PAGE;
            while left > 0 {
                let count = left.min(ENTRIES as u64);
                let bytes = buffer.get_mut(..8 * count as usize).unwrap_or_default();
                pagemap.read_exact_at(bytes, 8 * at)?;
                for entry in bytes.chunks_exact(8) {
                    let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                    if entry & SWAPPED != 0 || entry & (PRESENT | OF_FILE) == PRESENT {
                        push(&mut set.written, page);
                    } else if entry & PRESENT != 0 {
                        push(&mut set.read, page);
                    }
                    page += 1;
                }
                at += count;
                left -= count;
            }
        }
        Ok(set)
    }

    /// The pages of both; what one of them writes is written.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let pages = |lists: [&[Pages]; 2]| -> BTreeSet<u64> {
            lists
                .into_iter()
                .flatten()
                .flat_map(|pages| pages.first..pages.first.saturating_add(pages.count))
                .collect()
        };
        let written = pages([&self.written, &other.written]);
        let mut set = Self::default();
        for page in pages([&self.read, &other.read]).difference(&written) {
            push(&mut set.read, *page);
        }
        for page in &written {
            push(&mut set.written, *page);
        }
        set
    }

    /// Number of pages written.
    #[must_use]
    pub fn written_pages(&self) -> u64 {
        total(&self.written)
    }

    /// Number of pages only read.
    #[must_use]
    pub fn read_pages(&self) -> u64 {
        total(&self.read)
    }

    /// Whether every page is one of a memory of so many MiB, and both lists are in ascending order with no page twice: a
    /// list from a file costs no more than the memory is large.
    #[must_use]
    pub fn fits(&self, memory_mib: u64) -> bool {
        let pages = memory_mib.saturating_mul((1 << 20) / PAGE);
        [&self.written, &self.read].into_iter().all(|list| {
            let mut behind = 0;
            list.iter().all(|range| {
                let end = range.first.checked_add(range.count);
                let fits = range.count > 0 && range.first >= behind && end.is_some_and(|end| end <= pages);
                behind = end.unwrap_or(pages);
                fits
            })
        })
    }

    /// Blocks of the size of a large page of which a start reads much and writes nothing, by their number in the memory file.
    #[must_use]
    pub fn read_only_blocks(&self) -> Vec<u64> {
        let mut read: BTreeMap<u64, u64> = BTreeMap::new();
        for pages in &self.read {
            for page in pages.first..pages.first.saturating_add(pages.count) {
                let pages = read.entry(page / LARGE_PAGE_PAGES).or_default();
                *pages = pages.saturating_add(1);
            }
        }
        for pages in &self.written {
            for page in pages.first..pages.first.saturating_add(pages.count) {
                read.remove(&(page / LARGE_PAGE_PAGES));
            }
        }
        read.into_iter()
            .filter(|(_, pages)| *pages >= READ_MIN)
            .map(|(block, _)| block)
            .collect()
    }

    /// These blocks, read as a whole.
    #[must_use]
    pub(crate) fn of_read_blocks(blocks: &[u64]) -> Self {
        let read = blocks.iter().map(|block| Pages {
            first: block.saturating_mul(LARGE_PAGE_PAGES),
            count: LARGE_PAGE_PAGES,
        });
        Self {
            written: Vec::new(),
            read: read.collect(),
        }
    }

    /// Makes the pages that will be written present in a clone's memory, as copies of its own. Faulted in one by one, each
    /// costs up to three faults of the host: one to read it, one to copy it, one to map the copy. A kernel before 5.14
    /// cannot, and a page outside memory is left out: what is missing is faulted in when it is needed.
    pub fn populate_written(&self, memory: &GuestMemoryMmap) {
        populate(memory, &self.written, libc::MADV_POPULATE_WRITE);
    }

    /// Makes the pages that will only be read present in a clone's memory; otherwise as [`WorkingSet::populate_written`].
    pub fn populate_read(&self, memory: &GuestMemoryMmap) {
        populate(memory, &self.read, libc::MADV_POPULATE_READ);
    }

    /// The pages as guest-physical ranges, address and size in bytes: those written, then those read.
    pub(crate) fn guest_ranges(&self, memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
        self.written
            .iter()
            .chain(&self.read)
            .flat_map(|pages| places(memory, *pages))
            .map(|(guest, _, bytes)| (guest, bytes as u64))
            .collect()
    }
}

fn populate(memory: &GuestMemoryMmap, list: &[Pages], advice: libc::c_int) {
    for pages in list {
        for (_, address, bytes) in places(memory, *pages) {
            // SAFETY: the range lies in a live mapping of guest memory. The call makes its pages present and changes no
            // content.
            unsafe { libc::madvise(address.cast(), bytes, advice) };
        }
    }
}

/// Where pages of the memory file lie: guest-physical address, address in this process, bytes. One range for each region
/// of memory that they lie in.
fn places(memory: &GuestMemoryMmap, pages: Pages) -> Vec<(u64, *mut u8, usize)> {
    let mut found = Vec::new();
    let start = pages.first.saturating_mul(PAGE);
    let end = start.saturating_add(pages.count.saturating_mul(PAGE));
    let mut region_start = 0u64;
    for region in memory.iter() {
        let region_end = region_start.saturating_add(region.len());
        let (from, to) = (start.max(region_start), end.min(region_end));
        if from < to {
            let offset = from.saturating_sub(region_start);
            let address = region.as_ptr().wrapping_add(offset as usize);
            found.push((
                region.start_addr().0.saturating_add(offset),
                address,
                to.saturating_sub(from) as usize,
            ));
        }
        region_start = region_end;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestMemoryMmap {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        crate::memory::private(32, &file).unwrap()
    }

    #[test]
    fn what_was_written_is_told_from_what_was_read_and_what_was_not_touched() {
        let memory = memory();
        for page in [3u64, 4, 5, 900] {
            memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let _: u8 = memory.read_obj(GuestAddress(2000 * PAGE)).unwrap();
        let set = WorkingSet::of(&memory).unwrap();
        let written = [Pages { first: 3, count: 3 }, Pages { first: 900, count: 1 }];
        assert_eq!(set.written, written);
        assert!(
            set.read
                .iter()
                .any(|pages| (pages.first..pages.first + pages.count).contains(&2000))
        );
        assert!(set.read_pages() < 100, "{}", set.read_pages());
        assert!(set.fits(32) && !set.fits(3));
    }

    #[test]
    fn what_is_watched_is_told_exactly() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 1 << 20], 4 << 20).unwrap();
        file.set_len(32 << 20).unwrap();
        let memory = crate::memory::private(32, &file).unwrap();
        watch(&memory, &file).unwrap();
        let pages = [1024u64, 1027, 1028, 1279];
        for page in pages {
            let _: u8 = memory.read_obj(GuestAddress(page * PAGE)).unwrap();
        }
        memory.write_obj(1u8, GuestAddress(1100 * PAGE)).unwrap();
        let set = WorkingSet::of(&memory).unwrap();
        assert_eq!(set.read_pages(), pages.len() as u64, "{:?}", set.read);
        assert_eq!(
            set.written,
            [Pages {
                first: 1100,
                count: 1
            }]
        );
    }

    #[test]
    fn what_one_of_two_writes_their_union_writes() {
        let list = |ranges: &[(u64, u64)]| -> Vec<Pages> {
            ranges
                .iter()
                .map(|&(first, count)| Pages { first, count })
                .collect()
        };
        let one = WorkingSet {
            written: list(&[(1, 2), (9, 1)]),
            read: list(&[(3, 3)]),
        };
        let other = WorkingSet {
            written: list(&[(3, 1)]),
            read: list(&[(1, 1), (7, 1)]),
        };
        let both = one.union(&other);
        assert_eq!(both.written, list(&[(1, 3), (9, 1)]));
        assert_eq!(both.read, list(&[(4, 2), (7, 1)]));
        assert_eq!(both, other.union(&one));
    }

    #[test]
    fn populated_pages_are_there_and_hold_what_the_file_holds() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(b"seven", 7 * PAGE).unwrap();
        let memory = crate::memory::private(32, &file).unwrap();
        let set = WorkingSet {
            written: vec![Pages { first: 7, count: 2 }],
            read: vec![Pages { first: 100, count: 1 }],
        };
        set.populate_written(&memory);
        set.populate_read(&memory);
        let there = WorkingSet::of(&memory).unwrap();
        assert_eq!(there.written, set.written);
        assert!(there.read_pages() >= 1);
        let mut word = [0u8; 5];
        memory.read_slice(&mut word, GuestAddress(7 * PAGE)).unwrap();
        assert_eq!(&word, b"seven");
    }

    /// A file of a few bytes for each would otherwise have every page of memory looked at as often as it has room.
    #[test]
    fn pages_that_come_again_or_out_of_order_fit_no_memory() {
        let list = |ranges: &[(u64, u64)]| -> Vec<Pages> {
            ranges
                .iter()
                .map(|&(first, count)| Pages { first, count })
                .collect()
        };
        for (ranges, fits) in [
            (&[(0, 4), (4, 4), (9, 1)][..], true),
            (&[(0, 8192), (0, 8192)], false),
            (&[(0, 4), (3, 4)], false),
            (&[(9, 1), (0, 4)], false),
        ] {
            let written = WorkingSet {
                written: list(ranges),
                read: list(&[(2, 1)]),
            };
            let read = WorkingSet {
                written: list(&[(2, 1)]),
                read: list(ranges),
            };
            assert_eq!((written.fits(32), read.fits(32)), (fits, fits), "{ranges:?}");
        }
    }

    #[test]
    fn pages_that_no_memory_has_are_left_out() {
        let memory = memory();
        for (first, count) in [(u64::MAX, u64::MAX), (0, u64::MAX), (1 << 52, 1), (8192, 1)] {
            let set = WorkingSet {
                written: vec![Pages { first, count }],
                ..WorkingSet::default()
            };
            assert!(!set.fits(32), "{first} {count}");
            for (guest, bytes) in set.guest_ranges(&memory) {
                assert!(guest + bytes <= 32 << 20);
            }
        }
        let none = WorkingSet {
            read: vec![Pages { first: 0, count: 0 }],
            ..WorkingSet::default()
        };
        assert!(!none.fits(32));
    }
}
