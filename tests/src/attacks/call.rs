//! System calls by number: what an attacker has.

use std::ffi::CString;
use std::io;
use std::os::fd::RawFd;

/// An argument: a number or an address.
pub type Argument = usize;

/// A system call.
pub fn call<const N: usize>(number: libc::c_long, arguments: [Argument; N]) -> io::Result<usize> {
    let mut all = [0; 6];
    for (place, argument) in all.iter_mut().zip(arguments) {
        *place = argument;
    }
    let [a, b, c, d, e, f] = all;
    // SAFETY: whoever calls this passes addresses of memory that lives and is as the call wants it. What it does to the
    // system is what is tried.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as usize)
}

/// The address of a value that outlives the call.
pub fn address<T: ?Sized>(value: &T) -> Argument {
    std::ptr::from_ref(value).cast::<u8>() as usize
}

/// The address of a value that the call writes to.
pub fn address_mut<T: ?Sized>(value: &mut T) -> Argument {
    std::ptr::from_mut(value).cast::<u8>() as usize
}

/// A path for the kernel.
pub fn path(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

/// Opens a path.
pub fn open(name: &str, flags: i32) -> io::Result<RawFd> {
    let name = path(name);
    let here = libc::AT_FDCWD as usize;
    call(
        libc::SYS_openat,
        [here, name.as_ptr() as usize, flags as usize, 0o600],
    )
    .map(|fd| fd as RawFd)
}

/// Writes a byte where one is, so that nothing changes.
pub fn write_something(descriptor: RawFd) -> io::Result<()> {
    let mut byte = [0u8];
    call(
        libc::SYS_pread64,
        [descriptor as usize, address_mut(&mut byte), 1, 0],
    )?;
    call(libc::SYS_pwrite64, [descriptor as usize, address(&byte), 1, 0]).map(drop)
}

/// Creates a process that does this and ends.
pub fn fork(child: impl FnOnce()) -> io::Result<libc::pid_t> {
    let pid = call(libc::SYS_fork, [])? as libc::pid_t;
    if pid == 0 {
        child();
        let _ = call(libc::SYS_exit_group, [0]);
    }
    Ok(pid)
}
