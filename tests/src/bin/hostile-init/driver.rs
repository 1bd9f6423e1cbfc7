//! A driver that knows how a virtio device is used (virtio 1.2, 4.2), and does not care to.

use crate::machine::{Machine, PAGE, WINDOWS};

pub const CONSOLE: u64 = 0;
pub const ENTROPY: u64 = 1;
pub const SHARE: u64 = 2;
pub const DISK: u64 = 3;
pub const STORAGE: u64 = 4;
/// The console last: what goes wrong there may end the container.
pub const DEVICES: [u64; 5] = [ENTROPY, SHARE, DISK, STORAGE, CONSOLE];

pub const STATUS: u64 = 0x070;
pub const NOTIFY: u64 = 0x050;
pub const QUEUE_SELECT: u64 = 0x030;
pub const QUEUE_SIZE: u64 = 0x038;
pub const QUEUE_READY: u64 = 0x044;
pub const DESCRIPTORS: u64 = 0x080;
pub const AVAILABLE: u64 = 0x090;
pub const USED: u64 = 0x0a0;
pub const CONFIGURATION: u64 = 0x100;

/// Queue of the console that leads to the host.
pub const TRANSMIT: u64 = 1;

/// Flags of a descriptor (2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

/// Features (6): version 1, and without it nothing runs.
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_INDEX: u64 = 1 << 29;

/// Pages of the attacker's own for a device: three for each of four queues.
const PAGES_OF_DEVICE: usize = 12;
/// The first page that no queue lies in.
pub const BUFFERS: usize = DEVICES.len() * PAGES_OF_DEVICE;

/// A device, its queues in pages of the attacker's own.
#[derive(Clone)]
pub struct Device {
    pub machine: Machine,
    slot: u64,
}

impl Device {
    pub fn new(machine: &Machine, slot: u64) -> Self {
        Self {
            machine: machine.clone(),
            slot,
        }
    }

    pub fn queues(&self) -> u64 {
        match self.slot {
            CONSOLE => 4,
            SHARE => 2,
            _ => 1,
        }
    }

    /// Largest queue of the device.
    pub fn largest(&self) -> u16 {
        match self.slot {
            CONSOLE => 32,
            ENTROPY => 16,
            _ => 128,
        }
    }

    pub fn set(&self, register: u64, value: u64) {
        self.machine.poke(self.offset(register), 4, value);
    }

    pub fn get(&self, register: u64) -> u64 {
        self.machine.peek(self.offset(register), 4)
    }

    /// Where a register is, from the trap on.
    pub fn offset(&self, register: u64) -> u64 {
        WINDOWS + self.slot * PAGE + register
    }

    /// The page of a queue's descriptors; its rings are in the next two.
    pub fn page(&self, queue: u64) -> usize {
        self.slot as usize * PAGES_OF_DEVICE + 3 * queue as usize
    }

    pub fn set_address(&self, register: u64, address: u64) {
        self.set(register, address & 0xffff_ffff);
        self.set(register + 4, address >> 32);
    }

    /// Resets the device and negotiates these features.
    pub fn begin(&self, features: u64) {
        self.set(STATUS, 0);
        self.set(STATUS, 3);
        for word in 0..2 {
            self.set(0x024, word);
            self.set(0x020, features >> (32 * word) & 0xffff_ffff);
        }
        self.set(STATUS, 11);
    }

    /// Where a queue should lie: descriptors, available ring, used ring.
    pub fn usual(&self, queue: u64) -> [u64; 3] {
        let page = self.page(queue);
        [0, 1, 2].map(|part| self.machine.address(page + part))
    }

    pub fn set_up(&self, queue: u64, size: u64, [descriptors, available, used]: [u64; 3]) {
        self.set(QUEUE_SELECT, queue);
        self.set(QUEUE_READY, 0);
        self.set(QUEUE_SIZE, size);
        self.set_address(DESCRIPTORS, descriptors);
        self.set_address(AVAILABLE, available);
        self.set_address(USED, used);
        self.set(QUEUE_READY, 1);
    }

    /// Brings the device up with empty queues where they should lie.
    pub fn bring_up(&self, features: u64) {
        self.begin(features);
        for queue in 0..self.queues() {
            self.clear(queue);
            self.set_up(queue, self.largest().into(), self.usual(queue));
        }
        self.set(STATUS, 15);
    }

    pub fn clear(&self, queue: u64) {
        for part in 0..3 {
            self.machine.put(self.page(queue) + part, 0, &[0; PAGE as usize]);
        }
    }

    pub fn descriptor(&self, queue: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.machine
            .put(self.page(queue), usize::from(index) * 16, &bytes);
    }

    /// Entry of the available ring.
    pub fn available(&self, queue: u64, entry: u16, head: u16) {
        self.machine.put(
            self.page(queue) + 1,
            4 + usize::from(entry) * 2,
            &head.to_le_bytes(),
        );
    }

    /// Index of the available ring.
    pub fn offer(&self, queue: u64, index: u16) {
        self.machine.put(self.page(queue) + 1, 2, &index.to_le_bytes());
    }

    /// Index of the used ring.
    pub fn used(&self, queue: u64) -> u16 {
        let bytes = self.machine.get(self.page(queue) + 2, 2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    pub fn notify(&self, queue: u64) {
        self.set(NOTIFY, queue);
    }

    /// Header of a request to the disk (5.2.6), in one of the attacker's pages.
    pub fn request(&self, page: usize, offset: usize, kind: u32, sector: u64) -> u64 {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.machine.put(page, offset, &bytes);
        self.machine.address(page) + offset as u64
    }
}
