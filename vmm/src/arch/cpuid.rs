//! What the guest's CPUID says, and which processor a template was made on.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM features (Documentation/virt/kvm/x86/cpuid.rst) that a clone may have. Left out are those that write to guest
/// memory behind its back or need a host worker: asynchronous page faults, steal time.
const KVM_FEATURES_KEPT: u32 = 1 << 0  // clock source
    | 1 << 1   // no I/O delay
    | 1 << 3   // clock source, new MSRs
    | 1 << 6   // paravirtual end of interrupt
    | 1 << 7   // paravirtual unhalt
    | 1 << 11  // send IPI
    | 1 << 12  // poll control
    | 1 << 24; // clock source is stable

/// Virtualization in the guest: leaf 1, ECX, and leaf 0x8000_0001, ECX. Its state is not saved, so it is not offered;
/// and a hostile guest reaches less of the host's kernel.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;

/// Adapts what KVM supports to one vCPU of `vcpus`.
pub fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let apic_id = u32::from(index);
    let mut entries = Vec::with_capacity(supported.as_slice().len());
    for entry in supported.as_slice() {
        let mut entry = *entry;
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0x0000_ff00) | apic_id << 24 | u32::from(vcpus) << 16;
                // TSC deadline timer (KVM's local APIC has it; KVM_GET_SUPPORTED_CPUID leaves it out where the
                // irqchip does not exist yet) and the hypervisor bit.
                entry.ecx |= 1 << 24 | 1 << 31;
                entry.ecx &= !VMX;
                // More than one logical processor in the package.
                entry.edx = if vcpus > 1 {
                    entry.edx | 1 << 28
                } else {
                    entry.edx & !(1 << 28)
                };
            }
            4 => {
                // Each vCPU is a core with caches of its own; the package has all of them.
                entry.eax = (entry.eax & 0x3fff) | u32::from(vcpus - 1) << 26;
            }
            0xb | 0x1f => {
                let shift = u32::from(vcpus).next_power_of_two().trailing_zeros();
                entry.edx = apic_id;
                (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                    0 => (0, 1, 1 << 8),
                    1 => (shift, u32::from(vcpus), 2 << 8 | 1),
                    index => (0, 0, index),
                };
            }
            KVM_FEATURES => entry.eax &= KVM_FEATURES_KEPT,
            0x8000_0001 => entry.ecx &= !SVM,
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | u32::from(vcpus - 1),
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
        entries.push(entry);
    }
    CpuId::from_entries(&entries)
}

/// The processor that a machine ran on, as far as a guest that has looked at it depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// Vendor string, for example `AuthenticAMD`.
    pub vendor: String,
    /// Family, model and stepping: CPUID leaf 1, EAX.
    pub signature: u32,
    /// Feature words: leaf 1 ECX, EDX; leaf 7 EBX, ECX, EDX; leaf 0xd.1 EAX; leaf 0x8000_0001 ECX, EDX.
    pub features: [u32; 8],
}

impl Processor {
    /// Reads it off what KVM offers to guests on this machine.
    #[must_use]
    pub fn of(supported: &CpuId) -> Self {
        let leaf = |function: u32, index: u32| {
            supported
                .as_slice()
                .iter()
                .find(|entry| entry.function == function && entry.index == index)
                .copied()
                .unwrap_or(kvm_cpuid_entry2::default())
        };
        let (l0, l1, l7, ld, le) = (
            leaf(0, 0),
            leaf(1, 0),
            leaf(7, 0),
            leaf(0xd, 1),
            leaf(0x8000_0001, 0),
        );
        let mut vendor = Vec::new();
        for word in [l0.ebx, l0.edx, l0.ecx] {
            vendor.extend_from_slice(&word.to_le_bytes());
        }
        Self {
            vendor: String::from_utf8_lossy(&vendor).trim_end_matches('\0').to_owned(),
            signature: l1.eax,
            // Bit 27 (OSXSAVE) mirrors a control register of whoever asks, not the processor.
            features: [
                l1.ecx & !(1 << 27),
                l1.edx,
                l7.ebx,
                l7.ecx,
                l7.edx,
                ld.eax,
                le.ecx,
                le.edx,
            ],
        }
    }
}

impl std::fmt::Display for Processor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let base = self.signature >> 8 & 0xf;
        let (mut family, mut model) = (base, self.signature >> 4 & 0xf);
        if base == 0xf {
            family += self.signature >> 20 & 0xff;
        }
        if base == 0xf || base == 6 {
            model |= self.signature >> 12 & 0xf0;
        }
        write!(
            f,
            "{} family {family} model {model} stepping {}",
            self.vendor,
            self.signature & 0xf
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vcpu_has_its_own_id_and_none_can_virtualize() {
        let entry = |function| kvm_cpuid_entry2 {
            function,
            ecx: u32::MAX,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[entry(1), entry(0x8000_0001), entry(0xb)]).unwrap();
        for index in 0..4 {
            let cpuid = for_vcpu(&supported, index, 4).unwrap();
            let [leaf_1, extended, topology] = cpuid.as_slice() else {
                panic!("three leaves")
            };
            assert_eq!(leaf_1.ebx >> 24, u32::from(index));
            assert_eq!(topology.edx, u32::from(index));
            assert_eq!(leaf_1.ecx & VMX, 0);
            assert_eq!(extended.ecx & SVM, 0);
        }
    }
}
