//! What the guest sees: one queue of buffers to fill. There is no configuration and nothing to save beside the
//! transport; the backend is the host kernel's generator.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::devices::virtio::{Device, DeviceError, queue};

/// Bytes given per request at most: a guest that asks for more asks again.
const REQUEST_MAX: usize = 4096;

/// An entropy device.
#[derive(Default)]
pub struct Entropy;

impl Device for Entropy {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) {}

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<bool, DeviceError> {
        let mut used = false;
        while let Some(chain) = queue::pop(queues, index, memory)? {
            let mut written = 0u32;
            for buffer in &chain.writable {
                let mut bytes = vec![0u8; (buffer.length as usize).min(REQUEST_MAX)];
                let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
                    .map_err(|error| DeviceError::Backend("entropy", error.into()))?;
                // A buffer outside memory gets nothing; the guest sees the length.
                if memory
                    .write_slice(bytes.get(..filled).unwrap_or_default(), buffer.address)
                    .is_ok()
                {
                    written = written.saturating_add(u32::try_from(filled).unwrap_or(0));
                }
                if written as usize >= REQUEST_MAX {
                    break;
                }
            }
            queue::give_back(queues, index, memory, chain.head, written)?;
            used = true;
        }
        Ok(used && queue::wants_interrupt(queues, index, memory)?)
    }

    fn reset(&mut self) {}
}
