//! A container's writable layer on its machine's disk for storage, in the place of that in memory: an overlay of its own over the
//! image, to which the root is switched once the container is known.

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

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use picovm_guest_protocol::StartFailure;
use rustix::fs::{CWD, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount, move_mount, unmount,
};

use crate::layer::Layers;
use crate::mounts::STORAGE_DEVICE;
use crate::names::NameFiles;
use crate::start::failure;

/// Where the disk is mounted, beside the upper directory in memory.
pub const MOUNT_POINT: &str = "disk";
const UPPER: &str = "disk/upper";
const WORK: &str = "disk/work";
/// What is mounted on the root, and moves to the new one.
const MOVED: [&str; 4] = ["dev", "proc", "sys", "run"];
/// Directories that init makes or writes to for each start.
const MADE: [&str; 6] = ["dev", "proc", "sys", "run", "tmp", "etc"];

/// `discard`: what is deleted goes back to the host. `noinit_itable`: the host made the file system on a file of zeros.
const OPTIONS: &std::ffi::CStr = c"discard,noinit_itable,errors=remount-ro";

fn because(attempted: &str) -> impl FnOnce(Errno) -> StartFailure {
    move |error| failure(attempted, error.raw_os_error(), error)
}

fn because_io(attempted: &str) -> impl FnOnce(std::io::Error) -> StartFailure {
    move |error| failure(attempted, error.raw_os_error().unwrap_or(0), error)
}

/// Makes the image with the layer on disk the root: that of this process, and of all that have the one that was it. Nothing of a
/// container runs yet.
pub fn enter(layers: &Layers) -> Result<(), StartFailure> {
    mount(
        STORAGE_DEVICE,
        layers.scratch(MOUNT_POINT),
        "ext4",
        MountFlags::NOATIME,
        OPTIONS,
    )
    .map_err(because("mount the disk of its storage"))?;
    make_directories(layers).map_err(because_io("make the directories of its storage"))?;
    let root = mount_overlay(layers).map_err(because("mount its storage over its image"))?;
    switch_root(root.as_fd()).map_err(because("make its storage the root file system"))?;
    make_temporary().map_err(because("make /tmp"))?;
    let name = rustix::system::uname();
    NameFiles::make().write(&name.nodename().to_string_lossy())?;
    layers
        .move_to(UPPER, &MADE)
        .map_err(because_io("look at its storage"))
}

/// Makes the upper directory and overlayfs's own, on a disk that is new.
fn make_directories(layers: &Layers) -> std::io::Result<()> {
    let upper = layers.scratch(UPPER);
    let is_new = make(CWD, &upper, 0o755)?;
    make(CWD, &layers.scratch(WORK), 0o700)?;
    if is_new {
        // The overlay's root shows the mode and owner of the upper directory.
        let image = std::fs::metadata(layers.image().join("."))?;
        let (uid, gid) = (Uid::from_raw(image.uid()), Gid::from_raw(image.gid()));
        rustix::fs::chown(&upper, Some(uid), Some(gid))?;
        rustix::fs::chmod(&upper, Mode::from_raw_mode(image.mode() & 0o7777))?;
    }
    Ok(())
}

/// Makes a directory, unless it is there; whether it was not.
fn make(at: BorrowedFd<'_>, path: &Path, mode: u32) -> rustix::io::Result<bool> {
    match rustix::fs::mkdirat(at, path, Mode::from_raw_mode(mode)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

fn mount_overlay(layers: &Layers) -> rustix::io::Result<std::os::fd::OwnedFd> {
    let overlay = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, path) in [
        ("source", PathBuf::from("overlay")),
        ("lowerdir", layers.image()),
        ("upperdir", layers.scratch(UPPER)),
        ("workdir", layers.scratch(WORK)),
    ] {
        fsconfig_set_string(&overlay, key, path)?;
    }
    fsconfig_create(&overlay)?;
    let root = fsmount(
        &overlay,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOATIME,
    )?;
    for directory in MOVED {
        make(root.as_fd(), Path::new(directory), 0o755)?;
    }
    Ok(root)
}

/// Switches to a root that is mounted nowhere yet.
fn switch_root(root: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let nothing = MoveMountFlags::empty();
    move_mount(root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    for directory in MOVED {
        // The old root is still this process's, so the path leads to what is mounted there.
        move_mount(CWD, format!("/{directory}"), root, directory, nothing)?;
    }
    rustix::process::fchdir(root)?;
    // Puts the old root on the new one, from where it goes (pivot_root(2)).
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

fn make_temporary() -> rustix::io::Result<()> {
    if make(CWD, Path::new("/tmp"), 0o1777)? {
        rustix::fs::chmod("/tmp", Mode::from_raw_mode(0o1777))?;
    }
    Ok(())
}
