//! Checksums of a template's files.
//!
//! The memory's covers its chunks that are not all zero, each with its place: it costs what the memory holds and not
//! what it spans, and a hole is the same as zeros.

use std::io;

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

/// Reads a memory file as it is on disk, holes skipped, and returns its checksum.
pub fn of_memory(file: &std::fs::File, bytes: u64) -> io::Result<String> {
    use std::os::unix::fs::FileExt;
    let mut checksum = MemoryChecksum::new(bytes);
    let mut buffer = vec![0u8; CHUNK];
    let mut offset = 0u64;
    while offset < bytes {
        let data = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => data,
            // No data behind the offset: the rest is a hole.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let index = data / CHUNK as u64;
        let start = index * CHUNK as u64;
        if start >= bytes {
            break;
        }
        let length = usize::try_from(bytes - start).unwrap_or(CHUNK).min(CHUNK);
        let chunk = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(chunk, start)?;
        if !is_zero(chunk) {
            checksum.chunk(index, chunk);
        }
        offset = start + length as u64;
    }
    Ok(checksum.finish())
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
}
