//! Well-formed requests: what goes in comes out, however it is cut and whenever the device is paused, saved and built
//! anew.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use proptest::sample::Index;

use super::driver::{BUFFERS, Driver, MEMORY, Memory, Part, line};
use crate::devices::virtio::block::FileBackend;
use crate::devices::virtio::console;
use crate::devices::virtio::slot::{Slot, SlotBackend, SlotSources, SlotState};

/// Cuts `total` bytes from `at` into parts.
fn cut(mut at: u64, total: usize, cuts: &[Index], writable: bool) -> Vec<Part> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(total + 1)).collect();
    places.extend([0, total]);
    places.sort_unstable();
    let mut parts = Vec::new();
    for pair in places.windows(2) {
        let length = pair[1] - pair[0];
        parts.push((at, length as u32, writable));
        at += length as u64;
    }
    parts
}

fn restored(slot: &Slot, memory: &Memory) -> (Slot, UnixStream) {
    let state = slot.state();
    let (backend, host) = console::connection().unwrap();
    let mut sources = SlotSources {
        console: Some(backend),
        ..SlotSources::default()
    };
    let backend = state.open_backend(2, &mut sources).unwrap().unwrap();
    let slot = Slot::from_state(backend, 2, memory.guest.clone(), line(), &state).unwrap();
    for queue in slot.resume() {
        slot.process(queue);
    }
    (slot, host)
}

const SECTORS: usize = 64;

/// Reads through the device, in as many buffers as there are cuts; returns status and data.
fn read_disk(
    driver: &mut Driver,
    memory: &Memory,
    slot: &Slot,
    sector: u64,
    bytes: usize,
    cuts: &[Index],
) -> (u8, Vec<u8>) {
    let (header, data) = (BUFFERS, BUFFERS + 64);
    let mut head = vec![0u8; 8];
    head.extend_from_slice(&sector.to_le_bytes());
    memory.write(header, &head);
    memory.write(data, &vec![0xaa; bytes + 1]);
    let mut parts = vec![(header, 16, false)];
    parts.extend(cut(data, bytes + 1, cuts, true));
    driver.add(memory, 0, &parts).unwrap();
    driver.notify(memory, slot, 0, 1);
    driver.used(memory, 0);
    (memory.read(data + bytes as u64, 1)[0], memory.read(data, bytes))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_shown_larger_than_its_file_reads_zeros_behind_its_end(
        sector in 0u64..2 * SECTORS as u64 + 4,
        sectors in 0usize..12,
        cuts in prop::collection::vec(any::<Index>(), 0..5),
        other_sectors in 1usize..=2 * SECTORS,
    ) {
        let memory = Memory::new();
        let disk = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(disk.path(), vec![7u8; SECTORS * 512]).unwrap();
        let shown = 2 * SECTORS as u64;
        let backend = FileBackend::open(disk.path(), true).unwrap().with_capacity(disk.path(), Some(shown)).unwrap();
        let mut slot =
            Slot::new(SlotBackend::Block(backend, Some(disk.path().into())), 2, memory.guest.clone(), line()).unwrap();
        let mut driver = Driver::new(&slot, 1 << 9, false, 1, 64);
        let bytes = sectors * 512;
        for length in [SECTORS, other_sectors] {
            let (status, data) = read_disk(&mut driver, &memory, &slot, sector, bytes, &cuts);
            if sector + sectors as u64 <= shown {
                prop_assert_eq!(status, 0);
                for (at, byte) in data.into_iter().enumerate() {
                    let inside = sector as usize * 512 + at < length * 512;
                    prop_assert_eq!(byte, if inside { 7 } else { 0 }, "byte {}", at);
                }
            } else {
                prop_assert_eq!(status, 1);
            }
            // A clone goes on with a file of another size.
            std::fs::write(disk.path(), vec![7u8; other_sectors * 512]).unwrap();
            slot = restored(&slot, &memory).0;
        }
        prop_assert!(memory.is_intact());
    }
}

#[test]
fn a_disk_is_shown_larger_only_where_it_is_read_only() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(SECTORS as u64 * 512).unwrap();
    let open = |read_only| FileBackend::open(disk.path(), read_only).unwrap();
    let shown = |read_only, sectors| open(read_only).with_capacity(disk.path(), Some(sectors));
    assert!(shown(true, SECTORS as u64 - 1).is_err());
    let error = shown(false, SECTORS as u64 + 1).err().unwrap().to_string();
    assert!(error.contains("only to be read"), "{error}");
    assert!(shown(false, SECTORS as u64).is_ok_and(|backend| !backend.is_padded()));
    assert!(shown(true, SECTORS as u64 + 1).is_ok_and(|backend| backend.is_padded()));
}

#[derive(Clone, Debug)]
enum Request {
    Read { sector: usize, sectors: usize },
    Write { sector: usize, sectors: usize, fill: u8 },
    Flush,
    Id,
    Unknown,
    Restore,
}

fn request() -> impl Strategy<Value = (Request, Vec<Index>)> {
    let place = || (0usize..SECTORS + 4, 0usize..8);
    let request = prop_oneof![
        4 => place().prop_map(|(sector, sectors)| Request::Read { sector, sectors }),
        4 => (place(), any::<u8>()).prop_map(|((sector, sectors), fill)| Request::Write { sector, sectors, fill }),
        1 => Just(Request::Flush),
        1 => Just(Request::Id),
        1 => Just(Request::Unknown),
        1 => Just(Request::Restore),
    ];
    (request, prop::collection::vec(any::<Index>(), 0..5))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_holds_what_was_written(event_idx: bool, requests in prop::collection::vec(request(), 1..40)) {
        let memory = Memory::new();
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(SECTORS as u64 * 512).unwrap();
        let backend = FileBackend::open(disk.path(), false).unwrap();
        let mut slot =
            Slot::new(SlotBackend::Block(backend, Some(disk.path().into())), 2, memory.guest.clone(), line()).unwrap();
        let mut driver = Driver::new(&slot, 1 << 9, event_idx, 1, 64);
        let mut model = vec![0u8; SECTORS * 512];
        let (header, data) = (BUFFERS, BUFFERS + 64);
        for (request, cuts) in requests {
            let (kind, sector, bytes) = match request {
                Request::Read { sector, sectors } => (0u32, sector, sectors * 512),
                Request::Write { sector, sectors, .. } => (1, sector, sectors * 512),
                Request::Flush => (4, 0, 0),
                Request::Id => (8, 0, 20),
                Request::Unknown => (99, 0, 0),
                Request::Restore => {
                    slot = restored(&slot, &memory).0;
                    continue;
                }
            };
            let mut head = kind.to_le_bytes().to_vec();
            head.extend_from_slice(&[0; 4]);
            head.extend_from_slice(&(sector as u64).to_le_bytes());
            memory.write(header, &head);
            let status = data + bytes as u64;
            memory.write(status, &[0xff]);
            let mut parts = cut(header, 16, &cuts, false);
            match request {
                Request::Write { fill, .. } => {
                    memory.write(data, &vec![fill; bytes]);
                    parts.extend(cut(data, bytes, &cuts, false));
                    parts.push((status, 1, true));
                }
                // The identity is read into one buffer, as every driver does.
                Request::Id => parts.extend([(data, bytes as u32, true), (status, 1, true)]),
                _ => parts.extend(cut(data, bytes + 1, &cuts, true)),
            }
            let added = driver.add(&memory, 0, &parts).unwrap();
            driver.notify(&memory, &slot, 0, 1);
            let used = driver.used(&memory, 0);
            let inside = sector * 512 + bytes <= model.len();
            let place = sector * 512..sector * 512 + bytes;
            let status = memory.read(status, 1)[0];
            let mut written = 1;
            match request {
                Request::Read { .. } if inside => {
                    prop_assert_eq!(memory.read(data, bytes), &model[place]);
                    prop_assert_eq!(status, 0);
                    written += bytes as u32;
                }
                Request::Write { fill, .. } if inside => {
                    model[place].fill(fill);
                    prop_assert_eq!(status, 0);
                }
                Request::Read { .. } | Request::Write { .. } => prop_assert_eq!(status, 1),
                Request::Id => {
                    prop_assert_eq!(memory.read(data, 13), b"picovm-slot-2");
                    written += 20;
                }
                Request::Unknown => prop_assert_eq!(status, 2),
                Request::Flush | Request::Restore => prop_assert_eq!(status, 0),
            }
            prop_assert_eq!(used, vec![(added, written)]);
        }
        prop_assert_eq!(std::fs::read(disk.path()).unwrap(), model);
        prop_assert!(memory.is_intact());
    }

    #[test]
    fn entropy_fills_buffers_from_the_first_byte(
        event_idx: bool,
        requests in prop::collection::vec((1usize..6000, prop::collection::vec(any::<Index>(), 0..6), any::<bool>()), 1..20),
    ) {
        let memory = Memory::new();
        let mut slot = Slot::new(SlotBackend::Entropy, 1, memory.guest.clone(), line()).unwrap();
        let mut driver = Driver::new(&slot, 0, event_idx, 1, 16);
        for (bytes, cuts, restore) in requests {
            memory.write(BUFFERS, &vec![0; bytes + 64]);
            let added = driver.add(&memory, 0, &cut(BUFFERS, bytes, &cuts, true)).unwrap();
            driver.notify(&memory, &slot, 0, 1);
            let filled = bytes.min(4096);
            prop_assert_eq!(driver.used(&memory, 0), vec![(added, filled as u32)]);
            let content = memory.read(BUFFERS, bytes + 64);
            prop_assert!(content[filled..].iter().all(|byte| *byte == 0));
            // 64 random bytes are all zero once in 2^512 runs.
            prop_assert!(content[..filled].chunks_exact(64).all(|chunk| chunk.iter().any(|byte| *byte != 0)));
            if restore {
                slot = restored(&slot, &memory).0;
            }
        }
    }
}

#[test]
fn entropy_stops_at_a_buffer_outside_memory() {
    let memory = Memory::new();
    let slot = Slot::new(SlotBackend::Entropy, 1, memory.guest.clone(), line()).unwrap();
    let mut driver = Driver::new(&slot, 0, true, 1, 16);
    let outside = MEMORY as u64;
    let parts = [(BUFFERS, 16, true), (outside, 16, true), (BUFFERS + 16, 16, true)];
    driver.add(&memory, 0, &parts).unwrap();
    driver.notify(&memory, &slot, 0, 1);
    assert_eq!(driver.used(&memory, 0)[0].1, 16);
    assert_eq!(memory.read(BUFFERS + 16, 16), [0; 16]);
}

#[derive(Clone, Debug)]
enum ConsoleStep {
    /// The guest sends bytes, cut into buffers.
    Send(usize, Vec<Index>),
    /// The guest gives a buffer to receive into.
    Buffer(usize),
    HostWrites(usize),
    HostReads(usize),
    Pause,
    Resume,
    /// Save, build anew on another connection, resume.
    Restore,
    /// The guest closes and opens its port.
    Close,
    Open,
}

fn console_step() -> impl Strategy<Value = ConsoleStep> {
    prop_oneof![
        5 => (1usize..20_000, prop::collection::vec(any::<Index>(), 0..4)).prop_map(|(n, cuts)| ConsoleStep::Send(n, cuts)),
        5 => (1usize..5000).prop_map(ConsoleStep::Buffer),
        5 => (1usize..20_000).prop_map(ConsoleStep::HostWrites),
        5 => (1usize..40_000).prop_map(ConsoleStep::HostReads),
        1 => Just(ConsoleStep::Pause),
        2 => Just(ConsoleStep::Resume),
        2 => Just(ConsoleStep::Restore),
        1 => Just(ConsoleStep::Close),
        2 => Just(ConsoleStep::Open),
    ]
}

/// Bytes of a stream that tell where in it they are.
fn stream(from: usize, count: usize) -> Vec<u8> {
    (from..from + count)
        .map(|at| (at % 251) as u8 ^ (at >> 8) as u8)
        .collect()
}

struct Port {
    memory: Memory,
    slot: Slot,
    driver: Driver,
    host: UnixStream,
    /// Bytes sent by the guest, and those that the host has received.
    sent: usize,
    received_by_host: usize,
    /// Bytes that the host has written, as the guest is to see them, and those that the guest has received.
    written: usize,
    received_by_guest: usize,
    buffers: HashMap<u16, u64>,
    next_place: u64,
}

impl Port {
    fn new(event_idx: bool) -> Self {
        let memory = Memory::new();
        let (backend, host) = console::connection().unwrap();
        let slot = Slot::new(SlotBackend::Console(backend), 0, memory.guest.clone(), line()).unwrap();
        let driver = Driver::new(&slot, 1 << 1, event_idx, 4, 32);
        let mut port = Self {
            memory,
            slot,
            driver,
            host,
            sent: 0,
            received_by_host: 0,
            written: 0,
            received_by_guest: 0,
            buffers: HashMap::new(),
            next_place: BUFFERS,
        };
        port.limit();
        for at in 0..8 {
            port.driver
                .add(&port.memory, 2, &[(0xf000 + at * 64, 64, true)])
                .unwrap();
        }
        port.driver.notify(&port.memory, &port.slot, 2, 8);
        let said = |port: &mut Self| -> Vec<Vec<u8>> {
            let used = port.driver.used(&port.memory, 2);
            // Chains are given in order of the buffers and used in that order.
            let all: Vec<Vec<u8>> = (0..8).map(|at| port.memory.read(0xf000 + at * 64, 64)).collect();
            used.iter()
                .zip(all)
                .map(|((_, length), bytes)| bytes[..*length as usize].to_vec())
                .collect()
        };
        port.control(0, 1);
        assert_eq!(said(&mut port), [[0, 0, 0, 0, 1, 0, 1, 0]]);
        port.control(3, 1);
        assert_eq!(port.driver.used(&port.memory, 2).len(), 2);
        assert_eq!(port.memory.read(0xf000 + 64, 8), [0, 0, 0, 0, 7, 0, 1, 0]);
        assert_eq!(port.memory.read(0xf000 + 128, 8), [0, 0, 0, 0, 6, 0, 1, 0]);
        port.control(6, 1);
        port
    }

    /// A control message of the guest, which the device takes even if it is only resumed later.
    fn control(&mut self, event: u8, value: u8) {
        self.memory.write(0xfff0, &[0, 0, 0, 0, event, 0, value, 0]);
        self.driver.add(&self.memory, 3, &[(0xfff0, 8, false)]).unwrap();
        self.driver.notify(&self.memory, &self.slot, 3, 1);
        let _ = self.driver.used(&self.memory, 3);
    }

    /// As little room as there can be, so that the backend is often full.
    fn limit(&self) {
        self.host.set_nonblocking(true).unwrap();
        let descriptor = self.slot.descriptor().unwrap();
        // SAFETY: the device's end is open for as long as the slot.
        let device = unsafe { BorrowedFd::borrow_raw(descriptor) };
        rustix::net::sockopt::set_socket_send_buffer_size(device, 4096).unwrap();
    }

    fn place(&mut self, bytes: usize) -> u64 {
        // Never reused while a chain may lead there: what the queues hold at once fits.
        if self.next_place + bytes as u64 > MEMORY as u64 {
            return 0;
        }
        self.next_place += bytes as u64;
        self.next_place - bytes as u64
    }

    /// What the device thread does, and what the guest does on an interrupt.
    fn settle(&mut self) {
        self.slot.process(1);
        self.slot.process(0);
        for (head, length) in self.driver.used(&self.memory, 0) {
            let place = self.buffers.remove(&head).unwrap();
            let got = self.memory.read(place, length as usize);
            assert_eq!(got, stream(self.received_by_guest, got.len()));
            self.received_by_guest += got.len();
        }
        let _ = self.driver.used(&self.memory, 1);
        if self.buffers.is_empty() && self.received_by_host == self.sent {
            self.next_place = BUFFERS;
        }
    }

    fn host_reads(&mut self, count: usize) -> usize {
        let mut bytes = vec![0; count];
        let got = self.host.read(&mut bytes).unwrap_or(0);
        assert_eq!(bytes[..got], stream(self.received_by_host, got));
        self.received_by_host += got;
        got
    }

    fn take(&mut self, step: &ConsoleStep) {
        match step {
            ConsoleStep::Send(count, cuts) => {
                let place = self.place(*count);
                if place != 0 {
                    self.memory.write(place, &stream(self.sent, *count));
                    if self
                        .driver
                        .add(&self.memory, 1, &cut(place, *count, cuts, false))
                        .is_some()
                    {
                        self.sent += count;
                        self.driver.notify(&self.memory, &self.slot, 1, 1);
                    }
                }
            }
            ConsoleStep::Buffer(count) => {
                let place = self.place(*count);
                if place != 0
                    && let Some(head) = self.driver.add(&self.memory, 0, &[(place, *count as u32, true)])
                {
                    self.buffers.insert(head, place);
                    self.driver.notify(&self.memory, &self.slot, 0, 1);
                }
            }
            ConsoleStep::HostWrites(count) => {
                self.written += self.host.write(&stream(self.written, *count)).unwrap_or(0);
            }
            ConsoleStep::HostReads(count) => {
                self.host_reads(*count);
            }
            ConsoleStep::Pause => self.slot.pause(),
            ConsoleStep::Resume => {
                for queue in self.slot.resume() {
                    self.slot.process(queue);
                }
            }
            ConsoleStep::Restore => self.restore(),
            ConsoleStep::Close => self.control(6, 0),
            ConsoleStep::Open => self.control(6, 1),
        }
        self.settle();
    }

    fn restore(&mut self) {
        self.slot.pause();
        self.settle();
        // What the old connection holds belongs to the saved machine: the host has it, or says it again to the clone.
        while self.host_reads(1 << 16) > 0 {}
        let SlotState::Console { device, .. } = self.slot.state() else {
            unreachable!()
        };
        self.written = self.received_by_guest + device.to_guest.len();
        let (slot, host) = restored(&self.slot, &self.memory);
        (self.slot, self.host) = (slot, host);
        self.limit();
    }

    fn finish(&mut self) {
        self.take(&ConsoleStep::Resume);
        self.take(&ConsoleStep::Open);
        for _ in 0..2000 {
            if self.received_by_host == self.sent && self.received_by_guest == self.written {
                return;
            }
            self.host_reads(1 << 16);
            self.take(&ConsoleStep::Buffer(4096));
        }
        panic!(
            "the host has {} of {} bytes and the guest {} of {}",
            self.received_by_host, self.sent, self.received_by_guest, self.written
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn a_port_loses_and_doubles_no_byte(event_idx: bool, steps in prop::collection::vec(console_step(), 1..60)) {
        let mut port = Port::new(event_idx);
        for step in &steps {
            port.take(step);
        }
        port.finish();
        prop_assert!(!port.slot.output_waits());
        prop_assert!(port.memory.is_intact());
    }
}

#[test]
fn a_clone_of_a_machine_whose_host_had_gone_is_told_that_its_own_is_there() {
    let mut port = Port::new(true);
    let (_, gone) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut port.host, gone));
    port.settle();
    assert_eq!(port.driver.used(&port.memory, 2).len(), 1);
    assert_eq!(port.memory.read(0xf000 + 3 * 64, 8), [0, 0, 0, 0, 6, 0, 0, 0]);
    let (slot, host) = restored(&port.slot, &port.memory);
    (port.slot, port.host) = (slot, host);
    assert_eq!(port.driver.used(&port.memory, 2).len(), 1);
    assert_eq!(port.memory.read(0xf000 + 4 * 64, 8), [0, 0, 0, 0, 6, 0, 1, 0]);
    port.limit();
    port.take(&ConsoleStep::Send(100, Vec::new()));
    port.finish();
}

#[test]
fn a_guest_that_talks_to_nobody_is_not_held_up() {
    let mut port = Port::new(true);
    let (_, gone) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut port.host, gone));
    for _ in 0..20 {
        port.take(&ConsoleStep::Send(10_000, Vec::new()));
        port.received_by_host = port.sent;
    }
    assert!(!port.slot.output_waits());
}
