//! Interrupt lines.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use tracing::error;

/// A device's way to interrupt the guest.
pub trait InterruptLine: Send + Sync {
    /// One edge on the line.
    fn pulse(&self);
}

/// A line of the in-kernel interrupt controllers.
pub struct KvmLine {
    vm: Arc<VmFd>,
    line: u32,
}

impl KvmLine {
    /// The given line of a VM, 0 to 23.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, line: u32) -> Self {
        Self { vm, line }
    }
}

impl InterruptLine for KvmLine {
    // Two ioctls and not an irqfd: a clone takes few interrupts, and an irqfd costs more to set up and to take down.
    fn pulse(&self) {
        let result = self
            .vm
            .set_irq_line(self.line, true)
            .and_then(|()| self.vm.set_irq_line(self.line, false));
        if let Err(source) = result {
            error!(line = self.line, %source, "cannot interrupt the guest");
        }
    }
}
