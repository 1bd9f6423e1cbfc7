//! The floor: what KVM itself takes, whoever uses it. The same KVM objects as a clone's, over the same memory, made in the
//! shortest way, and run to the first exit.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use picovm_engine::figures::ms;
use picovm_vmm::{Template, memory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Where the guest's only instruction is: in low memory, which nothing of a template needs by then.
const CODE: u64 = 0x1000;
/// `out 0x80, al`: with an interrupt controller in the kernel, a halt would not come back to user space.
const OUT: u16 = u16::from_le_bytes([0xe6, 0x80]);

/// From nothing to the first exit of one vCPU. Opening KVM and reading its CPUID, once for many VMs, is not counted.
pub fn measure(template: &Template) -> anyhow::Result<[f64; 1]> {
    let file = File::open(template.path().join("memory"))?;
    let kvm = Kvm::new()?;
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;

    let start = Instant::now();
    let memory = memory::private(template.metadata().memory_mib, &file)?;
    let vm = kvm.create_vm()?;
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a live mapping that outlives the VM, which is dropped first.
        unsafe { vm.set_user_memory_region(region)? };
    }
    vm.set_tss_address(0xfffb_d000)?;
    vm.create_irq_chip()?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&cpuid)?;
    memory
        .write_obj(OUT, GuestAddress(CODE))
        .context("the code has no place")?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::IoOut(..) => {}
        exit => bail!("the guest did something else: {exit:?}"),
    }
    Ok([ms(start, Instant::now())])
}
