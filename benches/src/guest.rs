//! The smallest guests: initramfs archives whose program is some machine code that says "user space is reached" and
//! does nothing else, so that what is measured is the way there.

use picovm_guest_protocol::trap;
use picovm_vmm::arch::layout;

/// Where the program is loaded.
const ADDRESS: u64 = 0x40_0000;
/// Bytes of the ELF header and one program header.
const HEADERS: usize = 64 + 56;

/// What a program does when it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `reboot(RB_AUTOBOOT)`: ends the machine of any VMM.
    Reset,
    /// Writes to picovm's freeze register, again and again: costs nothing but the access.
    FreezePoint,
    /// Sleeps for ever.
    Sleep,
    /// Writes [`MARK`] to the console, again and again.
    Write,
    /// Writes to Firecracker's boot timer, which logs a line, then resets.
    BootTimer,
}

/// What [`Program::Write`] writes: ASCII's acknowledgement, which no message of a kernel has in it.
pub const MARK: u8 = 0x06;

/// Where Firecracker's boot timer is (present versions, earlier versions) and what it waits for
/// (`src/vmm/src/devices/pseudo/boot_timer.rs` there).
const BOOT_TIMERS: [u32; 2] = [0xc000_0000, 0xd000_0000];
const BOOT_TIMER_VALUE: u8 = 123;

impl Program {
    /// Machine code for Linux on x86-64.
    fn code(self) -> Vec<u8> {
        let mut code = Vec::new();
        match self {
            Self::Reset => reset(&mut code),
            Self::FreezePoint => {
                open_physical_memory(&mut code);
                map(&mut code, layout::TRAP as u32);
                code.extend(b"\xc7\x80"); //             mov dword ptr [rax + FREEZE], 0
                code.extend((trap::FREEZE as u32).to_le_bytes());
                code.extend(0u32.to_le_bytes());
                code.extend(b"\xeb\xf4"); //             jmp to that instruction
            }
            Self::Sleep => {
                code.extend(b"\xb8\x22\x00\x00\x00"); // mov eax, SYS_pause
                code.extend(b"\x0f\x05"); //             syscall
                code.extend(b"\xeb\xf7"); //             jmp to the beginning
            }
            Self::Write => {
                code.extend(b"\xe8\x01\x00\x00\x00"); // call behind the byte, which leaves its address on the stack
                code.push(MARK);
                code.extend(b"\x5e"); //                 pop rsi
                code.extend(b"\xbf\x01\x00\x00\x00"); // mov edi, 1: init's standard output is the console
                code.extend(b"\xba\x01\x00\x00\x00"); // mov edx, 1
                code.extend(b"\xb8\x01\x00\x00\x00"); // mov eax, SYS_write
                code.extend(b"\x0f\x05"); //             syscall
                code.extend(b"\xeb\xed"); //             jmp to the first mov
            }
            Self::BootTimer => {
                open_physical_memory(&mut code);
                for address in BOOT_TIMERS {
                    map(&mut code, address);
                    code.extend([0xc6, 0x00, BOOT_TIMER_VALUE]); // mov byte ptr [rax], 123
                }
                reset(&mut code);
            }
        }
        code
    }

    /// An ELF file (System V ABI, 4.1 and 5.1) of one readable and executable segment.
    fn elf(self) -> Vec<u8> {
        let code = self.code();
        let size = (HEADERS + code.len()) as u64;
        let mut elf = Vec::with_capacity(HEADERS + code.len());
        elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64 bits, little-endian
        for half in [2u16, 62] {
            elf.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
        }
        elf.extend(1u32.to_le_bytes());
        for long in [ADDRESS + HEADERS as u64, 64, 0] {
            elf.extend(long.to_le_bytes()); // entry, program headers, no sections
        }
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 0, 0, 0] {
            elf.extend(half.to_le_bytes()); // one program header
        }
        for word in [1u32, 5] {
            elf.extend(word.to_le_bytes()); // PT_LOAD, PF_R | PF_X
        }
        for long in [0, ADDRESS, ADDRESS, size, size, 0x1000] {
            elf.extend(long.to_le_bytes()); // offset, addresses, sizes, alignment
        }
        elf.extend(code);
        elf
    }

    /// An initramfs (format "newc", uncompressed) with this program as `/name`, a console and physical memory. It
    /// may be appended to another.
    pub fn initramfs(self, name: &str) -> Vec<u8> {
        const DIRECTORY: u32 = 0o040_755;
        const FILE: u32 = 0o100_755;
        const DEVICE: u32 = 0o020_600;
        let mut archive = Vec::new();
        entry(&mut archive, "dev", DIRECTORY, (0, 0), &[]);
        entry(&mut archive, "dev/console", DEVICE, (5, 1), &[]);
        entry(&mut archive, "dev/mem", DEVICE, (1, 1), &[]);
        entry(&mut archive, name, FILE, (0, 0), &self.elf());
        entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
        archive
    }
}

/// `reboot(RB_AUTOBOOT)`, which does not return.
fn reset(code: &mut Vec<u8>) {
    code.extend(b"\xbf\xad\xde\xe1\xfe"); // mov edi, LINUX_REBOOT_MAGIC1
    code.extend(b"\xbe\x69\x19\x12\x28"); // mov esi, LINUX_REBOOT_MAGIC2
    code.extend(b"\xba\x67\x45\x23\x01"); // mov edx, LINUX_REBOOT_CMD_RESTART
    code.extend(b"\xb8\xa9\x00\x00\x00"); // mov eax, SYS_reboot
    code.extend(b"\x0f\x05"); //             syscall
    code.extend(b"\xeb\xfe"); //             jmp itself
}

/// Opens `/dev/mem`; the descriptor is in `r8`.
fn open_physical_memory(code: &mut Vec<u8>) {
    const PATH: &[u8; 9] = b"/dev/mem\0";
    code.extend(b"\xe8"); //                 call behind the path, which leaves its address on the stack
    code.extend((PATH.len() as u32).to_le_bytes());
    code.extend(PATH);
    code.extend(b"\x5f"); //                 pop rdi
    code.extend(b"\xbe\x02\x10\x10\x00"); // mov esi, O_RDWR | O_SYNC
    code.extend(b"\xb8\x02\x00\x00\x00"); // mov eax, SYS_open
    code.extend(b"\x0f\x05"); //             syscall
    code.extend(b"\x49\x89\xc0"); //         mov r8, rax
}

/// Maps the page at a physical address; its address is in `rax`.
fn map(code: &mut Vec<u8>, address: u32) {
    code.extend(b"\x31\xff"); //             xor edi, edi: anywhere
    code.extend(b"\xbe\x00\x10\x00\x00"); // mov esi, 4096
    code.extend(b"\xba\x03\x00\x00\x00"); // mov edx, PROT_READ | PROT_WRITE
    code.extend(b"\x41\xba\x01\x00\x00\x00"); // mov r10d, MAP_SHARED
    code.extend(b"\x41\xb9"); //             mov r9d, the offset
    code.extend(address.to_le_bytes());
    code.extend(b"\xb8\x09\x00\x00\x00"); // mov eax, SYS_mmap
    code.extend(b"\x0f\x05"); //             syscall
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    archive.extend(b"070701");
    // Inode, mode, owner, group, links, time, size, device that it is on, device that it is, length of the name, sum.
    let fields = [
        0,
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    for part in [[name.as_bytes(), b"\0"].concat(), data.to_vec()] {
        archive.extend(part);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_small_files_that_begin_behind_their_headers() {
        for program in [
            Program::Reset,
            Program::FreezePoint,
            Program::Sleep,
            Program::Write,
            Program::BootTimer,
        ] {
            let elf = program.elf();
            assert!(elf.len() < 300, "{} bytes", elf.len());
            assert_eq!(elf.get(HEADERS..), Some(program.code().as_slice()));
        }
    }

    #[test]
    fn archives_can_be_joined() {
        let archive = Program::Reset.initramfs("init");
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.starts_with(b"070701"));
        assert!(archive.windows(10).any(|bytes| bytes == b"TRAILER!!!"));
    }
}
