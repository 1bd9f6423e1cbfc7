//! Writes a tar archive.

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

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use tar::{EntryType, Header};

use super::ATTRIBUTE;

/// An archive that is being written.
pub struct Packer<W: Write> {
    builder: tar::Builder<W>,
    /// Names of files that have several.
    links: BTreeMap<(u64, u64), Vec<u8>>,
}

impl<W: Write> Packer<W> {
    /// Begins one.
    pub fn new(writer: W) -> Self {
        Self {
            builder: tar::Builder::new(writer),
            links: BTreeMap::new(),
        }
    }

    /// Ends the archive.
    pub fn finish(self) -> io::Result<()> {
        self.builder.into_inner()?.flush()
    }

    /// Adds an empty file.
    pub fn marker(&mut self, name: &[u8]) -> io::Result<()> {
        let mut header = empty_header();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        self.add(header, name, &[], Vec::new(), io::empty())
    }

    /// Adds what is at `path`, without what is in it, under a name. A socket is passed over.
    pub fn append(&mut self, path: &Path, name: &[u8]) -> io::Result<()> {
        let metadata = std::fs::symlink_metadata(path)?;
        let kind = metadata.file_type();
        let mut header = empty_header();
        header.set_mode(metadata.mode() & 0o7777);
        header.set_uid(metadata.uid().into());
        header.set_gid(metadata.gid().into());
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or_default());
        let attributes = attributes(path)?;
        let file = (metadata.dev(), metadata.ino());
        if !kind.is_dir() && metadata.nlink() > 1 {
            if let Some(first) = self.links.get(&file).cloned() {
                header.set_entry_type(EntryType::Link);
                return self.add(header, name, &first, Vec::new(), io::empty());
            }
            self.links.insert(file, name.to_vec());
        }
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            let name = [name, b"/"].concat();
            return self.add(header, &name, &[], attributes, io::empty());
        }
        if kind.is_file() {
            header.set_entry_type(EntryType::Regular);
            // What may stand there by now is not waited for.
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let content = std::fs::OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(path)?;
            // A file that grows or shrinks meanwhile has the size that the header says.
            header.set_size(metadata.size());
            let content = content.chain(io::repeat(0)).take(metadata.size());
            return self.add(header, name, &[], attributes, content);
        }
        let mut target = Vec::new();
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            target = std::fs::read_link(path)?.as_os_str().as_bytes().to_vec();
        } else if kind.is_fifo() {
            header.set_entry_type(EntryType::Fifo);
        } else if kind.is_char_device() || kind.is_block_device() {
            header.set_entry_type(if kind.is_char_device() {
                EntryType::Char
            } else {
                EntryType::Block
            });
            header.set_device_major(rustix::fs::major(metadata.rdev()))?;
            header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
        } else {
            return Ok(());
        }
        self.add(header, name, &target, attributes, io::empty())
    }

    /// Adds an entry, with PAX records for what does not fit its header.
    fn add(
        &mut self,
        mut header: Header,
        name: &[u8],
        link: &[u8],
        attributes: Vec<(String, Vec<u8>)>,
        content: impl Read,
    ) -> io::Result<()> {
        let mut records: Vec<(String, Vec<u8>)> = attributes;
        if let Some(ustar) = header.as_ustar_mut() {
            if !fill(&mut ustar.name, name) {
                records.push(("path".into(), name.to_vec()));
            }
            if !fill(&mut ustar.linkname, link) {
                records.push(("linkpath".into(), link.to_vec()));
            }
        }
        let records = records
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        self.builder.append_pax_extensions(records)?;
        header.set_cksum();
        self.builder.append(&header, content)
    }
}

/// A header with a number in each field that has to have one.
fn empty_header() -> Header {
    let mut header = Header::new_ustar();
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// Whether all of a text has its place in a field; what has is put there.
fn fill(field: &mut [u8], text: &[u8]) -> bool {
    for (to, from) in field.iter_mut().zip(text) {
        *to = *from;
    }
    text.len() <= field.len()
}

/// The extended attributes that belong to a file's content: what its users have set, capabilities and access control lists.
fn attributes(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; 64 << 10];
    let count = match rustix::fs::llistxattr(path, names.as_mut_slice()) {
        Ok(count) => count,
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) => 0,
        Err(error) => return Err(error.into()),
    };
    names.truncate(count);
    let mut found = Vec::new();
    for name in names.split(|&byte| byte == 0) {
        let is_own = name.starts_with(b"user.")
            || name == b"security.capability"
            || name.starts_with(b"system.posix_acl_");
        // A record's name is text.
        let (true, Ok(text)) = (is_own, std::str::from_utf8(name)) else {
            continue;
        };
        let mut value = vec![0; 64 << 10];
        let name = CString::new(name).map_err(io::Error::other)?;
        let count = match rustix::fs::lgetxattr(path, name.as_c_str(), value.as_mut_slice()) {
            Ok(count) => count,
            // Gone meanwhile.
            Err(rustix::io::Errno::NODATA) => continue,
            Err(error) => return Err(error.into()),
        };
        value.truncate(count);
        found.push((format!("{ATTRIBUTE}{text}"), value));
    }
    Ok(found)
}
