//! What the guest sees: receive and transmit queues of port 0, and the two control queues by which ports are announced
//! and opened (5.3.6.2).

use std::collections::VecDeque;

use picovm_guest_protocol::CONTROL_PORT_NAME;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::backend::StreamBackend;
use super::state::ConsoleState;
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{Device, DeviceError, Progress, queue};

/// Port 0 to the guest.
const RECEIVE: usize = 0;
/// Port 0 from the guest.
const TRANSMIT: usize = 1;
const CONTROL_TO_GUEST: usize = 2;
const CONTROL_FROM_GUEST: usize = 3;
const SIZES: [u16; 4] = [32; 4];

const F_MULTIPORT: u64 = 1 << 1;

// Control events (5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Bytes taken from the backend at once, and copied per step.
const STEP: usize = 16 << 10;
/// A guest that never gives receive buffers for control messages loses the oldest ones after so many.
const CONTROL_MAX: usize = 64;
/// After so many bytes to the backend the device lets go of its lock for a moment.
const BYTES_AT_ONCE: u64 = 1 << 20;

/// How far a chain was sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// To its end, or to where it makes no sense.
    All,
    /// Until the backend could take no more.
    BackendFull,
    /// Until the device had done its share.
    BudgetSpent,
}

/// A console device with one port.
pub struct Console {
    backend: StreamBackend,
    multiport: bool,
    guest_open: bool,
    port_ready: bool,
    announced_open: bool,
    control: VecDeque<Vec<u8>>,
    to_guest: Vec<u8>,
    sent: u64,
    transmit_waits: bool,
}

impl Console {
    /// A device whose port leads to `backend`.
    #[must_use]
    pub fn new(backend: StreamBackend) -> Self {
        Self {
            backend,
            multiport: false,
            guest_open: false,
            port_ready: false,
            announced_open: false,
            control: VecDeque::new(),
            to_guest: Vec::new(),
            sent: 0,
            transmit_waits: false,
        }
    }

    /// What a clone needs to go on.
    #[must_use]
    pub fn state(&self) -> ConsoleState {
        ConsoleState {
            multiport: self.multiport,
            guest_open: self.guest_open,
            port_ready: self.port_ready,
            announced_open: self.announced_open,
            control: self.control.iter().cloned().collect(),
            to_guest: self.to_guest.clone(),
            sent: self.sent,
        }
    }

    /// A clone's device: the connection that the guest had open now leads to `backend`.
    #[must_use]
    pub fn from_state(backend: StreamBackend, state: &ConsoleState) -> Self {
        let mut console = Self {
            multiport: state.multiport,
            guest_open: state.guest_open,
            port_ready: state.port_ready,
            announced_open: state.announced_open,
            control: state.control.iter().take(CONTROL_MAX).cloned().collect(),
            to_guest: state.to_guest.clone(),
            sent: state.sent,
            ..Self::new(backend)
        };
        // The saved machine's host program had gone; this one's is there.
        if console.port_ready && !console.announced_open {
            console.announced_open = true;
            console.announce(PORT_OPEN, 1, &[]);
        }
        console
    }

    /// Where the backend's events come from.
    #[must_use]
    pub fn backend(&self) -> &StreamBackend {
        &self.backend
    }

    /// Whether bytes from the guest wait for the backend.
    #[must_use]
    pub fn waits_to_send(&self) -> bool {
        self.transmit_waits
    }

    /// Whether the device takes more bytes from the backend now.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.guest_open && self.to_guest.is_empty()
    }

    fn announce(&mut self, event: u16, value: u16, name: &[u8]) {
        // id 0 of 32 bits, event and value of 16 bits each.
        let mut message = vec![0u8; 4];
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        message.extend_from_slice(name);
        self.control.push_back(message);
        while self.control.len() > CONTROL_MAX {
            self.control.pop_front();
        }
    }

    /// Puts `bytes` into the chain's buffers as far as they go; returns how many went.
    fn fill(chain: &Chain, bytes: &[u8], memory: &GuestMemoryMmap) -> usize {
        let mut done = 0usize;
        for buffer in &chain.writable {
            let rest = bytes.get(done..).unwrap_or_default();
            let part = rest
                .get(..rest.len().min(buffer.length as usize))
                .unwrap_or_default();
            if part.is_empty() || memory.write_slice(part, buffer.address).is_err() {
                break;
            }
            done = done.saturating_add(part.len());
        }
        done
    }

    /// Gives bytes of the backend to the guest. The second of what it returns, here and below: there may be more.
    fn receive(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<(bool, bool), DeviceError> {
        let mut used = false;
        for _ in 0..queue::BATCH {
            if !self.guest_open {
                return Ok((used, false));
            }
            if self.to_guest.is_empty() {
                let mut bytes = vec![0u8; STEP];
                match self.backend.read(&mut bytes) {
                    None => return Ok((used, false)),
                    Some(0) => {
                        if self.announced_open {
                            self.announced_open = false;
                            self.announce(PORT_OPEN, 0, &[]);
                        }
                        return Ok((used, false));
                    }
                    Some(count) => {
                        bytes.truncate(count);
                        self.to_guest = bytes;
                    }
                }
            }
            let Some(chain) = queue::pop(queues, RECEIVE, memory)? else {
                return Ok((used, false));
            };
            let done = Self::fill(&chain, &self.to_guest, memory);
            self.to_guest.drain(..done);
            queue::give_back(
                queues,
                RECEIVE,
                memory,
                chain.head,
                u32::try_from(done).unwrap_or(0),
            )?;
            used = true;
        }
        Ok((used, true))
    }

    fn transmit(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<(bool, bool), DeviceError> {
        let mut used = false;
        let mut budget = BYTES_AT_ONCE;
        self.transmit_waits = false;
        for _ in 0..queue::BATCH {
            let Some(chain) = queue::pop(queues, TRANSMIT, memory)? else {
                return Ok((used, false));
            };
            let sent = self.send(&chain, memory, &mut budget);
            if sent != Sent::All {
                // The chain stays. If the backend is full, the device thread comes back when it is not.
                queue::unpop(queues, TRANSMIT);
                self.transmit_waits = sent == Sent::BackendFull;
                return Ok((used, sent == Sent::BudgetSpent));
            }
            self.sent = 0;
            queue::give_back(queues, TRANSMIT, memory, chain.head, 0)?;
            used = true;
        }
        Ok((used, true))
    }

    /// Sends what of the chain has not been sent, `budget` bytes at most.
    fn send(&mut self, chain: &Chain, memory: &GuestMemoryMmap, budget: &mut u64) -> Sent {
        let mut skip = self.sent;
        let mut bytes = [0u8; STEP];
        for buffer in &chain.readable {
            let length = u64::from(buffer.length);
            if let Some(behind) = skip.checked_sub(length) {
                skip = behind;
                continue;
            }
            let mut at = skip;
            skip = 0;
            while at < length {
                if !self.backend.takes_bytes() {
                    // Nobody is there to read them.
                    return Sent::All;
                }
                if *budget == 0 {
                    return Sent::BudgetSpent;
                }
                let step = usize::try_from(length.saturating_sub(at))
                    .unwrap_or(STEP)
                    .min(STEP);
                let part = bytes.get_mut(..step).unwrap_or_default();
                let address = vm_memory::Address::checked_add(&buffer.address, at);
                if address.is_none_or(|address| memory.read_slice(part, address).is_err()) {
                    // Outside memory: the rest of the chain is void.
                    return Sent::All;
                }
                match self.backend.write(part) {
                    None => return Sent::BackendFull,
                    Some(count) => {
                        at = at.saturating_add(count as u64);
                        self.sent = self.sent.saturating_add(count as u64);
                        *budget = budget.saturating_sub(count as u64);
                    }
                }
            }
        }
        Sent::All
    }

    fn deliver_control(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<bool, DeviceError> {
        let mut used = false;
        // At most `CONTROL_MAX` messages.
        while !self.control.is_empty() {
            let Some(chain) = queue::pop(queues, CONTROL_TO_GUEST, memory)? else {
                break;
            };
            let Some(message) = self.control.pop_front() else {
                break;
            };
            let done = Self::fill(&chain, &message, memory);
            queue::give_back(
                queues,
                CONTROL_TO_GUEST,
                memory,
                chain.head,
                u32::try_from(done).unwrap_or(0),
            )?;
            used = true;
        }
        Ok(used)
    }

    fn take_control(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<(bool, bool), DeviceError> {
        let mut used = false;
        for _ in 0..queue::BATCH {
            let Some(chain) = queue::pop(queues, CONTROL_FROM_GUEST, memory)? else {
                return Ok((used, false));
            };
            let mut message = [0u8; 8];
            let whole = chain.readable.first().is_some_and(|buffer| {
                buffer.length as usize >= message.len()
                    && memory.read_slice(&mut message, buffer.address).is_ok()
            });
            queue::give_back(queues, CONTROL_FROM_GUEST, memory, chain.head, 0)?;
            used = true;
            let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
            let (port, event) = (u32::from_le_bytes([p0, p1, p2, p3]), u16::from_le_bytes([e0, e1]));
            let value = u16::from_le_bytes([v0, v1]);
            if !whole || (port != 0 && event != DEVICE_READY) {
                continue;
            }
            match event {
                DEVICE_READY if value == 1 => self.announce(PORT_ADD, 1, &[]),
                PORT_READY if value == 1 => {
                    self.port_ready = true;
                    self.announce(PORT_NAME, 1, CONTROL_PORT_NAME.as_bytes());
                    self.announced_open = self.backend.is_connected();
                    self.announce(PORT_OPEN, u16::from(self.announced_open), &[]);
                }
                PORT_OPEN => self.guest_open = value == 1,
                _ => {}
            }
        }
        Ok((used, true))
    }
}

impl Device for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &SIZES
    }

    fn config(&self) -> Vec<u8> {
        // cols, rows (not offered), max_nr_ports, emerg_wr
        let mut config = vec![0u8; 4];
        config.extend_from_slice(&1u32.to_le_bytes());
        config.extend_from_slice(&[0; 4]);
        config
    }

    fn activate(&mut self, features: u64) {
        self.multiport = features & F_MULTIPORT != 0;
        // A driver without ports uses port 0 at once.
        self.guest_open = !self.multiport;
    }

    fn process(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemoryMmap,
    ) -> Result<Progress, DeviceError> {
        let mut used = [false; SIZES.len()];
        let mut more = false;
        match index {
            RECEIVE => (used[RECEIVE], more) = self.receive(queues, memory)?,
            TRANSMIT => (used[TRANSMIT], more) = self.transmit(queues, memory)?,
            CONTROL_FROM_GUEST => {
                (used[CONTROL_FROM_GUEST], more) = self.take_control(queues, memory)?;
                // The guest may just have opened the port with bytes already waiting for it.
                let (received, more_to_receive) = self.receive(queues, memory)?;
                used[RECEIVE] = received;
                more |= more_to_receive;
            }
            _ => {}
        }
        used[CONTROL_TO_GUEST] = self.deliver_control(queues, memory)?;
        let mut interrupt = false;
        for (index, used) in used.iter().enumerate() {
            interrupt |= *used && queue::wants_interrupt(queues, index, memory)?;
        }
        Ok(Progress { interrupt, more })
    }

    fn reset(&mut self) {
        self.multiport = false;
        self.guest_open = false;
        self.port_ready = false;
        self.announced_open = false;
        self.control.clear();
        self.to_guest.clear();
        self.sent = 0;
        self.transmit_waits = false;
    }
}
