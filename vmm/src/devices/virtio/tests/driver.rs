//! The guest's side of a device, for tests: a driver with its queues, over memory with marks before and behind it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::interrupt::InterruptLine;
use crate::devices::virtio::slot::Slot;

/// Bytes of guest memory.
pub const MEMORY: usize = 256 << 10;
/// Where a driver puts buffers: behind its queues.
pub const BUFFERS: u64 = 64 << 10;
/// Bytes of marks on either side of guest memory.
const MARGIN: usize = 16 << 10;
const MARK: u8 = 0xa5;
/// Bytes of memory for each queue.
const QUEUE_SPACE: u64 = 0x3000;

/// Guest memory in the middle of a larger mapping.
pub struct Memory {
    around: MmapRegion,
    pub guest: GuestMemoryMmap,
}

impl Memory {
    pub fn new() -> Self {
        let around: MmapRegion = MmapRegion::new(MEMORY + 2 * MARGIN).unwrap();
        let start = around.as_ptr().wrapping_add(MARGIN);
        // SAFETY: inside `around`, which lives as long as whoever uses the guest memory.
        let inner = unsafe {
            std::ptr::write_bytes(around.as_ptr(), MARK, MARGIN);
            std::ptr::write_bytes(start.wrapping_add(MEMORY), MARK, MARGIN);
            MmapRegion::build_raw(
                start,
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
            )
            .unwrap()
        };
        let region = GuestRegionMmap::new(inner, GuestAddress(0)).unwrap();
        Self {
            around,
            guest: GuestMemoryMmap::from_regions(vec![region]).unwrap(),
        }
    }

    /// Whether nothing was written outside guest memory.
    pub fn is_intact(&self) -> bool {
        let margin = |at: usize| {
            // SAFETY: inside `around`; nobody writes to the margins.
            unsafe { std::slice::from_raw_parts(self.around.as_ptr().wrapping_add(at), MARGIN) }
        };
        [margin(0), margin(MARGIN + MEMORY)]
            .concat()
            .iter()
            .all(|byte| *byte == MARK)
    }

    pub fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.guest.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.guest.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}

/// Counts interrupts.
#[derive(Default)]
pub struct Line(pub AtomicUsize);

impl InterruptLine for Line {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

pub fn line() -> Arc<Line> {
    Arc::new(Line::default())
}

pub fn set(slot: &Slot, register: u64, value: u32) {
    slot.write(register, &value.to_le_bytes());
}

pub fn get(slot: &Slot, register: u64) -> u32 {
    let mut bytes = [0; 4];
    slot.read(register, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// One queue as its driver sees it.
pub struct DriverQueue {
    index: u16,
    size: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    next_avail: u16,
    next_used: u16,
}

/// A well-behaved driver.
pub struct Driver {
    pub queues: Vec<DriverQueue>,
    event_idx: bool,
}

/// A buffer of a chain: address, bytes, whether the device writes it.
pub type Part = (u64, u32, bool);

impl Driver {
    /// Brings a device up with queues of the given size (3.1.1).
    pub fn new(slot: &Slot, features: u64, event_idx: bool, queues: u16, size: u16) -> Self {
        set(slot, 0x070, 0);
        set(slot, 0x070, 1 | 2);
        let features = features | 1 << 32 | u64::from(event_idx) << 29;
        for word in 0..2 {
            set(slot, 0x024, word);
            set(slot, 0x020, (features >> (32 * word)) as u32);
        }
        set(slot, 0x070, 1 | 2 | 8);
        assert_eq!(get(slot, 0x070), 1 | 2 | 8, "the features were refused");
        for index in 0..queues {
            set_up(slot, index, size, u64::from(index) * QUEUE_SPACE);
        }
        set(slot, 0x070, 1 | 2 | 4 | 8);
        assert_eq!(get(slot, 0x070), 1 | 2 | 4 | 8);
        let queues = (0..queues)
            .map(|index| DriverQueue {
                index,
                size,
                free: (0..size).collect(),
                chains: HashMap::new(),
                next_avail: 0,
                next_used: 0,
            })
            .collect();
        Self { queues, event_idx }
    }

    /// Makes a chain available; its head, or `None` if there are too few descriptors.
    pub fn add(&mut self, memory: &Memory, queue: usize, parts: &[Part]) -> Option<u16> {
        let event_idx = self.event_idx;
        let queue = &mut self.queues[queue];
        assert!(!parts.is_empty());
        if queue.free.len() < parts.len() {
            return None;
        }
        let base = u64::from(queue.index) * QUEUE_SPACE;
        let chain = queue.free.split_off(queue.free.len() - parts.len());
        for (position, (address, length, writable)) in parts.iter().enumerate() {
            let next = chain.get(position + 1);
            let flags = u16::from(next.is_some()) | u16::from(*writable) << 1;
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend_from_slice(&length.to_le_bytes());
            descriptor.extend_from_slice(&flags.to_le_bytes());
            descriptor.extend_from_slice(&next.copied().unwrap_or(0).to_le_bytes());
            memory.write(base + u64::from(chain[position]) * 16, &descriptor);
        }
        let head = chain[0];
        queue.chains.insert(head, chain);
        let slot = u64::from(queue.next_avail % queue.size);
        memory.write(base + 0x1004 + slot * 2, &head.to_le_bytes());
        queue.next_avail = queue.next_avail.wrapping_add(1);
        memory.write(base + 0x1002, &queue.next_avail.to_le_bytes());
        if event_idx {
            // Interrupt me for the next one.
            memory.write(
                base + 0x1004 + u64::from(queue.size) * 2,
                &queue.next_used.to_le_bytes(),
            );
        }
        Some(head)
    }

    /// What the device has used since the last time: heads and lengths, each chain once.
    pub fn used(&mut self, memory: &Memory, queue: usize) -> Vec<(u16, u32)> {
        let queue = &mut self.queues[queue];
        let base = u64::from(queue.index) * QUEUE_SPACE + 0x2000;
        let index = memory.read(base + 2, 2);
        let index = u16::from_le_bytes([index[0], index[1]]);
        let mut used = Vec::new();
        while queue.next_used != index {
            let slot = u64::from(queue.next_used % queue.size);
            let element = memory.read(base + 4 + slot * 8, 8);
            let head = u16::from_le_bytes([element[0], element[1]]);
            let length = u32::from_le_bytes([element[4], element[5], element[6], element[7]]);
            let chain = queue.chains.remove(&head).expect("used twice, or never given");
            queue.free.extend(chain);
            used.push((head, length));
            queue.next_used = queue.next_used.wrapping_add(1);
        }
        used
    }

    /// Notifies the device, if it asked to be (2.7.10).
    pub fn notify(&self, memory: &Memory, slot: &Slot, queue: usize, added: u16) {
        let state = &self.queues[queue];
        if self.event_idx {
            let base = u64::from(state.index) * QUEUE_SPACE + 0x2000;
            let event = memory.read(base + 4 + u64::from(state.size) * 8, 2);
            let event = u16::from_le_bytes([event[0], event[1]]);
            if state.next_avail.wrapping_sub(event).wrapping_sub(1) >= added {
                return;
            }
        }
        set(slot, 0x050, u32::from(state.index));
    }
}

/// Sets up a queue: descriptors at `base`, the available ring 4 KiB and the used ring 8 KiB behind it.
pub fn set_up(slot: &Slot, index: u16, size: u16, base: u64) {
    set(slot, 0x030, u32::from(index));
    set(slot, 0x038, u32::from(size));
    for (register, address) in [(0x080, base), (0x090, base + 0x1000), (0x0a0, base + 0x2000)] {
        set(slot, register, address as u32);
        set(slot, register + 4, (address >> 32) as u32);
    }
    set(slot, 0x044, 1);
}
