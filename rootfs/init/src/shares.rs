//! Directories and files of the host in a container: one file system of the host's, of which each mount shows a part.

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

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use picovm_guest_protocol::{Mount, SHARE_TAG, StartFailure};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_remount, move_mount, open_tree,
    unmount,
};

use crate::fill;
use crate::start::failure;

/// Where the whole of it is mounted for a moment: a directory that is always there, and that nobody looks at meanwhile.
const FOR_A_MOMENT: &str = "/sys";

/// A part of it that is not mounted anywhere yet.
struct Part<'m> {
    mount: &'m Mount,
    tree: OwnedFd,
    is_directory: bool,
}

/// Mounts what the spec asks for: directories before what lies in them.
pub fn mount_all(mounts: &[Mount]) -> Result<(), StartFailure> {
    let mut parts = take_parts(mounts)
        .map_err(|error| failure("mount what the host shares", error.raw_os_error(), error))?;
    parts.sort_by_key(|part| path(&part.mount.target).components().count());
    for part in &parts {
        let target = path(&part.mount.target);
        mount_part(part, target).map_err(|(attempted, error)| {
            failure(
                format!("{attempted} {}", target.display()),
                error.raw_os_error(),
                error,
            )
        })?;
    }
    Ok(())
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

fn take_parts(mounts: &[Mount]) -> Result<Vec<Part<'_>>, Errno> {
    let usual = MountFlags::NOSUID | MountFlags::NODEV;
    mount(SHARE_TAG, FOR_A_MOMENT, "virtiofs", usual, None)?;
    let parts = mounts.iter().map(take_part).collect();
    unmount(FOR_A_MOMENT, UnmountFlags::DETACH)?;
    parts
}

fn take_part(mount: &Mount) -> Result<Part<'_>, Errno> {
    let source = Path::new(FOR_A_MOMENT).join(path(&mount.name));
    let tree = open_tree(
        CWD,
        source,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    let status = rustix::fs::statat(&tree, "", AtFlags::EMPTY_PATH)?;
    Ok(Part {
        mount,
        tree,
        is_directory: FileType::from_raw_mode(status.st_mode) == FileType::Directory,
    })
}

type Attempt = (&'static str, Errno);

fn mount_part(part: &Part<'_>, target: &Path) -> Result<(), Attempt> {
    let attempted = "mount what the host shares on";
    let place = find_or_make(target, part.is_directory).map_err(|error| ("make", error))?;
    let own = format!("/proc/self/fd/{}", part.tree.as_raw_fd());
    if part.mount.fill && part.is_directory {
        // Before it hides what it is filled from.
        let from = format!("/proc/self/fd/{}", place.as_raw_fd());
        fill::fill(Path::new(&from), Path::new(&own)).map_err(|error| {
            let number = error.raw_os_error().unwrap_or(libc::EIO);
            (
                "fill the volume with what the image has at",
                Errno::from_raw_os_error(number),
            )
        })?;
    }
    move_mount(
        &part.tree,
        "",
        &place,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
    .map_err(|error| (attempted, error))?;
    if part.mount.read_only {
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        mount_remount(own.as_str(), flags, c"").map_err(|error| (attempted, error))?;
    }
    Ok(())
}

fn resolve(path: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(
        CWD,
        path,
        flags | OFlags::CLOEXEC,
        mode,
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// What is mounted on: it is there, or is made, and the directories above it. Every step is taken from the root of the container,
/// which links do not lead out of.
fn find_or_make(target: &Path, is_directory: bool) -> Result<OwnedFd, Errno> {
    let names: Vec<OsString> = target
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            _ => None,
        })
        .collect();
    let mut at = PathBuf::from("/");
    let mut directory = resolve(&at, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
    for (index, name) in names.iter().enumerate() {
        at.push(name);
        let is_last = index.checked_add(1) == Some(names.len());
        directory = match resolve(&at, OFlags::PATH, Mode::empty()) {
            Ok(found) => found,
            Err(Errno::NOENT) if is_last && !is_directory => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&directory, name.as_os_str(), flags, Mode::from_raw_mode(0o644))?;
                resolve(&at, OFlags::PATH, Mode::empty())?
            }
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&directory, name.as_os_str(), Mode::from_raw_mode(0o755))?;
                resolve(&at, OFlags::PATH, Mode::empty())?
            }
            Err(error) => return Err(error),
        };
    }
    Ok(directory)
}
