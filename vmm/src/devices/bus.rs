//! What the vCPU threads find at an address.

use std::sync::{Mutex, MutexGuard, PoisonError};

use picovm_guest_protocol::trap::TRAP_SIZE;

use super::legacy::Ports;
use super::trap::{Trap, TrapAction};
use super::virtio::slot::Slot;
use crate::arch::layout;

/// Everything that answers at an address.
pub struct Devices {
    /// Port I/O.
    pub ports: Mutex<Ports>,
    /// The freeze trap.
    pub trap: Mutex<Trap>,
    /// Virtio devices, in the order of their windows.
    pub slots: Vec<Slot>,
}

/// Queues in which there may be more than a device did at once, each by the index of its slot and its own. Mostly none.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unfinished(Vec<(usize, usize)>);

impl Devices {
    fn slot(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let index = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        Some((self.slots.get(index)?, offset % layout::VIRTIO_MMIO_SIZE))
    }

    /// A read from guest-physical memory that is not RAM.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        if let Some((slot, offset)) = self.slot(address) {
            slot.read(offset, data);
        } else if let Some(offset) = trap_offset(address) {
            lock(&self.trap).read(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A write to guest-physical memory that is not RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> TrapAction {
        if let Some((slot, offset)) = self.slot(address) {
            slot.write(offset, data);
        } else if let Some(offset) = trap_offset(address) {
            return lock(&self.trap).write(offset, data);
        }
        TrapAction::Continue
    }

    /// A read from a port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        lock(&self.ports).read(port, data);
    }

    /// A write to a port; `true` if the guest resets itself with it.
    pub fn write_port(&self, port: u16, data: &[u8]) -> bool {
        lock(&self.ports).write(port, data)
    }

    /// Lets no device touch guest memory any more.
    pub fn pause(&self) {
        for slot in &self.slots {
            slot.pause();
        }
    }

    /// Lets all devices go on. What they have left to do is for [`Devices::finish`].
    #[must_use]
    pub fn resume(&self) -> Unfinished {
        let mut unfinished = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            unfinished.extend(slot.resume().into_iter().map(|queue| (index, queue)));
        }
        Unfinished(unfinished)
    }

    /// Does what was left when the devices were resumed: until it is done, or they are paused.
    pub fn finish(&self, unfinished: &Unfinished) {
        for (index, queue) in &unfinished.0 {
            if let Some(slot) = self.slots.get(*index) {
                slot.process(*queue);
            }
        }
    }
}

/// Where in the freeze trap's page an address is, if it is there.
fn trap_offset(address: u64) -> Option<u64> {
    address
        .checked_sub(layout::TRAP)
        .filter(|offset| *offset < TRAP_SIZE)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
