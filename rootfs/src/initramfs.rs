//! The initramfs: init, the device nodes it needs before it has mounted anything, and its mount points.
//!
//! The archive is in the "newc" format (the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`),
//! uncompressed: it is a few MiB, and unpacking takes longer than copying. The same init gives the same bytes.

use std::fs;
use std::path::{Path, PathBuf};

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The init binary cannot be read.
    #[error("read the init binary {path}: {source}")]
    Read {
        /// The binary.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The init binary is no program for a guest.
    #[error("the init binary {path} {why}; build it with `cargo build --release -p picovm-init`")]
    NotInit {
        /// The binary.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// Packs `init_binary`, a static x86-64 ELF program, as `/init` into an initramfs.
///
/// # Errors
/// [`InitramfsError`] if the binary cannot be read, is no x86-64 ELF program, or needs a dynamic loader.
pub fn build(init_binary: &Path) -> Result<Vec<u8>, InitramfsError> {
    let init = fs::read(init_binary).map_err(|source| InitramfsError::Read {
        path: init_binary.into(),
        source,
    })?;
    check(&init).map_err(|why| InitramfsError::NotInit {
        path: init_binary.into(),
        why,
    })?;

    let mut archive = Archive::default();
    for directory in ["dev", "image", "proc", "root", "scratch", "sys"] {
        archive.entry(directory, libc::S_IFDIR | 0o755, (0, 0), &[]);
    }
    // Where the kernel connects init's standard streams, and what Rust's runtime opens where it could not.
    archive.entry("dev/console", libc::S_IFCHR | 0o600, (5, 1), &[]);
    archive.entry("dev/null", libc::S_IFCHR | 0o666, (1, 3), &[]);
    archive.entry("init", libc::S_IFREG | 0o755, (0, 0), &init);
    archive.entry("TRAILER!!!", 0, (0, 0), &[]);
    Ok(archive.bytes)
}

/// Checks the ELF header (System V ABI, 4.1) and that no program header asks for an interpreter.
fn check(elf: &[u8]) -> Result<(), &'static str> {
    const INTERPRETER: u32 = 3;
    let half = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| {
        Some(u64::from_le_bytes(
            elf.get(at..at.checked_add(8)?)?.try_into().ok()?,
        ))
    };
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") || half(18) != Some(62) {
        return Err("is not an x86-64 ELF program");
    }
    let truncated = "is truncated";
    let table = long(32)
        .and_then(|at| usize::try_from(at).ok())
        .ok_or(truncated)?;
    let (size, count) = (half(54).ok_or(truncated)?, half(56).ok_or(truncated)?);
    for index in 0..usize::from(count) {
        let header = index * usize::from(size);
        let kind = table
            .checked_add(header)
            .filter(|&at| at < elf.len())
            .and_then(word)
            .ok_or(truncated)?;
        if kind == INTERPRETER {
            return Err("is not static, and the guest has no libraries for it");
        }
    }
    Ok(())
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let links = if mode & libc::S_IFMT == libc::S_IFDIR {
            2
        } else {
            1
        };
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.entries, // inode
            mode,
            0, // uid
            0, // gid
            links,
            0, // modification time
            size,
            0, // major of the device it is on
            0, // minor of the device it is on
            device.0,
            device.1,
            name_size,
            0, // checksum, unused
        ] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// An ELF header with one program header of this kind.
    fn elf(kind: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64..68].copy_from_slice(&kind.to_le_bytes());
        bytes
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn a_static_program_is_packed_and_the_archive_is_what_cpio_reads() {
        let init = file(&elf(1));
        let archive = build(init.path()).unwrap();
        assert_eq!(archive, build(init.path()).unwrap(), "the same bytes each time");
        let archive = file(&archive);
        let listing = Command::new("cpio")
            .arg("-tv")
            .stdin(Stdio::from(fs::File::open(archive.path()).unwrap()))
            .output();
        // cpio is in no minimal Debian; where it is, it must agree.
        if let Ok(listing) = listing {
            let text = String::from_utf8(listing.stdout).unwrap();
            for line in [
                "crw-------",
                "5,   1",
                "dev/console",
                "drwxr-xr-x",
                "-rwxr-xr-x",
                "init",
            ] {
                assert!(text.contains(line), "{line} in {text}");
            }
        }
    }

    #[test]
    fn entries_lie_on_four_byte_boundaries_and_end_with_the_trailer() {
        let archive = build(file(&elf(1)).path()).unwrap();
        let mut at = 0;
        let mut names = Vec::new();
        while at < archive.len() {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&archive[at + 6 + 8 * index..][..8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (size, name_size) = (field(6), field(11));
            names.push(String::from_utf8(archive[at + 110..at + 110 + name_size - 1].to_vec()).unwrap());
            at = ((at + 110 + name_size).next_multiple_of(4) + size).next_multiple_of(4);
        }
        assert_eq!(names.first().unwrap(), "dev");
        assert_eq!(&names[names.len() - 2..], ["init", "TRAILER!!!"]);
    }

    #[test]
    fn what_is_no_static_program_is_refused() {
        let refused = |bytes: &[u8]| build(file(bytes).path()).unwrap_err().to_string();
        assert!(refused(b"#!/bin/sh\n").contains("not an x86-64 ELF"));
        assert!(refused(b"").contains("not an x86-64 ELF"));
        assert!(refused(&elf(3)).contains("not static"));
        assert!(refused(&elf(1)[..60]).contains("truncated"));
        let missing = build(Path::new("/nowhere/init")).unwrap_err().to_string();
        assert!(missing.contains("/nowhere/init"), "{missing}");
    }
}
