//! Device registers by every kind of instruction that reads or writes memory. KVM emulates what touches them, hands over
//! what it can, and gives up on the rest.

use crate::After;
use crate::driver::{DISK, Device, STATUS};
use crate::machine::{Machine, PAGE};

/// How long one may take.
const LIMIT: libc::timeval = libc::timeval {
    tv_sec: 0,
    tv_usec: 100_000,
};

/// Runs one of them in a process of its own, since it may not come back.
fn in_a_child(instruction: impl FnOnce()) {
    // SAFETY: process 1 has one thread at this moment, so its child may do whatever it may.
    match unsafe { libc::fork() } {
        0 => {
            // KVM enters some again and again: a signal ends them.
            let limit = libc::itimerval {
                it_interval: LIMIT,
                it_value: LIMIT,
            };
            // SAFETY: the structure is read, and nothing is written.
            unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const limit, std::ptr::null_mut()) };
            instruction();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) }
        }
        child if child > 0 => {
            // SAFETY: waits for the child; no status is asked for.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
        _ => {}
    }
}

macro_rules! instructions {
    ($at:ident, $buffer:ident; $($assembly:literal),* $(,)?) => {
        $(in_a_child(|| {
            // SAFETY: touches the registers and the buffer, or neither; what comes of it is the attack. The child ends
            // behind it, whatever it has done to registers and stack.
            unsafe {
                std::arch::asm!(
                    $assembly,
                    inout("rdi") $at => _,
                    inout("rsi") $buffer => _,
                    inout("rcx") 8u64 => _,
                    inout("rax") 1u64 => _,
                    inout("rdx") 0u64 => _,
                    out("r8") _,
                    out("xmm0") _,
                    out("st(0)") _,
                );
            }
        });)*
    };
}

pub fn all(machine: &Machine) -> After {
    let disk = Device::new(machine, DISK);
    let mut buffer = [0u8; 4096];
    let buffer = buffer.as_mut_ptr();
    // A register, the configuration, the end of the window into the next one, and the end of what is mapped.
    for offset in [STATUS, 0x100, PAGE - 3] {
        let at = machine.register(disk.offset(offset), 64);
        instructions! { at, buffer;
            "rep movsb", "rep movsq", "xchg rdi, rsi; rep movsb", "xchg rdi, rsi; rep movsd", "rep stosb", "rep stosw",
            "std; rep stosd; cld", "rep lodsd", "repe cmpsb", "repne scasb",
            "lock xadd [rdi], eax", "xchg [rdi], rax", "lock cmpxchg [rdi], edx", "lock cmpxchg8b [rdi]",
            "lock inc byte ptr [rdi]", "lock bts dword ptr [rdi], 200", "or qword ptr [rdi], rax", "neg word ptr [rdi]",
            "movdqu xmm0, [rdi]", "movdqu [rdi], xmm0", "movntdq [rdi], xmm0", "movnti [rdi], eax", "movbe eax, [rdi]",
            "fild qword ptr [rdi]", "fstp tbyte ptr [rdi]", "fxsave64 [rdi]", "fxrstor64 [rdi]", "fnstenv [rdi]",
            "mov r8, rsp; mov rsp, rdi; push rax; mov rsp, r8", "mov r8, rsp; mov rsp, rdi; pop rax; mov rsp, r8",
            "jmp qword ptr [rdi]", "call qword ptr [rdi]", "sgdt [rdi]", "sidt [rdi]", "clflush [rdi]",
            "prefetcht0 [rdi]", "mov ax, ss; mov [rdi], ss", "mov r8w, [rdi + 1]; mov r8, [rdi - 5]", "leave",
            "vmmcall", "vmcall", "rdpmc", "cpuid", "ud2", "int 3", "int 0x80", "monitor", "pause",
        }
    }
    After::Devices
}
