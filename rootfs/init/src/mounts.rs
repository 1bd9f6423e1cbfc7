//! File systems: from the initramfs to the container's root, and what belongs to the machine but not to a container.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};

use crate::console;
use crate::error::{Attempt, InitError};
use crate::layer::Layers;
use crate::storage;

/// The image, an EROFS file system.
const IMAGE_DEVICE: &str = "/dev/vda";
/// The disk for a container's storage, which has no file system before there is a container.
pub const STORAGE_DEVICE: &str = "/dev/vdb";
/// Block devices are probed asynchronously.
const DEVICE_DEADLINE: Duration = Duration::from_secs(2);
/// Every clone replaces it by its own.
pub const PLACEHOLDER_HOSTNAME: &str = "picovm";

/// Mounts /proc, /sys and /dev in the initramfs.
pub fn kernel_file_systems() -> Result<(), InitError> {
    let usual = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_on("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=0755")?;
    mount_on("proc", "/proc", "proc", usual | MountFlags::NODEV, c"")?;
    mount_on("sysfs", "/sys", "sysfs", usual | MountFlags::NODEV, c"")
}

/// Mounts the image read-only with a writable overlay in memory (at most half of it) and makes that the root file
/// system, for init and for the container. Gives what still leads to the layers.
pub fn enter_root_file_system() -> Result<Layers, InitError> {
    mount_on(
        IMAGE_DEVICE,
        "/image",
        "erofs",
        MountFlags::RDONLY | MountFlags::NOATIME,
        c"",
    )?;
    mount_on(
        "tmpfs",
        "/scratch",
        "tmpfs",
        MountFlags::NOATIME,
        c"size=50%,mode=0755",
    )?;
    for directory in ["upper", "work", storage::MOUNT_POINT] {
        make_directory(&format!("/scratch/{directory}"), 0o755)?;
    }
    // The overlay's root shows the mode and owner of the upper directory.
    let image = fs::metadata("/image").attempt(|| "stat /image".into())?;
    std::os::unix::fs::chown("/scratch/upper", Some(image.uid()), Some(image.gid()))
        .and_then(|()| {
            fs::set_permissions(
                "/scratch/upper",
                fs::Permissions::from_mode(image.mode() & 0o7777),
            )
        })
        .attempt(|| "give /scratch/upper the mode and owner of the image's root".into())?;
    // volatile: the upper layer is memory and dies with the machine, there is nothing to sync.
    let layers = c"lowerdir=/image,upperdir=/scratch/upper,workdir=/scratch/work,volatile";
    mount_on("overlay", "/root", "overlay", MountFlags::NOATIME, layers)?;

    let opened = Layers::open("/image", "/scratch")?;
    for directory in ["/dev", "/proc", "/sys"] {
        let target = format!("/root{directory}");
        make_directory(&target, 0o755)?;
        mount_move(directory, target.as_str()).attempt(|| format!("move {directory} to {target}"))?;
    }
    let switch = || -> io::Result<()> {
        std::env::set_current_dir("/root")?;
        mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        std::env::set_current_dir("/")
    };
    switch().attempt(|| "make the container's root file system the root".into())?;
    Ok(opened)
}

/// Waits until the devices of image and storage are there. Nothing of them is read.
pub fn wait_for_disks() -> Result<(), InitError> {
    let give_up = Instant::now() + DEVICE_DEADLINE;
    for device in [IMAGE_DEVICE, STORAGE_DEVICE] {
        while !Path::new(device).exists() {
            if Instant::now() > give_up {
                return Err(InitError::Machine(format!(
                    "there is no {device}: the first virtio block device must hold the image, the second is for storage"
                )));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(())
}

/// Mounts and makes what a container expects to find besides its image.
pub fn populate_root_file_system() -> Result<(), InitError> {
    let usual = MountFlags::NOSUID | MountFlags::NOEXEC;
    let shared = MountFlags::NOSUID | MountFlags::NODEV;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        make_link(link, target)?;
    }
    make_directory("/run", 0o755)?;
    mount_on("tmpfs", "/run", "tmpfs", shared, c"mode=0755")?;
    if !Path::new("/tmp").exists() {
        make_directory("/tmp", 0o1777)?;
        fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777)).attempt(|| "chmod /tmp".into())?;
    }
    rustix::system::sethostname(PLACEHOLDER_HOSTNAME.as_bytes()).attempt(|| "set the host name".into())?;

    let pts = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    mount_if_supported("devpts", "/dev/pts", "devpts", usual, pts)?;
    mount_if_supported(
        "shm",
        "/dev/shm",
        "tmpfs",
        shared | MountFlags::NOEXEC,
        c"mode=1777",
    )?;
    mount_if_supported("mqueue", "/dev/mqueue", "mqueue", usual | MountFlags::NODEV, c"")?;
    let cgroup = usual | MountFlags::NODEV;
    mount_if_supported("cgroup2", "/sys/fs/cgroup", "cgroup2", cgroup, c"nsdelegate")
}

/// Takes from the container's sight what would let it reach past its kernel: physical memory, and with it the trap.
/// What it would need to make the nodes work again, `CAP_SYS_RAWIO`, the stub drops.
pub fn hide_machine() -> Result<(), InitError> {
    for node in ["/dev/mem", "/dev/port"] {
        match fs::remove_file(node) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).attempt(|| format!("unlink {node}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Seconds between two rounds in which the kernel adds up its counters of memory: once a second by default, which wakes every
/// clone that has nothing to do. Whoever reads the counters has them added up at once.
const STATISTICS_INTERVAL: &str = "3600";

/// Keeps the kernel from waking for what nobody waits for.
pub fn quiet_kernel() -> Result<(), InitError> {
    let path = "/proc/sys/vm/stat_interval";
    fs::write(path, STATISTICS_INTERVAL).attempt(|| format!("write {path}"))
}

/// Brings the loopback interface up, if the kernel has one.
pub fn loopback_up() -> Result<(), InitError> {
    let attempted = || "bring the loopback interface up".into();
    let socket = match rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    ) {
        Ok(socket) => socket,
        Err(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::NOSYS) => return Ok(()),
        Err(error) => return Err(error).attempt(attempted),
    };
    // SAFETY: an all-zero ifreq is a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    // SAFETY: the request is a valid ifreq that outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).attempt(attempted),
    }
}

fn mount_on(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &CStr,
) -> Result<(), InitError> {
    make_directory(target, 0o755)?;
    mount(source, target, kind, flags, options).attempt(|| format!("mount {kind} from {source} on {target}"))
}

/// Like [`mount_on`], for what a smaller kernel may lack: then it says so and goes on.
fn mount_if_supported(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &CStr,
) -> Result<(), InitError> {
    match mount_on(source, target, kind, flags, options) {
        Err(InitError::System { attempted, source })
            if matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) =>
        {
            console::report(&format!("{attempted}: this kernel has none, going on without"));
            Ok(())
        }
        result => result,
    }
}

fn make_directory(path: &str, mode: u32) -> Result<(), InitError> {
    match rustix::fs::mkdir(path, rustix::fs::Mode::from_raw_mode(mode)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        // sysfs makes no directories: what is mounted there has its own mount point, or the kernel lacks it.
        Err(rustix::io::Errno::PERM) if path.starts_with("/sys/") => Ok(()),
        Err(error) => Err(error).attempt(|| format!("mkdir {path}")),
    }
}

fn make_link(link: &str, target: &str) -> Result<(), InitError> {
    match symlink(target, link) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).attempt(|| format!("link {link} to {target}"))
        }
        _ => Ok(()),
    }
}
