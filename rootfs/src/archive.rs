//! Reads a tar archive from an untrusted source, entry by entry: ustar, GNU (long names, sparse files) and PAX (long names,
//! large sizes, times, extended attributes, sparse files of the versions 0.0, 0.1 and 1.0).
//!
//! The fields of a header are the crate `tar`'s. What stands between the headers is read here, because that crate splits PAX
//! records at line ends, which are bytes like any other in a file capability or an access control list; gives sparse files of
//! PAX away as files of another name; and takes headers of any size into memory.

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

use std::ffi::CString;
use std::io::{self, Read};

use tar::{EntryType, Header};

use crate::unpack::UnpackError;

const BLOCK: usize = 512;
const BLOCK_BYTES: u64 = 512;
/// Bytes of all headers of one entry together: a path has 4,096 bytes at most, an extended attribute 64 KiB.
const HEADERS_MAX: u64 = 4 << 20;
/// Pieces of a sparse file. GNU tar writes one for each run of data.
const PIECES_MAX: usize = 1 << 18;

/// One entry, without its content.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryType,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Seconds since 1970, and nanoseconds of the second.
    pub(crate) modified: (i64, u32),
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    /// Bytes that the file has.
    pub(crate) size: u64,
    /// Where the stored bytes lie in the file, as offset and length, if it is sparse.
    pub(crate) pieces: Option<Vec<(u64, u64)>>,
    pub(crate) attributes: Vec<(CString, Vec<u8>)>,
}

/// An archive that is being read.
pub(crate) struct Reader<R> {
    inner: R,
    /// Entries whose headers were read.
    entries: u64,
    /// Bytes of content of the entry that are still to be read, and of what pads them to whole blocks.
    content: u64,
    padding: u64,
    /// Whether an archive may end without its end mark.
    lenient: bool,
    ended: bool,
}

/// What PAX records say of the next entry.
#[derive(Default)]
struct Extended {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<(i64, u32)>,
    attributes: Vec<(CString, Vec<u8>)>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_major: Option<u64>,
    pieces: Vec<(u64, u64)>,
    offset: Option<u64>,
    /// Whether the archive names pieces, be it none.
    has_pieces: bool,
}

impl<R: Read> Reader<R> {
    /// `lenient`: the end of the file will do for an end mark, as some other check finds truncation.
    pub(crate) fn new(inner: R, lenient: bool) -> Self {
        Self {
            inner,
            entries: 0,
            content: 0,
            padding: 0,
            lenient,
            ended: false,
        }
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    fn damaged(&self, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> UnpackError {
        UnpackError::Damaged {
            entries: self.entries,
            source: io::Error::other(why),
        }
    }

    /// Goes on to the next entry. What was not read of the content of the one before is passed over.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, UnpackError> {
        if self.ended {
            return Ok(None);
        }
        self.pass_over(self.content)?;
        match self.pass_over(self.padding) {
            // Some tools forget the padding of the last file.
            Err(UnpackError::Truncated) if self.lenient => {}
            result => result?,
        }
        (self.content, self.padding) = (0, 0);
        let mut extended = Extended::default();
        let mut described = false;
        let mut headers = 0u64;
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let mut block = [0; BLOCK];
            if !self.block(&mut block)? {
                self.ended = true;
                return match (described, self.lenient) {
                    (false, true) => Ok(None),
                    (false, false) if self.entries == 0 => Err(UnpackError::NotAnArchive),
                    _ => Err(UnpackError::Truncated),
                };
            }
            if block.iter().all(|byte| *byte == 0) {
                self.ended = true;
                return if described {
                    Err(self.damaged("a header describes an entry that does not follow"))
                } else {
                    Ok(None)
                };
            }
            let header = Header::from_byte_slice(&block);
            self.check(header)?;
            let kind = header.entry_type();
            let recognized = header.as_gnu().is_some() || header.as_ustar().is_some();
            let describes = kind.is_gnu_longname()
                || kind.is_gnu_longlink()
                || kind.is_pax_local_extensions()
                || kind.is_pax_global_extensions();
            if !(recognized && describes) {
                self.entries = self.entries.saturating_add(1);
                if let Some(name) = long_name {
                    extended.name = Some(name);
                }
                if let Some(link) = long_link {
                    extended.link = Some(link);
                }
                return self.entry(header, extended).map(Some);
            }
            let size = self.field(header.entry_size())?;
            headers = headers.saturating_add(size);
            if headers > HEADERS_MAX {
                return Err(self.damaged(format!(
                    "the headers of an entry are larger than {HEADERS_MAX} bytes"
                )));
            }
            let data = self.data(size)?;
            if kind.is_pax_global_extensions() {
                // Nothing that is said of all entries matters here: comments, mostly.
                continue;
            }
            described = true;
            if kind.is_gnu_longname() {
                long_name = Some(until_zero(data));
            } else if kind.is_gnu_longlink() {
                long_link = Some(until_zero(data));
            } else {
                extended
                    .read(&data)
                    .map_err(|why| self.damaged(format!("a PAX header is malformed: {why}")))?;
            }
        }
    }

    /// The entry of a header, with all that was said of it before.
    fn entry(&mut self, header: &Header, extended: Extended) -> Result<Entry, UnpackError> {
        let kind = header.entry_type();
        let stored = match extended.size {
            // As Go has it, which most tools for images are written in: some give a directory its size on their disk.
            _ if is_header_only(kind) => 0,
            Some(size) => size,
            None => self.field(header.entry_size())?,
        };
        self.padding = stored
            .checked_next_multiple_of(BLOCK_BYTES)
            .ok_or_else(|| self.damaged("the size of an entry is impossible"))?
            .saturating_sub(stored);
        self.content = stored;
        let old = header.as_old();
        let mut entry = Entry {
            name: extended
                .sparse_name
                .or(extended.name)
                .unwrap_or_else(|| header.path_bytes().into_owned()),
            link: extended
                .link
                .unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned()),
            kind,
            mode: self.field(header.mode())? & 0o7777,
            uid: match extended.uid {
                Some(uid) => uid,
                None => self.blank_or(&old.uid, header.uid())?,
            },
            gid: match extended.gid {
                Some(gid) => gid,
                None => self.blank_or(&old.gid, header.gid())?,
            },
            modified: match extended.modified {
                Some(modified) => modified,
                None => {
                    let seconds = self.blank_or(&old.mtime, header.mtime())?;
                    (i64::try_from(seconds).unwrap_or(i64::MAX), 0)
                }
            },
            device: (0, 0),
            size: stored,
            pieces: None,
            attributes: extended.attributes,
        };
        if matches!(kind, EntryType::Char | EntryType::Block) {
            entry.device = (
                self.field(header.device_major())?.unwrap_or(0),
                self.field(header.device_minor())?.unwrap_or(0),
            );
        }
        if kind.is_gnu_sparse() {
            let (size, pieces) = self.gnu_pieces(header)?;
            entry.size = size;
            entry.pieces = Some(pieces);
        } else if extended.sparse_major == Some(1) {
            entry.size = extended.sparse_size.unwrap_or(stored);
            entry.pieces = Some(self.stored_pieces()?);
        } else if extended.has_pieces {
            entry.size = extended.sparse_size.unwrap_or(stored);
            entry.pieces = Some(extended.pieces);
        }
        if let Some(pieces) = &entry.pieces {
            self.check_pieces(pieces, entry.size)?;
        }
        Ok(entry)
    }

    /// A number that archivers leave out where it is 0.
    fn blank_or(&self, field: &[u8], value: io::Result<u64>) -> Result<u64, UnpackError> {
        if field.iter().all(|byte| matches!(byte, 0 | b' ')) {
            return Ok(0);
        }
        self.field(value)
    }

    fn field<T>(&self, value: io::Result<T>) -> Result<T, UnpackError> {
        value.map_err(|source| UnpackError::Damaged {
            entries: self.entries,
            source,
        })
    }

    fn check(&self, header: &Header) -> Result<(), UnpackError> {
        let sum = header
            .as_bytes()
            .iter()
            .enumerate()
            // The checksum itself counts as blanks.
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .fold(0u32, u32::saturating_add);
        match header.cksum() {
            Ok(expected) if expected == sum => Ok(()),
            _ if self.entries == 0 => Err(UnpackError::NotAnArchive),
            _ => Err(self.damaged("the checksum of a header is wrong")),
        }
    }

    /// Reads content of the current entry.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        let most = usize::try_from(self.content)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most) else {
            return Ok(0);
        };
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = self.read(buffer)?;
        if count == 0 {
            return Err(UnpackError::Truncated);
        }
        self.content = self.content.saturating_sub(count as u64);
        Ok(count)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        loop {
            match self.inner.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(UnpackError::Damaged {
                        entries: self.entries,
                        source,
                    });
                }
                Ok(count) => return Ok(count),
            }
        }
    }

    /// Reads one block; `false` at the end of the file.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, UnpackError> {
        let mut filled = 0usize;
        while let Some(rest) = block.get_mut(filled..)
            && !rest.is_empty()
        {
            match self.read(rest)? {
                0 if filled == 0 => return Ok(false),
                0 if self.entries == 0 => return Err(UnpackError::NotAnArchive),
                0 => return Err(UnpackError::Truncated),
                count => filled = filled.saturating_add(count),
            }
        }
        Ok(true)
    }

    /// Reads so many bytes and their padding. The caller has bounded them.
    fn data(&mut self, size: u64) -> Result<Vec<u8>, UnpackError> {
        let mut data = Vec::new();
        let mut block = [0; BLOCK];
        let mut left = usize::try_from(size).unwrap_or(usize::MAX);
        while left > 0 {
            if !self.block(&mut block)? {
                return Err(UnpackError::Truncated);
            }
            data.extend_from_slice(block.get(..left.min(BLOCK)).unwrap_or_default());
            left = left.saturating_sub(BLOCK);
        }
        Ok(data)
    }

    fn pass_over(&mut self, mut bytes: u64) -> Result<(), UnpackError> {
        let mut buffer = [0; 1 << 15];
        while bytes > 0 {
            let most = usize::try_from(bytes).unwrap_or(usize::MAX).min(buffer.len());
            match self.read(buffer.get_mut(..most).unwrap_or_default())? {
                0 => return Err(UnpackError::Truncated),
                count => bytes = bytes.saturating_sub(count as u64),
            }
        }
        Ok(())
    }

    /// Size and pieces of a sparse file as GNU tar's own format has it: four in the header, more in blocks behind it.
    fn gnu_pieces(&mut self, header: &Header) -> Result<(u64, Vec<(u64, u64)>), UnpackError> {
        let Some(gnu) = header.as_gnu() else {
            return Err(self.damaged("a sparse file has no GNU header"));
        };
        let mut pieces = Vec::new();
        for piece in gnu.sparse.iter().filter(|piece| !piece.is_empty()) {
            pieces.push((self.field(piece.offset())?, self.field(piece.length())?));
        }
        let mut more = gnu.is_extended();
        let mut extension = tar::GnuExtSparseHeader::new();
        while more {
            if pieces.len() > PIECES_MAX {
                return Err(self.damaged("a sparse file has too many pieces"));
            }
            if !self.block(extension.as_mut_bytes())? {
                return Err(UnpackError::Truncated);
            }
            for piece in extension.sparse().iter().filter(|piece| !piece.is_empty()) {
                pieces.push((self.field(piece.offset())?, self.field(piece.length())?));
            }
            more = extension.is_extended();
        }
        Ok((self.field(gnu.real_size())?, pieces))
    }

    /// Pieces as version 1.0 of PAX has them: lines of decimal numbers at the start of the content.
    fn stored_pieces(&mut self) -> Result<Vec<(u64, u64)>, UnpackError> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut expected = None;
        let mut line = Vec::new();
        let mut block = [0; BLOCK];
        loop {
            if self.content < BLOCK_BYTES {
                return Err(self.damaged("the list of a sparse file's pieces does not end"));
            }
            if !self.block(&mut block)? {
                return Err(UnpackError::Truncated);
            }
            self.content = self.content.saturating_sub(BLOCK_BYTES);
            for byte in block {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                let number = decimal(&line)
                    .ok_or_else(|| self.damaged("the list of a sparse file's pieces is malformed"))?;
                line.clear();
                match expected {
                    None if number > PIECES_MAX as u64 => {
                        return Err(self.damaged("a sparse file has too many pieces"));
                    }
                    None => expected = Some(number.saturating_mul(2)),
                    Some(_) => numbers.push(number),
                }
                if expected == Some(numbers.len() as u64) {
                    return Ok(numbers
                        .chunks_exact(2)
                        .filter_map(|pair| Some((*pair.first()?, *pair.get(1)?)))
                        .collect());
                }
            }
            if line.len() > 20 {
                return Err(self.damaged("the list of a sparse file's pieces is malformed"));
            }
        }
    }

    /// The pieces are in order, lie in the file, and are what is stored.
    fn check_pieces(&self, pieces: &[(u64, u64)], size: u64) -> Result<(), UnpackError> {
        let mut end = 0;
        let mut sum = 0u64;
        for (offset, length) in pieces {
            let next = offset.checked_add(*length).filter(|next| *next <= size);
            let (true, Some(next)) = (*offset >= end, next) else {
                return Err(self.damaged("the pieces of a sparse file overlap or lie outside of it"));
            };
            end = next;
            sum = sum.saturating_add(*length);
        }
        if sum == self.content {
            Ok(())
        } else {
            Err(self.damaged("the pieces of a sparse file are not what is stored"))
        }
    }
}

/// What nothing follows, whatever its header says of its size.
fn is_header_only(kind: EntryType) -> bool {
    matches!(
        kind,
        EntryType::Link
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Directory
            | EntryType::Fifo
    )
}

pub(crate) fn has_content(kind: EntryType) -> bool {
    matches!(
        kind,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
    )
}

impl Extended {
    /// Reads PAX records: `LENGTH KEY=VALUE\n`, where the length counts all of it and the value may be any bytes.
    fn read(&mut self, mut data: &[u8]) -> Result<(), &'static str> {
        while !data.is_empty() {
            let blank = data
                .iter()
                .take(20)
                .position(|byte| *byte == b' ')
                .ok_or("a record has no length")?;
            let length = decimal(data.get(..blank).unwrap_or_default())
                .and_then(|length| usize::try_from(length).ok())
                .filter(|length| *length > blank)
                .ok_or("a record's length is no number")?;
            let record = data.get(..length).ok_or("a record is longer than its header")?;
            data = data.get(length..).unwrap_or_default();
            let record = record
                .strip_suffix(b"\n")
                .and_then(|record| record.get(blank.checked_add(1)?..))
                .ok_or("a record has no end")?;
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or("a record has no value")?;
            let (key, value) = record.split_at(equals);
            self.record(key, value.get(1..).unwrap_or_default())?;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let number = || decimal(value).ok_or("a number is malformed");
        match key {
            b"path" => self.name = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.modified = Some(time(value).ok_or("a time is malformed")?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.major" => self.sparse_major = Some(number()?),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse_size = Some(number()?),
            b"GNU.sparse.numblocks" => self.has_pieces = true,
            b"GNU.sparse.offset" => self.offset = Some(number()?),
            b"GNU.sparse.numbytes" => {
                let offset = self
                    .offset
                    .take()
                    .ok_or("a piece of a sparse file has no offset")?;
                self.pieces.push((offset, number()?));
                self.has_pieces = true;
            }
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<u64>> = value.split(|byte| *byte == b',').map(decimal).collect();
                let numbers = match numbers {
                    Some(numbers) if numbers.len().is_multiple_of(2) => numbers,
                    _ if value.is_empty() => Vec::new(),
                    _ => return Err("the list of a sparse file's pieces is malformed"),
                };
                self.pieces = numbers
                    .chunks_exact(2)
                    .filter_map(|pair| Some((*pair.first()?, *pair.get(1)?)))
                    .collect();
                self.has_pieces = true;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    let name = CString::new(name).map_err(|_| "an attribute's name contains a zero byte")?;
                    self.attributes.push((name, value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

fn until_zero(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|byte| *byte == 0) {
        data.truncate(end);
    }
    data
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]`, as seconds rounded down and nanoseconds after them.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let negative = text.first() == Some(&b'-');
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let mut parts = digits.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanoseconds = (0..9)
        .map(|at| {
            fraction
                .get(at)
                .map_or(0, |digit| u32::from(digit.saturating_sub(b'0')))
        })
        .fold(0u32, |sum, digit| sum.saturating_mul(10).saturating_add(digit));
    Some(match (negative, nanoseconds) {
        (false, nanoseconds) => (seconds, nanoseconds),
        (true, 0) => (seconds.saturating_neg(), 0),
        (true, nanoseconds) => (
            seconds.saturating_neg().saturating_sub(1),
            1_000_000_000u32.saturating_sub(nanoseconds),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_pax_records_may_be_any_bytes() {
        let mut extended = Extended::default();
        let mut record = b"38 SCHILY.xattr.security.capability=".to_vec();
        record.extend([10, b'\n']);
        assert_eq!(record.len(), 38);
        record.extend(b"14 path=a\nb=c\n");
        extended.read(&record).unwrap();
        assert_eq!(extended.attributes[0].1, [10]);
        assert_eq!(extended.name.as_deref(), Some(&b"a\nb=c"[..]));
        for bad in [
            &b"8 path=a\n"[..],
            b"path=a\n",
            b"99 path=a\n",
            b"1 \n",
            b"11 size=-1\n",
            b"8 path\n\n",
        ] {
            assert!(Extended::default().read(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn times_are_seconds_and_what_is_after_them() {
        assert_eq!(time(b"1700000000"), Some((1_700_000_000, 0)));
        assert_eq!(time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(time(b"1.0000000019"), Some((1, 1)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-3"), Some((-3, 0)));
        for bad in [&b""[..], b"-", b"1.x", b"x", b"99999999999999999999"] {
            assert_eq!(time(bad), None);
        }
    }

    #[test]
    fn headers_without_an_end_are_not_taken_into_memory() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(u64::from(u32::MAX));
        header.set_cksum();
        let endless = (&header.as_bytes()[..]).chain(io::repeat(b'x'));
        let error = Reader::new(endless, false).next().unwrap_err().to_string();
        assert!(error.contains("larger than"), "{error}");
    }
}
