//! Virtio devices (Virtual I/O Device specification 1.2) on the MMIO transport.

pub mod block;
pub mod console;
pub mod entropy;
pub mod fs;
pub mod queue;
pub mod slot;
pub mod transport;

#[cfg(test)]
mod tests;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// Why a device gave up on what the guest asked. The device then stops until the guest resets it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A queue lies outside guest memory or its indices make no sense.
    #[error("queue {0} is malformed: {1}")]
    Queue(usize, virtio_queue::Error),
    /// A saved state does not fit the device.
    #[error("the saved state of a {0} device does not fit it")]
    State(&'static str),
    /// The backend failed for good.
    #[error("the backend of a {0} device failed: {1}")]
    Backend(&'static str, std::io::Error),
}

/// What a device did with a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Something was used, and the guest wants to be interrupted for it.
    pub interrupt: bool,
    /// The device did its share ([`queue::BATCH`]) and there may be more: it is to be called again, after whoever waits
    /// for it had a chance.
    pub more: bool,
}

/// What the transport needs of a device.
pub trait Device: Send {
    /// Device type (5, "Device Types").
    fn device_type(&self) -> u32;
    /// Features offered, without those of the transport.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];
    /// Device configuration space; what lies behind it reads as zero.
    fn config(&self) -> Vec<u8>;
    /// The guest has accepted the features and is ready.
    fn activate(&mut self, features: u64);
    /// The guest has put something into a queue, or there may be something in it since the device was last
    /// looked at. Returns after bounded work, whatever the guest does meanwhile.
    ///
    /// # Errors
    /// The device then needs a reset.
    fn process(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<Progress, DeviceError>;
    /// Back to the state after creation; the backend stays.
    fn reset(&mut self);
}
