//! Other processes, ids, namespaces, what processes share.

use std::io;

use super::call::{address, call, fork, path};
use super::prey;

fn victim() -> usize {
    prey::of(prey::PROCESS).parse().unwrap_or(1)
}

pub fn kill() -> io::Result<()> {
    call(libc::SYS_kill, [victim(), libc::SIGCONT as usize]).map(drop)
}

pub fn trace() -> io::Result<()> {
    call(libc::SYS_ptrace, [libc::PTRACE_SEIZE as usize, victim(), 0, 0]).map(drop)
}

pub fn process_memory() -> io::Result<()> {
    // Its vDSO or stack would have to be found; that the kernel looks at the address is far enough.
    let mut byte = [0u8];
    let ours = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let theirs = libc::iovec {
        iov_base: 8 as *mut libc::c_void,
        iov_len: 1,
    };
    let written = call(
        libc::SYS_process_vm_writev,
        [victim(), address(&ours), 1, address(&theirs), 1, 0],
    );
    match written {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        other => other.map(drop),
    }
}

pub fn steal_descriptor() -> io::Result<()> {
    let process = call(libc::SYS_pidfd_open, [victim(), 0])?;
    call(libc::SYS_pidfd_getfd, [process, 0, 0]).map(drop)
}

pub fn setns() -> io::Result<()> {
    let process = call(libc::SYS_pidfd_open, [victim(), 0])?;
    call(
        libc::SYS_setns,
        [process, (libc::CLONE_NEWNS | libc::CLONE_NEWNET) as usize],
    )
    .map(drop)
}

pub fn user_namespace() -> io::Result<()> {
    call(libc::SYS_unshare, [libc::CLONE_NEWUSER as usize]).map(drop)
}

pub fn setuid() -> io::Result<()> {
    call(libc::SYS_setresuid, [0, 0, 0]).map(drop)
}

pub fn capabilities() -> io::Result<()> {
    // _LINUX_CAPABILITY_VERSION_3; CAP_SYS_ADMIN effective and permitted.
    let header = [0x2008_0522u32, 0];
    let all = [1u32 << 21, 1 << 21, 0, 0, 0, 0];
    call(libc::SYS_capset, [address(&header), address(&all)]).map(drop)
}

pub fn new_process() -> io::Result<()> {
    fork(|| ()).map(drop)
}

pub fn fork_bomb() -> io::Result<()> {
    let mut all = Vec::new();
    let bombed = (0..100).try_for_each(|_| {
        all.push(fork(|| {
            let _ = call(libc::SYS_pause, []);
        })?);
        Ok(())
    });
    for pid in all {
        let _ = call(libc::SYS_kill, [pid as usize, libc::SIGKILL as usize]);
    }
    bombed
}

/// Key of the shared memory that the test makes.
pub const SHARED_MEMORY: i32 = 0x7069_636f;
/// Name of the queue that it makes.
pub const QUEUE: &str = "picovm-attacked";

pub fn shared_memory() -> io::Result<()> {
    let id = call(libc::SYS_shmget, [SHARED_MEMORY as usize, 4096, 0])?;
    call(libc::SYS_shmat, [id, 0, 0]).map(drop)
}

/// Makes what `shared_memory` and `message_queue` look for, for everybody.
///
/// # Errors
/// As the system calls.
pub fn share() -> io::Result<()> {
    call(
        libc::SYS_shmget,
        [SHARED_MEMORY as usize, 4096, (libc::IPC_CREAT | 0o666) as usize],
    )?;
    let name = path(QUEUE);
    let flags = (libc::O_CREAT | libc::O_RDWR) as usize;
    call(libc::SYS_mq_open, [name.as_ptr() as usize, flags, 0o666, 0]).map(drop)
}

pub fn message_queue() -> io::Result<()> {
    let name = path(QUEUE);
    call(
        libc::SYS_mq_open,
        [name.as_ptr() as usize, libc::O_RDWR as usize, 0, 0],
    )
    .map(drop)
}
