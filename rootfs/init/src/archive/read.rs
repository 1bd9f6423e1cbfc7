//! Reads a tar archive entry by entry: ustar, GNU (long names) and PAX.
//!
//! The crate `tar` splits PAX records at line ends, which are bytes like any other in a file capability; so it gives the raw
//! entries here, and records are read by their length.

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

use std::io::{self, Read};

use tar::EntryType;

use super::ATTRIBUTE;

/// Bytes of one header that describes the next entry: a path has 4,096 bytes at most, an extended attribute 64 KiB.
const HEADER_MAX: u64 = 1 << 20;

/// One entry, without its content.
#[derive(Debug)]
pub struct Entry {
    /// As the archive has it.
    pub name: Vec<u8>,
    /// What a link leads to.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: EntryType,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub modified: (i64, u32),
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes.
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What headers in front of an entry say of it.
#[derive(Default)]
struct Described {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u32>,
    gid: Option<u32>,
    modified: Option<(i64, u32)>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Gives each entry of an archive and its content to `take`.
///
/// # Errors
/// Those of the reader, of an archive that is damaged, and of `take`.
pub fn each<R: Read>(
    reader: R,
    mut take: impl FnMut(&Entry, &mut dyn Read) -> io::Result<()>,
) -> io::Result<()> {
    let mut archive = tar::Archive::new(reader);
    let mut described = Described::default();
    for raw in archive.entries()?.raw(true) {
        let mut raw = raw?;
        let kind = raw.header().entry_type();
        match kind {
            EntryType::XGlobalHeader => continue,
            EntryType::XHeader | EntryType::GNULongName | EntryType::GNULongLink => {
                if raw.size() > HEADER_MAX {
                    return Err(io::Error::other("a header of the archive is too long"));
                }
                let mut bytes = Vec::new();
                raw.read_to_end(&mut bytes)?;
                match kind {
                    EntryType::XHeader => described.records(&bytes)?,
                    EntryType::GNULongName => described.name = Some(until_zero(bytes)),
                    _ => described.link = Some(until_zero(bytes)),
                }
                continue;
            }
            _ => {}
        }
        let said = std::mem::take(&mut described);
        let header = raw.header();
        let number = |number: io::Result<u64>| {
            number
                .and_then(|number| u32::try_from(number).map_err(|_| io::Error::other("an id is too large")))
        };
        let entry = Entry {
            name: said.name.unwrap_or_else(|| header.path_bytes().into_owned()),
            link: said
                .link
                .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
                .unwrap_or_default(),
            kind,
            mode: header.mode()?,
            uid: said.uid.map_or_else(|| number(header.uid()), Ok)?,
            gid: said.gid.map_or_else(|| number(header.gid()), Ok)?,
            modified: match said.modified {
                Some(modified) => modified,
                None => (i64::try_from(header.mtime()?).unwrap_or(i64::MAX), 0),
            },
            device: (
                header.device_major().ok().flatten().unwrap_or_default(),
                header.device_minor().ok().flatten().unwrap_or_default(),
            ),
            attributes: said.attributes,
        };
        take(&entry, &mut raw)?;
    }
    Ok(())
}

fn until_zero(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

impl Described {
    /// Takes PAX records, `LENGTH KEY=VALUE\n` each.
    fn records(&mut self, bytes: &[u8]) -> io::Result<()> {
        let damaged = || io::Error::other("a PAX header of the archive is damaged");
        let mut rest = bytes;
        while !rest.is_empty() {
            let space = rest.iter().position(|&byte| byte == b' ').ok_or_else(damaged)?;
            let length: usize = text(rest.get(..space)).ok_or_else(damaged)?;
            let record = rest
                .get(space.saturating_add(1)..length.saturating_sub(1))
                .ok_or_else(damaged)?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(damaged)?;
            let (key, value) = (
                record.get(..equals).unwrap_or_default(),
                record.get(equals.saturating_add(1)..).unwrap_or_default(),
            );
            self.record(key, value)?;
            rest = rest.get(length..).ok_or_else(damaged)?;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        match key {
            b"path" => self.name = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"uid" => self.uid = text(Some(value)),
            b"gid" => self.gid = text(Some(value)),
            b"mtime" => self.modified = time(value),
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(io::Error::other(
                    "the archive has a sparse file, which is not supported",
                ));
            }
            _ => {
                if let Some(name) = key.strip_prefix(ATTRIBUTE.as_bytes()) {
                    self.attributes.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

fn text<T: std::str::FromStr>(bytes: Option<&[u8]>) -> Option<T> {
    std::str::from_utf8(bytes?).ok()?.parse().ok()
}

/// Seconds with a fraction.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let value = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = value.split_once('.').unwrap_or((value, ""));
    let nanoseconds =
        fraction
            .bytes()
            .chain(std::iter::repeat(b'0'))
            .take(9)
            .try_fold(0u32, |sum, digit| {
                let digit = char::from(digit).to_digit(10)?;
                sum.checked_mul(10)?.checked_add(digit)
            })?;
    let seconds: i64 = seconds.parse().ok()?;
    match nanoseconds {
        0 => Some((seconds, 0)),
        // A fraction goes back from the second, before 1970.
        _ if value.starts_with('-') => Some((
            seconds.checked_sub(1)?,
            1_000_000_000u32.checked_sub(nanoseconds)?,
        )),
        _ => Some((seconds, nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_fractions_on_either_side_of_1970() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"-12.25"), Some((-13, 750_000_000)));
        assert_eq!(time(b"12.x"), None);
    }

    #[test]
    fn a_record_is_as_long_as_it_says() {
        let mut described = Described::default();
        described
            .records(b"26 SCHILY.xattr.user.a=\n\n\n9 uid=77\n")
            .unwrap();
        assert_eq!(described.attributes, [(b"user.a".to_vec(), b"\n\n".to_vec())]);
        assert_eq!(described.uid, Some(77));
        for damaged in [
            &b"5"[..],
            b"x a=b\n",
            b"99 a=b\n",
            b"3 ab\n",
            b"0 a=b\n",
            b"18446744073709551615 a=b",
        ] {
            assert!(Described::default().records(damaged).is_err(), "{damaged:?}");
        }
    }
}
