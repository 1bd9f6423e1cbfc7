//! The root directory of a jail: an empty file system in memory, read-only, with nothing but what the policy lists.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

use crate::policy::{Access, RootEntry};
use crate::sys;

/// What was attempted when building a root failed.
pub(crate) type Failure = (&'static str, io::Error);

fn failed<E: Into<io::Error>>(attempted: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| (attempted, error.into())
}

fn attributes(access: Access) -> u64 {
    let (read_only, no_exec, no_device) = (
        libc::MOUNT_ATTR_RDONLY,
        libc::MOUNT_ATTR_NOEXEC,
        libc::MOUNT_ATTR_NODEV,
    );
    libc::MOUNT_ATTR_NOSUID
        | match access {
            Access::Read => read_only | no_exec | no_device,
            Access::Execute => read_only | no_device,
            Access::Write => no_exec | no_device,
            Access::Device => no_exec,
        }
}

/// Makes the root of the calling process, which is alone in a mount namespace of its own.
pub(crate) fn build(entries: &[RootEntry]) -> Result<(), Failure> {
    // What is mounted here stays here, and what the host mounts later does not come here.
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("separate the mounts"))?;
    let mut trees = Vec::new();
    for entry in entries {
        trees.push((entry, take(entry)?));
    }

    let context =
        rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("make the root"))?;
    for (key, value) in [("size", "64k"), ("nr_inodes", "256"), ("mode", "0755")] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value).map_err(failed("make the root"))?;
    }
    rustix::mount::fsconfig_create(context.as_fd()).map_err(failed("make the root"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(failed("make the root"))?;
    attach(&root, Path::new("/")).map_err(failed("mount the root"))?;
    rustix::process::fchdir(&root).map_err(failed("enter the root"))?;
    for (entry, (tree, is_directory)) in &trees {
        let place = place(&entry.path, *is_directory).map_err(failed("make a place in the root"))?;
        attach(tree, &place).map_err(failed("mount an entry of the root"))?;
    }
    // The old root is stacked on the new one, and taken away (pivot_root(2)).
    rustix::process::pivot_root(".", ".").map_err(failed("change the root"))?;
    let own = rustix::fs::fstat(&root)
        .map_err(failed("look at the root"))?
        .st_dev;
    // One by one: the host's root may have other mounts stacked on itself, and all of them are above ours now.
    for _ in 0..STACKED_MAX {
        rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the host's root"))?;
        if topmost()? == own {
            break;
        }
    }
    if topmost()? != own {
        let error = io::Error::from_raw_os_error(libc::EBUSY);
        return Err(("let go of all that is mounted on the host's root", error));
    }
    sys::add_mount_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY, false)
        .map_err(failed("make the root read-only"))?;
    rustix::process::chdir("/").map_err(failed("enter the root"))
}

/// Mounts on the host's root that are taken away at most; there is hardly ever one.
const STACKED_MAX: usize = 16;

/// The file system that is topmost at the root of the mount namespace: what a process that enters it finds.
fn topmost() -> Result<u64, Failure> {
    // Unlike `/` and `.`, the way up leads to what is stacked.
    let found = rustix::fs::stat("/..").map_err(failed("look at the root"))?;
    Ok(found.st_dev)
}

/// A copy of the mount that an entry names, not attached anywhere, with what may be done with it.
fn take(entry: &RootEntry) -> Result<(OwnedFd, bool), Failure> {
    let source = entry.source.as_deref().unwrap_or(&entry.path);
    let flags =
        OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE;
    let attempted = "find an entry of the root on the host";
    let tree = rustix::mount::open_tree(rustix::fs::CWD, source, flags).map_err(failed(attempted))?;
    sys::add_mount_attributes(tree.as_fd(), attributes(entry.access), true)
        .map_err(failed("restrict an entry of the root"))?;
    let kind = rustix::fs::statat(&tree, "", AtFlags::EMPTY_PATH).map_err(failed(attempted))?;
    Ok((tree, FileType::from_raw_mode(kind.st_mode) == FileType::Directory))
}

/// Makes what an entry is mounted on, and the directories above; its path from the root.
fn place(path: &Path, is_directory: bool) -> io::Result<PathBuf> {
    let inside = path.strip_prefix("/").unwrap_or(path);
    let mut directories = if is_directory {
        Some(inside)
    } else {
        inside.parent()
    }
    .map(|path| {
        path.ancestors()
            .filter(|path| !path.as_os_str().is_empty())
            .collect::<Vec<_>>()
    })
    .unwrap_or_default();
    directories.reverse();
    for directory in directories {
        match rustix::fs::mkdir(directory, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !is_directory {
        rustix::fs::open(
            inside,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o444),
        )?;
    }
    Ok(inside.to_owned())
}

fn attach(mount: &OwnedFd, at: &Path) -> rustix::io::Result<()> {
    rustix::mount::move_mount(
        mount,
        "",
        rustix::fs::CWD,
        at,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}
