//! What the guest sees: a queue of FUSE requests, and one before it for those that must not wait (5.11.2). A request is a chain of
//! what the guest says and room for what it is told.
//!
//! The device looks at nothing but the header. Each request goes to the share server under a number of the device's own, so that
//! a reply finds the chain that it is for, whatever numbers the guest uses.

use std::collections::BTreeMap;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::backend::{PACKET_MAX, Sent, ShareBackend};
use super::state::{FsState, Unanswered};
use crate::devices::virtio::queue::{Buffer, Chain};
use crate::devices::virtio::{Device, DeviceError, Progress, queue};

const SIZES: [u16; 2] = [128; 2];
/// By which the guest mounts it.
const TAG: &[u8] = picovm_guest_protocol::SHARE_TAG.as_bytes();
const TAG_MAX: usize = 36;
/// Requests under way at most: what no honest guest can exceed, but one that gives the same chain again and again.
const UNDER_WAY_MAX: usize = 256;
/// Headers of a request and of a reply (`struct fuse_in_header`, `struct fuse_out_header`).
const REQUEST_HEADER: usize = 40;
const REPLY_HEADER: u32 = 16;
/// Requests without a reply.
const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;

/// A file system device.
pub struct Fs {
    backend: ShareBackend,
    under_way: BTreeMap<u64, Unanswered>,
    /// What the saved machine's server was asked: nobody else will answer.
    lost: Vec<Unanswered>,
    next: u64,
    waits: bool,
    /// What a request is put together in.
    packet: Vec<u8>,
}

/// What became of a request.
enum Taken {
    /// It has its answer, or expects none: so many bytes were written.
    Done(u32),
    /// It is with the server.
    UnderWay,
    /// It has to wait.
    Full,
}

impl Fs {
    /// A device whose requests `backend` carries out.
    #[must_use]
    pub fn new(backend: ShareBackend) -> Self {
        Self {
            backend,
            under_way: BTreeMap::new(),
            lost: Vec::new(),
            next: 1,
            waits: false,
            packet: Vec::new(),
        }
    }

    /// What a clone needs to know of it.
    #[must_use]
    pub fn state(&self) -> FsState {
        FsState {
            unanswered: self.under_way.values().chain(&self.lost).cloned().collect(),
        }
    }

    /// A clone's device, on a backend of its own.
    #[must_use]
    pub fn from_state(backend: ShareBackend, state: &FsState) -> Self {
        Self {
            lost: state.unanswered.iter().take(UNDER_WAY_MAX).cloned().collect(),
            ..Self::new(backend)
        }
    }

    /// Where the backend's events come from.
    #[must_use]
    pub fn backend(&self) -> &ShareBackend {
        &self.backend
    }

    /// Whether a request waits for the backend.
    #[must_use]
    pub fn waits_to_send(&self) -> bool {
        self.waits
    }

    /// Takes a request from its chain: checks its header, and hands it over.
    fn take(&mut self, queue: usize, chain: &Chain, memory: &GuestMemoryMmap) -> Taken {
        let mut packet = std::mem::take(&mut self.packet);
        let taken = match gather(chain, memory, &mut packet) {
            Some(header) => self.hand_over(queue, chain, &header, &mut packet, memory),
            // Nothing that could be answered.
            None => Taken::Done(0),
        };
        self.packet = packet;
        taken
    }

    fn hand_over(
        &mut self,
        queue: usize,
        chain: &Chain,
        header: &Header,
        packet: &mut [u8],
        memory: &GuestMemoryMmap,
    ) -> Taken {
        let expects_reply = !matches!(header.opcode, FORGET | BATCH_FORGET);
        let request = Unanswered {
            queue: u16::try_from(queue).unwrap_or_default(),
            head: chain.head,
            unique: header.unique,
            reply: chain
                .writable
                .iter()
                .map(|buffer| (buffer.address.0, buffer.length))
                .collect(),
        };
        if header.length as usize != packet.len() || expects_reply && chain.writable_bytes() < REPLY_HEADER {
            return Taken::Done(refuse(&request, libc::EINVAL, memory));
        }
        let number = self.next;
        if let Some(place) = packet.get_mut(8..16) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        match self.backend.send(packet) {
            Sent::Full => Taken::Full,
            Sent::Gone if expects_reply => Taken::Done(refuse(&request, libc::ENOTCONN, memory)),
            Sent::Gone => Taken::Done(0),
            Sent::Whole => {
                self.next = self.next.wrapping_add(1);
                if !expects_reply {
                    return Taken::Done(0);
                }
                self.under_way.insert(number, request);
                Taken::UnderWay
            }
        }
    }

    /// Takes requests of a queue. The first of what it returns: something was used; the second: there may be more.
    fn take_requests(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<(bool, bool), DeviceError> {
        let mut used = false;
        for _ in 0..queue::BATCH {
            if self.under_way.len() >= UNDER_WAY_MAX {
                // Each reply brings the device back here.
                return Ok((used, false));
            }
            let Some(chain) = queue::pop(queues, index, memory)? else {
                return Ok((used, false));
            };
            match self.take(index, &chain, memory) {
                Taken::Done(written) => {
                    queue::give_back(queues, index, memory, chain.head, written)?;
                    used = true;
                }
                Taken::UnderWay => {}
                Taken::Full => {
                    // The chain stays. The device thread comes back when there is room.
                    queue::unpop(queues, index);
                    self.waits = true;
                    return Ok((used, false));
                }
            }
        }
        Ok((used, true))
    }

    /// Gives the guest replies that have come. As [`Fs::take_requests`], by queue.
    fn give_replies(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
        used: &mut [bool; SIZES.len()],
    ) -> Result<bool, DeviceError> {
        for _ in 0..queue::BATCH {
            // Where nothing was asked there is nothing to look for: on the start of a machine not even room for it.
            if self.under_way.is_empty() {
                return Ok(false);
            }
            let Some(reply) = self.backend.receive() else {
                if self.backend.descriptor().is_none() {
                    self.fail_all(queues, memory, used)?;
                }
                return Ok(false);
            };
            let number = reply
                .get(8..16)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u64::from_le_bytes);
            // What nobody has asked is nobody's.
            let Some(request) = self.under_way.remove(&number) else {
                continue;
            };
            let written = match deliver(&request, reply, memory) {
                Some(written) => written,
                None => refuse(&request, libc::EIO, memory),
            };
            give_back(&request, written, queues, memory, used)?;
        }
        Ok(true)
    }

    /// Nobody will answer: there is no server any more, or another one.
    fn fail_all(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
        used: &mut [bool; SIZES.len()],
    ) -> Result<(), DeviceError> {
        let all = std::mem::take(&mut self.under_way).into_values();
        for request in all.chain(std::mem::take(&mut self.lost)) {
            let written = refuse(&request, libc::ENOTCONN, memory);
            give_back(&request, written, queues, memory, used)?;
        }
        Ok(())
    }
}

/// What the device reads of a request's header.
struct Header {
    length: u32,
    opcode: u32,
    unique: u64,
}

/// Puts a request together, and reads its header; `None` if it has none.
fn gather(chain: &Chain, memory: &GuestMemoryMmap, packet: &mut Vec<u8>) -> Option<Header> {
    packet.clear();
    for buffer in &chain.readable {
        let start = packet.len();
        let end = start.checked_add(buffer.length as usize)?;
        if end > PACKET_MAX {
            // More than the guest was ever told that it may send: the header will not fit what there is.
            break;
        }
        packet.resize(end, 0);
        memory
            .read_slice(packet.get_mut(start..end)?, buffer.address)
            .ok()?;
    }
    let header = packet.first_chunk::<REQUEST_HEADER>()?;
    let [l0, l1, l2, l3, o0, o1, o2, o3, u0, u1, u2, u3, u4, u5, u6, u7, ..] = *header;
    Some(Header {
        length: u32::from_le_bytes([l0, l1, l2, l3]),
        opcode: u32::from_le_bytes([o0, o1, o2, o3]),
        unique: u64::from_le_bytes([u0, u1, u2, u3, u4, u5, u6, u7]),
    })
}

/// Writes a reply, under the guest's number, if it is one and there is room for it.
fn deliver(request: &Unanswered, reply: &[u8], memory: &GuestMemoryMmap) -> Option<u32> {
    let (length, rest) = reply.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*length) as usize != reply.len() {
        return None;
    }
    let (result, rest) = rest.split_first_chunk::<4>()?;
    let (_, body) = rest.split_first_chunk::<8>()?;
    let mut header = [0u8; REPLY_HEADER as usize];
    let parts = [length.as_slice(), result, &request.unique.to_le_bytes()];
    for (place, byte) in header.iter_mut().zip(parts.concat()) {
        *place = byte;
    }
    scatter(&[&header, body], &request.reply, memory)
}

/// Answers a request with an error number. Returns the bytes written.
fn refuse(request: &Unanswered, error: i32, memory: &GuestMemoryMmap) -> u32 {
    let result = error.checked_neg().unwrap_or(error);
    let parts = [
        REPLY_HEADER.to_le_bytes().as_slice(),
        &result.to_le_bytes(),
        &request.unique.to_le_bytes(),
    ]
    .concat();
    scatter(&[&parts], &request.reply, memory).unwrap_or(0)
}

/// Writes bytes into buffers; `None` if they do not fit, or a buffer is not in memory.
fn scatter(parts: &[&[u8]], buffers: &[(u64, u32)], memory: &GuestMemoryMmap) -> Option<u32> {
    let total = parts
        .iter()
        .fold(0usize, |sum, part| sum.saturating_add(part.len()));
    let room = buffers
        .iter()
        .fold(0u64, |sum, (_, length)| sum.saturating_add(u64::from(*length)));
    if total as u64 > room {
        return None;
    }
    let mut buffers = buffers.iter().map(|(address, length)| Buffer {
        address: GuestAddress(*address),
        length: *length,
    });
    let mut buffer = buffers.next();
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            let into = buffer?;
            let (now, behind) = rest.split_at(rest.len().min(into.length as usize));
            memory.write_slice(now, into.address).ok()?;
            rest = behind;
            let left = into.length.checked_sub(u32::try_from(now.len()).ok()?)?;
            buffer = if left == 0 {
                buffers.next()
            } else {
                Some(Buffer {
                    address: vm_memory::Address::checked_add(&into.address, now.len() as u64)?,
                    length: left,
                })
            };
        }
    }
    u32::try_from(total).ok()
}

fn give_back(
    request: &Unanswered,
    written: u32,
    queues: &mut [Queue],
    memory: &GuestMemoryMmap,
    used: &mut [bool; SIZES.len()],
) -> Result<(), DeviceError> {
    let index = usize::from(request.queue);
    queue::give_back(queues, index, memory, request.head, written)?;
    if let Some(used) = used.get_mut(index) {
        *used = true;
    }
    Ok(())
}

impl Device for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut config = TAG.to_vec();
        config.resize(TAG_MAX, 0);
        // num_request_queues
        config.extend_from_slice(&1u32.to_le_bytes());
        config
    }

    fn activate(&mut self, _features: u64) {}

    fn process(
        &mut self,
        _index: usize,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<Progress, DeviceError> {
        // A reply makes room for a request of either queue, so all are looked at, whichever it is.
        let mut used = [false; SIZES.len()];
        self.waits = false;
        if !self.lost.is_empty() {
            self.fail_all(queues, memory, &mut used)?;
        }
        let mut more = self.give_replies(queues, memory, &mut used)?;
        for (index, used) in used.iter_mut().enumerate() {
            let (taken, unfinished) = self.take_requests(index, queues, memory)?;
            *used |= taken;
            more |= unfinished;
        }
        let mut interrupt = false;
        for (index, used) in used.iter().enumerate() {
            interrupt |= *used && queue::wants_interrupt(queues, index, memory)?;
        }
        Ok(Progress { interrupt, more })
    }

    fn reset(&mut self) {
        // Replies to what was under way find nothing.
        self.under_way.clear();
        self.lost.clear();
        self.waits = false;
    }
}
