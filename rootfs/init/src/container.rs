//! What holds for all processes of a container: its limits, its writable layer, file systems in memory, and whether its root
//! can be written to.

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

use std::ffi::{CString, OsStr};
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use picovm_guest_protocol::{ContainerSpec, Frame, Limits, StartFailure};
use rustix::mount::{MountFlags, mount, mount_remount};

use crate::cgroup::Cgroup;
use crate::layer::{self, Layers};
use crate::shares;
use crate::start::failure;
use crate::storage;

/// What a container gets of the machine, made before the freeze. A test has none of it.
#[derive(Default)]
pub struct Ground {
    /// Whether this is a guest, whose processes are confined.
    pub is_guest: bool,
    /// Its control group, unless the kernel has none.
    pub cgroup: Option<Cgroup>,
    /// Where its image and its writable layer are.
    pub layers: Option<Layers>,
}

/// Arranges what the spec asks for beside processes. Gives the frames for the agent that came in between.
pub fn arrange(
    spec: &ContainerSpec,
    ground: &Ground,
    control: BorrowedFd<'_>,
) -> Result<Vec<(u16, Frame)>, StartFailure> {
    if spec.storage {
        let layers = ground
            .layers
            .as_ref()
            .ok_or_else(|| failure("use its storage", 0, "this machine has no layers of its own"))?;
        storage::enter(layers)?;
    }
    let early = if spec.layer {
        layer::receive(control, Path::new("/"))?
    } else {
        Vec::new()
    };
    for (target, options) in &spec.tmpfs {
        mount_tmpfs(target, options)?;
    }
    if !spec.mounts.is_empty() {
        shares::mount_all(&spec.mounts)?;
    }
    if !spec.hosts.is_empty() {
        add_hosts(&spec.hosts)?;
    }
    if spec.read_only {
        // This mount alone: what is mounted on it stays as it is, and the agent still reaches the writable layer.
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOATIME;
        mount_remount("/", flags, c"")
            .map_err(|error| failure("make the root file system read-only", error.raw_os_error(), error))?;
    }
    if spec.limits != Limits::default() {
        let group = ground
            .cgroup
            .as_ref()
            .ok_or_else(|| failure("limit the container", 0, "its kernel has no control groups"))?;
        group.limit(&spec.limits)?;
    }
    Ok(early)
}

/// Mounts a file system in memory, as `docker run --tmpfs` does.
fn mount_tmpfs(target: &[u8], options: &[u8]) -> Result<(), StartFailure> {
    let path = Path::new(OsStr::from_bytes(target));
    let attempted = || format!("mount a tmpfs on {}", path.display());
    if path.is_relative() {
        return Err(failure(attempted(), libc::EINVAL, "it is not an absolute path"));
    }
    let (flags, data) =
        tmpfs_options(options).map_err(|message| failure(attempted(), libc::EINVAL, message))?;
    std::fs::create_dir_all(path)
        .map_err(|error| failure(attempted(), error.raw_os_error().unwrap_or(0), error))?;
    mount("tmpfs", path, "tmpfs", flags, data.as_c_str())
        .map_err(|error| failure(attempted(), error.raw_os_error(), error))
}

/// Flags, and what the file system itself is told.
fn tmpfs_options(options: &[u8]) -> Result<(MountFlags, CString), String> {
    const FOR_TMPFS: [&[u8]; 7] = [
        b"size=",
        b"mode=",
        b"uid=",
        b"gid=",
        b"nr_inodes=",
        b"nr_blocks=",
        b"huge=",
    ];
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let mut data: Vec<&[u8]> = Vec::new();
    for word in options.split(|&byte| byte == b',') {
        let (flag, set) = match word {
            b"" | b"defaults" | b"rw" | b"async" => continue,
            b"ro" => (MountFlags::RDONLY, true),
            b"nosuid" => (MountFlags::NOSUID, true),
            b"suid" => (MountFlags::NOSUID, false),
            b"nodev" => (MountFlags::NODEV, true),
            b"dev" => (MountFlags::NODEV, false),
            b"noexec" => (MountFlags::NOEXEC, true),
            b"exec" => (MountFlags::NOEXEC, false),
            b"sync" => (MountFlags::SYNCHRONOUS, true),
            b"dirsync" => (MountFlags::DIRSYNC, true),
            b"noatime" => (MountFlags::NOATIME, true),
            b"atime" => (MountFlags::NOATIME, false),
            b"nodiratime" => (MountFlags::NODIRATIME, true),
            b"diratime" => (MountFlags::NODIRATIME, false),
            b"relatime" => (MountFlags::RELATIME, true),
            b"norelatime" => (MountFlags::RELATIME, false),
            b"strictatime" => (MountFlags::STRICTATIME, true),
            b"nostrictatime" => (MountFlags::STRICTATIME, false),
            word if FOR_TMPFS.iter().any(|name| word.starts_with(name)) => {
                data.push(word);
                continue;
            }
            word => return Err(format!("there is no option {}", String::from_utf8_lossy(word))),
        };
        flags.set(flag, set);
    }
    let data = CString::new(data.join(&b',')).map_err(|_| String::from("an option contains a zero byte"))?;
    Ok((flags, data))
}

/// Adds lines to `/etc/hosts`.
pub fn add_hosts(hosts: &[(Vec<u8>, Vec<u8>)]) -> Result<(), StartFailure> {
    let mut lines = Vec::new();
    for (address, name) in hosts {
        if [address, name].iter().any(|word| word.contains(&b'\n')) {
            let message = "an address or a name contains a line end";
            return Err(failure("add to /etc/hosts", libc::EINVAL, message));
        }
        lines.extend_from_slice(&[address.as_slice(), b"\t", name, b"\n"].concat());
    }
    std::fs::create_dir_all("/etc")
        .and_then(|()| {
            std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open("/etc/hosts")
        })
        .and_then(|mut file| file.write_all(&lines))
        .map_err(|error| failure("add to /etc/hosts", error.raw_os_error().unwrap_or(0), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tmpfs_has_dockers_flags_unless_told_otherwise() {
        let usual = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        assert_eq!(tmpfs_options(b""), Ok((usual, c"".into())));
        assert_eq!(
            tmpfs_options(b"rw,exec,size=64m,mode=1777,ro"),
            Ok((
                MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY,
                c"size=64m,mode=1777".into()
            ))
        );
        assert!(tmpfs_options(b"size=1,bogus").unwrap_err().contains("bogus"));
        assert!(tmpfs_options(b"size=\0").is_err());
    }
}
