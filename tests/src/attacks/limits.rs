//! More than its share.

use std::io;
use std::time::{Duration, Instant};

use super::call::{address, call};

pub fn priority() -> io::Result<()> {
    let highest = -20isize as usize;
    call(libc::SYS_setpriority, [libc::PRIO_PROCESS as usize, 0, highest]).map(drop)
}

pub fn real_time() -> io::Result<()> {
    let priority = 1i32;
    call(
        libc::SYS_sched_setscheduler,
        [0, libc::SCHED_FIFO as usize, address(&priority)],
    )
    .map(drop)
}

pub fn lock_memory() -> io::Result<()> {
    let memory = vec![0u8; 64 << 20];
    call(libc::SYS_mlock, [address(memory.as_slice()), memory.len()]).map(drop)
}

pub fn memory_hog() -> io::Result<()> {
    let mut memory = Vec::new();
    for _ in 0..256 {
        // Not zeros: those would be no pages at all.
        memory.push(vec![1u8; 1 << 20]);
    }
    std::hint::black_box(&memory);
    Ok(())
}

pub fn cpu_hog() -> io::Result<()> {
    let (begun, used) = (Instant::now(), processor_time()?);
    while begun.elapsed() < Duration::from_secs(2) {
        std::hint::spin_loop();
    }
    let used = processor_time()?.saturating_sub(used);
    if used > begun.elapsed() / 2 {
        return Ok(());
    }
    Err(io::Error::other(format!("got {} ms in 2 s", used.as_millis())))
}

fn processor_time() -> io::Result<Duration> {
    let mut time = [0u64; 2];
    let process = libc::CLOCK_PROCESS_CPUTIME_ID as usize;
    call(
        libc::SYS_clock_gettime,
        [process, super::call::address_mut(&mut time)],
    )?;
    let [seconds, nanoseconds] = time;
    Ok(Duration::new(seconds, u32::try_from(nanoseconds).unwrap_or(0)))
}

pub fn descriptors() -> io::Result<()> {
    for _ in 0..1000 {
        call(libc::SYS_dup, [1])?;
    }
    Ok(())
}
