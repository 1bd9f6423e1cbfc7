//! The KVM objects of one machine, and their state outside the vCPUs: interrupt controllers and clock.

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

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::layout;

/// Why KVM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {source}. {remedy}")]
    Open {
        /// What the kernel says.
        source: kvm_ioctls::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// KVM lacks something.
    #[error("KVM on this host lacks {0}, which picovm needs: use a host kernel of version 5.10 or later")]
    Missing(&'static str),
    /// An ioctl failed.
    #[error("cannot {attempted}: {source}")]
    Ioctl {
        /// What was attempted.
        attempted: &'static str,
        /// What the kernel says.
        source: kvm_ioctls::Error,
    },
}

/// What every machine needs of KVM, with the names of the kernel's documentation.
pub const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

fn ioctl<T>(attempted: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, VmError> {
    result.map_err(|source| VmError::Ioctl { attempted, source })
}

/// Opens `/dev/kvm` and checks that it has what machines need.
///
/// # Errors
/// [`VmError::Open`] with a remedy, [`VmError::Missing`].
pub fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|source| VmError::Open {
        source,
        remedy: open_remedy(source.errno()),
    })?;
    if kvm.get_api_version() != 12 {
        return Err(VmError::Missing("API version 12"));
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(*capability) {
            return Err(VmError::Missing(name));
        }
    }
    Ok(kvm)
}

fn open_remedy(errno: i32) -> &'static str {
    match errno {
        libc::ENOENT => {
            "The kernel offers no KVM here: load kvm_intel or kvm_amd, or switch virtualization on in the firmware \
             (or in the settings of the surrounding VM). `picovm doctor` says more"
        }
        libc::EACCES | libc::EPERM => {
            "This user may not use KVM: add it to the group of /dev/kvm (usually `kvm`) or run as root"
        }
        libc::ENODEV | libc::ENXIO => {
            "The device file is there but no KVM behind it: load kvm_intel or kvm_amd"
        }
        libc::EMFILE | libc::ENFILE => "Too many files are open: raise `ulimit -n`",
        _ => "`picovm doctor` checks this machine",
    }
}

/// CPUID that KVM supports on this host.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, VmError> {
    ioctl(
        "read the supported CPUID",
        kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES),
    )
}

/// Creates the VM, gives it its memory and then its interrupt controllers.
///
/// In this order: with the irqchip first, setting memory waits for a grace period of the host kernel (7 ms measured
/// against 0.03 ms).
pub fn create(kvm: &Kvm, memory: &GuestMemoryMmap) -> Result<VmFd, VmError> {
    let vm = ioctl("create a VM", kvm.create_vm())?;
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a live mapping; the machine that owns both VM and memory drops the VM first.
        let result = unsafe { vm.set_user_memory_region(region) };
        ioctl("give the VM its memory", result)?;
    }
    ioctl(
        "reserve the pages that KVM needs on Intel processors",
        vm.set_tss_address(layout::KVM_TSS),
    )?;
    ioctl("create the interrupt controllers", vm.create_irq_chip())?;
    Ok(vm)
}

/// State of a VM outside its vCPUs.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// Both PICs, then the IOAPIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// Paravirtual clock.
    pub clock: kvm_clock_data,
}

impl VmState {
    /// Sets the clock back by `ticks` of a time stamp counter of `khz`, which is not 0.
    pub fn rewind_clock(&mut self, ticks: u64, khz: u32) {
        let ns = u128::from(ticks)
            .saturating_mul(1_000_000)
            .checked_div(khz.into());
        let ns = ns.and_then(|ns| u64::try_from(ns).ok()).unwrap_or(u64::MAX);
        self.clock.clock = self.clock.clock.saturating_sub(ns);
    }
}

pub(crate) const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Captures it while no vCPU runs.
pub fn save(vm: &VmFd) -> Result<VmState, VmError> {
    let mut irqchips = Vec::new();
    for chip_id in CHIPS {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        ioctl("save the interrupt controllers", vm.get_irqchip(&mut chip))?;
        irqchips.push(chip);
    }
    let mut clock = ioctl("save the clock", vm.get_clock())?;
    // Only the value is meant: with KVM_CLOCK_REALTIME set, KVM would add the time since the freeze.
    clock.flags = 0;
    Ok(VmState { irqchips, clock })
}

/// Loads the interrupt controllers into a fresh VM, before its vCPUs.
pub fn load_irqchips(vm: &VmFd, state: &VmState) -> Result<(), VmError> {
    for chip in &state.irqchips {
        ioctl("load the interrupt controllers", vm.set_irqchip(chip))?;
    }
    Ok(())
}

/// Sets the paravirtual clock, before the vCPUs run.
pub fn load_clock(vm: &VmFd, clock: &kvm_clock_data) -> Result<(), VmError> {
    ioctl("load the clock", vm.set_clock(clock))
}
