//! What the kernel offers to those who may, and to everybody.

use std::io;

use super::KVM;
use super::call::{address, address_mut, call, path};

pub fn kvm_ioctl() -> io::Result<()> {
    const KVM_CREATE_VM: usize = 0xae01;
    call(libc::SYS_ioctl, [KVM as usize, KVM_CREATE_VM, 0]).map(drop)
}

pub fn module() -> io::Result<()> {
    let (nonsense, none) = ([0u8; 64], path(""));
    match call(
        libc::SYS_init_module,
        [address(&nonsense), nonsense.len(), none.as_ptr() as usize],
    ) {
        // It was read as a module.
        Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => Ok(()),
        other => other.map(drop),
    }
}

pub fn time() -> io::Result<()> {
    let mut now = [0i64; 2];
    call(
        libc::SYS_clock_gettime,
        [libc::CLOCK_REALTIME as usize, address_mut(&mut now)],
    )?;
    call(
        libc::SYS_clock_settime,
        [libc::CLOCK_REALTIME as usize, address(&now)],
    )
    .map(drop)
}

pub fn host_name() -> io::Result<()> {
    call(libc::SYS_sethostname, [address(b"attacked"), 8]).map(drop)
}

pub fn reboot() -> io::Result<()> {
    let [first, second] = [0xfee1_dead, 0x2812_1969];
    // LINUX_REBOOT_CMD_CAD_OFF.
    call(libc::SYS_reboot, [first, second, 0, 0]).map(drop)
}

pub fn kernel_log() -> io::Result<()> {
    const READ_ALL: usize = 3;
    let mut bytes = vec![0u8; 4096];
    call(
        libc::SYS_syslog,
        [READ_ALL, address_mut(bytes.as_mut_slice()), bytes.len()],
    )
    .map(drop)
}

pub fn ports() -> io::Result<()> {
    call(libc::SYS_ioperm, [0x80, 1, 1]).map(drop)
}

pub fn bpf() -> io::Result<()> {
    // BPF_MAP_CREATE: a hash of one pair of 4 bytes each.
    let map = [1u32, 4, 4, 1, 0, 0, 0, 0];
    call(libc::SYS_bpf, [0, address(&map), size_of_val(&map)]).map(drop)
}

pub fn perf() -> io::Result<()> {
    // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, of all processes on the first processor.
    let mut attributes = [0u32; 16];
    attributes[0] = 1;
    attributes[1] = 64;
    call(
        libc::SYS_perf_event_open,
        [address(&attributes), usize::MAX, 0, usize::MAX, 0],
    )
    .map(drop)
}

pub fn userfaultfd() -> io::Result<()> {
    call(libc::SYS_userfaultfd, [0]).map(drop)
}

pub fn io_uring() -> io::Result<()> {
    let mut parameters = [0u8; 120];
    call(libc::SYS_io_uring_setup, [1, address_mut(&mut parameters)]).map(drop)
}

pub fn keyring() -> io::Result<()> {
    let (kind, name) = (path("user"), path("attacked"));
    // KEY_SPEC_PROCESS_KEYRING.
    let keyring = -2isize as usize;
    call(
        libc::SYS_add_key,
        [
            kind.as_ptr() as usize,
            name.as_ptr() as usize,
            address(b"x"),
            1,
            keyring,
        ],
    )
    .map(drop)
}

pub fn executable_memory() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    call(
        libc::SYS_mmap,
        [0, 4096, protection as usize, flags as usize, usize::MAX, 0],
    )
    .map(drop)
}

pub fn old_calls() -> io::Result<()> {
    // `getpid` of the 32-bit interface.
    let mut result = 20i64;
    // SAFETY: the call takes no argument and touches no memory; the kernel may clear the registers that are named.
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inout("rax") result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if result > 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(result.unsigned_abs() as i32))
    }
}
