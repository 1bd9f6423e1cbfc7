//! The freeze trap: the MMIO page through which init speaks to the VMM.

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

use std::fs;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, compiler_fence};

use picovm_guest_protocol::{PROTOCOL_VERSION, trap};
use rustix::fs::{Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::{Attempt, InitError};

/// The mapped trap page. It is inherited by the container stub and gone with its `execve`.
pub struct Trap {
    registers: NonNull<u8>,
}

impl Trap {
    /// Maps the page that the kernel command line names and checks that a VMM of our protocol is behind it.
    pub fn map() -> Result<Self, InitError> {
        let command_line = fs::read("/proc/cmdline").attempt(|| "read /proc/cmdline".into())?;
        let address = address(&command_line).map_err(|why| InitError::Machine(why.into()))?;
        let attempted = || format!("map the trap page at {address:#x} from /dev/mem");
        let flags = OFlags::RDWR | OFlags::SYNC | OFlags::CLOEXEC;
        let memory = rustix::fs::open("/dev/mem", flags, Mode::empty()).attempt(attempted)?;
        // SAFETY: a new mapping at an address of the kernel's choice; it is never unmapped.
        let registers = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                trap::PAGE_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memory,
                address,
            )
        }
        .attempt(attempted)?;
        let registers = NonNull::new(registers.cast())
            .ok_or_else(|| InitError::Machine("the trap page is mapped at address zero".into()))?;
        let trap = Self { registers };
        trap.check()?;
        Ok(trap)
    }

    fn check(&self) -> Result<(), InitError> {
        let magic = self.read(trap::MAGIC);
        if magic != trap::MAGIC_VALUE {
            return Err(InitError::Machine(format!(
                "there is no freeze trap where {} says: it reads {magic:#x}",
                trap::CMDLINE_PARAMETER
            )));
        }
        let version = self.read(trap::VERSION);
        if version != PROTOCOL_VERSION {
            return Err(InitError::Machine(format!(
                "the VMM speaks version {version} of the guest protocol, this init {PROTOCOL_VERSION}"
            )));
        }
        Ok(())
    }

    /// Announces where the identity is to be written: guest-physical addresses of 4 KiB pages, in order.
    pub fn announce(&self, pages: &[u64]) {
        self.write(trap::IDENTITY_RESET, 0);
        for &page in pages {
            // SAFETY: as for `write`; the register is 64 bits wide and aligned.
            unsafe {
                self.registers
                    .as_ptr()
                    .add(trap::IDENTITY_PAGE as usize)
                    .cast::<u64>()
                    .write_volatile(page);
            }
        }
    }

    /// The freeze point. The instruction after the write in here is the first one of every clone.
    pub fn freeze(&self) {
        compiler_fence(Ordering::SeqCst);
        self.write(trap::FREEZE, 0);
        compiler_fence(Ordering::SeqCst);
    }

    /// The base freeze point: a VMM that makes a template here stops the machine, every other lets it go on at once.
    pub fn base(&self) {
        compiler_fence(Ordering::SeqCst);
        self.write(trap::BASE, 0);
        compiler_fence(Ordering::SeqCst);
    }

    /// Powers the machine off. `status` is 0 if all went as it should.
    pub fn power_off(&self, status: u32) -> ! {
        self.write(trap::POWER_OFF, status);
        loop {
            std::thread::park();
        }
    }

    fn read(&self, register: u64) -> u32 {
        // SAFETY: the page is mapped for as long as the process lives, and the registers are aligned and lie in it.
        unsafe {
            self.registers
                .as_ptr()
                .add(register as usize)
                .cast::<u32>()
                .read_volatile()
        }
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: as for `read`.
        unsafe {
            self.registers
                .as_ptr()
                .add(register as usize)
                .cast::<u32>()
                .write_volatile(value);
        }
    }
}

/// The trap page's guest-physical address on the kernel command line.
fn address(command_line: &[u8]) -> Result<u64, &'static str> {
    let value = command_line
        .split(u8::is_ascii_whitespace)
        .filter_map(|word| {
            word.strip_prefix(trap::CMDLINE_PARAMETER.as_bytes())?
                .strip_prefix(b"=")
        })
        .next_back()
        .ok_or("the kernel command line has no picovm.trap=0xADDRESS")?;
    let address = std::str::from_utf8(value)
        .ok()
        .and_then(|value| value.strip_prefix("0x"))
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or("picovm.trap on the kernel command line is not a hexadecimal address with 0x")?;
    if address % trap::TRAP_SIZE != 0 {
        return Err("picovm.trap on the kernel command line is not page-aligned");
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn the_trap_address_is_found_among_other_words() {
        assert_eq!(
            address(b"quiet picovm.trap=0xd0010000 panic=-1\n"),
            Ok(0xd001_0000)
        );
        assert_eq!(address(b"picovm.trap=0x1000 picovm.trap=0x2000"), Ok(0x2000));
    }

    #[test]
    fn a_missing_or_wrong_trap_address_says_what_is_wrong() {
        assert!(
            address(b"quiet xpicovm.trap=0x1000")
                .unwrap_err()
                .contains("has no")
        );
        for wrong in ["", "4096", "0x", "0xzz", "0x11111111111111111"] {
            let line = format!("picovm.trap={wrong}");
            assert!(
                address(line.as_bytes()).unwrap_err().contains("hexadecimal"),
                "{wrong}"
            );
        }
        assert!(
            address(b"picovm.trap=0x1001")
                .unwrap_err()
                .contains("page-aligned")
        );
    }
}
