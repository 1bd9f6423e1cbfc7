//! Registers of the freeze trap.
//!
//! The trap is one 4 KiB MMIO page whose guest-physical address the kernel command line names
//! (`picovm.trap=0xADDRESS`). `init` maps it through `/dev/mem`. All registers are little-endian, naturally aligned,
//! and accessed with their own width.

/// Kernel command-line parameter that holds the page's guest-physical address, in hexadecimal with `0x`.
pub const CMDLINE_PARAMETER: &str = "picovm.trap";

/// Read, 32 bits: [`MAGIC_VALUE`].
pub const MAGIC: u64 = 0x00;
/// Read, 32 bits: [`crate::PROTOCOL_VERSION`] of the host.
pub const VERSION: u64 = 0x04;
/// Write, 64 bits: guest-physical address of the next 4 KiB page of the identity area, page-aligned. Written once per
/// page, in order; at most [`IDENTITY_PAGES_MAX`] pages are kept.
pub const IDENTITY_PAGE: u64 = 0x08;
/// Write, 32 bits, any value: forget the identity pages announced so far.
pub const IDENTITY_RESET: u64 = 0x10;
/// Write, 32 bits, any value: the freeze point. The instruction after this write is the first one of every clone.
pub const FREEZE: u64 = 0x14;
/// Write, 32 bits: power off. The value is informational; the container's exit status goes over the control
/// connection.
pub const POWER_OFF: u64 = 0x18;

/// Write, 32 bits, any value: the base freeze point, at which kernel and init are ready and no image is mounted yet. A
/// VMM that wants no template there lets the guest go on at once; a clone made there goes on in the same way.
pub const BASE: u64 = 0x1c;

/// `"PICO"` in little-endian order.
pub const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"PICO");

/// The identity area is at most this many pages of 4 KiB.
pub const IDENTITY_PAGES_MAX: usize = 16;
/// Size of one page of the identity area in bytes.
pub const PAGE_SIZE: usize = 4096;
/// Size of the trap's MMIO page in bytes.
pub const TRAP_SIZE: u64 = 0x1000;
