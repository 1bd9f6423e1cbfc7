//! One entry of an archive that is written: a header of ustar, before which stands what that cannot say, as records of PAX.

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

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use tar::{Builder, EntryType, Header};

const BLOCK: usize = 512;
/// Bytes of a piece of a file that is not stored if all of them are zero: as large as that, so that the list of what is stored stays
/// small.
const HOLE: usize = 1 << 20;
/// Pieces that are stored of a file, at most. Other readers bound them, too.
const PIECES_MAX: usize = 10_000;

/// An entry before it is written.
pub(super) struct Entry {
    header: Header,
    records: Vec<(String, Vec<u8>)>,
}

impl Entry {
    /// `name` is its path in the archive.
    pub(super) fn new(kind: EntryType, name: &[u8], metadata: &Metadata) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(metadata.mode() & 0o7777);
        header.set_uid(metadata.uid().into());
        header.set_gid(metadata.gid().into());
        header.set_size(0);
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        let mut entry = Self {
            header,
            records: Vec::new(),
        };
        if !fits(&mut entry.header.as_old_mut().name, name) {
            entry.record("path", name);
        }
        if metadata.mtime() < 0 || metadata.mtime_nsec() != 0 {
            let time = time(metadata.mtime(), metadata.mtime_nsec());
            entry.record("mtime", time.as_bytes());
        }
        entry
    }

    fn record(&mut self, key: &str, value: &[u8]) {
        self.records.push((key.to_owned(), value.to_vec()));
    }

    /// What it is a link to.
    pub(super) fn link(mut self, target: &[u8]) -> Self {
        if !fits(&mut self.header.as_old_mut().linkname, target) {
            self.record("linkpath", target);
        }
        self
    }

    /// The device that it stands for.
    pub(super) fn device(mut self, number: u64) -> io::Result<Self> {
        self.header.set_device_major(rustix::fs::major(number))?;
        self.header.set_device_minor(rustix::fs::minor(number))?;
        Ok(self)
    }

    /// Extended attributes.
    pub(super) fn attributes(mut self, attributes: Vec<(CString, Vec<u8>)>) -> io::Result<Self> {
        for (name, value) in attributes {
            // The first `=` ends the key of a record.
            let name = name.to_str().ok().filter(|name| !name.contains('='));
            let name = name.ok_or_else(|| {
                io::Error::other("an extended attribute has a name that an archive cannot hold")
            })?;
            self.record(&format!("SCHILY.xattr.{name}"), &value);
        }
        Ok(self)
    }

    /// Writes it, without content.
    pub(super) fn write(self, to: &mut Builder<impl Write>) -> io::Result<()> {
        self.write_with(to, io::empty(), 0)
    }

    /// Writes it with a file's content. Whole pieces of zeros are not stored, by version 1.0 of PAX's format for sparse files, wherever
    /// the file's own holes are: these are its file system's matter.
    pub(super) fn write_file(
        mut self,
        to: &mut Builder<impl Write>,
        name: &[u8],
        file: &File,
        size: u64,
    ) -> io::Result<()> {
        let pieces = pieces(file, size)?;
        if pieces == [(0, size)] || size == 0 {
            return self.write_with(to, Pieces::new(file, pieces), size);
        }
        self.records.retain(|(key, _)| key != "path");
        self.record("GNU.sparse.major", b"1");
        self.record("GNU.sparse.minor", b"0");
        self.record("GNU.sparse.name", name);
        self.record("GNU.sparse.realsize", size.to_string().as_bytes());
        let mut map = format!("{}\n", pieces.len());
        for (offset, length) in &pieces {
            map += &format!("{offset}\n{length}\n");
        }
        let mut map = map.into_bytes();
        map.resize(map.len().next_multiple_of(BLOCK), 0);
        let stored = pieces
            .iter()
            .fold(map.len() as u64, |sum, (_, length)| sum.saturating_add(*length));
        self.write_with(to, map.chain(Pieces::new(file, pieces)), stored)
    }

    fn write_with(mut self, to: &mut Builder<impl Write>, content: impl Read, size: u64) -> io::Result<()> {
        let records = self
            .records
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        to.append_pax_extensions(records)?;
        self.header.set_size(size);
        self.header.set_cksum();
        to.append(&self.header, content)
    }
}

/// Puts as much of a text into a field as it takes; whether that is all.
fn fits(field: &mut [u8], text: &[u8]) -> bool {
    for (to, from) in field.iter_mut().zip(text) {
        *to = *from;
    }
    text.len() <= field.len()
}

/// `[-]SECONDS.FRACTION`, of seconds rounded down and nanoseconds after them.
fn time(seconds: i64, nanoseconds: i64) -> String {
    if seconds < 0 && nanoseconds > 0 {
        let (seconds, rest) = (
            seconds.saturating_add(1).unsigned_abs(),
            1_000_000_000i64.saturating_sub(nanoseconds),
        );
        format!("-{seconds}.{rest:09}")
    } else {
        format!("{seconds}.{nanoseconds:09}")
    }
}

/// What of a file is to be stored, as offsets and lengths in order.
fn pieces(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    if size < HOLE as u64 {
        return Ok(vec![(0, size)]);
    }
    let mut buffer = vec![0; HOLE];
    let mut at = 0u64;
    while at < size {
        let length = size.saturating_sub(at).min(HOLE as u64);
        let piece = buffer
            .get_mut(..usize::try_from(length).unwrap_or(HOLE))
            .unwrap_or_default();
        file.read_exact_at(piece, at)?;
        let next = at.saturating_add(length);
        if piece.len() < HOLE || piece.iter().any(|byte| *byte != 0) {
            let is_full = pieces.len() == PIECES_MAX;
            match pieces.last_mut() {
                Some((offset, length)) if is_full || offset.saturating_add(*length) == at => {
                    *length = next.saturating_sub(*offset);
                }
                _ => pieces.push((at, length)),
            }
        }
        at = next;
    }
    // As GNU tar ends a list whose file ends in a hole.
    if pieces
        .last()
        .is_none_or(|(offset, length)| offset.saturating_add(*length) < size)
    {
        pieces.push((size, 0));
    }
    Ok(pieces)
}

/// Pieces of a file, one behind the other.
struct Pieces<'a> {
    file: &'a File,
    pieces: VecDeque<(u64, u64)>,
}

impl<'a> Pieces<'a> {
    fn new(file: &'a File, pieces: Vec<(u64, u64)>) -> Self {
        Self {
            file,
            pieces: pieces.into(),
        }
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.pieces.front().is_some_and(|(_, length)| *length == 0) {
            self.pieces.pop_front();
        }
        let Some((offset, length)) = self.pieces.front_mut() else {
            return Ok(0);
        };
        let most = usize::try_from(*length).unwrap_or(usize::MAX).min(buffer.len());
        let count = self
            .file
            .read_at(buffer.get_mut(..most).unwrap_or_default(), *offset)?;
        if count == 0 && most > 0 {
            return Err(io::Error::other("it got shorter while it was read"));
        }
        *offset = offset.saturating_add(count as u64);
        *length = length.saturating_sub(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_what_a_reader_takes_them_for() {
        assert_eq!(time(1, 500_000_000), "1.500000000");
        assert_eq!(time(0, 1), "0.000000001");
        assert_eq!(time(-3, 0), "-3.000000000");
        assert_eq!(time(-2, 750_000_000), "-1.250000000");
        assert_eq!(time(-1, 750_000_000), "-0.250000000");
    }

    #[test]
    fn whole_pieces_of_zeros_are_not_stored() {
        let of = |written: &[u64], size: u64| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            for at in written {
                file.write_all_at(b"x", *at).unwrap();
            }
            pieces(&file, size).unwrap()
        };
        let hole = HOLE as u64;
        assert_eq!(of(&[], 100), [(0, 100)]);
        assert_eq!(of(&[0, hole], 2 * hole), [(0, 2 * hole)]);
        assert_eq!(of(&[0, 3 * hole], 4 * hole), [(0, hole), (3 * hole, hole)]);
        assert_eq!(of(&[hole], 3 * hole), [(hole, hole), (3 * hole, 0)]);
        assert_eq!(of(&[], 2 * hole), [(2 * hole, 0)]);
        // What is smaller than a piece is stored.
        assert_eq!(of(&[], hole + 5), [(hole, 5)]);
    }
}
