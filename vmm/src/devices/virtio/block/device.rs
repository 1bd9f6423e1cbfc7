//! What the guest sees: one queue of requests, each a header, data and a status byte (5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::backend::FileBackend;
use super::state::BlockState;
use crate::devices::virtio::queue::{Buffer, Chain};
use crate::devices::virtio::{Device, DeviceError, Progress, queue};

const QUEUE_SIZE: u16 = 128;
/// Buffers of data per request: the queue less header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
const HEADER: usize = 16;
/// Ranges of a request to discard, and sectors of each: 1 GiB, so that no request takes long.
const DISCARD_SEGMENTS: u32 = 32;
const DISCARD_SECTORS: u32 = 1 << 21;
/// Blocks of the host's file systems: less than one of these cannot be given back.
const DISCARD_ALIGNMENT: u32 = 8;
/// A range to discard: first sector, number of sectors, flags (5.2.6.1).
const DISCARD_SEGMENT: usize = 16;
/// Where `max_discard_sectors` is in the configuration space (5.2.4).
const DISCARD_CONFIG: usize = 36;
/// After so many bytes the device lets go of its lock for a moment. A single request is never cut: it moves less than
/// 4 GiB (2.7.5.2) and no more than the disk holds.
const BYTES_AT_ONCE: u64 = 8 << 20;

/// A block device.
pub struct Block {
    backend: FileBackend,
    serial: String,
    flush: bool,
}

impl Block {
    /// A block device on a file. `serial` is what the guest reads as its serial number, 20 bytes at most.
    #[must_use]
    pub fn new(backend: FileBackend, serial: String) -> Self {
        Self {
            backend,
            serial,
            flush: false,
        }
    }

    /// What a clone needs to know of it.
    #[must_use]
    pub fn state(&self) -> BlockState {
        BlockState {
            sectors: self.backend.sectors(),
            padded: self.backend.is_padded(),
            read_only: self.backend.is_read_only(),
            flush: self.flush,
        }
    }

    /// A clone's device, on a backend of its own.
    #[must_use]
    pub fn from_state(backend: FileBackend, serial: String, state: &BlockState) -> Self {
        Self {
            backend,
            serial,
            flush: state.flush,
        }
    }

    /// Carries out one request; returns its status and the bytes written before the status byte. `moved` is how much was done at once.
    fn request(&self, chain: &mut Chain, memory: &GuestMemoryMmap, moved: &mut u64) -> (u32, u32) {
        *moved = moved.saturating_add(chain.bytes());
        let Some(header) = take_header(chain, memory) else {
            return (VIRTIO_BLK_S_IOERR, 0);
        };
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes([
            header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
        ]);
        let bytes = |done: Option<u64>| match done {
            Some(done) => (VIRTIO_BLK_S_OK, u32::try_from(done).unwrap_or(u32::MAX)),
            None => (VIRTIO_BLK_S_IOERR, 0),
        };
        match kind {
            VIRTIO_BLK_T_IN => bytes(self.backend.read(sector, memory, &chain.writable)),
            VIRTIO_BLK_T_OUT => {
                let (status, _) = bytes(self.backend.write(sector, memory, &chain.readable));
                // Without the flush feature the guest counts on write-through (5.2.6.2).
                let durable = status != VIRTIO_BLK_S_OK || self.flush || self.backend.flush().is_ok();
                (if durable { status } else { VIRTIO_BLK_S_IOERR }, 0)
            }
            VIRTIO_BLK_T_FLUSH => match self.backend.flush() {
                Ok(()) => (VIRTIO_BLK_S_OK, 0),
                Err(_) => (VIRTIO_BLK_S_IOERR, 0),
            },
            VIRTIO_BLK_T_DISCARD => {
                *moved = BYTES_AT_ONCE;
                (self.discard(chain, memory), 0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0u8; VIRTIO_BLK_ID_BYTES as usize];
                for (byte, value) in id.iter_mut().zip(self.serial.bytes()) {
                    *byte = value;
                }
                match chain.writable.first() {
                    Some(buffer) if buffer.length >= VIRTIO_BLK_ID_BYTES => bytes(
                        memory
                            .write_slice(&id, buffer.address)
                            .ok()
                            .map(|()| id.len() as u64),
                    ),
                    _ => (VIRTIO_BLK_S_IOERR, 0),
                }
            }
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        }
    }

    /// Discards the ranges of a request; returns its status. Those before one that is refused are discarded.
    fn discard(&self, chain: &Chain, memory: &GuestMemoryMmap) -> u32 {
        if self.backend.is_read_only() {
            return VIRTIO_BLK_S_UNSUPP;
        }
        let Some(ranges) = take_ranges(chain, memory) else {
            return VIRTIO_BLK_S_IOERR;
        };
        for range in ranges.as_chunks::<DISCARD_SEGMENT>().0 {
            let [sector @ .., a, b, c, d, e, f, g, h] = *range;
            let sector = u64::from_le_bytes(sector);
            let (sectors, flags) = (u32::from_le_bytes([a, b, c, d]), [e, f, g, h]);
            if flags != [0; 4] {
                return VIRTIO_BLK_S_UNSUPP;
            }
            if sectors > DISCARD_SECTORS || self.backend.discard(sector, sectors.into()).is_none() {
                return VIRTIO_BLK_S_IOERR;
            }
        }
        VIRTIO_BLK_S_OK
    }
}

/// The ranges of a request to discard, one to [`DISCARD_SEGMENTS`] whole ones.
fn take_ranges(chain: &Chain, memory: &GuestMemoryMmap) -> Option<Vec<u8>> {
    let total = chain
        .readable
        .iter()
        .map(|buffer| u64::from(buffer.length))
        .sum::<u64>();
    let total = usize::try_from(total).ok()?;
    let most = (DISCARD_SEGMENTS as usize).saturating_mul(DISCARD_SEGMENT);
    if total == 0 || total > most || !total.is_multiple_of(DISCARD_SEGMENT) {
        return None;
    }
    let mut bytes = vec![0u8; total];
    let mut rest = bytes.as_mut_slice();
    for buffer in &chain.readable {
        let (part, behind) = rest.split_at_mut_checked(buffer.length as usize)?;
        memory.read_slice(part, buffer.address).ok()?;
        rest = behind;
    }
    Some(bytes)
}

/// Reads the header, which may be cut into buffers as the guest likes, and takes it off the readable part.
fn take_header(chain: &mut Chain, memory: &GuestMemoryMmap) -> Option<[u8; HEADER]> {
    let mut header = [0u8; HEADER];
    let mut have = 0usize;
    while have < HEADER {
        let buffer = chain.readable.first_mut()?;
        let take = (buffer.length as usize).min(HEADER.saturating_sub(have));
        memory
            .read_slice(header.get_mut(have..have.saturating_add(take))?, buffer.address)
            .ok()?;
        have = have.saturating_add(take);
        if take as u32 == buffer.length {
            chain.readable.remove(0);
        } else {
            *buffer = Buffer {
                address: vm_memory::Address::checked_add(&buffer.address, take as u64)?,
                length: buffer.length.saturating_sub(take as u32),
            };
        }
    }
    Some(header)
}

/// Takes the status byte, the last one of the writable part, off it.
fn take_status(chain: &mut Chain) -> Option<vm_memory::GuestAddress> {
    while chain.writable.last().is_some_and(|buffer| buffer.length == 0) {
        chain.writable.pop();
    }
    let last = chain.writable.last_mut()?;
    last.length = last.length.checked_sub(1)?;
    let address = vm_memory::Address::checked_add(&last.address, u64::from(last.length))?;
    if last.length == 0 {
        chain.writable.pop();
    }
    Some(address)
}

impl Device for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let writing = if self.backend.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD
        };
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH | writing
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.backend.sectors().to_le_bytes().to_vec();
        config.extend_from_slice(&0u32.to_le_bytes()); // size_max
        config.extend_from_slice(&SEGMENTS.to_le_bytes());
        if !self.backend.is_read_only() {
            // Geometry to number of queues: of features that are not offered.
            config.resize(DISCARD_CONFIG, 0);
            config.extend_from_slice(&DISCARD_SECTORS.to_le_bytes());
            config.extend_from_slice(&DISCARD_SEGMENTS.to_le_bytes());
            config.extend_from_slice(&DISCARD_ALIGNMENT.to_le_bytes());
        }
        config
    }

    fn activate(&mut self, features: u64) {
        self.flush = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
    }

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<Progress, DeviceError> {
        let mut used = false;
        let mut more = true;
        let mut moved = 0u64;
        for _ in 0..queue::BATCH {
            if moved >= BYTES_AT_ONCE {
                break;
            }
            let Some(mut chain) = queue::pop(queues, index, memory)? else {
                more = false;
                break;
            };
            let head = chain.head;
            let written = match take_status(&mut chain) {
                // No room for a status: nothing can be told, and nothing is done.
                None => 0,
                Some(address) => {
                    let (status, bytes) = self.request(&mut chain, memory, &mut moved);
                    match memory.write_obj(status as u8, address) {
                        Ok(()) => bytes.saturating_add(1),
                        Err(_) => 0,
                    }
                }
            };
            queue::give_back(queues, index, memory, head, written)?;
            used = true;
        }
        Ok(Progress {
            interrupt: used && queue::wants_interrupt(queues, index, memory)?,
            more,
        })
    }

    fn reset(&mut self) {
        self.flush = false;
    }
}
