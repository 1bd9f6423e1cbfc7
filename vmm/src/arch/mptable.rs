//! The MP table (Intel MultiProcessor Specification 1.4), by which a kernel without ACPI finds its processors and
//! interrupt lines.

use super::layout::{IOAPIC, IRQ_LINES, LOCAL_APIC, MP_TABLE, MP_TABLE_MAX};

const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ISA_BUS: u8 = 0;

/// The table for `vcpus` processors, to be written at [`MP_TABLE`]: floating pointer first, configuration behind it.
#[must_use]
pub fn build(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };

    for id in 0..vcpus {
        let flags = if id == 0 {
            CPU_ENABLED | CPU_BOOTSTRAP
        } else {
            CPU_ENABLED
        };
        let mut entry = [0u8; 20];
        entry[0] = PROCESSOR;
        entry[1] = id;
        entry[2] = APIC_VERSION;
        entry[3] = flags;
        // Signature and feature flags are what CPUID says; the kernel reads CPUID.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&entry);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut entry = [IO_APIC, io_apic_id, APIC_VERSION, 1, 0, 0, 0, 0];
    entry[4..8].copy_from_slice(&IOAPIC.to_le_bytes());
    add(&entry);
    for irq in 0..IRQ_LINES as u8 {
        // Edge-triggered, active high, as the ISA bus has it: every line is pulsed.
        add(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, irq, io_apic_id, irq]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);

    const HEADER: usize = 44;
    let mut config = Vec::with_capacity(HEADER + entries.len());
    config.extend_from_slice(b"PCMP");
    config.extend_from_slice(&((HEADER + entries.len()) as u16).to_le_bytes());
    config.push(SPEC_1_4);
    config.push(0); // checksum, below
    config.extend_from_slice(b"PICOVM  ");
    config.extend_from_slice(b"CLONE       ");
    config.extend_from_slice(&[0; 6]); // no OEM table
    config.extend_from_slice(&count.to_le_bytes());
    config.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    config.extend_from_slice(&[0; 4]); // no extended table
    config.extend_from_slice(&entries);
    config[7] = checksum(&config);

    let mut table = [0u8; 16];
    table[..4].copy_from_slice(b"_MP_");
    table[4..8].copy_from_slice(&(MP_TABLE as u32 + 16).to_le_bytes());
    table[8] = 1; // length in 16-byte units
    table[9] = SPEC_1_4;
    table[10] = checksum(&table);
    let mut table = table.to_vec();
    table.extend_from_slice(&config);
    debug_assert!(table.len() as u64 <= MP_TABLE_MAX);
    table
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_sum_to_zero_and_fit_for_every_number_of_vcpus() {
        for vcpus in 1..=super::super::layout::VCPUS_MAX {
            let table = build(vcpus);
            assert!(table.len() as u64 <= MP_TABLE_MAX);
            assert_eq!(checksum(&table[..16]), 0);
            assert_eq!(checksum(&table[16..]), 0);
        }
    }
}
