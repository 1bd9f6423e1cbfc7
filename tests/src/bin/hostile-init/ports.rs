//! Ports. The kernel has no `iopl(2)`, so the attacker takes the privilege: it finds the registers of one of its own
//! threads where the kernel has saved them, and sets the I/O privilege level in its flags.

use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::After;
use crate::machine::{Machine, physical_memory};
use crate::random::Random;

/// I/O privilege level 3 in RFLAGS.
const PRIVILEGE: u64 = 3 << 12;
/// What r12 to r15 hold while the thread waits to be found.
const MARKS: [u64; 4] = [
    0x6d61_726b_0000_0c12,
    0x6d61_726b_0000_0d13,
    0x6d61_726b_0000_0e14,
    0x6d61_726b_0000_0f15,
];
/// `struct pt_regs`: r15 to r12 first, then code segment, flags and stack segment at these places.
const PT_REGS: usize = 21;
const CS: usize = 17;
const FLAGS: usize = 18;
const SS: usize = 20;
/// User code and data segments of Linux.
const USER_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;

const SERIAL: u16 = 0x3f8;
const KEYBOARD: u16 = 0x64;
/// Command of the keyboard controller: pull the processor's reset line.
const RESET: u8 = 0xfe;

/// Gives the calling thread all ports.
pub fn take_privilege(machine: &Machine) -> Result<()> {
    let (wait, wake) = std::io::pipe()?;
    let machine = machine.clone();
    let finder = std::thread::spawn(move || -> Result<()> {
        let found = raise_flags(&machine);
        // Lets the thread go on in any case.
        drop(wake);
        found
    });
    let mut byte = 0u8;
    let flags: u64;
    // SAFETY: `read(2)` of one byte into `byte`, with marks in registers that it keeps; then the flags are read.
    unsafe {
        std::arch::asm!(
            "syscall",
            "pushfq",
            "pop {flags}",
            flags = out(reg) flags,
            inout("rax") libc::SYS_read => _,
            in("rdi") wait.as_raw_fd(),
            in("rsi") &raw mut byte,
            in("rdx") 1,
            in("r12") MARKS[0],
            in("r13") MARKS[1],
            in("r14") MARKS[2],
            in("r15") MARKS[3],
            out("rcx") _,
            out("r11") _,
        );
    }
    finder
        .join()
        .map_err(|_| Error::other("the finder has panicked"))??;
    if flags & PRIVILEGE != PRIVILEGE {
        return Err(Error::other(format!("the flags are {flags:#x}")));
    }
    Ok(())
}

/// Finds the saved registers of the thread that waits, and raises its privilege.
fn raise_flags(machine: &Machine) -> Result<()> {
    const STEP: usize = 1 << 20;
    let memory = physical_memory()?;
    let mut bytes = vec![0; STEP + PT_REGS * 8];
    // It may not wait yet.
    for _ in 0..100 {
        for start in (STEP as u64..machine.ram_end()).step_by(STEP) {
            let end = (machine.ram_end() - start).min(bytes.len() as u64) as usize;
            if memory.read_exact_at(&mut bytes[..end], start).is_err() {
                continue;
            }
            let Some(at) = find(&bytes[..end]) else {
                continue;
            };
            let place = start + (at + FLAGS * 8) as u64;
            let mut flags = [0; 8];
            memory.read_exact_at(&mut flags, place)?;
            let raised = u64::from_le_bytes(flags) | PRIVILEGE;
            return memory.write_all_at(&raised.to_le_bytes(), place);
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    Err(Error::other("the registers of the waiting thread are nowhere"))
}

fn find(bytes: &[u8]) -> Option<usize> {
    let first = MARKS[3].to_le_bytes();
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    bytes
        .chunks_exact(8)
        .enumerate()
        .filter(|(_, word)| *word == first)
        .map(|(index, _)| index * 8)
        .find(|&at| {
            word(at + 8) == Some(MARKS[2])
                && word(at + 16) == Some(MARKS[1])
                && word(at + 24) == Some(MARKS[0])
                && word(at + CS * 8) == Some(USER_CS)
                && word(at + SS * 8) == Some(USER_SS)
        })
}

fn write(port: u16, width: u64, value: u32) {
    // SAFETY: the thread may use every port; what answers there is what is attacked.
    unsafe {
        match width {
            1 => std::arch::asm!("out dx, al", in("dx") port, in("al") value as u8),
            2 => std::arch::asm!("out dx, ax", in("dx") port, in("ax") value as u16),
            _ => std::arch::asm!("out dx, eax", in("dx") port, in("eax") value),
        }
    }
}

fn read(port: u16, width: u64) -> u32 {
    let value: u32;
    // SAFETY: as for writing.
    unsafe {
        match width {
            1 => std::arch::asm!("in al, dx", "movzx eax, al", in("dx") port, out("eax") value),
            2 => std::arch::asm!("in ax, dx", "movzx eax, ax", in("dx") port, out("eax") value),
            _ => std::arch::asm!("in eax, dx", in("dx") port, out("eax") value),
        }
    }
    value
}

/// Writes all bytes to one port by one instruction.
fn write_string(port: u16, bytes: &[u8]) {
    // SAFETY: the instruction reads exactly the bytes of the slice.
    unsafe {
        std::arch::asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _);
    }
}

/// Fills all bytes from one port by one instruction.
fn read_string(port: u16, bytes: &mut [u8]) {
    // SAFETY: the instruction writes exactly the bytes of the slice.
    unsafe {
        std::arch::asm!("rep insb", in("dx") port, inout("rdi") bytes.as_mut_ptr() => _, inout("rcx") bytes.len() => _);
    }
}

/// Ports that the kernel emulates: the interrupt controllers and the timer. What is written there stops the guest's own
/// clock, which says nothing of the VMM.
const OF_THE_KERNEL: [u16; 12] = [
    0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x60,
];

/// Every port read, many written, at every width, and those of the VMM again and again.
pub fn storm(random: &mut Random) -> After {
    let is_reset = |port: u16, width: u64, value: u32| {
        (0..width).any(|byte| port.wrapping_add(byte as u16) == KEYBOARD)
            || port == KEYBOARD && value & 0xff == u32::from(RESET)
    };
    for port in (0..=u16::MAX).step_by(61) {
        read(port, random.one_of(&[1, 2, 4]));
    }
    let mut page = vec![0; 128];
    for _ in 0..4000 {
        let port = match random.below(4) {
            0 => random.next() as u16,
            1 => random.one_of(&[0x60, KEYBOARD, 0x70, 0x71, 0x80]),
            _ => SERIAL + random.below(8) as u16,
        };
        let width = random.one_of(&[1, 2, 4]);
        let value = random.next() as u32;
        if random.once_in(2) || OF_THE_KERNEL.contains(&port) || is_reset(port, width, value) {
            read(port, width);
        } else {
            write(port, width, value);
        }
        if random.once_in(100) {
            random.fill(&mut page);
            write_string(SERIAL + random.below(8) as u16, &page);
            read_string(random.one_of(&[SERIAL, SERIAL + 5, KEYBOARD, 0x80]), &mut page);
        }
    }
    After::Whole
}

/// Far more on the console than its log keeps.
pub fn flood_console(random: &mut Random) -> After {
    // 8 bits, no loop back, no interrupts.
    for (register, value) in [(3, 3), (4, 0), (1, 0)] {
        write(SERIAL + register, 1, value);
    }
    // Each byte is an exit, or each four: several times what is kept of it, at a pace that a software KVM bears.
    let mut part = vec![0; 512];
    for _ in 0..8 {
        random.fill(&mut part);
        write_string(SERIAL, &part);
        for _ in 0..1000 {
            write(SERIAL, 4, random.next() as u32);
        }
    }
    After::Whole
}

/// Ends the machine after some last words that a terminal would obey.
pub fn escape_on_console() -> After {
    for (register, value) in [(3, 3), (4, 0), (1, 0)] {
        write(SERIAL + register, 1, value);
    }
    write_string(
        SERIAL,
        b"\x1b]0;owned\x07\x1b[2J\x1b[31mlast words\r\xc2\x9b1m\x7f\xff\n",
    );
    After::Nothing
}

pub fn reset_line() -> After {
    loop {
        write(KEYBOARD, 1, RESET.into());
    }
}
