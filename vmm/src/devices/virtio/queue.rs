//! Walking a queue: descriptor chains as lists of checked guest ranges.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::DeviceError;

/// One buffer of a chain. The range may still lie outside guest memory: accesses check that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical start.
    pub address: GuestAddress,
    /// Bytes.
    pub length: u32,
}

/// A chain, cut into what the device reads and what it writes.
#[derive(Debug)]
pub struct Chain {
    /// Index of the head, for the used ring.
    pub head: u16,
    /// Buffers that the device reads.
    pub readable: Vec<Buffer>,
    /// Buffers that the device writes.
    pub writable: Vec<Buffer>,
}

impl Chain {
    /// Bytes that the device may write, as many as the used ring can tell.
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        self.writable
            .iter()
            .fold(0u32, |sum, buffer| sum.saturating_add(buffer.length))
    }

    fn from(chain: DescriptorChain<&GuestMemoryMmap>) -> Self {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        // The iterator ends a chain that loops after as many descriptors as the queue has.
        for descriptor in chain {
            let buffer = Buffer {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            if descriptor.is_write_only() {
                writable.push(buffer);
            } else {
                readable.push(buffer);
            }
        }
        Self {
            head,
            readable,
            writable,
        }
    }
}

/// Takes the next chain from a queue.
///
/// # Errors
/// [`DeviceError::Queue`] if the available ring is outside memory or its index is nonsense.
pub fn pop(
    queues: &mut [Queue],
    index: usize,
    memory: &GuestMemoryMmap,
) -> Result<Option<Chain>, DeviceError> {
    let Some(queue) = queues.get_mut(index) else {
        return Ok(None);
    };
    if !queue.ready() {
        return Ok(None);
    }
    let error = |error| DeviceError::Queue(index, error);
    loop {
        if let Some(chain) = queue.iter(memory).map_err(error)?.next() {
            return Ok(Some(Chain::from(chain)));
        }
        // Empty: ask to be notified of the next chain, and look again for one that came before the asking (2.7.10).
        if !queue.enable_notification(memory).map_err(error)? {
            return Ok(None);
        }
    }
}

/// Puts the chain that was popped last back, to be popped again.
pub fn unpop(queues: &mut [Queue], index: usize) {
    if let Some(queue) = queues.get_mut(index) {
        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    }
}

/// Gives a chain back to the guest with the number of bytes written into it.
///
/// # Errors
/// [`DeviceError::Queue`] if the used ring is outside memory.
pub fn give_back(
    queues: &mut [Queue],
    index: usize,
    memory: &GuestMemoryMmap,
    head: u16,
    written: u32,
) -> Result<(), DeviceError> {
    match queues.get_mut(index) {
        Some(queue) => queue
            .add_used(memory, head, written)
            .map_err(|error| DeviceError::Queue(index, error)),
        None => Ok(()),
    }
}

/// Whether the guest wants to be interrupted for what was given back.
///
/// # Errors
/// [`DeviceError::Queue`] if the rings are outside memory.
pub fn wants_interrupt(
    queues: &mut [Queue],
    index: usize,
    memory: &GuestMemoryMmap,
) -> Result<bool, DeviceError> {
    match queues.get_mut(index) {
        Some(queue) => queue
            .needs_notification(memory)
            .map_err(|error| DeviceError::Queue(index, error)),
        None => Ok(false),
    }
}
