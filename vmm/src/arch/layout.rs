//! Where things lie in guest-physical memory.
//!
//! ```text
//! 0x0000_0000  low memory: boot parameters, page tables, command line, MP table
//! 0x0010_0000  kernel, initramfs (at the end of low RAM), free memory
//! 0xc000_0000  end of low RAM at most; the hole of the 32-bit devices begins
//! 0xd000_0000  freeze trap
//! 0xd000_1000  virtio-mmio devices, 4 KiB each
//! 0xfec0_0000  IOAPIC, then local APIC
//! 0x1_0000_0000  high RAM
//! ```

/// Zero page (`struct boot_params`), Linux boot protocol.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Initial stack pointer; below it nothing lies that boot needs.
pub const BOOT_STACK: u64 = 0x8ff0;
/// First of the boot page tables: PML4, PDPT, PD, a page each.
pub const PAGE_TABLES: u64 = 0x9000;
/// Boot GDT.
pub const GDT: u64 = 0x500;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Largest command line in bytes, terminating zero included (`COMMAND_LINE_SIZE` of x86).
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory, where the MP table lies: the kernel looks in the last KiB below 640 KiB.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Bytes that the MP table may take.
pub const MP_TABLE_MAX: u64 = 0x400;
/// Start of extended memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// End of low RAM at most.
pub const HOLE_START: u64 = 0xc000_0000;
/// High RAM starts here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// The freeze trap's MMIO page.
pub const TRAP: u64 = 0xd000_0000;
/// First virtio-mmio device.
pub const VIRTIO_MMIO: u64 = 0xd000_1000;
/// Size of a virtio-mmio device's window in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt line of the first virtio-mmio device; the next ones follow.
pub const VIRTIO_IRQ: u32 = 5;
/// Interrupt lines of the IOAPIC.
pub const IRQ_LINES: u32 = 24;
/// Most virtio-mmio devices, by interrupt lines.
pub const VIRTIO_DEVICES_MAX: usize = (IRQ_LINES - VIRTIO_IRQ) as usize;
/// IOAPIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors (KVM API 4.35), inside the hole.
pub const KVM_TSS: usize = 0xfffb_d000;
/// First serial port and its interrupt line.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt line of the first serial port.
pub const SERIAL_IRQ: u32 = 4;

/// Smallest guest memory in MiB.
pub const MEMORY_MIN_MIB: u64 = 32;
/// Largest guest memory in MiB (1 TiB).
pub const MEMORY_MAX_MIB: u64 = 1 << 20;
/// Most vCPUs.
pub const VCPUS_MAX: u8 = 8;

/// Splits memory of `bytes` into what lies below the hole and above: `(guest-physical start, bytes)`.
#[must_use]
pub fn memory_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_the_hole_is_a_second_range() {
        assert_eq!(memory_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(memory_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(memory_ranges(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }
}
