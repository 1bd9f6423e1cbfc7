//! Guest memory: anonymous while a machine boots, a private mapping of the template's memory file in a clone.

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

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::mmap::{GuestRegionMmap, MmapRegion, MmapRegionBuilder};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use crate::arch::layout;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Too little or too much.
    #[error(
        "a machine of {mib} MiB cannot be made: guest memory is {} to {} MiB",
        layout::MEMORY_MIN_MIB,
        layout::MEMORY_MAX_MIB
    )]
    Size {
        /// What was asked for.
        mib: u64,
    },
    /// More than this host has.
    #[error("a machine of {mib} MiB cannot be made: this host has {host_mib} MiB of memory in all")]
    Host {
        /// What was asked for.
        mib: u64,
        /// Memory of the host.
        host_mib: u64,
    },
    /// The host refused.
    #[error("cannot map {mib} MiB of guest memory: {reason}")]
    Map {
        /// What was asked for.
        mib: u64,
        /// What the host says.
        reason: String,
    },
}

/// Checks a size in MiB against what a machine can have and what this host has.
pub fn check_size(mib: u64) -> Result<(), MemoryError> {
    if !(layout::MEMORY_MIN_MIB..=layout::MEMORY_MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size { mib });
    }
    let info = rustix::system::sysinfo();
    let host_mib = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) >> 20;
    if mib > host_mib {
        return Err(MemoryError::Host { mib, host_mib });
    }
    Ok(())
}

/// Zeroed memory of `mib` MiB, backed by nothing until it is touched, then by huge pages where the host has them: a
/// boot touches some 20 MiB for the first time, and each page of 4 KiB costs a fault of the host and one of KVM.
pub fn anonymous(mib: u64) -> Result<GuestMemoryMmap, MemoryError> {
    map(mib, None)
}

/// A private, copy-on-write mapping of a template's memory file, low range first.
pub fn private(mib: u64, file: &File) -> Result<GuestMemoryMmap, MemoryError> {
    map(mib, Some(file))
}

/// Writes bytes to where they lie in a memory file: the ranges of memory follow one another there.
pub fn write_at_offset(memory: &GuestMemoryMmap, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
    let mut region_start = 0u64;
    for region in memory.iter() {
        let region_end = region_start.saturating_add(region.len());
        let end = offset.saturating_add(bytes.len() as u64);
        let (from, to) = (offset.max(region_start), end.min(region_end));
        if from < to {
            let part = bytes
                .get(from.saturating_sub(offset) as usize..to.saturating_sub(offset) as usize)
                .unwrap_or_default();
            let place = MemoryRegionAddress(from.saturating_sub(region_start));
            region
                .write_slice(part, place)
                .map_err(|error| MemoryError::Map {
                    mib: region.len() >> 20,
                    reason: error.to_string(),
                })?;
        }
        region_start = region_end;
    }
    Ok(())
}

/// Bytes of a large page: what one entry of the second level of page tables maps.
pub const LARGE_PAGE: u64 = 2 << 20;

fn map(mib: u64, file: Option<&File>) -> Result<GuestMemoryMmap, MemoryError> {
    let failed = |reason: String| MemoryError::Map { mib, reason };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, bytes) in layout::memory_ranges(mib << 20) {
        let size = usize::try_from(bytes).map_err(|error| failed(error.to_string()))?;
        // MAP_NORESERVE: most of a clone's memory is never written, so no swap is set aside for it.
        // Anonymous at first in any case: the kernel aligns that to large pages, as it does only with some files.
        let region = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| failed(error.to_string()))?;
        match file {
            Some(file) => map_file(&region, file, offset).map_err(|error| failed(error.to_string()))?,
            None => {
                // SAFETY: the range is the mapping just made. The call is advice: it changes no content, and a host that
                // has no huge pages refuses it, which only costs time.
                unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
            }
        }
        regions.push(
            GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| failed("the range leaves the address space".into()))?,
        );
        offset = offset.saturating_add(bytes);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| failed(error.to_string()))
}

/// Puts a private mapping of a file, from `offset`, in the place of an anonymous one.
fn map_file(region: &MmapRegion, file: &File, offset: u64) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: replaces exactly the mapping that the region owns and nobody has looked at yet; the region unmaps what is
    // there when it is dropped.
    let mapped = unsafe {
        libc::mmap(
            region.as_ptr().cast(),
            region.size(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_to_where_they_lie_in_a_memory_file_past_the_hole_of_the_devices() {
        let mib = (layout::memory_ranges(8 << 30)[0].1 >> 20) + 2;
        let memory = anonymous(mib).unwrap();
        let [(_, low), (high, _)] = layout::memory_ranges(mib << 20)[..] else {
            panic!("no hole");
        };
        // Two bytes on each side of it.
        write_at_offset(&memory, low - 2, b"abcd").unwrap();
        let read = |address| memory.read_obj::<[u8; 2]>(GuestAddress(address)).unwrap();
        assert_eq!((&read(low - 2), &read(high)), (b"ab", b"cd"));
        // What lies behind memory goes nowhere.
        write_at_offset(&memory, mib << 20, b"x").unwrap();
    }

    #[test]
    fn sizes_out_of_range_are_refused_with_the_range() {
        assert!(
            check_size(0)
                .unwrap_err()
                .to_string()
                .contains("32 to 1048576 MiB")
        );
        assert!(check_size(31).is_err());
        assert!(check_size(u64::MAX).is_err());
        assert!(matches!(
            check_size(layout::MEMORY_MAX_MIB),
            Err(MemoryError::Host { .. })
        ));
        assert!(check_size(64).is_ok());
    }
}
