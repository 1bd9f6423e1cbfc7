//! The MMIO transport (virtio 1.2, 4.2): registers through which the guest finds, sets up and notifies a device.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::warn;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{Device, DeviceError};
use crate::devices::interrupt::InterruptLine;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"PICO");
const F_VERSION_1: u64 = 1 << 32;
const F_EVENT_IDX: u64 = 1 << 29;

const STATUS_FEATURES_OK: u32 = 8;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 64;
const STATUS_FAILED: u32 = 128;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// Registers (4.2.2).
mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// What is saved of a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl SavedQueue {
    fn of(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    fn queue(&self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx_enabled,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}

/// What is saved of a transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct TransportState {
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<SavedQueue>,
}

/// A device behind its registers.
pub struct Transport<D> {
    device: D,
    memory: GuestMemoryMmap,
    interrupt: Arc<dyn InterruptLine>,
    queues: Vec<Queue>,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    status: u32,
    interrupt_status: u32,
    config_generation: u32,
    paused: bool,
}

impl<D: Device> Transport<D> {
    /// A device as the guest finds it after power-on.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] if a queue size of the device is no power of two.
    pub fn new(
        device: D,
        memory: GuestMemoryMmap,
        interrupt: Arc<dyn InterruptLine>,
    ) -> Result<Self, DeviceError> {
        let queues = fresh_queues(&device)?;
        Ok(Self {
            device,
            memory,
            interrupt,
            queues,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            paused: false,
        })
    }

    /// A device as it was saved, paused. The device itself is already in its saved state.
    ///
    /// # Errors
    /// [`DeviceError`] if the state does not fit the device: it came from a file.
    pub fn from_state(
        device: D,
        memory: GuestMemoryMmap,
        interrupt: Arc<dyn InterruptLine>,
        state: &TransportState,
    ) -> Result<Self, DeviceError> {
        let sizes = device.queue_sizes();
        let mut queues = Vec::with_capacity(sizes.len());
        for (index, saved) in state.queues.iter().enumerate() {
            if sizes.get(index) != Some(&saved.max_size) {
                return Err(DeviceError::State("virtio"));
            }
            queues.push(saved.queue().map_err(|error| DeviceError::Queue(index, error))?);
        }
        if queues.len() != sizes.len() {
            return Err(DeviceError::State("virtio"));
        }
        let transport = Self {
            device,
            memory,
            interrupt,
            queues,
            driver_features: state.driver_features,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            queue_select: state.queue_select,
            status: state.status,
            interrupt_status: state.interrupt_status,
            config_generation: state.config_generation,
            paused: true,
        };
        // As where a driver starts: every queue that is used lies in memory.
        let usable = |queue: &Queue| !queue.ready() || queue.is_valid(&transport.memory);
        if transport.is_live() && !transport.queues.iter().all(usable) {
            return Err(DeviceError::State("virtio"));
        }
        Ok(transport)
    }

    /// What a clone needs to go on from here.
    #[must_use]
    pub fn state(&self) -> TransportState {
        TransportState {
            driver_features: self.driver_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            status: self.status,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: self.queues.iter().map(SavedQueue::of).collect(),
        }
    }

    /// The device itself.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device itself, for its backend's events.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Leaves guest memory alone from now on.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Goes on, and looks at every queue once for work that waited. Returns the queues in which there may be more: see
    /// [`Transport::process`]. A queue whose rings lie on each other, or whose requests write into it, has work without
    /// end, and whoever resumes a machine must come back from it.
    #[must_use]
    pub fn resume(&mut self) -> Vec<usize> {
        self.paused = false;
        let mut unfinished = Vec::new();
        for index in 0..self.queues.len() {
            if self.process(index) {
                unfinished.push(index);
            }
        }
        unfinished
    }

    /// Lets the device look at a queue, and interrupts the guest if it used something. Returns whether there may be
    /// more to do: call it again, with the lock released in between so that a pause or another vCPU has its turn.
    pub fn process(&mut self, index: usize) -> bool {
        if self.paused || !self.is_live() || index >= self.queues.len() {
            return false;
        }
        let result = self.device.process(index, &mut self.queues, &self.memory);
        match result {
            Ok(progress) => {
                if progress.interrupt {
                    self.interrupt(INTERRUPT_USED);
                }
                progress.more
            }
            Err(error) => {
                warn!(device = self.device.device_type(), %error, "device needs reset");
                self.status |= STATUS_NEEDS_RESET;
                self.interrupt(INTERRUPT_CONFIG);
                false
            }
        }
    }

    fn is_live(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0 && self.status & (STATUS_NEEDS_RESET | STATUS_FAILED) == 0
    }

    fn interrupt(&mut self, cause: u32) {
        self.interrupt_status |= cause;
        self.interrupt.pulse();
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_EVENT_IDX
    }

    fn selected(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue_select as usize)
    }

    fn register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_type(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_select {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_SIZE_MAX => self.selected().map_or(0, |queue| u32::from(queue.max_size())),
            register::QUEUE_READY => self.selected().map_or(0, |queue| u32::from(queue.ready())),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            register::CONFIG_GENERATION => self.config_generation,
            // No shared memory region: its length and base read as all ones (4.2.2).
            register::SHM_LEN_LOW
            | register::SHM_LEN_HIGH
            | register::SHM_BASE_LOW
            | register::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// A read by the guest, of any width, at an offset into the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            let config = self.device.config();
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
                *byte = *value;
            }
        } else if let Ok(bytes) = <&mut [u8; 4]>::try_from(data) {
            *bytes = self.register(offset).to_le_bytes();
        }
    }

    /// A write by the guest, of any width, at an offset into the window. Registers take 32-bit writes only (4.2.2.2);
    /// no device here has a writable configuration. Returns the queue that was notified if there may be more in it; see
    /// [`Transport::process`].
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<usize> {
        let value = u32::from_le_bytes(<[u8; 4]>::try_from(data).ok()?);
        match offset {
            register::QUEUE_NOTIFY => {
                let index = value as usize;
                return self.process(index).then_some(index);
            }
            register::INTERRUPT_ACK => self.interrupt_status &= !value,
            register::STATUS => self.set_status(value),
            register::QUEUE_SEL => self.queue_select = value,
            register::DEVICE_FEATURES_SEL => self.device_features_select = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            register::DRIVER_FEATURES if self.status & STATUS_FEATURES_OK == 0 => {
                match self.driver_features_select {
                    0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                    1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                    _ => {}
                }
            }
            // Queues are set up before the driver is ready, never under a running device (4.2.3.2).
            _ if self.status & STATUS_DRIVER_OK == 0 => self.set_up_queue(offset, value),
            _ => {}
        }
        None
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        match offset {
            register::QUEUE_SIZE => {
                if let Ok(size) = u16::try_from(value) {
                    queue.set_size(size);
                }
            }
            register::QUEUE_READY => queue.set_ready(value == 1),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = value & !STATUS_NEEDS_RESET | self.status & STATUS_NEEDS_RESET;
        if new & STATUS_FEATURES_OK != 0 && self.status & STATUS_FEATURES_OK == 0 {
            // Features that were not offered, or a driver of before 1.0, are refused by not keeping the bit (3.1.1).
            let features = self.driver_features;
            if features & !self.offered() != 0 || features & F_VERSION_1 == 0 {
                new &= !STATUS_FEATURES_OK;
            }
        }
        // Nothing runs on features that were refused or never checked (3.1.1, 2.1.2).
        if new & STATUS_FEATURES_OK == 0 {
            new &= !STATUS_DRIVER_OK;
        }
        let starts = new & STATUS_DRIVER_OK != 0 && self.status & STATUS_DRIVER_OK == 0;
        self.status = new;
        if starts {
            self.start();
        }
    }

    fn start(&mut self) {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
            // A queue that was never set up stays unused; one that lies outside memory is not used either.
            if queue.ready() && !queue.is_valid(&self.memory) {
                warn!(
                    device = self.device.device_type(),
                    "a queue lies outside guest memory"
                );
                self.status |= STATUS_NEEDS_RESET;
            }
        }
        self.device.activate(self.driver_features);
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.status = 0;
        self.interrupt_status = 0;
    }
}

fn fresh_queues<D: Device>(device: &D) -> Result<Vec<Queue>, DeviceError> {
    device
        .queue_sizes()
        .iter()
        .enumerate()
        .map(|(index, size)| Queue::new(*size).map_err(|error| DeviceError::Queue(index, error)))
        .collect()
}
