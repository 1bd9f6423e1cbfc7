//! Files between host and container.

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

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use picovm_guest_protocol::PathStatus;

use crate::archive::write::Packer;

/// What is packed as an empty directory in a tree that is packed: no files, but views of the kernel.
const VIEWS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// An absolute path, and whether a link at its end is followed in any case: the path goes on behind it.
fn absolute(path: &[u8]) -> Result<(PathBuf, bool), String> {
    let text = String::from_utf8_lossy(path);
    if path.contains(&0) {
        return Err(format!("{text}: the path contains a zero byte"));
    }
    if !path.starts_with(b"/") {
        return Err(format!("{text}: the path is not absolute"));
    }
    let follows = path.ends_with(b"/") || path.ends_with(b"/.");
    let mut clean: PathBuf = Path::new(OsStr::from_bytes(path)).components().collect();
    if clean.file_name().is_none() {
        // What `..` leads to depends on links in front of it.
        clean = fs::canonicalize(&clean).map_err(|error| format!("{text}: {error}"))?;
    }
    Ok((clean, follows))
}

fn last_name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or(OsStr::new("."))
}

/// An existing directory.
pub fn directory(path: &[u8]) -> Result<PathBuf, String> {
    let (path, _) = absolute(path)?;
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => Err(format!("{}: it is not a directory", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// What `stat(2)` says.
pub fn stat(path: &[u8]) -> Result<PathStatus, String> {
    let (path, follows) = absolute(path)?;
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let metadata = if follows {
        fs::metadata(&path)
    } else {
        fs::symlink_metadata(&path)
    }
    .map_err(failed)?;
    let target = match metadata.is_symlink() {
        true => fs::read_link(&path)
            .map_err(failed)?
            .as_os_str()
            .as_bytes()
            .to_vec(),
        false => Vec::new(),
    };
    Ok(PathStatus {
        name: last_name(&path).as_bytes().to_vec(),
        mode: metadata.mode(),
        size: metadata.size(),
        modified: metadata.mtime(),
        target,
    })
}

/// Writes an archive of a file, or of a directory with all that is in it, under its last name.
pub fn pack(path: &[u8], follow: bool, output: &mut impl Write) -> Result<(), String> {
    let (path, follows) = absolute(path)?;
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let name = last_name(&path).to_owned();
    let place = match follow || follows {
        true => fs::canonicalize(&path).map_err(failed)?,
        false => path.clone(),
    };
    // That there is nothing to pack is told before an archive is begun.
    fs::symlink_metadata(&place).map_err(failed)?;
    let mut archive = Packer::new(output);
    pack_tree(&mut archive, &place, Path::new(&name))?;
    archive.finish().map_err(failed)
}

fn pack_tree<W: Write>(archive: &mut Packer<W>, place: &Path, name: &Path) -> Result<(), String> {
    // Directories that are still to be packed; a hostile tree may be deeper than a stack.
    let mut waiting = vec![(place.to_path_buf(), name.to_path_buf())];
    while let Some((place_here, name_here)) = waiting.pop() {
        let failed = |error: io::Error| format!("{}: {error}", place_here.display());
        match archive.append(&place_here, name_here.as_os_str().as_bytes()) {
            // Gone meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(failed)?,
        }
        let is_view = VIEWS.iter().any(|view| place_here == Path::new(view)) && place_here != place;
        let is_directory = fs::symlink_metadata(&place_here).is_ok_and(|metadata| metadata.is_dir());
        if is_view || !is_directory {
            continue;
        }
        let mut names: Vec<_> = fs::read_dir(&place_here)
            .map_err(failed)?
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        names.sort();
        let children = names.iter().rev();
        waiting.extend(children.map(|child| (place_here.join(child), name_here.join(child))));
    }
    Ok(())
}
