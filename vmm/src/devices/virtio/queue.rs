//! Walking a queue: descriptor chains as lists of checked guest ranges.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::DeviceError;

/// Chains that a device takes from a queue at most before it lets go of its lock: another vCPU may add new ones for
/// as long as it likes.
pub const BATCH: usize = 256;

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
    /// Bytes of all buffers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.readable
            .iter()
            .chain(&self.writable)
            .map(|buffer| u64::from(buffer.length))
            .sum()
    }

    /// Bytes that the device may write, as many as the used ring can tell.
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        self.writable
            .iter()
            .fold(0u32, |sum, buffer| sum.saturating_add(buffer.length))
    }

    fn from(chain: DescriptorChain<&GuestMemoryMmap>, size: u16) -> Self {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        // No chain is longer than its queue (2.7.5.2). The iterator ends one that loops there, but it also follows an
        // indirect table, which was never offered and could hold 65,535 descriptors.
        for descriptor in chain.take(usize::from(size)) {
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
    let size = queue.size();
    // Empty: ask to be notified of the next chain, and look again for one that came before the asking (2.7.10).
    for _ in 0..2 {
        if let Some(chain) = queue.iter(memory).map_err(error)?.next() {
            return Ok(Some(Chain::from(chain, size)));
        }
        if !queue.enable_notification(memory).map_err(error)? {
            return Ok(None);
        }
    }
    // There is one, and then there is none: the guest moves the index back and forth, or the ring's entries cannot be
    // read.
    Err(error(virtio_queue::Error::InvalidAvailRingIndex))
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
