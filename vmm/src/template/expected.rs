//! What a template is to be, whoever wrote it: a guest that has taken over the process that made it may have written
//! anything.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use picovm_guest_protocol::trap::IDENTITY_PAGES_MAX;

use super::open::Template;
use crate::arch::cpuid;
use crate::config::{Disk, STORAGE_SECTORS};
use crate::devices::virtio::slot::SlotState;
use crate::machine::MachineState;
use crate::vm;

/// What was asked for, with which what was written is compared.
#[derive(Clone, Copy)]
pub struct Expected<'a> {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Disks in order.
    pub disks: &'a [Disk],
    /// The template that it is a clone of, if it is one.
    pub base: Option<&'a Template>,
}

/// A word of CPUID, and the bits of it that follow what the guest does (`kvm_update_cpuid_runtime`).
type Word = (fn(&kvm_cpuid_entry2) -> u32, u32);

/// Words of a leaf that say what the guest may use: function, index, words.
const FEATURES: [(u32, u32, &[Word]); 6] = [
    // MONITOR and OSXSAVE; the local APIC.
    (
        1,
        0,
        &[(|leaf| leaf.ecx, 1 << 3 | 1 << 27), (|leaf| leaf.edx, 1 << 9)],
    ),
    // OSPKE.
    (
        7,
        0,
        &[
            (|leaf| leaf.ebx, 0),
            (|leaf| leaf.ecx, 1 << 4),
            (|leaf| leaf.edx, 0),
        ],
    ),
    (0xd, 1, &[(|leaf| leaf.eax, 0)]),
    (0x4000_0001, 0, &[(|leaf| leaf.eax, 0), (|leaf| leaf.edx, 0)]),
    (0x8000_0001, 0, &[(|leaf| leaf.ecx, 0), (|leaf| leaf.edx, 0)]),
    (0x8000_000a, 0, &[(|leaf| leaf.edx, 0)]),
];

impl Expected<'_> {
    /// Compares; the reason says what differs.
    pub(super) fn check(&self, state: &MachineState, supported: &CpuId) -> Result<(), String> {
        if state.memory_mib != self.memory_mib {
            return Err(format!(
                "it has {} MiB of memory instead of {}",
                state.memory_mib, self.memory_mib
            ));
        }
        if state.vcpus.len() != usize::from(self.vcpus) {
            return Err(format!(
                "it has {} vCPUs instead of {}",
                state.vcpus.len(),
                self.vcpus
            ));
        }
        self.check_slots(&state.slots)?;
        self.check_processors(state, supported)?;
        if state.trap.identity_pages.len() > IDENTITY_PAGES_MAX {
            return Err("it has too many pages for an identity".into());
        }
        if state.vm.irqchips.len() != vm::CHIPS.len() {
            return Err("it has other interrupt controllers".into());
        }
        Ok(())
    }

    /// The devices, and the disks' files above all: whoever opens the template opens those that its state names.
    fn check_slots(&self, slots: &[SlotState]) -> Result<(), String> {
        let [
            SlotState::Console { .. },
            SlotState::Entropy { .. },
            SlotState::Fs { .. },
            written @ ..,
            SlotState::Storage { device: storage, .. },
        ] = slots
        else {
            return Err("it has other devices".into());
        };
        if storage.sectors != STORAGE_SECTORS || storage.read_only {
            return Err("its storage is another disk".into());
        }
        if written.len() != self.disks.len() {
            return Err(format!(
                "it has {} disks instead of {}",
                written.len(),
                self.disks.len()
            ));
        }
        for (slot, disk) in written.iter().zip(self.disks) {
            let SlotState::Block { device, path, .. } = slot else {
                return Err("it has other devices".into());
            };
            if *path != disk.path {
                return Err(format!(
                    "its disk lies on {} instead of {}",
                    path.display(),
                    disk.path.display()
                ));
            }
            if device.read_only != disk.read_only {
                return Err("what its guest may do with a disk is something else".into());
            }
            if disk.sectors.is_some_and(|sectors| sectors != device.sectors) {
                return Err("a disk has another size".into());
            }
        }
        Ok(())
    }

    /// What the guest is offered of the processor, and with that of the host's kernel: nothing more than its base was.
    fn check_processors(&self, state: &MachineState, supported: &CpuId) -> Result<(), String> {
        for (index, written) in (0u8..).zip(&state.vcpus) {
            let base = self.base.map(|base| base.state().vcpus.get(usize::from(index)));
            let fresh;
            let offered = match base {
                Some(Some(base)) => base.cpuid.as_slice(),
                Some(None) => return Err("its base has fewer vCPUs".into()),
                None => {
                    fresh = cpuid::for_vcpu(supported, index, self.vcpus)
                        .map_err(|_| "this host's CPUID has too many entries".to_owned())?;
                    fresh.as_slice()
                }
            };
            check_cpuid(&written.cpuid, offered).map_err(|reason| format!("vCPU {index} {reason}"))?;
        }
        Ok(())
    }
}

fn check_cpuid(written: &[kvm_cpuid_entry2], offered: &[kvm_cpuid_entry2]) -> Result<(), String> {
    for leaf in written {
        let known = offered
            .iter()
            .find(|known| known.function == leaf.function && known.index == leaf.index)
            .ok_or_else(|| format!("has the CPUID leaf {:#x}, which it was not given", leaf.function))?;
        let words = FEATURES
            .iter()
            .filter(|(function, index, _)| (*function, *index) == (leaf.function, leaf.index))
            .flat_map(|(.., words)| *words);
        for (word, follows) in words {
            let more = word(leaf) & !word(known) & !follows;
            if more != 0 {
                return Err(format!(
                    "has features that it was not given: {more:#x} in the CPUID leaf {:#x}",
                    leaf.function
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::block::BlockState;
    use crate::template::open::tests::state;
    use std::path::Path;

    const IMAGE: &str = "/store/image.erofs";

    fn disk(change: impl FnOnce(&mut BlockState, &mut std::path::PathBuf)) -> SlotState {
        let mut device = BlockState {
            sectors: 8,
            padded: false,
            read_only: true,
            flush: false,
        };
        let mut path = IMAGE.into();
        change(&mut device, &mut path);
        SlotState::Block {
            transport: Default::default(),
            device,
            path,
        }
    }

    fn written(disks: Vec<SlotState>) -> MachineState {
        let mut state = state();
        state.vm.irqchips = vec![Default::default(); 3];
        state.slots = vec![
            SlotState::Console {
                transport: Default::default(),
                device: Default::default(),
            },
            SlotState::Entropy {
                transport: Default::default(),
            },
            SlotState::Fs {
                transport: Default::default(),
                device: Default::default(),
            },
        ];
        state.slots.extend(disks);
        state.slots.push(SlotState::Storage {
            transport: Default::default(),
            device: BlockState {
                sectors: STORAGE_SECTORS,
                padded: true,
                read_only: false,
                flush: true,
            },
        });
        state
    }

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ecx,
            ..Default::default()
        }
    }

    fn check(state: &MachineState) -> Result<(), String> {
        let disks = [Disk {
            sectors: Some(8),
            ..Disk::read_only(Path::new(IMAGE))
        }];
        let expected = Expected {
            memory_mib: state.memory_mib,
            vcpus: 1,
            disks: &disks,
            base: None,
        };
        expected.check(state, &CpuId::from_entries(&[leaf(1, 0b11)]).unwrap())
    }

    #[test]
    fn what_was_asked_for_is_taken() {
        let mut state = written(vec![disk(|_, _| {})]);
        // OSXSAVE is the guest's doing.
        state.vcpus[0].cpuid = vec![leaf(1, 0b11 | 1 << 27)];
        check(&state).unwrap();
        let other = Expected {
            memory_mib: 1,
            vcpus: 1,
            disks: &[],
            base: None,
        };
        let supported = CpuId::new(0).unwrap();
        assert!(other.check(&state, &supported).unwrap_err().contains("MiB"));
        let other = Expected {
            memory_mib: state.memory_mib,
            vcpus: 2,
            ..other
        };
        assert!(other.check(&state, &supported).unwrap_err().contains("vCPUs"));
    }

    #[test]
    fn a_disk_on_a_file_of_the_host_is_refused_by_its_name() {
        let other = disk(|_, path| *path = "/etc/shadow".into());
        let reason = check(&written(vec![other])).unwrap_err();
        assert!(reason.contains("/etc/shadow"), "{reason}");
    }

    #[test]
    fn an_image_that_its_guest_could_write_to_is_refused() {
        let writable = disk(|device, _| device.read_only = false);
        assert!(check(&written(vec![writable])).is_err());
        let larger = disk(|device, _| device.sectors = 9);
        assert!(check(&written(vec![larger])).is_err());
        assert!(check(&written(vec![])).is_err());
        assert!(check(&written(vec![disk(|_, _| {}), disk(|_, _| {})])).is_err());
        assert!(check(&state()).unwrap_err().contains("other devices"));
    }

    #[test]
    fn storage_that_is_another_disk_is_refused() {
        let mut state = written(vec![disk(|_, _| {})]);
        let Some(SlotState::Storage { device, .. }) = state.slots.last_mut() else {
            panic!("the last slot is that of storage")
        };
        device.sectors = 8;
        assert!(check(&state).unwrap_err().contains("storage"));
        state.slots.pop();
        assert!(check(&state).unwrap_err().contains("other devices"));
    }

    #[test]
    fn a_guest_that_was_given_more_of_the_processor_is_refused() {
        let mut state = written(vec![disk(|_, _| {})]);
        state.vcpus[0].cpuid = vec![leaf(1, 0b11 | 1 << 5)];
        assert!(check(&state).unwrap_err().contains("0x20"));
        state.vcpus[0].cpuid = vec![leaf(0x8000_0001, 0)];
        assert!(check(&state).unwrap_err().contains("not given"));
    }

    #[test]
    fn lists_longer_than_a_machine_has_are_refused() {
        let mut state = written(vec![disk(|_, _| {})]);
        state.trap.identity_pages = vec![0; IDENTITY_PAGES_MAX + 1];
        assert!(check(&state).is_err());
        let mut state = written(vec![disk(|_, _| {})]);
        state.vm.irqchips.pop();
        assert!(check(&state).is_err());
    }
}
