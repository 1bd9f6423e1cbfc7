//! State of one vCPU: captured from a machine that stands still, loaded into a fresh one.

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

use std::os::fd::AsRawFd;

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pre_fault_memory, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// What `kvm-ioctls` does not have.
mod numbers {
    #![allow(missing_docs)]
    use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
    vmm_sys_util::ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);
}

/// Why vCPU state could not be captured or loaded.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("cannot {attempted} of vCPU {index}: {source}")]
    Ioctl {
        /// `save the registers`, ...
        attempted: &'static str,
        /// Which vCPU.
        index: u8,
        /// What the host kernel says.
        source: kvm_ioctls::Error,
    },
    /// KVM stopped at a model-specific register.
    #[error("KVM on this host refuses model-specific register {msr:#x} = {value:#x} of vCPU {index}")]
    Msr {
        /// Which vCPU.
        index: u8,
        /// The register.
        msr: u32,
        /// The value.
        value: u64,
    },
    /// A list is longer than KVM takes.
    #[error("the saved {what} of vCPU {index} has too many entries")]
    List {
        /// Which list.
        what: &'static str,
        /// Which vCPU.
        index: u8,
    },
}

/// Time stamp counter.
const MSR_TSC: u32 = 0x10;
/// Deadline of the local APIC timer: only valid once the counter and the APIC are set.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// A rate of the time stamp counter that differs by less than one part of so many is taken for the same.
const TSC_TOLERANCE: u32 = 500;
/// Most registers per ioctl.
const MSRS_AT_ONCE: usize = 128;

/// A model-specific register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Number.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// Everything that a vCPU holds between two instructions.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// Rate of the time stamp counter in kHz; 0 where KVM does not know it.
    pub tsc_khz: u32,
    /// CPUID as the guest was told.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers that differ from those of a fresh vCPU.
    pub msrs: Vec<Msr>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// Floating point and vector registers.
    pub xsave: kvm_xsave,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
    /// Running, halted or waiting to be started.
    pub mp_state: kvm_mp_state,
}

fn ioctl<T>(
    index: u8,
    attempted: &'static str,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<T, VcpuError> {
    result.map_err(|source| VcpuError::Ioctl {
        attempted,
        index,
        source,
    })
}

/// Reads the given registers; those that this vCPU does not have are left out.
pub fn read_msrs(vcpu: &VcpuFd, index: u8, numbers: &[u32]) -> Result<Vec<Msr>, VcpuError> {
    let mut values = Vec::with_capacity(numbers.len());
    let mut rest = numbers;
    while !rest.is_empty() {
        let wanted: Vec<kvm_msr_entry> = rest
            .iter()
            .take(MSRS_AT_ONCE)
            .map(|number| kvm_msr_entry {
                index: *number,
                ..Default::default()
            })
            .collect();
        let mut list = Msrs::from_entries(&wanted).map_err(|_| VcpuError::List {
            what: "registers",
            index,
        })?;
        let read = ioctl(
            index,
            "save the model-specific registers",
            vcpu.get_msrs(&mut list),
        )?;
        values.extend(list.as_slice().iter().take(read).map(|entry| Msr {
            index: entry.index,
            value: entry.data,
        }));
        // KVM stops at the first register that it cannot read: go on behind it.
        let done = if read < wanted.len() {
            read.saturating_add(1)
        } else {
            read
        };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(values)
}

fn write_msrs(vcpu: &VcpuFd, index: u8, msrs: &[Msr]) -> Result<(), VcpuError> {
    for chunk in msrs.chunks(MSRS_AT_ONCE) {
        let entries: Vec<kvm_msr_entry> = chunk
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let list = Msrs::from_entries(&entries).map_err(|_| VcpuError::List {
            what: "registers",
            index,
        })?;
        let written = ioctl(index, "load the model-specific registers", vcpu.set_msrs(&list))?;
        // KVM stops at the first register that it refuses, and says so by its return value alone.
        if let Some(msr) = chunk.get(written) {
            return Err(VcpuError::Msr {
                index,
                msr: msr.index,
                value: msr.value,
            });
        }
    }
    Ok(())
}

/// Model-specific registers to save.
pub struct MsrList {
    /// Those that KVM lists.
    pub numbers: Vec<u32>,
    /// Their values in a fresh vCPU: what equals them need not be saved, nor loaded into each clone.
    pub fresh: Vec<Msr>,
}

/// Whether a register holds time: what a vCPU is given when it first runs, not when it is made, so that its guest's time does
/// not pass meanwhile.
fn is_time(msr: &Msr) -> bool {
    matches!(msr.index, MSR_TSC | MSR_TSC_DEADLINE)
}

/// Where a register stands among those that are loaded: the counter first, the deadline of its timer last.
fn order(msr: &Msr) -> u8 {
    match msr.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    }
}

/// The time stamp counter of a vCPU that is not running.
///
/// # Errors
/// [`VcpuError::Ioctl`].
pub fn read_tsc(vcpu: &VcpuFd, index: u8) -> Result<Option<u64>, VcpuError> {
    Ok(read_msrs(vcpu, index, &[MSR_TSC])?.first().map(|msr| msr.value))
}

/// Captures the state of a vCPU that is not running and has completed its last exit.
pub fn save(vcpu: &VcpuFd, index: u8, list: &MsrList) -> Result<VcpuState, VcpuError> {
    // KVM API 4.38: the multiprocessing state first, for reading it may change what follows.
    let mp_state = ioctl(index, "save the run state", vcpu.get_mp_state())?;
    let regs = ioctl(index, "save the registers", vcpu.get_regs())?;
    let sregs = ioctl(index, "save the control registers", vcpu.get_sregs())?;
    let xsave = ioctl(index, "save the vector registers", vcpu.get_xsave())?;
    let xcrs = ioctl(index, "save the extended control registers", vcpu.get_xcrs())?;
    let debug = ioctl(index, "save the debug registers", vcpu.get_debug_regs())?;
    let mut msrs = read_msrs(vcpu, index, &list.numbers)?;
    msrs.retain(|msr| msr.index == MSR_TSC || !list.fresh.contains(msr));
    msrs.sort_by_key(order);
    // After the registers: KVM may deliver an expired timer at any moment, and then clears its deadline. Read in this
    // order, the interrupt is in one of the two, or in both and comes twice, but never in neither.
    let lapic = ioctl(index, "save the local APIC", vcpu.get_lapic())?;
    let events = ioctl(index, "save the pending events", vcpu.get_vcpu_events())?;
    // Refused where the host's own counter is not stable.
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let cpuid = ioctl(
        index,
        "save the CPUID",
        vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES),
    )?
    .as_slice()
    .to_vec();
    Ok(VcpuState {
        tsc_khz,
        cpuid,
        msrs,
        regs,
        sregs,
        xsave,
        xcrs,
        debug,
        lapic,
        events,
        mp_state,
    })
}

/// Maps guest-physical ranges (address and size in bytes) in the second-stage page tables, as far as the host has pages
/// for them, so that the guest's first access does not fault (KVM API 4.143, `KVM_PRE_FAULT_MEMORY`). It is advice: a
/// kernel before 6.11 has no such call, and what it leaves out is mapped when it is needed.
pub fn prefault(vcpu: &VcpuFd, ranges: &[(u64, u64)]) {
    for &(gpa, size) in ranges {
        let mut range = kvm_pre_fault_memory {
            gpa,
            size,
            ..Default::default()
        };
        // The call ends early for a signal, and has then moved the start of the range.
        while range.size > 0 {
            // SAFETY: the descriptor is that of a live vCPU, and the structure is laid out as the ioctl reads and writes it.
            let result = unsafe {
                vmm_sys_util::ioctl::ioctl_with_mut_ref(
                    &vcpu.as_raw_fd(),
                    numbers::KVM_PRE_FAULT_MEMORY(),
                    &mut range,
                )
            };
            if result == 0 {
                continue;
            }
            match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => {}
                Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL) => return,
                _ => break,
            }
        }
    }
}

impl VcpuState {
    /// The registers that hold time, in the order in which [`load_time`] takes them.
    #[must_use]
    pub fn time(&self) -> Vec<Msr> {
        self.msrs.iter().copied().filter(is_time).collect()
    }

    /// The same with these registers of time instead.
    #[must_use]
    pub fn with_time(mut self, time: &[Msr]) -> Self {
        self.msrs.retain(|msr| !is_time(msr));
        self.msrs.extend(time);
        self.msrs.sort_by_key(order);
        self
    }

    /// The time stamp counter, if it was saved.
    #[must_use]
    pub fn tsc(&self) -> Option<u64> {
        let counter = self.msrs.iter().find(|msr| msr.index == MSR_TSC)?;
        Some(counter.value)
    }

    /// Sets the time stamp counter back by so much.
    pub fn rewind(&mut self, ticks: u64) {
        for msr in self.msrs.iter_mut().filter(|msr| msr.index == MSR_TSC) {
            msr.value = msr.value.saturating_sub(ticks);
        }
    }
}

/// Loads the registers that hold time ([`VcpuState::time`]): the counter, then the deadline of its timer.
///
/// # Errors
/// [`VcpuError`].
pub fn load_time(vcpu: &VcpuFd, index: u8, time: &[Msr]) -> Result<(), VcpuError> {
    write_msrs(vcpu, index, time)
}

/// Loads a saved state into a fresh vCPU, all but the time.
pub fn load(vcpu: &VcpuFd, index: u8, state: &VcpuState) -> Result<(), VcpuError> {
    // CPUID first: KVM checks what follows against it. The local APIC before the timer's deadline.
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| VcpuError::List { what: "CPUID", index })?;
    ioctl(index, "load the CPUID", vcpu.set_cpuid2(&cpuid))?;
    // The guest has measured the rate and never does again. KVM scales where this host's differs by more than 250 ppm.
    if state.tsc_khz != 0 {
        let here = vcpu.get_tsc_khz().unwrap_or(0);
        let near = here.abs_diff(state.tsc_khz) <= here / TSC_TOLERANCE;
        match vcpu.set_tsc_khz(state.tsc_khz) {
            // Without scaling, KVM refuses what is slower than the processor by more than 250 ppm. So much lies
            // between two measurements of the same processor by its kernel, too, and the guest's clock can bear it.
            Err(_) if near => {}
            set => ioctl(index, "load the rate of the time stamp counter", set)?,
        }
    }
    ioctl(index, "load the run state", vcpu.set_mp_state(state.mp_state))?;
    ioctl(index, "load the registers", vcpu.set_regs(&state.regs))?;
    ioctl(index, "load the control registers", vcpu.set_sregs(&state.sregs))?;
    // SAFETY: no dynamically enabled feature (AMX) is ever requested, so the kernel reads at most the 4 KiB of
    // kvm_xsave.
    let xsave = unsafe { vcpu.set_xsave(&state.xsave) };
    ioctl(index, "load the vector registers", xsave)?;
    ioctl(
        index,
        "load the extended control registers",
        vcpu.set_xcrs(&state.xcrs),
    )?;
    ioctl(
        index,
        "load the debug registers",
        vcpu.set_debug_regs(&state.debug),
    )?;
    ioctl(index, "load the local APIC", vcpu.set_lapic(&state.lapic))?;
    let msrs: Vec<Msr> = state.msrs.iter().copied().filter(|msr| !is_time(msr)).collect();
    write_msrs(vcpu, index, &msrs)?;
    ioctl(
        index,
        "load the pending events",
        vcpu.set_vcpu_events(&state.events),
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A vCPU that never was, with these registers.
    pub(crate) fn state(msrs: &[(u32, u64)]) -> VcpuState {
        VcpuState {
            tsc_khz: 1,
            cpuid: vec![Default::default(); 2],
            msrs: msrs.iter().map(|&(index, value)| Msr { index, value }).collect(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debug: Default::default(),
            lapic: Default::default(),
            events: Default::default(),
            mp_state: Default::default(),
        }
    }

    #[test]
    fn time_comes_counter_first_and_deadline_last() {
        let mut saved = state(&[(MSR_TSC, 100), (7, 1), (MSR_TSC_DEADLINE, 120)]);
        let time = saved.time();
        assert_eq!(time.first().map(|msr| msr.index), Some(MSR_TSC));
        assert_eq!(time.last().map(|msr| msr.index), Some(MSR_TSC_DEADLINE));
        saved.rewind(30);
        assert_eq!(saved.tsc(), Some(70));
        let again = saved.with_time(&time);
        assert_eq!(
            again.msrs,
            state(&[(MSR_TSC, 100), (7, 1), (MSR_TSC_DEADLINE, 120)]).msrs
        );
        assert_eq!(state(&[(7, 1)]).with_time(&time).time(), time);
    }
}
