//! Files, mounts, descriptors.

use std::io;

use super::call::{address, address_mut, call, open, path, write_something};
use super::{MEMFD, MEMORY, SECRET, prey};

const HERE: usize = libc::AT_FDCWD as usize;

pub fn host_file() -> io::Result<()> {
    open("/etc/passwd", libc::O_RDONLY).map(drop)
}

pub fn proc_of_others() -> io::Result<()> {
    let file = open(
        &format!("/proc/{}/environ", prey::of(prey::PROCESS)),
        libc::O_RDONLY,
    )?;
    let mut bytes = [0u8; 16];
    call(
        libc::SYS_read,
        [file as usize, address_mut(&mut bytes), bytes.len()],
    )
    .map(drop)
}

pub fn other_template() -> io::Result<()> {
    open(&prey::of(prey::TEMPLATE), libc::O_RDONLY).map(drop)
}

pub fn device_node() -> io::Result<()> {
    open("/dev/mem", libc::O_RDONLY).map(drop)
}

pub fn make_file() -> io::Result<()> {
    open("/attacked", libc::O_WRONLY | libc::O_CREAT).map(drop)
}

pub fn make_device() -> io::Result<()> {
    let _ = call(libc::SYS_unlink, [path("/attacked-node").as_ptr() as usize]);
    let node = path("/attacked-node");
    let null = 1 << 8 | 3;
    call(
        libc::SYS_mknodat,
        [
            HERE,
            node.as_ptr() as usize,
            (libc::S_IFCHR | 0o600) as usize,
            null,
        ],
    )
    .map(drop)
}

pub fn own_cgroup() -> io::Result<()> {
    let file = open("/sys/fs/cgroup/cgroup.procs", libc::O_WRONLY)?;
    call(libc::SYS_write, [file as usize, address(b"0"), 1]).map(drop)
}

pub fn template_by_proc() -> io::Result<()> {
    write_something(open(&format!("/proc/self/fd/{MEMORY}"), libc::O_RDWR)?)
}

pub fn memfd_by_proc() -> io::Result<()> {
    write_something(open(&format!("/proc/self/fd/{MEMFD}"), libc::O_RDWR)?)
}

/// `struct file_handle`, with room.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; 128],
}

pub fn template_by_handle() -> io::Result<()> {
    let mut handle = Handle {
        bytes: 128,
        kind: 0,
        handle: [0; 128],
    };
    let mut mount = 0i32;
    let empty = path("");
    call(
        libc::SYS_name_to_handle_at,
        [
            MEMORY as usize,
            empty.as_ptr() as usize,
            address_mut(&mut handle),
            address_mut(&mut mount),
            libc::AT_EMPTY_PATH as usize,
        ],
    )?;
    let file = call(
        libc::SYS_open_by_handle_at,
        [MEMORY as usize, address_mut(&mut handle), libc::O_RDWR as usize],
    )?;
    write_something(file as i32)
}

pub fn template_mode() -> io::Result<()> {
    call(libc::SYS_fchmod, [MEMORY as usize, 0o666]).map(drop)
}

pub fn other_descriptor() -> io::Result<()> {
    let mut bytes = [0u8; 16];
    call(
        libc::SYS_read,
        [SECRET as usize, address_mut(&mut bytes), bytes.len()],
    )
    .map(drop)
}

pub fn mount() -> io::Result<()> {
    let (name, place) = (path("tmpfs"), path("/"));
    let (name, place) = (name.as_ptr() as usize, place.as_ptr() as usize);
    call(libc::SYS_mount, [name, place, name, 0, 0]).map(drop)
}

pub fn unmount() -> io::Result<()> {
    // Free, it must not take the host's root away: what it mounts before is taken away again.
    let _ = mount();
    let place = path("/");
    call(
        libc::SYS_umount2,
        [place.as_ptr() as usize, libc::MNT_DETACH as usize],
    )
    .map(drop)
}

pub fn chroot_escape() -> io::Result<()> {
    // A directory that is there in both: the root itself.
    let (root, up) = (path("/"), path(".."));
    call(libc::SYS_chroot, [root.as_ptr() as usize])?;
    for _ in 0..8 {
        call(libc::SYS_chdir, [up.as_ptr() as usize])?;
    }
    open("etc/passwd", libc::O_RDONLY).map(drop)
}

pub fn execute() -> io::Result<()> {
    run("/bin/true")
}

fn run(program: &str) -> io::Result<()> {
    let program = path(program);
    let arguments = [program.as_ptr() as usize, 0];
    // It ends with 0, as what gets through does.
    call(
        libc::SYS_execve,
        [program.as_ptr() as usize, address(&arguments), address(&[0usize])],
    )
    .map(drop)
}

/// A whole ELF program that does `exit(0)`.
fn tiny_program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    let code = [0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    half(&mut elf, 2);
    half(&mut elf, 62);
    word(&mut elf, 1);
    long(&mut elf, BASE + 120);
    long(&mut elf, 64);
    long(&mut elf, 0);
    word(&mut elf, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        half(&mut elf, value);
    }
    word(&mut elf, 1);
    word(&mut elf, 5);
    for value in [0, BASE, BASE, 120 + 9, 120 + 9, 0x1000] {
        long(&mut elf, value);
    }
    elf.extend(code);
    elf
}

pub fn execute_memory() -> io::Result<()> {
    let program = tiny_program();
    let name = path("x");
    let file = call(libc::SYS_memfd_create, [name.as_ptr() as usize, 0])?;
    call(
        libc::SYS_write,
        [file, address(program.as_slice()), program.len()],
    )?;
    let (empty, none) = (path(""), [0usize]);
    call(
        libc::SYS_execveat,
        [
            file,
            empty.as_ptr() as usize,
            address(&none),
            address(&none),
            libc::AT_EMPTY_PATH as usize,
        ],
    )
    .map(drop)
}
