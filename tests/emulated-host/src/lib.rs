//! A whole KVM host in software, to run and test picovm on any machine.
//!
//! QEMU emulates an AMD CPU with SVM; a stock Debian kernel with `kvm_amd` runs on it; the machine's own file system
//! is its root. Two programs share this library: `picovm-emulated-host` starts the host and passes streams and status
//! through, `picovm-host-init` is process 1 inside.

pub mod console;
pub mod helper;
pub mod kernel;
pub mod modules;
pub mod protocol;
pub mod qemu;
pub mod runner;
pub mod virtiofs;
