//! Tar archives of a container's files, with all that a file has: owner, mode, times, links, devices, extended attributes.

pub mod read;
pub mod unpack;
pub mod write;

/// What the name of a PAX record for an extended attribute begins with.
const ATTRIBUTE: &str = "SCHILY.xattr.";
/// An archive says by a file of this name in a directory that nothing of the layers below is in it.
pub const OPAQUE: &[u8] = b".wh..wh..opq";
/// An archive says by a file of a name with this in front that the file of the rest of the name is gone.
pub const WHITEOUT: &[u8] = b".wh.";
