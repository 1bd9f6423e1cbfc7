//! What ends or wrecks the guest's kernel.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::system::RebootCommand;

use crate::After;
use crate::machine::{Machine, PAGE, physical_memory};
use crate::random::Random;

pub fn mount_file_systems() -> std::io::Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, target, kind, MountFlags::empty(), None)?;
    }
    Ok(())
}

/// A kernel panics when process 1 ends.
pub fn panic() -> ! {
    std::process::exit(1)
}

pub fn reboot(how: RebootCommand) -> After {
    let _ = rustix::system::reboot(how);
    After::Nothing
}

/// Neither runs nor ends.
pub fn be_silent() -> ! {
    loop {
        std::thread::park();
    }
}

/// Takes its vCPU for good: nothing interrupts it.
pub fn spin() -> ! {
    // SAFETY: touches no memory; the thread has the privilege.
    unsafe {
        std::arch::asm!("cli", "2: jmp 2b", options(noreturn));
    }
}

/// Random bytes over the kernel and everything else in memory, until nothing works any more.
pub fn scribble(machine: &Machine, random: &mut Random) -> After {
    let end = Instant::now() + Duration::from_secs(2);
    let Ok(memory) = physical_memory() else {
        return After::Whole;
    };
    let mut bytes = [0; 64];
    while Instant::now() < end {
        random.fill(&mut bytes);
        let place = (1 << 20) + random.below(machine.ram_end() - (1 << 20) - PAGE);
        let _ = memory.write_all_at(&bytes, place);
    }
    After::Whole
}
