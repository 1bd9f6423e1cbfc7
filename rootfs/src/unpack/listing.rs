//! Archives whose entries are looked at one by one and not unpacked: archives of images.

use std::io::{self, BufReader, Read};

use super::{Budget, Limits, UnpackError, decompress, each_entry};
use crate::archive::{Reader, has_content};
use crate::tree::inner_path;

/// An entry of an archive that is looked at.
pub enum Item<'a> {
    /// A file; what is not read of it is passed over.
    File(&'a mut dyn Read),
    /// A symbolic or hard link, and its target.
    Link(String),
}

/// Shows the files and links of an archive, plain or compressed by gzip, zstd or xz, one after the other to `each`, with their
/// paths in it. A path has no `.`, `..` and no empty part.
///
/// # Errors
/// [`UnpackError`]; [`UnpackError::Entry`] for what `each` says.
pub fn each_file<R: Read>(
    archive: R,
    limits: &Limits,
    each: &mut dyn FnMut(&str, Item<'_>) -> io::Result<()>,
) -> Result<(), UnpackError> {
    let mut budget = Budget::new(limits);
    let plain = decompress(BufReader::with_capacity(1 << 17, archive))?;
    each_entry(plain, false, &mut budget, &mut |entry, reader| {
        let shown = String::from_utf8_lossy(&entry.name).into_owned();
        let hostile = |why| UnpackError::Hostile {
            entry: shown.clone(),
            why,
        };
        let path = inner_path(&entry.name).map_err(hostile)?;
        let Some(path) = path.to_str() else {
            return Err(hostile("its name is no UTF-8"));
        };
        let kind = entry.kind;
        let result = if kind.is_symlink() || kind.is_hard_link() {
            each(
                path,
                Item::Link(String::from_utf8_lossy(&entry.link).into_owned()),
            )
        } else if has_content(kind) && entry.pieces.is_none() {
            each(path, Item::File(&mut Content(reader)))
        } else {
            Ok(())
        };
        result.map_err(|source| UnpackError::Entry {
            entry: shown,
            attempted: "take what is in the archive",
            source,
        })
    })?;
    Ok(())
}

/// The content of the current entry.
struct Content<'a, R>(&'a mut Reader<R>);

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_content(buffer).map_err(io::Error::other)
    }
}
