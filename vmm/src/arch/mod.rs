//! What an x86-64 machine without firmware, ACPI and PCI needs: where things lie in guest-physical memory, how the
//! kernel is started, and the tables by which it finds its processors.

pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod mptable;
