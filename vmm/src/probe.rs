//! Does KVM on this host run kernel code, or only interpret it? A tiny built-in guest finds out.
//!
//! Some machines offer a `/dev/kvm` without hardware behind it: guest user mode is fast there, but kernel mode is
//! interpreted, a thousand times slower, and instructions that every stock kernel executes at boot end in
//! `KVM_EXIT_INTERNAL_ERROR`. Capabilities and CPUID do not tell; running a few instructions does.
//!
//! ```no_run
//! use picovm_vmm::{probe, vm};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let report = probe::run(&vm::open_kvm()?)?;
//! assert_eq!(report.verdict(), probe::Verdict::Executes, "{report}");
//! # Ok(()) }
//! ```
//!
//! Each trial is a VM of its own with one vCPU in ring 0 of long mode, so that a failing one leaves nothing behind
//! for the next.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_INTERNAL_ERROR_EMULATION, kvm_regs, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::{boot, cpuid, layout};
use crate::memory::{self, MemoryError};
use crate::vm::{self, VmError};

/// Below this many iterations of a two-instruction loop a second, KVM interprets. An interpreter does about 2 million,
/// an emulated processor hundreds of millions, a real one thousands of millions.
pub const INTERPRETED_BELOW: f64 = 20e6;

/// Iterations of a round of the timed loop: a tenth of a second on an interpreter, long against an exit elsewhere.
const ITERATIONS: u32 = 200_000;
/// Rounds of the timed loop. The fastest counts: the first one faults its pages in, and the host may be busy.
const ROUNDS: usize = 5;
/// Longest time for the timed loop.
const LOOP_LIMIT: Duration = Duration::from_secs(8);
/// Longest time for another trial: a handful of instructions.
const TRIAL_LIMIT: Duration = Duration::from_secs(2);
/// How long a vCPU is kicked until it is given up as stuck in the host kernel, and how often.
const KICK_LIMIT: Duration = Duration::from_secs(2);
const KICK_INTERVAL: Duration = Duration::from_millis(10);

/// Port of "I have come to the end", and of "exception", with its vector as the value.
const PORT_DONE: u8 = 0xf0;
const PORT_EXCEPTION: u8 = 0xf1;

const MEMORY_MIB: u64 = 2;
const IDT: u64 = 0x1000;
/// Exception handlers, [`HANDLER_SIZE`] bytes each, by vector.
const HANDLERS: u64 = 0x2000;
const HANDLER_SIZE: u64 = 8;
const CODE: u64 = 0x3000;
/// What a trial reads; RDI points to it.
const INPUT: u64 = 0x4000;
/// What a trial writes; RSI points to it.
const OUTPUT: u64 = 0x5000;

const VECTORS: u8 = 32;
const BREAKPOINT: u8 = 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
/// x87 and SSE state: what every processor with XSAVE has.
const XCR0: u64 = 0b11;

/// Machine code with its mnemonics: an instruction that fails is reported by name.
type Listing = &'static [(&'static str, &'static [u8])];

const LOOP: Listing = &[
    ("mov ecx, esi", &[0x89, 0xf1]),
    ("dec ecx", &[0xff, 0xc9]),
    ("jnz", &[0x75, 0xfc]), // to the `dec`
    ("out", &[0xe6, PORT_DONE]),
    ("jmp", &[0xeb, 0xf6]), // to the `mov`: the next round
];
const INT3: Listing = &[("int3", &[0xcc]), ("out", &[0xe6, PORT_DONE])];
const BREAKPOINT_HANDLER: Listing = &[("inc dword [rdi]", &[0xff, 0x07]), ("iretq", &[0x48, 0xcf])];
const CMPXCHG16B: Listing = &[
    ("lock cmpxchg16b [rdi]", &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]),
    ("out", &[0xe6, PORT_DONE]),
];
const XSETBV: Listing = &[
    ("xgetbv", &[0x0f, 0x01, 0xd0]),
    ("xsetbv", &[0x0f, 0x01, 0xd1]),
    ("out", &[0xe6, PORT_DONE]),
];
const XRSTOR: Listing = &[
    ("xrstor64 [rdi]", &[0x48, 0x0f, 0xae, 0x2f]),
    ("xsave64 [rsi]", &[0x48, 0x0f, 0xae, 0x26]),
    ("out", &[0xe6, PORT_DONE]),
];

/// Why the guest could not be run at all. How far it came is in the [`ProbeReport`] instead.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The VM cannot be created.
    #[error("cannot make the probe's guest: {0}")]
    Vm(#[from] VmError),
    /// Its memory cannot be had.
    #[error("cannot make the probe's guest: {0}")]
    Memory(#[from] MemoryError),
    /// Its memory cannot be filled.
    #[error("cannot write the probe's code to guest memory: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
    /// KVM refuses its vCPU.
    #[error("cannot {attempted} of the probe's guest: {source}")]
    Ioctl {
        /// `set the registers`, ...
        attempted: &'static str,
        /// What the host kernel says.
        source: kvm_ioctls::Error,
    },
    /// What KVM supports does not fit into its own list.
    #[error("KVM on this host supports more CPUID entries than it takes")]
    Cpuid,
    /// Its thread or its signal cannot be had.
    #[error("cannot start a thread for the probe's guest: {0}")]
    Thread(std::io::Error),
    /// The vCPU neither runs to an end nor reacts to signals: the host kernel is at fault.
    #[error("the probe's guest hangs inside the host kernel and does not react to signals")]
    Stuck,
}

/// How an instruction failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// KVM tried to interpret an instruction and does not know it (`KVM_INTERNAL_ERROR_EMULATION`).
    #[error("KVM cannot emulate `{instruction}`")]
    NotEmulated {
        /// The instruction.
        instruction: &'static str,
    },
    /// Another internal error of KVM.
    #[error("internal error {suberror} of KVM at `{instruction}`")]
    Internal {
        /// `suberror` of `KVM_EXIT_INTERNAL_ERROR` (KVM API 5).
        suberror: u32,
        /// The instruction.
        instruction: &'static str,
    },
    /// The guest got an exception that it should not get.
    #[error("exception {vector} in the guest")]
    Exception {
        /// For example 6: invalid opcode.
        vector: u8,
    },
    /// The guest got an exception and could not handle that.
    #[error("triple fault in the guest")]
    TripleFault,
    /// The processor did not enter the guest.
    #[error("the processor refused to enter the guest (hardware reason {reason:#x})")]
    EntryRefused {
        /// `hardware_entry_failure_reason` (KVM API 5).
        reason: u64,
    },
    /// The instruction was executed and did the wrong thing.
    #[error("executed with a wrong result")]
    WrongResult,
    /// It did not come to an end.
    #[error("no end after {} s", limit.as_secs())]
    TimedOut {
        /// How long it was given.
        limit: Duration,
    },
    /// Anything else.
    #[error("{0}")]
    Unexpected(String),
}

/// What became of one instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Works,
    /// CPUID says that guests do not have it, and a kernel does without.
    NotOffered,
    /// It does not work.
    Failed(Failure),
}

/// One instruction that a stock kernel executes at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstructionReport {
    /// `int3`, `cmpxchg16b`, `xsetbv` or `xrstor`.
    pub instruction: &'static str,
    /// What became of it.
    pub outcome: Outcome,
}

/// What the probe found. `Display` gives it in one line.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeReport {
    /// Iterations a second of a two-instruction loop in ring 0.
    pub iterations_per_second: Result<f64, Failure>,
    /// The instructions, in a fixed order.
    pub instructions: Vec<InstructionReport>,
}

/// What a [`ProbeReport`] means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Kernel code runs on the processor, real or emulated: this KVM is usable.
    Executes,
    /// Kernel code is interpreted instruction by instruction: no kernel boots in reasonable time, or at all.
    Interprets,
    /// Kernel code runs fast enough, or not at all, and something that a kernel needs fails.
    Broken,
}

impl ProbeReport {
    /// What it means.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match &self.iterations_per_second {
            Ok(rate) if *rate < INTERPRETED_BELOW => Verdict::Interprets,
            Err(Failure::NotEmulated { .. } | Failure::TimedOut { .. }) => Verdict::Interprets,
            Ok(_) if self.failed().next().is_none() => Verdict::Executes,
            _ => Verdict::Broken,
        }
    }

    /// The instructions that failed.
    pub fn failed(&self) -> impl Iterator<Item = (&'static str, &Failure)> {
        self.instructions
            .iter()
            .filter_map(|report| match &report.outcome {
                Outcome::Failed(failure) => Some((report.instruction, failure)),
                Outcome::Works | Outcome::NotOffered => None,
            })
    }
}

impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.iterations_per_second {
            Ok(rate) => write!(f, "{:.1} M iterations/s", rate / 1e6)?,
            Err(failure) => write!(f, "timed loop: {failure}")?,
        }
        for report in &self.instructions {
            match &report.outcome {
                Outcome::Works => write!(f, "; {} works", report.instruction)?,
                Outcome::NotOffered => write!(f, "; {} is not offered", report.instruction)?,
                Outcome::Failed(failure) => write!(f, "; {}: {failure}", report.instruction)?,
            }
        }
        Ok(())
    }
}

/// An instruction to try.
struct Trial {
    instruction: &'static str,
    code: Listing,
    /// CPUID leaf 1, ECX: the bit that says whether guests have it.
    feature: Option<u32>,
    /// Whether the kernel would have enabled XSAVE before.
    xsave: bool,
    /// Sets the registers that it works on.
    registers: fn(&mut kvm_regs),
    /// What it reads at [`INPUT`]: offsets and values.
    input: &'static [(u64, u64)],
    /// What must be in memory afterwards: addresses and values.
    expected: &'static [(u64, u64)],
}

/// A value that is nowhere by chance.
const PATTERN: u64 = 0x5a17_c0de_d00d_feed;

const TRIALS: &[Trial] = &[
    Trial {
        instruction: "int3",
        code: INT3,
        feature: None,
        xsave: false,
        registers: |_| {},
        input: &[],
        expected: &[(INPUT, 1)],
    },
    Trial {
        instruction: "cmpxchg16b",
        code: CMPXCHG16B,
        feature: Some(13),
        xsave: false,
        // RDX:RAX is what is there, RCX:RBX what shall be there.
        registers: |regs| (regs.rax, regs.rdx, regs.rbx, regs.rcx) = (1, 2, PATTERN, !PATTERN),
        input: &[(0, 1), (8, 2)],
        expected: &[(INPUT, PATTERN), (INPUT + 8, !PATTERN)],
    },
    Trial {
        instruction: "xsetbv",
        code: XSETBV,
        feature: Some(26),
        xsave: true,
        // It writes what it has read: a hypervisor below this KVM that does not intercept it loses nothing.
        registers: |regs| regs.rcx = 0,
        input: &[],
        expected: &[],
    },
    Trial {
        instruction: "xrstor",
        code: XRSTOR,
        feature: Some(26),
        xsave: true,
        // EDX:EAX selects all state components.
        registers: |regs| (regs.rax, regs.rdx) = (0xffff_ffff, 0xffff_ffff),
        // MXCSR, XMM0, and in the header "SSE state is here" (SDM volume 1, 13.4).
        input: &[(24, 0x1f80), (160, PATTERN), (168, !PATTERN), (512, 0b10)],
        expected: &[(OUTPUT + 160, PATTERN), (OUTPUT + 168, !PATTERN)],
    },
];

/// Runs the probe: the timed loop, then each instruction. Takes a few milliseconds where KVM executes kernel code, and
/// about a second where it interprets; never more than 30 seconds, whatever the guest does. Nothing stays behind.
///
/// Needs what [`vm::open_kvm`] has checked. Uses the signal `SIGRTMIN`, as every machine does.
///
/// # Errors
/// [`ProbeError`] if the guest cannot be made. A guest that does not work is no error but a report.
pub fn run(kvm: &Kvm) -> Result<ProbeReport, ProbeError> {
    register_signal_handler(SIGRTMIN(), do_nothing)
        .map_err(|error| ProbeError::Thread(std::io::Error::from_raw_os_error(error.errno())))?;
    let supported = vm::supported_cpuid(kvm)?;

    let guest = Guest::new(kvm, &supported, LOOP, &[], |regs| {
        regs.rsi = u64::from(ITERATIONS)
    })?;
    let rounds = guest.run(ROUNDS, LOOP_LIMIT)?;
    let iterations_per_second = rounds.map(|rounds| rate(&rounds));

    let mut instructions = Vec::new();
    for trial in TRIALS {
        let outcome = try_instruction(kvm, &supported, trial)?;
        instructions.push(InstructionReport {
            instruction: trial.instruction,
            outcome,
        });
    }
    Ok(ProbeReport {
        iterations_per_second,
        instructions,
    })
}

extern "C" fn do_nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Iterations a second, by the fastest round.
fn rate(rounds: &[Duration]) -> f64 {
    let fastest = rounds.iter().min().copied().unwrap_or(LOOP_LIMIT);
    f64::from(ITERATIONS) / fastest.as_secs_f64().max(1e-9)
}

fn try_instruction(kvm: &Kvm, supported: &CpuId, trial: &Trial) -> Result<Outcome, ProbeError> {
    if trial.feature.is_some_and(|bit| !offers(supported, bit)) {
        return Ok(Outcome::NotOffered);
    }
    let guest = Guest::new(kvm, supported, trial.code, trial.input, trial.registers)?;
    if trial.xsave
        && let Err(failure) = guest.enable_xsave()
    {
        return Ok(Outcome::Failed(failure));
    }
    let memory = guest.memory.clone();
    if let Err(failure) = guest.run(1, TRIAL_LIMIT)? {
        return Ok(Outcome::Failed(failure));
    }
    for (address, value) in trial.expected {
        if memory.read_obj::<u64>(GuestAddress(*address))? != *value {
            return Ok(Outcome::Failed(Failure::WrongResult));
        }
    }
    Ok(Outcome::Works)
}

/// Whether a bit of CPUID leaf 1, ECX is set.
fn offers(supported: &CpuId, bit: u32) -> bool {
    supported
        .as_slice()
        .iter()
        .any(|entry| entry.function == 1 && entry.ecx & (1 << bit) != 0)
}

/// A VM with code that is ready to run. Dropped in this order.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: GuestMemoryMmap,
    code: Listing,
}

fn ioctl<T>(attempted: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, ProbeError> {
    result.map_err(|source| ProbeError::Ioctl { attempted, source })
}

impl Guest {
    fn new(
        kvm: &Kvm,
        supported: &CpuId,
        code: Listing,
        input: &[(u64, u64)],
        registers: impl Fn(&mut kvm_regs),
    ) -> Result<Self, ProbeError> {
        let memory = memory::anonymous(MEMORY_MIB)?;
        fill(&memory, code, input)?;
        let vm = vm::create(kvm, &memory)?;
        let vcpu = ioctl("create the vCPU", vm.create_vcpu(0))?;
        let cpuid = cpuid::for_vcpu(supported, 0, 1).map_err(|_| ProbeError::Cpuid)?;
        ioctl("set the CPUID", vcpu.set_cpuid2(&cpuid))?;

        let mut sregs = ioctl("read the control registers", vcpu.get_sregs())?;
        boot::enter_long_mode(&mut sregs);
        sregs.cr4 |= CR4_OSFXSR;
        sregs.idt.base = IDT;
        sregs.idt.limit = u16::from(VECTORS) * 16 - 1;
        ioctl("set the control registers", vcpu.set_sregs(&sregs))?;

        let mut regs = boot::entry_registers(GuestAddress(CODE));
        (regs.rdi, regs.rsi) = (INPUT, OUTPUT);
        registers(&mut regs);
        ioctl("set the registers", vcpu.set_regs(&regs))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            memory,
            code,
        })
    }

    /// Sets CR4.OSXSAVE and XCR0 as a kernel would have done.
    fn enable_xsave(&self) -> Result<(), Failure> {
        let refused = |error| Failure::Unexpected(format!("KVM refuses to enable XSAVE: {error}"));
        let mut sregs = self.vcpu.get_sregs().map_err(refused)?;
        sregs.cr4 |= CR4_OSXSAVE;
        self.vcpu.set_sregs(&sregs).map_err(refused)?;
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = XCR0;
        self.vcpu.set_xcrs(&xcrs).map_err(refused)
    }

    /// Runs until the guest has said "done" `rounds` times, and returns how long each round took.
    fn run(mut self, rounds: usize, limit: Duration) -> Result<Result<Vec<Duration>, Failure>, ProbeError> {
        let expired = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = channel();
        let thread = {
            let expired = expired.clone();
            std::thread::Builder::new()
                .name("probe".into())
                .stack_size(256 << 10)
                .spawn(move || {
                    let result = self.rounds(rounds, limit, &expired);
                    drop(self);
                    let _ = sender.send(result);
                })
                .map_err(ProbeError::Thread)?
        };
        let mut result = receiver.recv_timeout(limit);
        if result.is_err() {
            expired.store(true, Ordering::SeqCst);
            // A signal just before KVM_RUN is lost, so they are sent until one has met it.
            let give_up = Instant::now() + KICK_LIMIT;
            while matches!(result, Err(RecvTimeoutError::Timeout)) && Instant::now() < give_up {
                let _ = thread.kill(SIGRTMIN());
                result = receiver.recv_timeout(KICK_INTERVAL);
            }
        }
        match result {
            Ok(result) => {
                let _ = thread.join();
                Ok(result)
            }
            // The thread owns all it uses, so it can be left alone.
            Err(_) => Err(ProbeError::Stuck),
        }
    }

    fn rounds(
        &mut self,
        rounds: usize,
        limit: Duration,
        expired: &AtomicBool,
    ) -> Result<Vec<Duration>, Failure> {
        let mut times = Vec::with_capacity(rounds);
        let mut start = Instant::now();
        while times.len() < rounds {
            if expired.load(Ordering::SeqCst) {
                return Err(Failure::TimedOut { limit });
            }
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT_DONE) => {
                    times.push(start.elapsed());
                    start = Instant::now();
                }
                Ok(VcpuExit::IoOut(port, data)) if port == u16::from(PORT_EXCEPTION) => {
                    return Err(Failure::Exception {
                        vector: data.first().copied().unwrap_or_default(),
                    });
                }
                Ok(VcpuExit::Shutdown) => return Err(Failure::TripleFault),
                Ok(VcpuExit::FailEntry(reason, _)) => return Err(Failure::EntryRefused { reason }),
                Ok(VcpuExit::InternalError) => return Err(self.internal_error()),
                Ok(exit) => return Err(Failure::Unexpected(format!("KVM stopped with {exit:?}"))),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => return Err(Failure::Unexpected(format!("KVM_RUN failed: {error}"))),
            }
        }
        Ok(times)
    }

    fn internal_error(&mut self) -> Failure {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills in `internal` (KVM API 5); any
        // bits are a valid u32.
        let suberror = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let instruction = self
            .vcpu
            .get_regs()
            .map_or("an unknown instruction", |regs| name(self.code, regs.rip));
        match suberror {
            KVM_INTERNAL_ERROR_EMULATION => Failure::NotEmulated { instruction },
            suberror => Failure::Internal {
                suberror,
                instruction,
            },
        }
    }
}

/// The instruction at an address.
fn name(code: Listing, address: u64) -> &'static str {
    let handler = HANDLERS + u64::from(BREAKPOINT) * HANDLER_SIZE;
    for (mut start, listing) in [(CODE, code), (handler, BREAKPOINT_HANDLER)] {
        for (mnemonic, bytes) in listing {
            if start == address {
                return mnemonic;
            }
            start += bytes.len() as u64;
        }
    }
    "an unknown instruction"
}

fn assemble(listing: Listing) -> Vec<u8> {
    listing
        .iter()
        .flat_map(|(_, bytes)| bytes.iter().copied())
        .collect()
}

/// Says which exception it was.
fn handler(vector: u8) -> Vec<u8> {
    match vector {
        BREAKPOINT => assemble(BREAKPOINT_HANDLER),
        // mov al, vector; out PORT_EXCEPTION, al; hlt
        vector => vec![0xb0, vector, 0xe6, PORT_EXCEPTION, 0xf4],
    }
}

/// An interrupt gate of long mode (SDM volume 3, 6.14.1) into the boot code segment.
fn gate(handler: u64) -> [u64; 2] {
    const CODE_SELECTOR: u64 = 0x10;
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00 << 32;
    let low =
        handler & 0xffff | CODE_SELECTOR << 16 | PRESENT_INTERRUPT_GATE | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Puts page tables, descriptors, handlers, code and input into guest memory, where [`boot::enter_long_mode`] expects
/// them.
fn fill(
    memory: &GuestMemoryMmap,
    code: Listing,
    input: &[(u64, u64)],
) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const CODE_SEGMENT: u64 = 0x00af_9b00_0000_ffff;
    const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;
    let put = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address));
    // One 2 MiB page is all there is.
    let (pml4, pdpt, pd) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    put(pml4, pdpt | PRESENT_WRITABLE)?;
    put(pdpt, pd | PRESENT_WRITABLE)?;
    put(pd, PRESENT_WRITABLE | LARGE)?;
    put(layout::GDT + 0x10, CODE_SEGMENT)?;
    put(layout::GDT + 0x18, DATA_SEGMENT)?;
    for vector in 0..VECTORS {
        let address = HANDLERS + u64::from(vector) * HANDLER_SIZE;
        memory.write_slice(&handler(vector), GuestAddress(address))?;
        memory.write_obj(gate(address), GuestAddress(IDT + u64::from(vector) * 16))?;
    }
    memory.write_slice(&assemble(code), GuestAddress(CODE))?;
    for (offset, value) in input {
        put(INPUT + offset, *value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // What the assembler makes of the listings: the bytes between two labels.
    std::arch::global_asm!(
        ".pushsection .rodata",
        "probe_test_start:",
        "2: mov ecx, esi",
        "3: dec ecx",
        "jnz 3b",
        "out 0xf0, al",
        "jmp 2b",
        "int3",
        "out 0xf0, al",
        "inc dword ptr [rdi]",
        "iretq",
        "lock cmpxchg16b [rdi]",
        "out 0xf0, al",
        "xgetbv",
        "xsetbv",
        "out 0xf0, al",
        "xrstor64 [rdi]",
        "xsave64 [rsi]",
        "out 0xf0, al",
        "mov al, 13",
        "out 0xf1, al",
        "hlt",
        "probe_test_end:",
        ".popsection",
    );
    unsafe extern "C" {
        static probe_test_start: u8;
        static probe_test_end: u8;
    }

    #[test]
    fn the_listings_are_what_an_assembler_makes() {
        let (start, end) = (&raw const probe_test_start, &raw const probe_test_end);
        // SAFETY: both labels are in the same section of this program, in this order, and nobody writes there.
        let assembled = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) };
        let mut written: Vec<u8> = [LOOP, INT3, BREAKPOINT_HANDLER, CMPXCHG16B, XSETBV, XRSTOR]
            .into_iter()
            .flat_map(assemble)
            .collect();
        written.extend(handler(13));
        assert_eq!(written, assembled);
    }

    #[test]
    fn an_instruction_is_named_by_its_address() {
        assert_eq!(name(XRSTOR, CODE), "xrstor64 [rdi]");
        assert_eq!(name(XRSTOR, CODE + 4), "xsave64 [rsi]");
        assert_eq!(name(INT3, HANDLERS + 3 * HANDLER_SIZE + 2), "iretq");
        assert_eq!(name(INT3, CODE + 7), "an unknown instruction");
    }

    #[test]
    fn handlers_code_and_data_do_not_overlap() {
        let memory = memory::anonymous(MEMORY_MIB).unwrap();
        fill(&memory, XRSTOR, TRIALS[3].input).unwrap();
        let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert!((0..VECTORS).all(|vector| handler(vector).len() as u64 <= HANDLER_SIZE));
        assert_eq!(read(IDT + 3 * 16), 0x0000_8e00_0010_2018);
        assert_eq!(read(CODE).to_le_bytes()[..4], *XRSTOR[0].1);
        assert_eq!(read(INPUT + 512), 0b10);
        assert_eq!(read(layout::PAGE_TABLES), layout::PAGE_TABLES + 0x1003);
    }

    #[test]
    fn the_fastest_round_counts() {
        let rounds = [
            Duration::from_millis(900),
            Duration::from_millis(100),
            Duration::from_millis(300),
        ];
        assert!((rate(&rounds) - 2e6).abs() < 1.0);
        assert!(rate(&[Duration::ZERO]).is_finite());
    }

    fn report(rate: Result<f64, Failure>, outcomes: [Outcome; 2]) -> ProbeReport {
        let instructions = ["int3", "xrstor"]
            .into_iter()
            .zip(outcomes)
            .map(|(instruction, outcome)| InstructionReport { instruction, outcome })
            .collect();
        ProbeReport {
            iterations_per_second: rate,
            instructions,
        }
    }

    #[test]
    fn slow_kernel_code_is_interpreted_and_a_failing_instruction_is_broken() {
        let works = [Outcome::Works, Outcome::NotOffered];
        let fails = || {
            [
                Outcome::Works,
                Outcome::Failed(Failure::NotEmulated {
                    instruction: "xrstor64 [rdi]",
                }),
            ]
        };
        assert_eq!(report(Ok(300e6), works.clone()).verdict(), Verdict::Executes);
        assert_eq!(report(Ok(2.2e6), works.clone()).verdict(), Verdict::Interprets);
        assert_eq!(report(Ok(2.2e6), fails()).verdict(), Verdict::Interprets);
        assert_eq!(report(Ok(300e6), fails()).verdict(), Verdict::Broken);
        assert_eq!(
            report(
                Err(Failure::NotEmulated {
                    instruction: "dec ecx"
                }),
                works.clone()
            )
            .verdict(),
            Verdict::Interprets
        );
        assert_eq!(
            report(Err(Failure::TripleFault), works).verdict(),
            Verdict::Broken
        );
        assert_eq!(
            report(Ok(2.2e6), fails()).to_string(),
            "2.2 M iterations/s; int3 works; xrstor: KVM cannot emulate `xrstor64 [rdi]`"
        );
    }
}
