//! Checksums of a template's files.
//!
//! The memory's covers its chunks that are not all zero, each with its place: it costs what the memory holds and not
//! what it spans, and a hole is the same as zeros.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

/// Bytes of a chunk of memory.
pub const CHUNK: usize = 64 << 10;

/// Running checksum of guest memory.
pub struct MemoryChecksum {
    hasher: blake3::Hasher,
}

impl MemoryChecksum {
    pub fn new(bytes: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes.to_le_bytes());
        Self { hasher }
    }

    /// Takes the next chunk that is not all zero.
    pub fn chunk(&mut self, index: u64, bytes: &[u8]) {
        self.hasher.update(&index.to_le_bytes());
        self.hasher.update(bytes);
    }

    pub fn finish(self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

/// Checksum of a small file's bytes, in hexadecimal.
pub fn of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

pub fn is_zero(bytes: &[u8]) -> bool {
    // Words, so that the compiler compares many bytes at once.
    let (words, tail) = bytes.as_chunks::<16>();
    tail.iter().all(|byte| *byte == 0) && words.iter().all(|word| u128::from_ne_bytes(*word) == 0)
}

/// Where a memory file holds data, in bytes: the rest are holes. In pieces as the file system keeps them.
pub fn data_ranges(file: &File, bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut offset = 0u64;
    while offset < bytes {
        let data = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(data) if data < bytes => data,
            // No data behind the offset: the rest is a hole.
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(bytes);
        ranges.push(data..hole);
        offset = hole.max(data.saturating_add(1));
    }
    Ok(ranges)
}

/// Chunks of a memory file that hold data, by their index: the others are holes.
pub fn data_chunks(file: &File, bytes: u64) -> io::Result<BTreeSet<u64>> {
    let chunks = data_ranges(file, bytes)?;
    Ok(chunks
        .iter()
        .flat_map(|data| data.start.div_euclid(CHUNK as u64)..data.end.div_ceil(CHUNK as u64))
        .collect())
}

/// Reads a memory file as it is on disk, holes skipped, and returns its checksum.
pub fn of_memory(file: &File, bytes: u64) -> io::Result<String> {
    of_memory_and_data(file, bytes).map(|(checksum, _)| checksum)
}

/// Bytes of a page.
const PAGE: usize = 4096;

/// The same, and the bytes of pages that are not all zero.
pub fn of_memory_and_data(file: &File, bytes: u64) -> io::Result<(String, u64)> {
    let mut data = 0u64;
    let mut checksum = MemoryChecksum::new(bytes);
    let mut buffer = vec![0u8; CHUNK];
    for index in data_chunks(file, bytes)? {
        let start = index.saturating_mul(CHUNK as u64);
        let length = usize::try_from(bytes.saturating_sub(start))
            .unwrap_or(CHUNK)
            .min(CHUNK);
        let chunk = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(chunk, start)?;
        if !is_zero(chunk) {
            checksum.chunk(index, chunk);
            let pages = chunk.chunks(PAGE).filter(|page| !is_zero(page));
            data = pages.fold(data, |sum, page| sum.saturating_add(page.len() as u64));
        }
    }
    Ok((checksum.finish(), data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    #[test]
    fn zeros_are_found_at_any_length() {
        for length in [0, 1, 15, 16, 17, 4096] {
            let mut bytes = vec![0u8; length];
            assert!(is_zero(&bytes));
            if let Some(last) = bytes.last_mut() {
                *last = 1;
                assert!(!is_zero(&bytes));
            }
        }
    }

    #[test]
    fn a_hole_and_zeros_have_the_same_checksum_and_data_its_place() {
        let size = 16 * CHUNK as u64;
        let file = |write_at: &[(u64, &[u8])]| {
            let mut file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            for (offset, bytes) in write_at {
                file.seek(io::SeekFrom::Start(*offset)).unwrap();
                file.write_all(bytes).unwrap();
            }
            of_memory(&file, size).unwrap()
        };
        assert_eq!(file(&[]), file(&[(5, &[0; 100])]));
        assert_ne!(file(&[(5, b"x")]), file(&[]));
        assert_ne!(file(&[(5, b"x")]), file(&[(5 + CHUNK as u64, b"x")]));
    }

    #[test]
    fn the_chunks_of_a_file_that_hold_data_are_found() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * CHUNK as u64).unwrap();
        assert!(data_chunks(&file, 64 * CHUNK as u64).unwrap().is_empty());
        for chunk in [3, 4, 63] {
            file.write_all_at(b"data", chunk * CHUNK as u64 + 9).unwrap();
        }
        let found = data_chunks(&file, 64 * CHUNK as u64).unwrap();
        assert!([3, 4, 63].iter().all(|chunk| found.contains(chunk)), "{found:?}");
        assert!(!found.contains(&30), "{found:?}");
    }
}
