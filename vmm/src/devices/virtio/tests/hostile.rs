//! A driver that does as it likes: whatever it writes to registers and rings, a device returns, does not panic, and
//! touches nothing outside guest memory.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::driver::{BUFFERS, Driver, MEMORY, Memory, line, set, set_up};
use crate::devices::virtio::block::FileBackend;
use crate::devices::virtio::fs::ShareBackend;
use crate::devices::virtio::slot::{Slot, SlotBackend, SlotSources};
use crate::devices::virtio::{console, queue};

const DISK_SECTORS: u64 = 8;

#[derive(Clone, Debug)]
enum Step {
    /// Any register, any width.
    Write(u64, Vec<u8>),
    Read(u64, usize),
    /// Brings the device up with queues of this size where `base` says, and features as given.
    BringUp {
        base: u64,
        size: u16,
        features: u64,
    },
    Descriptor {
        base: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    },
    Available {
        base: u64,
        slot: u16,
        head: u16,
        index: u16,
    },
    /// Any bytes anywhere.
    Memory(u64, Vec<u8>),
    Notify(u32),
    Pause,
    Resume,
    SaveAndRestore,
    /// The host writes or reads so many bytes, or leaves.
    HostWrites(usize),
    HostReads(usize),
    HostLeaves,
    BackendEvent(usize),
}

fn base() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => Just(0u64),
        1 => (0..MEMORY as u64).prop_map(|base| base & !0xf),
        1 => any::<u64>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let address = || {
        prop_oneof![
            6 => 0..MEMORY as u64,
            1 => MEMORY as u64 - 64..MEMORY as u64 + 64,
            1 => any::<u64>(),
        ]
    };
    let length =
        prop_oneof![6 => 0u32..2048, 1 => Just(512), 1 => Just(16), 1 => Just(u32::MAX), 1 => any::<u32>()];
    let index = || prop_oneof![8 => 0u16..16, 1 => any::<u16>()];
    prop_oneof![
        2 => (0u64..0x120, prop::collection::vec(any::<u8>(), 4)).prop_map(|(at, data)| Step::Write(at & !3, data)),
        1 => (0u64..0x1000, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Step::Write(at, data)),
        1 => (0u64..0x1000, 0usize..9).prop_map(|(at, width)| Step::Read(at, width)),
        4 => (base(), prop_oneof![8 => Just(8u16), 1 => any::<u16>()],
              prop_oneof![4 => Just(1u64 << 32 | 2), 4 => Just(1u64 << 32 | 1 << 29 | 2), 4 => Just(1u64 << 32), 1 => any::<u64>()])
            .prop_map(|(base, size, features)| Step::BringUp { base, size, features }),
        12 => (base(), index(), address(), length, 0u16..8, index()).prop_map(
            |(base, index, address, length, flags, next)| Step::Descriptor { base, index, address, length, flags, next }
        ),
        8 => (base(), index(), index(), index())
            .prop_map(|(base, slot, head, index)| Step::Available { base, slot, head, index }),
        4 => (address(), prop::collection::vec(any::<u8>(), 1..64)).prop_map(|(at, bytes)| Step::Memory(at, bytes)),
        // What a request of the block device or a control message may look like.
        4 => (address(), 0u8..12, 0u8..9, 0u8..2).prop_map(|(at, kind, sector, value)| {
            Step::Memory(at, vec![kind, 0, 0, 0, sector % 8, 0, value, 0, sector, 0, 0, 0, 0, 0, 0, 0])
        }),
        12 => (0u32..5).prop_map(Step::Notify),
        2 => Just(Step::Pause),
        3 => Just(Step::Resume),
        2 => Just(Step::SaveAndRestore),
        2 => (1usize..40_000).prop_map(Step::HostWrites),
        2 => (1usize..40_000).prop_map(Step::HostReads),
        1 => Just(Step::HostLeaves),
        3 => (0usize..2).prop_map(Step::BackendEvent),
    ]
}

struct Rig {
    memory: Memory,
    slot: Slot,
    host: Option<UnixStream>,
    disk: Option<tempfile::NamedTempFile>,
}

impl Rig {
    fn console() -> Self {
        let memory = Memory::new();
        let (backend, host) = console::connection().unwrap();
        host.set_nonblocking(true).unwrap();
        let slot = Slot::new(SlotBackend::Console(backend), 0, memory.guest.clone(), line()).unwrap();
        Self {
            memory,
            slot,
            host: Some(host),
            disk: None,
        }
    }

    fn entropy() -> Self {
        let memory = Memory::new();
        let slot = Slot::new(SlotBackend::Entropy, 1, memory.guest.clone(), line()).unwrap();
        Self {
            memory,
            slot,
            host: None,
            disk: None,
        }
    }

    /// Its server takes and says what the host's steps do; a restored one has none.
    fn fs() -> Self {
        let memory = Memory::new();
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let backend = ShareBackend::new(ours.into()).unwrap();
        let slot = Slot::new(SlotBackend::Fs(backend), 2, memory.guest.clone(), line()).unwrap();
        Self {
            memory,
            slot,
            host: Some(std::os::fd::OwnedFd::from(theirs).into()),
            disk: None,
        }
    }

    fn block(read_only: bool) -> Self {
        let memory = Memory::new();
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(DISK_SECTORS * 512).unwrap();
        let backend = FileBackend::open(disk.path(), read_only).unwrap();
        let backend = SlotBackend::Block(backend, Some(disk.path().into()));
        let slot = Slot::new(backend, 2, memory.guest.clone(), line()).unwrap();
        Self {
            memory,
            slot,
            host: None,
            disk: Some(disk),
        }
    }

    /// Much larger than its file, if it has one.
    fn storage(has_file: bool) -> Self {
        let memory = Memory::new();
        let disk = has_file.then(|| tempfile::NamedTempFile::new().unwrap());
        if let Some(disk) = &disk {
            disk.as_file().set_len(DISK_SECTORS * 512).unwrap();
        }
        let file = disk.as_ref().map(|disk| disk.reopen().unwrap());
        let backend = FileBackend::storage(file, 1 << 31).unwrap();
        let slot = Slot::new(SlotBackend::Block(backend, None), 4, memory.guest.clone(), line()).unwrap();
        Self {
            memory,
            slot,
            host: None,
            disk,
        }
    }

    fn queues(&self) -> u16 {
        match self.slot {
            Slot::Console(_) => 4,
            Slot::Fs(_) => 2,
            Slot::Block(..) | Slot::Entropy(_) => 1,
        }
    }

    fn save_and_restore(&mut self) {
        let state = self.slot.state();
        let (backend, host) = console::connection().unwrap();
        host.set_nonblocking(true).unwrap();
        let mut sources = SlotSources {
            console: Some(backend),
            storage: self.disk.as_ref().map(|disk| disk.reopen().unwrap()),
            ..SlotSources::default()
        };
        let backend = state.open_backend(0, &mut sources).unwrap().unwrap();
        self.slot = Slot::from_state(backend, 0, self.memory.guest.clone(), line(), &state)
            .expect("what was saved can be restored");
        assert_eq!(
            format!("{:?}", self.slot.state()).split("control").next(),
            format!("{state:?}").split("control").next(),
        );
        self.host = Some(host);
        let _ = self.slot.resume();
    }

    fn take(&mut self, step: &Step) {
        let slot = &self.slot;
        let write = |at: u64, bytes: &[u8]| {
            // Where it does not fit, the guest could not write it either.
            let _ = vm_memory::Bytes::write_slice(&self.memory.guest, bytes, vm_memory::GuestAddress(at));
        };
        match step {
            Step::Write(at, data) => slot.write(*at, data),
            Step::Read(at, width) => slot.read(*at, &mut vec![0; *width]),
            Step::BringUp { base, size, features } => {
                set(slot, 0x070, 0);
                set(slot, 0x070, 3);
                for word in 0..2 {
                    set(slot, 0x024, word);
                    set(slot, 0x020, (features >> (32 * word)) as u32);
                }
                set(slot, 0x070, 11);
                for index in 0..self.queues() {
                    set_up(slot, index, *size, base.wrapping_add(u64::from(index) * 0x3000));
                }
                set(slot, 0x070, 15);
            }
            Step::Descriptor {
                base,
                index,
                address,
                length,
                flags,
                next,
            } => {
                for queue in 0..u64::from(self.queues()) {
                    let mut bytes = address.to_le_bytes().to_vec();
                    bytes.extend_from_slice(&length.to_le_bytes());
                    bytes.extend_from_slice(&flags.to_le_bytes());
                    bytes.extend_from_slice(&next.to_le_bytes());
                    write(
                        base.wrapping_add(queue * 0x3000)
                            .wrapping_add(u64::from(*index) * 16),
                        &bytes,
                    );
                }
            }
            Step::Available {
                base,
                slot,
                head,
                index,
            } => {
                for queue in 0..u64::from(self.queues()) {
                    let ring = base.wrapping_add(queue * 0x3000 + 0x1000);
                    write(ring.wrapping_add(4 + u64::from(*slot) * 2), &head.to_le_bytes());
                    write(ring.wrapping_add(2), &index.to_le_bytes());
                }
            }
            Step::Memory(at, bytes) => write(*at, bytes),
            Step::Notify(queue) => set(slot, 0x050, *queue),
            Step::Pause => slot.pause(),
            Step::Resume => drop(slot.resume()),
            Step::SaveAndRestore => self.save_and_restore(),
            Step::HostWrites(count) => {
                if let Some(host) = &mut self.host {
                    let _ = host.write(&vec![7; *count]);
                }
            }
            Step::HostReads(count) => {
                if let Some(host) = &mut self.host {
                    let _ = host.read(&mut vec![0; *count]);
                }
            }
            Step::HostLeaves => self.host = None,
            Step::BackendEvent(queue) => slot.process(*queue),
        }
    }

    fn run(mut self, steps: &[Step]) -> Result<(), TestCaseError> {
        // Running from the start, so that few steps are lost on a device that does nothing.
        self.take(&Step::BringUp {
            base: 0,
            size: 8,
            features: 1 << 32 | 2,
        });
        self.take(&Step::BringUp {
            base: 0,
            size: 8,
            features: 1 << 32,
        });
        for step in steps {
            self.take(step);
        }
        prop_assert!(self.memory.is_intact());
        if let Some(disk) = &self.disk {
            prop_assert_eq!(disk.as_file().metadata().unwrap().len(), DISK_SECTORS * 512);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_console_survives(steps in prop::collection::vec(step(), 1..80)) {
        Rig::console().run(&steps)?;
    }

    #[test]
    fn an_entropy_device_survives(steps in prop::collection::vec(step(), 1..80)) {
        Rig::entropy().run(&steps)?;
    }

    #[test]
    fn a_file_system_device_survives(steps in prop::collection::vec(step(), 1..80)) {
        Rig::fs().run(&steps)?;
    }

    #[test]
    fn a_block_device_survives(read_only: bool, steps in prop::collection::vec(step(), 1..80)) {
        Rig::block(read_only).run(&steps)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn storage_survives_and_does_not_grow(
        has_file: bool,
        kind in prop_oneof![Just(0u8), Just(1), Just(4), Just(11)],
        requests in prop::collection::vec((any::<u64>(), 0u64..16, any::<bool>(), 0u32..6000, any::<[u8; 16]>()), 1..12),
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let rig = Rig::storage(has_file);
        let mut driver = Driver::new(&rig.slot, 1 << 9 | 1 << 13, false, 1, 64);
        for (far, near, is_near, length, range) in requests {
            let mut header = vec![kind, 0, 0, 0, 0, 0, 0, 0];
            header.extend_from_slice(&if is_near { near } else { far }.to_le_bytes());
            rig.memory.write(BUFFERS, &header);
            rig.memory.write(BUFFERS + 64, &range);
            let parts = [(BUFFERS, 16, false), (BUFFERS + 64, length, kind == 0), (BUFFERS + 32, 1, true)];
            driver.add(&rig.memory, 0, &parts).unwrap();
            driver.notify(&rig.memory, &rig.slot, 0, 1);
            driver.used(&rig.memory, 0);
        }
        rig.run(&steps)?;
    }
}

/// Work that feeds itself, as a second vCPU could do it too: each request reads the next one, and the index that makes
/// it available, off the disk. The device lets go of its lock all the same, and a pause ends it.
#[test]
fn endless_work_leaves_room_for_a_pause() {
    const REQUESTS: u16 = 1000;
    let memory = Memory::new();
    let mut disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(u64::from(REQUESTS) * 512).unwrap();
    let backend = FileBackend::open(disk.path(), true).unwrap();
    let slot = Slot::new(
        SlotBackend::Block(backend, Some(disk.path().into())),
        2,
        memory.guest.clone(),
        line(),
    )
    .unwrap();
    let mut driver = Driver::new(&slot, 0, false, 1, 16);
    let parts = [
        (BUFFERS, 16, false),
        (0x1000, 496, true),
        (BUFFERS, 16, true),
        (BUFFERS + 16, 1, true),
    ];
    let head = driver.add(&memory, 0, &parts).unwrap();
    for request in 0..REQUESTS {
        // The available ring (flags, index, heads) in 496 bytes, and the header of the next request.
        let mut sector = [0, 0].to_vec();
        sector.extend_from_slice(&(request + 2).min(REQUESTS).to_le_bytes());
        sector.extend(head.to_le_bytes().repeat(16));
        sector.resize(512, 0);
        sector[504..506].copy_from_slice(&(request + 1).to_le_bytes());
        disk.write_all(&sector).unwrap();
    }
    let used = || {
        let index = memory.read(0x2002, 2);
        u16::from_le_bytes([index[0], index[1]])
    };
    let Slot::Block(device, _) = &slot else {
        unreachable!()
    };
    let mut transport = device.lock().unwrap();
    assert_eq!(transport.write(0x050, &[0; 4]), Some(0), "there is more");
    assert_eq!(usize::from(used()), queue::BATCH);
    transport.pause();
    assert!(!transport.process(0));
    assert_eq!(usize::from(used()), queue::BATCH);
    assert_eq!(transport.resume(), [0], "there is more");
    assert_eq!(usize::from(used()), 2 * queue::BATCH);
    drop(transport);
    slot.process(0);
    assert_eq!(used(), REQUESTS);
}

/// The used ring on the available ring, and one ahead: whatever the device gives back makes the next chain available.
/// Saved like that, it is work without end in every clone, before its first instruction.
#[test]
fn rings_that_lie_on_each_other_do_not_hold_up_a_resume() {
    let memory = Memory::new();
    let slot = Slot::new(SlotBackend::Entropy, 1, memory.guest.clone(), line()).unwrap();
    set(&slot, 0x070, 3);
    set(&slot, 0x024, 1);
    set(&slot, 0x020, 1);
    set(&slot, 0x070, 11);
    set_up(&slot, 0, 16, 0);
    for register in [0x0a0, 0x090] {
        set(&slot, register, 0x1000);
    }
    memory.write(0x1002, &[1, 0]);
    slot.pause();
    set(&slot, 0x070, 15);
    let mut state = serde_json::to_value(slot.state()).unwrap();
    state["Entropy"]["transport"]["queues"][0]["next_used"] = 1.into();
    let state = serde_json::from_value(state).unwrap();
    let slot = Slot::from_state(SlotBackend::Entropy, 1, memory.guest.clone(), line(), &state).unwrap();
    let resumed = std::thread::spawn({
        let slot = slot.clone();
        move || slot.resume()
    });
    let begun = std::time::Instant::now();
    while !resumed.is_finished() {
        assert!(begun.elapsed().as_secs() < 20, "it is still at work");
        std::thread::yield_now();
    }
    assert_eq!(resumed.join().unwrap(), [0], "there is more");
    let index = memory.read(0x1002, 2);
    assert_eq!(
        usize::from(u16::from_le_bytes([index[0], index[1]])),
        1 + queue::BATCH
    );
    // What is left is done by a vCPU's thread, which a pause ends.
    let worker = std::thread::spawn({
        let slot = slot.clone();
        move || slot.process(0)
    });
    slot.pause();
    worker.join().unwrap();
}
