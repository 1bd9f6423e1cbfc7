//! What a machine is made of.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::arch::layout;

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The file, of one or more whole sectors of 512 bytes.
    pub path: PathBuf,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// How many sectors of 512 bytes the guest sees; as many as the file has if `None`. More is for disks that are only
    /// read: what is behind the file's end reads as zeros, and a clone may get a file of another size in its place.
    pub sectors: Option<u64>,
}

impl Disk {
    /// A disk that the guest can only read, as large as its file.
    #[must_use]
    pub fn read_only(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            read_only: true,
            sectors: None,
        }
    }
}

/// What a machine is made of. Start with [`MachineConfig::new`] and change what differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Uncompressed kernel (`vmlinux`).
    pub kernel: PathBuf,
    /// Initial root file system, uncompressed or in a format that the kernel unpacks.
    pub initramfs: Option<PathBuf>,
    /// Memory in MiB, 32 to 1,048,576, and no more than this host has.
    pub memory_mib: u64,
    /// vCPUs, 1 to 8.
    pub vcpus: u8,
    /// Disks in order: the guest sees `/dev/vda`, `/dev/vdb`, ..., and after them the disk of a clone's own ([`STORAGE_SECTORS`]). At
    /// most 15.
    pub disks: Vec<Disk>,
    /// Where console output is logged, 1 MiB at most. The last of it is kept in memory in any case:
    /// [`crate::Machine::console_tail`].
    pub console_log: Option<PathBuf>,
    /// Whether the machine stops at its base freeze point too: kernel and init are ready, no disk has been read yet. A
    /// template made there is one for any disks in the place of these.
    pub stop_at_base: bool,
    /// Appended to the kernel command line.
    pub extra_cmdline: String,
}

/// What a configuration has wrong.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Number of vCPUs.
    #[error("a machine of {0} vCPUs cannot be made: 1 to {max} are possible", max = layout::VCPUS_MAX)]
    Vcpus(u8),
    /// Number of disks.
    #[error("a machine of {0} disks cannot be made: at most {max} are possible", max = DISKS_MAX)]
    Disks(usize),
}

/// Sectors of 512 bytes of the disk that every machine has for storage, as its guest sees it: 1 TiB. It reads as zeros and takes no
/// write, until a clone is given a file for it ([`crate::ForkOptions::storage`]), of which the file system in it knows the size.
pub const STORAGE_SECTORS: u64 = 1 << 31;

/// Slots of a machine that are not disks of its configuration: control connection, entropy and shared directories before them, storage
/// after them.
pub const FIXED_SLOTS: usize = 4;
/// Most disks.
pub const DISKS_MAX: usize = layout::VIRTIO_DEVICES_MAX - FIXED_SLOTS;

impl MachineConfig {
    /// One vCPU and 128 MiB for the given kernel.
    #[must_use]
    pub fn new(kernel: impl AsRef<Path>) -> Self {
        Self {
            kernel: kernel.as_ref().to_owned(),
            initramfs: None,
            memory_mib: 128,
            vcpus: 1,
            disks: Vec::new(),
            console_log: None,
            stop_at_base: false,
            extra_cmdline: String::new(),
        }
    }

    /// Checks what can be checked before any resource is taken. Memory is checked where it is mapped.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=layout::VCPUS_MAX).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(ConfigError::Disks(self.disks.len()));
        }
        Ok(())
    }

    /// The kernel command line.
    #[must_use]
    pub fn cmdline(&self) -> String {
        // No ACPI, PCI or keyboard to look for; a panic resets at once, through the keyboard controller's reset line;
        // the clock needs no watching and the interrupt lines no trial.
        let mut line = String::from(
            "quiet panic=-1 reboot=k tsc=reliable no_timer_check rcupdate.rcu_expedited=1 swiotlb=noforce cgroup.memory=nokmem \
             console=ttyS0 8250.nr_uarts=1",
        );
        line.push_str(&format!(
            " {}={:#x}",
            picovm_guest_protocol::trap::CMDLINE_PARAMETER,
            layout::TRAP
        ));
        for slot in 0..self.disks.len() + FIXED_SLOTS {
            line.push_str(&format!(
                " virtio_mmio.device={}K@{:#x}:{}",
                layout::VIRTIO_MMIO_SIZE >> 10,
                layout::VIRTIO_MMIO + slot as u64 * layout::VIRTIO_MMIO_SIZE,
                layout::VIRTIO_IRQ as usize + slot
            ));
        }
        if !self.extra_cmdline.is_empty() {
            line.push(' ');
            line.push_str(&self.extra_cmdline);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_and_disks_out_of_range_are_refused() {
        let mut config = MachineConfig::new("vmlinux");
        assert!(config.check().is_ok());
        config.vcpus = 0;
        assert!(config.check().is_err());
        config.vcpus = 9;
        assert!(config.check().unwrap_err().to_string().contains("1 to 8"));
        config.vcpus = 1;
        config.disks = vec![Disk::read_only("disk"); DISKS_MAX + 1];
        assert!(config.check().is_err());
    }

    #[test]
    fn every_slot_is_named_on_the_command_line() {
        let mut config = MachineConfig::new("vmlinux");
        config.disks = vec![Disk::read_only("disk"); 3];
        config.extra_cmdline = "loglevel=7".into();
        let line = config.cmdline();
        assert_eq!(line.matches("virtio_mmio.device=4K@0xd000").count(), 7);
        assert!(line.contains("virtio_mmio.device=4K@0xd0007000:11"));
        assert!(line.ends_with(" loglevel=7"));
    }
}
