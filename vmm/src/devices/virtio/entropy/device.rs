//! What the guest sees: one queue of buffers to fill. There is no configuration and nothing to save beside the
//! transport; the backend is the host kernel's generator.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{Device, DeviceError, Progress, queue};

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
    ) -> Result<Progress, DeviceError> {
        let mut used = false;
        let mut more = true;
        for _ in 0..queue::BATCH {
            let Some(chain) = queue::pop(queues, index, memory)? else {
                more = false;
                break;
            };
            let written = fill(&chain, memory).map_err(|error| DeviceError::Backend("entropy", error))?;
            queue::give_back(queues, index, memory, chain.head, written)?;
            used = true;
        }
        Ok(Progress {
            interrupt: used && queue::wants_interrupt(queues, index, memory)?,
            more,
        })
    }

    fn reset(&mut self) {}
}

/// Fills a request's buffers in order, [`REQUEST_MAX`] bytes at most and as far as they lie in memory: the guest counts
/// on the first bytes being the filled ones.
fn fill(chain: &Chain, memory: &GuestMemoryMmap) -> io::Result<u32> {
    let mut bytes = [0u8; REQUEST_MAX];
    let wanted =
        usize::try_from(chain.writable_bytes()).map_or(REQUEST_MAX, |wanted| wanted.min(REQUEST_MAX));
    let wanted = bytes.get_mut(..wanted).unwrap_or_default();
    // Interrupted by a pause, perhaps: ask again.
    let filled = rustix::io::retry_on_intr(|| {
        rustix::rand::getrandom(&mut *wanted, rustix::rand::GetRandomFlags::empty())
    })?;
    let mut rest = wanted.get(..filled).unwrap_or_default();
    let mut written = 0u32;
    for buffer in &chain.writable {
        let (part, behind) = rest.split_at(rest.len().min(buffer.length as usize));
        if part.is_empty() && rest.is_empty() || memory.write_slice(part, buffer.address).is_err() {
            break;
        }
        written = written.saturating_add(part.len() as u32);
        rest = behind;
    }
    Ok(written)
}
