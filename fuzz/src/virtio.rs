//! Virtio devices under a driver that does as it likes: registers of any width, queues anywhere, chains of any shape,
//! memory rewritten at any moment, saved and restored in between.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use arbitrary::{Arbitrary, Unstructured};
use picovm_vmm::devices::virtio::block::FileBackend;
use picovm_vmm::devices::virtio::console;
use picovm_vmm::devices::virtio::fs::ShareBackend;
use picovm_vmm::devices::virtio::slot::{Slot, SlotBackend, SlotSources, SlotState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::guest;

const SECTORS: u64 = 8;
const DISK: usize = SECTORS as usize * 512;
/// Bytes of guest memory for the three parts of each queue, each a page long.
const QUEUE_SPACE: u64 = 0x3000;
const QUEUES_MAX: usize = 4;
/// More steps in one input find nothing that fewer do not.
const STEPS_MAX: usize = 200;

/// An address: mostly within memory, sometimes at its end, sometimes anywhere.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Within(u16),
    Page(u8, u8),
    AtEnd(i8),
    Any(u64),
}

impl Address {
    fn value(self) -> u64 {
        match self {
            Self::Within(at) => 0x10000 + u64::from(at),
            Self::Page(page, at) => u64::from(page % 32) << 12 | u64::from(at),
            Self::AtEnd(off) => (guest::MEMORY as u64).wrapping_add_signed(off.into()),
            Self::Any(at) => at,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Length {
    Short(u8),
    Sector,
    Header,
    Middle(u16),
    Any(u32),
}

impl Length {
    fn value(self) -> u32 {
        match self {
            Self::Short(bytes) => bytes.into(),
            Self::Sector => 512,
            Self::Header => 16,
            Self::Middle(bytes) => bytes.into(),
            Self::Any(bytes) => bytes,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Any register, any width up to 8 bytes.
    Write(u16, [u8; 8], u8),
    Read(u16, u8),
    Register(u8, u32),
    /// Brings the device up: queue size, where the queues begin, features.
    BringUp(u8, Option<Address>, Features),
    OddSize(u16),
    /// A chain of up to four buffers, made available as drivers do it.
    Chain(u8, u8, [(Address, Length, bool); 4]),
    /// A block request: kind, sector, address of the data, its length.
    Request(u8, u8, Address, Length),
    /// One descriptor: queue, index, address, length, flags, next.
    Descriptor(u8, u8, Address, Length, u16, u16),
    /// Queue, slot in the ring, head, index of the ring.
    Available(u8, u8, u16, u16),
    Memory(Address, [u8; 8]),
    Notify(u8),
    Process(u8),
    Pause,
    Resume,
    SaveAndRestore,
    HostWrites(u16),
    HostReads(u16),
    HostLeaves,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Features {
    Plain,
    EventIndex,
    Multiport,
    Both,
    Any(u64),
}

impl Features {
    fn value(self) -> u64 {
        const VERSION_1: u64 = 1 << 32;
        match self {
            Self::Plain => VERSION_1,
            Self::EventIndex => VERSION_1 | 1 << 29,
            // VIRTIO_CONSOLE_F_MULTIPORT; a disk has no such feature, so it refuses.
            Self::Multiport => VERSION_1 | 1 << 1,
            Self::Both => VERSION_1 | 1 << 29 | 1 << 1,
            Self::Any(bits) => bits,
        }
    }
}

struct Rig {
    memory: GuestMemoryMmap,
    slot: Slot,
    host: Option<UnixStream>,
    disk: Option<(File, bool)>,
    /// Queue size and start of the queues as last brought up, and the index of each available ring.
    size: u16,
    base: u64,
    available: [u16; QUEUES_MAX],
}

fn connection() -> (console::StreamBackend, UnixStream) {
    let (backend, host) = console::connection().expect("make a socket pair");
    host.set_nonblocking(true).expect("set a socket non-blocking");
    (backend, host)
}

fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn content() -> Vec<u8> {
    (0..DISK).map(|at| (at / 512) as u8 + 1).collect()
}

impl Rig {
    fn new(backend: SlotBackend, host: Option<UnixStream>, disk: Option<(File, bool)>) -> Self {
        let memory = guest::memory();
        let slot = Slot::new(backend, 2, memory.clone(), guest::line()).expect("a fresh device");
        Self {
            memory,
            slot,
            host,
            disk,
            size: 8,
            base: 0,
            available: [0; QUEUES_MAX],
        }
    }

    /// Where the guest cannot write, neither can this.
    fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn set(&self, register: u64, value: u32) {
        self.slot.write(register, &value.to_le_bytes());
    }

    fn start_of(&self, queue: u8) -> u64 {
        self.base
            .wrapping_add(u64::from(queue) % QUEUES_MAX as u64 * QUEUE_SPACE)
    }

    fn bring_up(&mut self, size: u16, base: u64, features: u64) {
        (self.size, self.base, self.available) = (size, base, [0; QUEUES_MAX]);
        for status in [0, 3] {
            self.set(0x070, status);
        }
        for word in 0..2 {
            self.set(0x024, word);
            self.set(0x020, (features >> (32 * word)) as u32);
        }
        self.set(0x070, 11);
        for queue in 0..QUEUES_MAX as u8 {
            self.set(0x030, queue.into());
            self.set(0x038, size.into());
            let start = self.start_of(queue);
            // A fresh ring has indices of zero.
            for part in 0..3u64 {
                let at = start.wrapping_add(part << 12);
                self.put(at, &[0; 4]);
                let register = 0x080 + 0x010 * part;
                self.set(register, at as u32);
                self.set(register + 4, (at >> 32) as u32);
            }
            self.set(0x044, 1);
        }
        self.set(0x070, 15);
    }

    fn descriptor(&self, queue: u8, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.put(self.start_of(queue).wrapping_add(u64::from(index) * 16), &bytes);
    }

    /// Makes a chain available at the next place of the ring.
    fn chain(&mut self, queue: u8, parts: &[(u64, u32, bool)]) {
        let queue = queue % QUEUES_MAX as u8;
        let size = self.size.max(1);
        let index = self.available[usize::from(queue)];
        let head = index.wrapping_mul(4) % size;
        for (part, &(address, length, writable)) in (0u16..).zip(parts) {
            let last = usize::from(part) + 1 == parts.len();
            let at = (head + part) % size;
            let flags = u16::from(!last) | u16::from(writable) << 1;
            self.descriptor(queue, at, address, length, flags, (at + 1) % size);
        }
        let ring = self.start_of(queue).wrapping_add(0x1000);
        self.put(
            ring.wrapping_add(4 + u64::from(index % size) * 2),
            &head.to_le_bytes(),
        );
        let index = index.wrapping_add(1);
        self.available[usize::from(queue)] = index;
        self.put(ring.wrapping_add(2), &index.to_le_bytes());
    }

    fn save_and_restore(&mut self) {
        let saved = self.slot.state();
        let (backend, host) = connection();
        let mut sources = SlotSources {
            console: Some(backend),
            storage: self.disk.as_ref().and_then(|(disk, _)| disk.try_clone().ok()),
            ..SlotSources::default()
        };
        let backend = saved
            .open_backend(2, &mut sources)
            .expect("the disk is what it was")
            .expect("every slot has a backend");
        let slot = Slot::from_state(backend, 2, self.memory.clone(), guest::line(), &saved)
            .expect("what was saved can be restored");
        let transport = |state: &SlotState| match state {
            SlotState::Console { transport, .. }
            | SlotState::Block { transport, .. }
            | SlotState::Entropy { transport }
            | SlotState::Fs { transport, .. }
            | SlotState::Storage { transport, .. } => transport.clone(),
        };
        assert_eq!(transport(&slot.state()), transport(&saved));
        if let Some(own) = &mut self.host {
            *own = host;
        }
        self.slot = slot;
        let _ = self.slot.resume();
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Write(at, bytes, width) => self
                .slot
                .write(u64::from(at % 0x1000), &bytes[..usize::from(width % 9)]),
            Step::Read(at, width) => {
                self.slot
                    .read(u64::from(at % 0x1000), &mut vec![1; usize::from(width % 9)]);
            }
            Step::Register(register, value) => self.set(u64::from(register) & !3, value),
            Step::BringUp(size, base, features) => {
                let base = base.map_or(0, |base| base.value() & !0xf);
                self.bring_up(1 << (size % 8), base, features.value());
            }
            Step::OddSize(size) => self.bring_up(size, 0, Features::Plain.value()),
            Step::Chain(queue, count, parts) => {
                let parts =
                    parts.map(|(address, length, writable)| (address.value(), length.value(), writable));
                self.chain(queue, &parts[..1 + usize::from(count) % parts.len()]);
            }
            Step::Request(kind, sector, address, length) => {
                let header = 0x1f000;
                self.put(header, &u128::from(kind).to_le_bytes());
                self.put(header + 8, &u64::from(sector).to_le_bytes());
                let reads = kind != 1;
                self.chain(
                    0,
                    &[
                        (header, 16, false),
                        (address.value(), length.value(), reads),
                        (0x1f800, 1, true),
                    ],
                );
                self.set(0x050, 0);
            }
            Step::Descriptor(queue, index, address, length, flags, next) => {
                self.descriptor(queue, index.into(), address.value(), length.value(), flags, next);
            }
            Step::Available(queue, slot, head, index) => {
                let ring = self.start_of(queue).wrapping_add(0x1000);
                self.put(ring.wrapping_add(4 + u64::from(slot) * 2), &head.to_le_bytes());
                self.put(ring.wrapping_add(2), &index.to_le_bytes());
            }
            Step::Memory(at, bytes) => self.put(at.value(), &bytes),
            Step::Notify(queue) => self.set(0x050, queue.into()),
            Step::Process(queue) => self.slot.process(queue.into()),
            Step::Pause => self.slot.pause(),
            Step::Resume => drop(self.slot.resume()),
            Step::SaveAndRestore => self.save_and_restore(),
            Step::HostWrites(bytes) => {
                if let Some(host) = &mut self.host {
                    let _ = host.write(&vec![7; bytes.into()]);
                }
            }
            Step::HostReads(bytes) => {
                if let Some(host) = &mut self.host {
                    let _ = host.read(&mut vec![0; bytes.into()]);
                }
            }
            Step::HostLeaves => self.host = None,
        }
    }

    fn run(mut self, mut input: Unstructured<'_>) {
        // Running from the start, so that few steps are lost on a device that does nothing.
        let features = match self.slot {
            Slot::Console(_) => Features::Multiport,
            _ => Features::Plain,
        };
        self.bring_up(16, 0, features.value());
        for _ in 0..STEPS_MAX {
            if input.is_empty() {
                break;
            }
            let Ok(step) = Step::arbitrary(&mut input) else {
                break;
            };
            self.take(step);
        }
        if let Some((disk, read_only)) = &self.disk {
            assert_eq!(disk.metadata().expect("look at the disk").len(), DISK as u64);
            if *read_only {
                let mut bytes = vec![0; DISK];
                disk.read_exact_at(&mut bytes, 0).expect("read the disk");
                assert!(bytes == content(), "a disk that can only be read was written");
            }
        }
    }
}

/// The control connection's device, and the host program at its other end.
pub fn virtio_console(data: &[u8]) {
    let (backend, host) = connection();
    Rig::new(SlotBackend::Console(backend), Some(host), None).run(Unstructured::new(data));
}

/// A disk: writable, read-only, shown larger than it is, or a clone's storage, as the first byte says.
pub fn virtio_block(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let disk: OwnedFd =
        rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("make a disk");
    let disk = File::from(disk);
    disk.write_all_at(&content(), 0).expect("fill the disk");
    let path = path_of(&disk);
    let (read_only, sectors) = match kind % 4 {
        0 => (false, None),
        1 => (true, None),
        2 => (true, Some(2 * SECTORS)),
        _ => {
            let file = disk.try_clone().expect("have the disk twice");
            let backend = FileBackend::storage(Some(file), 4 * SECTORS).expect("the disk is one");
            Rig::new(SlotBackend::Block(backend, None), None, Some((disk, false)))
                .run(Unstructured::new(data));
            return;
        }
    };
    let backend = FileBackend::open(&path, read_only)
        .and_then(|backend| backend.with_capacity(&path, sectors))
        .expect("the disk is one");
    Rig::new(
        SlotBackend::Block(backend, Some(path)),
        None,
        Some((disk, read_only)),
    )
    .run(Unstructured::new(data));
}

/// The entropy device.
pub fn virtio_entropy(data: &[u8]) {
    Rig::new(SlotBackend::Entropy, None, None).run(Unstructured::new(data));
}

/// The file system device, and a share server that says what the input does.
pub fn virtio_fs(data: &[u8]) {
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().expect("make a pair of sockets");
    theirs.set_nonblocking(true).expect("no waiting");
    let backend = ShareBackend::new(ours.into()).expect("a backend");
    let host = OwnedFd::from(theirs).into();
    Rig::new(SlotBackend::Fs(backend), Some(host), None).run(Unstructured::new(data));
}
