//! Starts a Linux kernel by the 64-bit boot protocol (Documentation/arch/x86/boot.rst): the uncompressed `vmlinux` is
//! loaded where its ELF headers say, the zero page tells it of memory, command line and initramfs, and the first
//! vCPU enters it in long mode with the first GiB identity-mapped.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, load_cmdline};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{layout, mptable};

/// Why a kernel could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// `the kernel` or `the initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// Not an ELF file.
    #[error(
        "{} is not an uncompressed kernel: it starts with {found}, and a 64-bit ELF file is needed. \
         Use `vmlinux`, not `bzImage` or `vmlinuz`",
        path.display()
    )]
    NotElf {
        /// The file.
        path: PathBuf,
        /// Its first bytes, in words.
        found: String,
    },
    /// An ELF file that cannot be loaded.
    #[error("cannot load the kernel {}: {reason}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader says.
        reason: String,
    },
    /// The initramfs does not fit.
    #[error(
        "the initramfs {} ({initramfs_kib} KiB) does not fit into {memory_mib} MiB of guest memory beside the kernel: \
         give the machine more memory",
        path.display()
    )]
    InitramfsSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        initramfs_kib: u64,
        /// Guest memory.
        memory_mib: u64,
    },
    /// The command line is too long or has bytes that the kernel cannot take.
    #[error("the kernel command line cannot be used: {0}")]
    Cmdline(String),
    /// Writing to guest memory failed.
    #[error("cannot write the boot data to guest memory: {0}")]
    Memory(String),
}

/// A file to boot from: open, and its name for messages.
pub struct BootFile {
    file: File,
    path: PathBuf,
}

impl BootFile {
    /// Opens the kernel.
    ///
    /// # Errors
    /// [`BootError::Read`].
    pub fn kernel(path: &Path) -> Result<Self, BootError> {
        Self::open("the kernel", path)
    }

    /// Opens the initramfs.
    ///
    /// # Errors
    /// [`BootError::Read`].
    pub fn initramfs(path: &Path) -> Result<Self, BootError> {
        Self::open("the initramfs", path)
    }

    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        match File::open(path) {
            Ok(file) => Ok(Self {
                file,
                path: path.to_owned(),
            }),
            Err(source) => Err(BootError::Read {
                what,
                path: path.to_owned(),
                source,
            }),
        }
    }
}

impl AsFd for BootFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Loads kernel, initramfs, command line, zero page, page tables and MP table; returns the entry point.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: BootFile,
    initramfs: Option<BootFile>,
    cmdline: &str,
    vcpus: u8,
) -> Result<GuestAddress, BootError> {
    let (entry, kernel_end) = load_kernel(memory, kernel)?;
    let initramfs = match initramfs {
        Some(file) => Some(load_initramfs(memory, file, kernel_end)?),
        None => None,
    };

    let mut line = linux_loader::cmdline::Cmdline::new(layout::CMDLINE_MAX)
        .map_err(|error| BootError::Cmdline(error.to_string()))?;
    line.insert_str(cmdline).map_err(|error| {
        BootError::Cmdline(format!(
            "{error} ({} bytes; {} at most)",
            cmdline.len(),
            layout::CMDLINE_MAX
        ))
    })?;
    load_cmdline(memory, GuestAddress(layout::CMDLINE), &line)
        .map_err(|error| BootError::Memory(error.to_string()))?;

    write_zero_page(memory, cmdline.len(), initramfs)?;
    write(memory, layout::MP_TABLE, &mptable::build(vcpus))?;
    write_page_tables(memory)?;
    write_gdt(memory)?;
    Ok(entry)
}

fn write(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|error| BootError::Memory(error.to_string()))
}

fn load_kernel(memory: &GuestMemoryMmap, kernel: BootFile) -> Result<(GuestAddress, u64), BootError> {
    let BootFile { mut file, path } = kernel;
    let path = path.as_path();
    let read = |source| BootError::Read {
        what: "the kernel",
        path: path.to_owned(),
        source,
    };
    let mut start = [0u8; 4];
    let have = file.read(&mut start).map_err(read)?;
    if start != *b"\x7fELF" {
        let found = match &start[..have] {
            [] => "nothing (the file is empty)".to_owned(),
            [b'M', b'Z', ..] => "`MZ` (a bzImage)".to_owned(),
            bytes => format!("{bytes:02x?}"),
        };
        return Err(BootError::NotElf {
            path: path.to_owned(),
            found,
        });
    }
    let loaded =
        Elf::load(memory, None, &mut file, Some(GuestAddress(layout::HIGH_MEMORY))).map_err(|error| {
            BootError::Load {
                path: path.to_owned(),
                reason: format!("{error} (is the file whole, and is the guest's memory large enough?)"),
            }
        })?;
    // The loader checks what it copies; the zeroed part behind that is the kernel's to touch.
    let room = low_ram_end(memory);
    if loaded.kernel_end > room {
        return Err(BootError::Load {
            path: path.to_owned(),
            reason: format!(
                "it takes {} MiB and the guest has {}: give the machine more memory",
                loaded.kernel_end.div_ceil(1 << 20),
                room >> 20
            ),
        });
    }
    Ok((loaded.kernel_load, loaded.kernel_end.max(layout::HIGH_MEMORY)))
}

/// Puts the initramfs at the end of low RAM, page-aligned, and returns its address and size.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    initramfs: BootFile,
    kernel_end: u64,
) -> Result<(u64, u64), BootError> {
    let BootFile { mut file, path } = initramfs;
    let path = path.as_path();
    let read = |source| BootError::Read {
        what: "the initramfs",
        path: path.to_owned(),
        source,
    };
    let size = file.metadata().map_err(read)?.len();
    let low_end = low_ram_end(memory);
    let address = low_end
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel_end)
        .ok_or_else(|| BootError::InitramfsSize {
            path: path.to_owned(),
            initramfs_kib: size >> 10,
            memory_mib: memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20,
        })?;
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|error| BootError::Memory(error.to_string()))?;
    Ok((address, size))
}

fn low_ram_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .iter()
        .filter(|region| region.start_addr().0 == 0)
        .map(GuestMemoryRegion::len)
        .sum()
}

fn write_zero_page(
    memory: &GuestMemoryMmap,
    cmdline_length: usize,
    initramfs: Option<(u64, u64)>,
) -> Result<(), BootError> {
    const E820_RAM: u32 = 1;
    let mut params = boot_params::default();
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448; // "HdrS"
    params.hdr.type_of_loader = 0xff;
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_length as u32 + 1;
    if let Some((address, size)) = initramfs {
        // Both are below 4 GiB: the initramfs lies in low RAM.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    let mut map = vec![
        (0, layout::MP_TABLE),
        (layout::HIGH_MEMORY, low_ram_end(memory) - layout::HIGH_MEMORY),
    ];
    map.extend(
        memory
            .iter()
            .filter(|region| region.start_addr().0 != 0)
            .map(|region| (region.start_addr().0, region.len())),
    );
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: E820_RAM,
        };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::BOOT_PARAMS)),
        memory,
    )
    .map_err(|error| BootError::Memory(error.to_string()))
}

/// Identity-maps the first GiB with 2 MiB pages.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    write(memory, pml4, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    write(memory, pdpt, &(pd | PRESENT_WRITABLE).to_le_bytes())?;
    let entries: Vec<u8> = (0..512u64)
        .flat_map(|index| ((index << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes())
        .collect();
    write(memory, pd, &entries)
}

/// A segment of the boot GDT: index, type, long mode.
const fn segment(index: u16, type_: u8, long: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// `__BOOT_CS` is selector 0x10 and `__BOOT_DS` 0x18, as the boot protocol wants it.
const CODE: kvm_segment = segment(2, 0b1011, 1);
const DATA: kvm_segment = segment(3, 0b0011, 0);

fn descriptor(segment: &kvm_segment) -> u64 {
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    0xffff | 0xf << 48 | flags << 40
}

fn write_gdt(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let entries: Vec<u8> = [0, 0, descriptor(&CODE), descriptor(&DATA)]
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    write(memory, layout::GDT, &entries)
}

/// General registers of the first vCPU at the kernel's entry.
#[must_use]
pub fn entry_registers(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rflags: 0x2,
        rip: entry.0,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::BOOT_PARAMS,
        ..Default::default()
    }
}

/// Sets segments, page tables and mode bits for the kernel's 64-bit entry.
pub fn enter_long_mode(sregs: &mut kvm_sregs) {
    const CR0_PROTECTED: u64 = 1;
    const CR0_PAGING: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LONG_ENABLED: u64 = 1 << 8;
    const EFER_LONG_ACTIVE: u64 = 1 << 10;
    sregs.cs = CODE;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = DATA;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr0 |= CR0_PROTECTED | CR0_PAGING;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_ENABLED | EFER_LONG_ACTIVE;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_file_that_is_no_kernel_is_named_with_what_it_is() {
        let load = |bytes: &[u8]| {
            load(
                &memory(),
                BootFile::kernel(file(bytes).path()).unwrap(),
                None,
                "",
                1,
            )
            .unwrap_err()
            .to_string()
        };
        assert!(load(b"").contains("empty"));
        assert!(load(b"MZ\x90\x00").contains("bzImage"));
        assert!(load(b"#!/bin/sh").contains("is not an uncompressed kernel"));
        assert!(load(b"\x7fELF").contains("cannot load the kernel"));
    }

    #[test]
    fn a_kernel_that_needs_more_memory_is_refused() {
        // An ELF header and one segment of a byte in the file and 1 GiB in memory.
        let mut elf = vec![0u8; 64 + 56 + 1];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[24..32].copy_from_slice(&layout::HIGH_MEMORY.to_le_bytes()); // e_entry
        elf[32..40].copy_from_slice(&64u64.to_le_bytes()); // e_phoff
        elf[54..58].copy_from_slice(&[56, 0, 1, 0]); // e_phentsize, e_phnum
        elf[64] = 1; // PT_LOAD
        elf[72..80].copy_from_slice(&120u64.to_le_bytes()); // p_offset
        elf[88..96].copy_from_slice(&layout::HIGH_MEMORY.to_le_bytes()); // p_paddr
        elf[96..104].copy_from_slice(&1u64.to_le_bytes()); // p_filesz
        elf[104..112].copy_from_slice(&(1u64 << 20).to_le_bytes()); // p_memsz
        assert!(
            load(
                &memory(),
                BootFile::kernel(file(&elf).path()).unwrap(),
                None,
                "",
                1
            )
            .is_ok()
        );
        elf[104..112].copy_from_slice(&(1u64 << 30).to_le_bytes());
        let error = load(
            &memory(),
            BootFile::kernel(file(&elf).path()).unwrap(),
            None,
            "",
            1,
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("takes 1025 MiB and the guest has 32"), "{error}");
    }

    #[test]
    fn an_initramfs_larger_than_memory_is_refused() {
        let large = tempfile::NamedTempFile::new().unwrap();
        large.as_file().set_len(64 << 20).unwrap();
        let error =
            load_initramfs(&memory(), BootFile::initramfs(large.path()).unwrap(), 16 << 20).unwrap_err();
        assert!(error.to_string().contains("does not fit into 32 MiB"));
    }
}
